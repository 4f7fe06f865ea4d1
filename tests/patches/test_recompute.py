import torch

from benchmarks.memory import allocations
from lcmlora.adapters import lora
from lcmlora.bases.base import LoadedBase
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.patches.recompute import SelectiveRecompute


def _gradients(base: LoadedBase) -> tuple[dict[str, torch.Tensor], int]:
    """Returns the gradients, and the bytes that the forward pass leaves in memory."""
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (5, 16)))
    t, losses = torch.tensor([999, 259]), []
    blocks = allocations(lambda: losses.append(base.predict(x, t, {"encoder_hidden_states": text}).square().mean()))
    losses[0].backward()
    found = {n: p.grad.clone() for n, p in base.network.named_parameters() if p.grad is not None}
    base.network.zero_grad()
    return found, sum(dict(blocks).values())


def test_the_backward_pass_recomputes_what_is_not_kept_to_the_bit(base: LoadedBase):
    for parameter in lora.inject(base.network, 4, 4, 0).values():
        parameter.data.normal_(std=0.1)
    LoraForwards().install(base.network)
    expected, plain = _gradients(base)
    SelectiveRecompute().install(base.network)
    for _ in range(2):
        found, kept = _gradients(base)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name
        assert 0 < kept < 0.7 * plain
    SelectiveRecompute().undo(base.network)
    assert _gradients(base)[1] == plain
