from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lcmlora import bases, patches
from lcmlora.bases.base import LoadedBase
from lcmlora.config import Base
from lcmlora.distillation.loss import add_adapter
from lcmlora.patches import Patch
from lcmlora.patches.attention import DirectAttention, WideAttention
from lcmlora.patches.compilation import Compilation
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.patches.recompute import FullRecompute, SelectiveRecompute
from lcmlora.patches.upsampling import ExpandingUpsampling
from lcmlora.training import execution
from tests.support.adapters import train
from tests.support.distillation import CPU, SETTINGS
from tests.support.miniature import RESOLUTION

PATCHES: list[Patch] = [
    DirectAttention(),
    WideAttention(),
    LoraForwards(merged=False),
    LoraForwards(merged=True),
    SelectiveRecompute(),
    FullRecompute(),
    ExpandingUpsampling(),
    Compilation(),
]


def _own_attributes(network: nn.Module) -> list[dict[str, Any]]:
    """Returns the attributes of each module's instance."""
    return [dict(vars(module)) for module in network.modules()]


def _same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """Returns whether the modules have the same attributes, and these are the very same objects."""
    return all(
        now.keys() == then.keys() and all(now[name] is then[name] for name in then)
        for now, then in zip(found, expected, strict=True)
    )


def _pass(base: LoadedBase) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the output of a forward and the gradients of its backward pass."""
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    output = base.predict(x, torch.tensor([999, 259]), {"encoder_hidden_states": text})
    output.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in base.network.named_parameters() if p.grad is not None}
    base.network.zero_grad()
    return output.detach(), gradients


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.name)
def test_undo_puts_back_the_very_objects_and_the_pass_to_the_bit(base: LoadedBase, patch: Patch):
    train(base)
    for loaded in patches.installed(base.network):
        loaded.patch.undo(base.network)
    assert patches.installed(base.network) == []
    before, (output, gradients) = _own_attributes(base.network), _pass(base)

    patch.install(base.network)
    (found,) = patches.installed(base.network)
    assert found.patch is patch and found.modules
    assert not _same(_own_attributes(base.network), before)
    if not isinstance(patch, Compilation):  # tests/training/test_execution.py runs it
        _pass(base)
    patch.undo(base.network)

    assert patches.installed(base.network) == []
    assert _same(_own_attributes(base.network), before)
    again, gradients_again = _pass(base)
    assert torch.equal(again, output)
    assert gradients_again.keys() == gradients.keys()
    assert all(torch.equal(gradients_again[name], gradients[name]) for name in gradients)


def _count(network: nn.Module, kind: type[Any]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


def test_a_loaded_base_with_an_adapter_lists_exactly_what_it_has(base: LoadedBase):
    (direct,) = patches.installed(base.network)
    assert str(direct) == f"direct attention: {_count(base.network, Attention)} x diffusers Attention.forward"
    add_adapter(base, SETTINGS.model_copy(update={"checkpointing": "selective"}))
    direct, lora, recompute = patches.installed(base.network)
    assert isinstance(direct.patch, DirectAttention)
    assert isinstance(lora.patch, LoraForwards) and isinstance(recompute.patch, SelectiveRecompute)
    layers = {name for name, module in base.network.named_modules() if isinstance(module, LoraLayer)}
    assert set(lora.modules) == layers
    assert sum(lora.variants.values()) == len(layers)
    assert recompute.modules[0] == ""  # the network itself
    execution.recompute(base.network, "full")
    names = [each.patch.name for each in patches.installed(base.network)]
    assert names == ["direct attention", "LoRA forwards", "full recompute"]
    execution.recompute(base.network, "none")
    assert len(patches.installed(base.network)) == 2


def test_a_compiled_network_lists_its_compilation(base: LoadedBase, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(execution, "has_cpp_compiler", lambda: True)  # nothing is compiled before the first call
    execution.compile_network(base.network)
    names = [each.patch.name for each in patches.installed(base.network)]
    assert names == ["direct attention", "expanding upsampling", "compilation"]


def test_half_precision_on_a_cpu_lists_its_wide_attention(base_folder: Path):
    settings = Base(source=str(base_folder), resolution=RESOLUTION, license="mit")
    base = bases.load("mini", settings, base_folder, device=CPU, dtype=torch.bfloat16, parts=("network",))
    _, wide = patches.installed(base.network)
    assert isinstance(wide.patch, WideAttention)
    assert len(wide.modules) == 2 * _count(base.network, BasicTransformerBlock)


def test_installing_again_replaces_the_first_installation(base: LoadedBase):
    train(base)
    LoraForwards(merged=True).install(base.network)
    LoraForwards(merged=False).install(base.network)
    _, lora = patches.installed(base.network)
    assert list(lora.variants) == ["beside the base's weight"]
    LoraForwards().undo(base.network)
    assert not any("forward" in vars(module) for module in base.network.modules() if isinstance(module, LoraLayer))


def test_a_patch_under_another_replacement_is_not_undone_and_not_listed(base: LoadedBase):
    attention = next(module for module in base.network.modules() if isinstance(module, Attention))
    ours = attention.forward
    vars(attention)["forward"] = partial(ours)
    (direct,) = patches.installed(base.network)
    assert len(direct.modules) == _count(base.network, Attention) - 1
    with pytest.raises(RuntimeError, match=r"patch 'direct attention': Attention\.forward was replaced again"):
        DirectAttention().undo(base.network)
    vars(attention)["forward"] = ours
    DirectAttention().undo(base.network)
    assert patches.installed(base.network) == []


def test_every_patch_says_what_it_replaces_and_why():
    for kind in {type(patch) for patch in PATCHES}:
        assert kind.name and kind.replaces and len(kind.reason) > 40
    assert {type(patch) for patch in PATCHES} == set(Patch.__subclasses__())


def test_the_docs_list_every_patch():
    page = (Path(__file__).parents[2] / "docs/performance.md").read_text()
    assert [kind.name for kind in Patch.__subclasses__() if f"| {kind.name} |" not in page] == []
