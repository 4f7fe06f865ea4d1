from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lcmlora.adapters import lora
from lcmlora.bases.base import LoadedBase
from lcmlora.patches.lora_forwards import LoraForwards, merging_pays
from tests.support.adapters import forward, train


@pytest.mark.parametrize("merged", [True, False])
def test_direct_forwards_give_pefts_output_and_gradients(base: LoadedBase, merged: bool):
    train(base)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 259])
    conditioning = {"encoder_hidden_states": torch.randn(2, 5, 16)}
    results = []
    for direct in (False, True):
        if direct:
            LoraForwards(merged).install(base.network)
        output = base.predict(x, t, conditioning)
        output.square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in base.network.named_parameters() if p.grad is not None}
        base.network.zero_grad()
        with lora.disabled(base.network), torch.no_grad():
            results.append((output.detach(), base.predict(x, t, conditioning), gradients))
    (plain, alone, expected), (ours, ours_alone, gradients) = results
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours_alone, alone)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 8e-3)])
def test_in_half_precision_outputs_and_gradients_differ_by_rounding(
    base: LoadedBase, dtype: torch.dtype, tolerance: float, merged: bool
):
    train(base)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([999, 259])
    conditioning = {"encoder_hidden_states": torch.randn(2, 5, 16)}
    results = []
    for half in (False, True):
        if half:
            base.network.to(dtype)
            for name, parameter in base.network.named_parameters():
                parameter.data = parameter.data.float() if ".lcm." in name else parameter.data
        LoraForwards(merged).install(base.network)
        output = base.predict(x, t, conditioning)
        output.square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in base.network.parameters() if p.grad is not None])
        base.network.zero_grad()
        results.append((output.detach(), gradients))
    (plain, expected), (ours, gradients) = results
    assert gradients.dtype == torch.float32
    assert ((ours - plain).norm() / plain.norm()).item() < tolerance
    assert ((gradients - expected).norm() / expected.norm()).item() < tolerance


def test_the_sum_is_made_once_for_the_passes_that_share_it_and_again_when_the_adapter_changes(base: LoadedBase):
    train(base)
    LoraForwards(merged=True).install(base.network)

    def operations() -> int:
        with FlopCounterMode(display=False) as counter:
            forward(base)
        return counter.get_total_flops()

    first, second = operations(), operations()
    sums = sum(2 * 4 * layer.base_layer.weight.numel() for _, layer in lora._layers(base.network))
    assert first - second == sums
    with torch.no_grad():
        next(layer for _, layer in lora._layers(base.network)).lora_B[lora.ADAPTER].weight.mul_(2)
    assert second < operations() < first


@pytest.mark.parametrize("merged", [True, False])
def test_gradients_add_up_over_backward_passes(base: LoadedBase, merged: bool):
    train(base)
    LoraForwards(merged).install(base.network)
    found = []
    for _ in range(2):
        conditioning = {"encoder_hidden_states": torch.ones(2, 5, 16)}
        base.predict(torch.ones(2, 4, 8, 8), torch.tensor([999, 259]), conditioning).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in base.network.parameters() if p.grad is not None]))
    torch.testing.assert_close(found[1], 2 * found[0])


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("kind", [nn.Linear, partial(nn.Conv2d, kernel_size=3, padding=1)])
def test_an_adapter_is_summed_with_its_layer_where_that_is_less_to_compute(kind: Callable[..., nn.Module], rank: int):
    unet = nn.Module()
    unet.conv1 = kind(32, 16)
    lora.inject(unet, rank, rank, seed=0)
    ((_, layer),) = lora._layers(unet)
    chosen = merging_pays(layer)
    x = torch.randn(1, 32, 64, 64) if isinstance(layer.base_layer, nn.Conv2d) else torch.randn(1, 4096, 32)
    operations = {}
    for merged in (True, False):
        LoraForwards(merged).install(unet)
        with FlopCounterMode(display=False) as counter:
            layer(x.requires_grad_()).sum().backward()
        operations[merged] = counter.get_total_flops()
    assert chosen == (operations[True] < operations[False])
