from typing import Any

import pytest
import torch
from torch import nn

from lcmlora.adapters import lora
from lcmlora.errors import UserError
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.training.optimization import Optimization
from tests.support.distillation import SETTINGS


def _optimization(scaled: bool = False, **changes: Any) -> tuple[torch.nn.Parameter, Optimization]:
    parameter = torch.nn.Parameter(torch.ones(3))
    settings = SETTINGS.model_copy(update={"warmup": 0, "cooldown": 0} | changes)
    return parameter, Optimization({"p": parameter}, settings, scaled=scaled)


@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_clips_as_torch_does(scaled: bool):
    """In the common training scripts clipping does nothing, since their iterator over the parameters is used up."""
    parameter, optimization = _optimization(scaled)
    reference = torch.nn.Parameter(torch.ones(3))
    adamw = torch.optim.AdamW([reference], lr=SETTINGS.lr, weight_decay=0.0)
    for step, scale in enumerate((100.0, 0.1)):  # AdamW forgets one scale; two steps show the ratio
        optimization.backward((parameter * scale).sum())
        reference.grad = torch.full((3,), scale)
        assert optimization.step(step).item() == pytest.approx(scale * 3**0.5)
        torch.nn.utils.clip_grad_norm_([reference], SETTINGS.max_grad_norm)
        adamw.step()
    torch.testing.assert_close(parameter, reference, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "schedule-free"])
def test_a_gradient_that_is_not_finite_changes_nothing(optimizer: str):
    parameter, optimization = _optimization(optimizer=optimizer)
    optimization.backward((parameter * torch.tensor([1.0, float("nan"), 1.0])).sum())
    assert not optimization.step(0).isfinite()
    assert parameter.tolist() == [1.0, 1.0, 1.0]


def test_gradients_add_up_until_a_step_and_are_gone_after_it():
    parameter, optimization = _optimization(max_grad_norm=1e9)
    for _ in range(2):
        optimization.backward(parameter.sum())
    assert optimization.step(0).item() == pytest.approx(2 * 3**0.5)
    optimization.backward(parameter.sum())
    assert optimization.step(1).item() == pytest.approx(3**0.5)


def test_an_overflow_halves_the_scale_of_the_loss_and_is_skipped():
    parameter, optimization = _optimization(scaled=True)
    scale = optimization.state()["scale"].item()
    optimization.backward(parameter.sum() * float("inf"))
    optimization.step(0)
    assert optimization.state()["scale"].item() == scale / 2
    assert parameter.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("optimizer", ["adamw", "prodigy", "schedule-free"])
def test_every_optimizer_descends_and_goes_on_from_its_state_to_the_bit(optimizer: str):
    def quadratic(optimization: Optimization, parameter: torch.nn.Parameter, steps: range) -> None:
        for step in steps:
            optimization.backward((parameter - 3).square().sum())
            optimization.step(step)

    rate, steps = (1.0, 400) if optimizer == "prodigy" else (0.1, 40)  # which has to find its own rate first
    whole, first = _optimization(optimizer=optimizer, lr=rate)
    quadratic(first, whole, range(steps))
    assert (whole - 3).abs().max() < 1.0

    half, second = _optimization(optimizer=optimizer, lr=rate)
    quadratic(second, half, range(steps // 2))
    state = {name: value.clone() if torch.is_tensor(value) else value for name, value in second.state().items()}
    again, third = _optimization(optimizer=optimizer, lr=rate)
    third.restore(state)
    quadratic(third, again, range(steps // 2, steps))
    assert torch.equal(again, whole)
    with first.averaged() as uninterrupted, third.averaged() as resumed:
        assert torch.equal(uninterrupted, resumed)


@pytest.mark.parametrize("optimizer", ["adamw", "schedule-free"])
def test_within_averaged_the_student_has_the_average_and_afterwards_its_own_weights(optimizer: str):
    parameter, optimization = _optimization(optimizer=optimizer)
    for step in range(3):
        optimization.backward((parameter - 3).square().sum())
        optimization.step(step)
    live = parameter.detach().clone()
    with optimization.averaged() as average:
        assert torch.equal(parameter, average[:3])
        assert not torch.equal(parameter, live)
    assert torch.equal(parameter, live)


@pytest.mark.parametrize(("merged", "dtype"), [(True, torch.float32), (False, torch.bfloat16), (False, torch.float32)])
def test_a_layer_follows_every_change_of_its_adapter(merged: bool, dtype: torch.dtype):
    unet = nn.Module()
    unet.conv1 = nn.Linear(3, 2, dtype=dtype)
    parameters = lora.inject(unet, 4, 8, seed=0)
    LoraForwards(merged).install(unet)
    optimization = Optimization(parameters, SETTINGS.model_copy(update={"lr": 0.1, "warmup": 0}))
    x = torch.ones(1, 3, dtype=dtype)

    def follows() -> torch.Tensor:
        down, up = parameters["conv1.lora_A.lcm.weight"], parameters["conv1.lora_B.lcm.weight"]
        with torch.no_grad():
            output = unet.conv1(x)
        expected = unet.conv1.base_layer(x) + (x.float() @ down.t() @ up.t() * 2).to(dtype)
        torch.testing.assert_close(output, expected, atol=0.02, rtol=0.02)
        return output

    outputs = [follows()]
    before = {name: value.clone() for name, value in optimization.state().items() if name in ("weights", "average")}
    for step in range(3):
        optimization.backward(unet.conv1(x).square().sum())
        optimization.step(step)
        outputs.append(follows())
    with optimization.averaged() as average:
        outputs.append(follows())
    torch.testing.assert_close(follows(), outputs[-2])
    optimization.load_weights(2 * average, torch.float32)
    outputs.append(follows())
    optimization.restore(optimization.state() | before)
    torch.testing.assert_close(follows(), outputs[0])
    assert len({tuple(output.flatten().tolist()) for output in outputs}) == len(outputs)


def test_an_optimizer_that_needs_another_device_is_refused_by_name():
    with pytest.raises(UserError, match=r"distill\.optimizer: adamw8bit needs a GPU"):
        _optimization(optimizer="adamw8bit")


def test_the_rate_warms_up_holds_and_cools_down():
    _, optimization = _optimization(warmup=2, cooldown=0.5, steps=8, lr=1.0)
    assert [optimization.rate(s) for s in range(8)] == [0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25]
