"""From gradients to the next adapter: optimizer, clipping, loss scale, moving average.

The adapter's weights and its average are one flat buffer each, of which the layers' tensors are views, and so is its
gradient when a step is taken. Averaging over processes, the norm, the update and the moving average are then one kernel
each, however many layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lcmlora.config import Training
from lcmlora.errors import UserError
from lcmlora.parallel.ranks import Ranks
from lcmlora.patches.torch_internals import amp_update_scale_, foreach_copy_

_ALIGN = 64  # elements: every view starts where vectorized kernels like it
# GradScaler's numbers, but for the first scale: its 65536 spends the first steps of a short run on overflows.
_FIRST_SCALE, _GROWTH, _BACKOFF, _INTERVAL = 4096.0, 2.0, 0.5, 2000


class Optimization:
    """The adapter under training, and everything that a checkpoint must hold of it."""

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
            scaled: multiply the loss, for gradients in fp16.

        Raises:
            UserError: the optimizer's library is not installed, or has no kernel for this device.
        """
        self._settings = settings
        self._ranks = ranks or Ranks()
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
        """Returns what each parameter's numbers are of a flat buffer."""
        pairs = zip(self._starts, self._parameters, strict=True)
        return [flat[start : start + p.numel()].view_as(p) for start, p in pairs]

    def _changed(self) -> None:
        """Tells autograd, and who goes by its count, what was done to the parameters by way of the buffer."""
        torch.autograd.graph.increment_version(self._parameters)

    def _gather(self) -> Tensor:
        """Returns the gradients, flat; the parameters then have none.

        There is no buffer for them before: while activations fill the memory, there is none to spare.
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
        """Linear warm-up, constant, then linear to zero over the last `cooldown` of the steps."""
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
        self._ranks.add_up(gradient)
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
        """Within the block the student has its averaged weights, which are yielded, flat: what is validated and
        released. No backward pass may cross the block's border."""
        with torch.no_grad():
            live = self._weights.detach().clone()
            if self._settings.optimizer == "schedule-free":
                optimizer: Any = self._optimizer
                optimizer.eval()  # puts its own average into the weights
                self._average.copy_(self._weights)
                optimizer.train()
            self._weights.copy_(self._average)
        self._changed()
        try:
            yield self._average
        finally:
            with torch.no_grad():
                self._weights.copy_(live)  # schedule-free's own way back would round
            self._changed()

    @torch.no_grad()
    def use(self, weights: Tensor, dtype: torch.dtype) -> None:
        """Puts flat weights, rounded as the file will round them, into the live student."""
        self._weights.copy_(weights.to(self._weights.device, dtype))
        self._changed()

    def state(self) -> dict[str, Any]:
        return {
            "weights": self._weights.detach(),
            "average": self._average,
            "optimizer": self._optimizer.state_dict(),
            "scale": self._scale,
            "growth": self._growth,
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        self._weights.copy_(state["weights"])
        self._changed()
        self._average.copy_(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        if self._scale is not None:
            self._scale.copy_(state["scale"])
            self._growth.copy_(state["growth"])


def _optimizer(weights: nn.Parameter, settings: Training) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW([weights], fused=True, **options)
    try:
        if settings.optimizer == "adamw8bit":
            if weights.device.type != "cuda":
                raise UserError("distill.optimizer: adamw8bit needs a GPU; use adamw")
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit([weights], **options)
        if settings.optimizer == "prodigy":
            from prodigyopt import Prodigy

            return Prodigy([weights], **options, use_bias_correction=True, safeguard_warmup=True)
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree([weights], **options)
        optimizer.train()
        return optimizer
    except ImportError as error:
        raise UserError(
            f"distill.optimizer: {settings.optimizer} needs {error.name}: pip install 'lcmlora[optimizers]'"
        ) from error
