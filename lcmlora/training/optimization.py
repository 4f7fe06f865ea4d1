"""An optimization step: mean over processes, clipping, loss scale, optimizer, moving average.

The weights under training are one flat buffer, of which the layers' parameters are views. Their moving average is
another, and so are the gradients during a step. Averaging over processes, the norm, the update and the moving average
are then one kernel each, however many layers there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from lcmlora import extras
from lcmlora.config import Training
from lcmlora.errors import UserError
from lcmlora.parallel.ranks import Ranks
from lcmlora.patches.torch_internals import amp_update_scale_, foreach_copy_

_ALIGN = 64  # elements: each view begins at a multiple, as vectorized kernels need it
# GradScaler's numbers, except for the first scale: with its 65536 the first steps of a short run would overflow.
_FIRST_SCALE, _GROWTH, _BACKOFF, _INTERVAL = 4096.0, 2.0, 0.5, 2000


class OptimizationState(TypedDict):
    """What a checkpoint holds of an Optimization."""

    weights: Tensor  # (N,) fp32
    average: Tensor  # (N,) fp32
    optimizer: dict[str, Any]  # `state_dict` of torch's optimizer
    scale: Tensor | None  # of the loss, ()
    growth: Tensor  # steps since the scale last changed, ()


class Optimization:
    """The weights under training with their optimizer, loss scale and moving average."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        settings: Training,
        *,
        ranks: Ranks | None = None,
        scaled: bool = False,
    ) -> None:
        """Args:
            parameters: fp32, on one device; they become views of one buffer.
            scaled: multiply the loss by a scale, as gradients in fp16 need it.

        Raises:
            UserError: the optimizer's library is not installed, or has no kernel for this device.
        """
        self._settings = settings
        self._ranks = ranks or Ranks()
        self._scaled = scaled
        starts, total = [], 0
        for parameter in parameters.values():
            starts.append(total)
            total += -(-parameter.numel() // _ALIGN) * _ALIGN
        device = next(iter(parameters.values())).device
        self._weights = nn.Parameter(torch.zeros(total, device=device))
        self._parameters, self._starts = list(parameters.values()), starts
        self._gapless = total == sum(p.numel() for p in self._parameters)
        with torch.no_grad():
            for view, parameter in zip(self._views(self._weights.data), self._parameters, strict=True):
                view.copy_(parameter)
                parameter.data = view
        self._average = self._weights.detach().clone()
        self._optimizer = _optimizer(self._weights, settings)
        self._fused = settings.optimizer == "adamw"
        self._scale = torch.tensor(_FIRST_SCALE, device=device) if scaled else None
        self._growth = torch.zeros((), dtype=torch.int32, device=device)

    def _views(self, flat: Tensor) -> list[Tensor]:
        """Returns each parameter's part of a flat buffer, in the parameter's shape."""
        pairs = zip(self._starts, self._parameters, strict=True)
        return [flat[start : start + p.numel()].view_as(p) for start, p in pairs]

    def second(self, settings: Training) -> Optimization:
        """Returns an optimization of other weights for the same network, which begin as these. The network has these
        until the other one takes it."""
        named = {str(number): parameter for number, parameter in enumerate(self._parameters)}
        other = Optimization(named, settings, ranks=self._ranks, scaled=self._scaled)
        self.take_network()
        return other

    def take_network(self) -> None:
        """Makes the network's parameters views of this optimization's weights, where there is a `second` one.

        No backward pass may begin before this call and end after it.
        """
        for view, parameter in zip(self._views(self._weights.data), self._parameters, strict=True):
            parameter.data = view
        self._changed()

    def _changed(self) -> None:
        """Counts a change of all parameters.

        They are views of a buffer, and writing to the buffer alone leaves the version counters that autograd and the
        merged forward compare as they are.
        """
        torch.autograd.graph.increment_version(self._parameters)

    def _gather(self) -> Tensor:
        """Returns the gradients, flat, (N,), and takes them from the parameters.

        The buffer is allocated here and not before, since activations fill the memory until now.
        """
        filled = self._gapless and all(p.grad is not None for p in self._parameters)
        gradient = (torch.empty_like if filled else torch.zeros_like)(self._weights, requires_grad=False)
        found = [
            (v, p.grad) for v, p in zip(self._views(gradient), self._parameters, strict=True) if p.grad is not None
        ]
        foreach_copy_([view for view, _ in found], [grad for _, grad in found])
        for parameter in self._parameters:
            parameter.grad = None
        return gradient

    def rate(self, step: int) -> float:
        """Returns the learning rate: linear warm-up, constant, then linear to zero over the `cooldown` share."""
        s = self._settings
        warm = min(1.0, (step + 1) / s.warmup) if s.warmup else 1.0
        cool = min(1.0, (s.steps - step) / (s.cooldown * s.steps)) if s.cooldown else 1.0
        return s.lr * warm * cool

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this loss to those that the next step applies."""
        (loss if self._scale is None else loss * self._scale).backward()

    def step(self, step: int) -> Tensor:
        """Applies the gradients and returns their norm before clipping, (). A non-finite gradient changes nothing.

        With AdamW the host never waits: the fused kernel divides by the clipping factor and skips on `found_inf` by
        itself. The other optimizers cannot skip, so for them the host looks first.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self.rate(step)
        self._weights.grad = gradient = self._gather()
        self._ranks.all_reduce_sum(gradient)
        norm = torch.linalg.vector_norm(gradient) / self._ranks.size
        divisor = torch.ones_like(norm) * self._ranks.size
        if self._scale is not None:
            norm, divisor = norm / self._scale, divisor * self._scale
        divisor = divisor * (norm / self._settings.max_grad_norm).clamp(min=1.0)
        overflow = (~norm.isfinite()).float()
        if self._fused:
            # torch's contract with fused optimizers (GradScaler uses it); the stubs do not know it.
            kernel: Any = self._optimizer
            kernel.grad_scale, kernel.found_inf = divisor, overflow
            self._optimizer.step()
        elif not overflow:
            gradient.div_(divisor)
            self._optimizer.step()
        if self._scale is not None:
            amp_update_scale_(self._scale, self._growth, overflow, _GROWTH, _BACKOFF, _INTERVAL)
        self._weights.grad = None
        self._changed()
        if self._settings.optimizer != "schedule-free":  # which keeps an average of its own
            # Early weights are forgotten quickly, or a short run would average over its start.
            decay = min(self._settings.ema, (1 + step) / (10 + step))
            self._average.lerp_(self._weights.detach(), 1 - decay)
        return norm

    @contextmanager
    def averaged(self) -> Iterator[Tensor]:
        """Gives the network its averaged weights within the block, and yields them, flat, (N,).

        They are what is validated and released. A backward pass must not begin outside the block and end inside it, nor
        the other way round.
        """
        with torch.no_grad():
            live = self._weights.detach().clone()
            if self._settings.optimizer == "schedule-free":
                optimizer: Any = self._optimizer
                optimizer.eval()  # copies its own average into the weights
                self._average.copy_(self._weights)
                optimizer.train()
            self._weights.copy_(self._average)
        self._changed()
        try:
            yield self._average
        finally:
            with torch.no_grad():
                self._weights.copy_(live)  # `optimizer.train()` alone would restore them with rounding errors
            self._changed()

    @torch.no_grad()
    def load_weights(self, weights: Tensor, dtype: torch.dtype) -> None:
        """Gives the network these flat weights, (N,), rounded to `dtype`, in which the file will have them."""
        self._weights.copy_(weights.to(self._weights.device, dtype))
        self._changed()

    def state(self) -> OptimizationState:
        """Returns the state for a checkpoint; its tensors are the live ones."""
        return {
            "weights": self._weights.detach(),
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
            "scale": self._scale,
            "growth": self._growth,
        }

    @torch.no_grad()
    def restore(self, state: OptimizationState) -> None:
        """Continues from the state of a checkpoint."""
        self._weights.copy_(state["weights"])
        self._changed()
        self._average.copy_(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scale is not None:
            assert state["scale"] is not None  # the checkpoint's settings are the same
            self._scale.copy_(state["scale"])
            self._growth.copy_(state["growth"])


def _optimizer(weights: nn.Parameter, settings: Training) -> torch.optim.Optimizer:
    lr, weight_decay = settings.lr, settings.weight_decay
    if settings.optimizer == "adamw":
        return torch.optim.AdamW([weights], lr=lr, weight_decay=weight_decay, fused=True)
    needed_by = f"distill.optimizer: {settings.optimizer}"
    if settings.optimizer == "adamw8bit":
        if weights.device.type != "cuda":
            raise UserError("distill.optimizer: adamw8bit needs a GPU; use adamw")
        extras.require("bitsandbytes", extra="optimizers", needed_by=needed_by)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit([weights], lr=lr, weight_decay=weight_decay)
    if settings.optimizer == "prodigy":
        extras.require("prodigyopt", extra="optimizers", needed_by=needed_by)
        from prodigyopt import Prodigy

        return Prodigy([weights], lr=lr, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=True)
    extras.require("schedulefree", extra="optimizers", needed_by=needed_by)
    from schedulefree import AdamWScheduleFree

    optimizer = AdamWScheduleFree([weights], lr=lr, weight_decay=weight_decay)
    optimizer.train()
    return optimizer
