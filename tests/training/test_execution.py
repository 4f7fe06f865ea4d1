import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.cpp_builder import cpp_compiler_search
from torch.nn.functional import interpolate

from lcmlora.adapters import lora
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families import Conditioning
from lcmlora.errors import UserError
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.patches.upsampling import twice
from lcmlora.training import execution
from lcmlora.training.execution import AdapterCheck


def _inputs(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    conditioning = {"encoder_hidden_states": torch.randn(rows, 5, 16, generator=generator)}
    return torch.randn(rows, 4, 8, 8, generator=generator), torch.tensor([999, 259]), conditioning


def _inject(base: LoadedBase, strength: float = 0.0, *, merged: bool | None = None) -> None:
    for parameter in lora.inject(base.network, 4, 4, 0).values():
        if strength:
            parameter.data.normal_(std=strength)
    LoraForwards(merged).install(base.network)


def _compile(base: LoadedBase, backend: str | Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "inductor":
        monkeypatch.setattr(execution, "has_cpp_compiler", lambda: True)  # the machine may have none, and needs none
    monkeypatch.setattr(base.network, "compile", partial(base.network.compile, backend=backend))
    execution.compile_network(base.network)


def test_an_adapter_that_is_off_must_leave_the_base_as_it_was(base: LoadedBase):
    check = AdapterCheck(base, *_inputs())
    _inject(base, strength=0.1)
    check.teacher()
    base.network.conv_in.weight.data.add_(1e-4)
    with pytest.raises(UserError, match="with its adapter off the base does not draw as it did"):
        check.teacher()


def test_a_student_that_training_has_not_changed_is_refused(base: LoadedBase):
    check = AdapterCheck(base, *_inputs())
    _inject(base)
    with pytest.raises(UserError, match="the adapter was trained and changes nothing"):
        check.student()
    for _, layer in lora._layers(base.network):
        layer.lora_B[lora.ADAPTER].weight.data.fill_(0.1)
    check.student()


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_unet_is_teacher_and_student_as_the_eager_one_is_when_the_adapter_changes_too(
    base: LoadedBase, backend: str, merged: bool, monkeypatch: pytest.MonkeyPatch
):
    check = AdapterCheck(base, *_inputs())
    _inject(base, strength=0.1, merged=merged)
    _compile(base, backend, monkeypatch)
    check.compiled(3, 5)
    check.student()
    with torch.no_grad():
        for name, parameter in base.network.named_parameters():
            if ".lora_B." in name:
                parameter.mul_(2)
    check.compiled(3, 5)
    torch._dynamo.reset()


def test_a_compiled_unet_that_differs_is_refused_with_the_figure(base: LoadedBase):
    check = AdapterCheck(base, *_inputs())
    _inject(base)
    check._alone = check._alone + 0.01
    with pytest.raises(UserError, match=r"the compiled teacher is \d\.\de-0\d of .* set compile: false"):
        check.compiled(3, 5)


@pytest.mark.slow
def test_a_compiled_unet_whose_gradient_differs_is_refused_with_the_figure(
    base: LoadedBase, monkeypatch: pytest.MonkeyPatch
):
    def halving(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
        return lambda *inputs: tuple(out.detach() + (out - out.detach()) / 2 for out in graph(*inputs))

    check = AdapterCheck(base, *_inputs())
    _inject(base)
    _compile(base, halving, monkeypatch)
    with pytest.raises(UserError, match=r"the compiled student's gradient is 5\.0e-01 of .* set compile: false"):
        check.compiled(3, 5)
    torch._dynamo.reset()


@pytest.mark.parametrize(("shape", "size"), [((2, 3, 4, 5), None), ((1, 1, 3, 2), (5, 4)), ((1, 2, 1, 7), (1, 13))])
def test_pixels_are_doubled_as_by_interpolation(shape: tuple[int, ...], size: tuple[int, int] | None):
    x = torch.arange(math.prod(shape)).float().view(shape)
    height, width = size or (2 * shape[2], 2 * shape[3])
    expected = interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest")
    torch.testing.assert_close(twice(x)[..., :height, :width], expected, atol=0, rtol=0)


@pytest.mark.slow
def test_a_compiled_unet_scatters_nothing_in_its_backward_pass(base: LoadedBase, monkeypatch: pytest.MonkeyPatch):
    """torch 2.13's inductor, in bf16 on a CPU, reads what an interpolation's gradient is scattered into too early."""
    operations: set[str] = set()

    def noting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        operations.update(str(node.target) for node in graph.graph.nodes)
        return graph

    def scatters() -> bool:
        operations.clear()
        torch._dynamo.reset()
        base.predict(*_inputs()).square().mean().backward()
        assert "aten.convolution_backward.default" in operations
        return any("index_put" in operation for operation in operations)

    _inject(base, strength=0.1)
    backend = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=noting)
    base.network.compile(backend=backend)
    assert scatters()
    _compile(base, backend, monkeypatch)
    assert not scatters()
    torch._dynamo.reset()


def test_compiling_without_a_compiler_is_refused(base: LoadedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    cpp_compiler_search.cache_clear()  # where an earlier test has found one
    with pytest.raises(UserError, match=r"compile: true needs a C\+\+ compiler"):
        execution.compile_network(base.network)


def test_where_nothing_is_said_only_a_gpu_recomputes():
    assert execution.pick_checkpointing("auto", torch.device("cpu")) == "none"
    assert execution.pick_checkpointing("auto", torch.device("cuda")) == "selective"
    assert execution.pick_checkpointing("full", torch.device("cpu")) == "full"


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputed_activations_give_the_same_gradients_and_save_memory(base: LoadedBase, how: str):
    _inject(base, strength=0.1)

    def gradients() -> tuple[dict[str, torch.Tensor], int]:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = base.predict(*_inputs())
        output.square().mean().backward()
        found = {n: p.grad.clone() for n, p in base.network.named_parameters() if p.grad is not None}
        base.network.zero_grad()
        return found, sum(kept.values())

    expected, plain = gradients()
    execution.recompute(base.network, how)
    found, saved = gradients()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    if how == "full":  # selective has hooks of its own; tests/patches/test_recompute.py counts what it keeps
        assert saved < 0.5 * plain
