"""The teacher of a distillation: the base without its adapter, in guided DDIM steps between the solver timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from lcmlora.adapters import lora
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families.family import Conditioning
from lcmlora.diffusion import solver
from lcmlora.diffusion.teacher_cache import TeacherCache


class Teacher:
    """The base without its adapter.

    t, t_prev: the solver timesteps, ascending, and the ends of the steps from them; both (N,) int64, on the base's
        device.
    """

    def __init__(
        self, base: LoadedBase, unconditional: Conditioning, grid: int, cache: TeacherCache | None = None
    ) -> None:
        """Args:
        unconditional: one row, without micro-conditioning, which is the picture's own.
        grid: the number of solver timesteps, N of arXiv 2310.04378, Algorithm 1.
        cache: of outputs, from earlier runs on the same samples.
        """
        self._base, self._cache = base, cache
        self._unconditional = {k: v.to(base.device) for k, v in unconditional.items()}
        upper, lower = solver.ddim_grid(len(base.schedule), grid)
        self.t, self.t_prev = upper.to(base.device), lower.to(base.device)

    @torch.no_grad()
    def step(
        self,
        x: Tensor,
        t: Tensor,
        t_prev: Tensor,
        w: Tensor,
        conditioning: Conditioning,
        samples: range | None = None,
    ) -> Tensor:
        """Returns zhat_{t_n} (B, C, h, w): the DDIM step from t to t_prev with guidance w (B,).

        Args:
            samples: their indices, if x (B, C, h, w) is their noisy state at t; the cache is used only with them.
        """
        schedule = self._base.schedule
        guided = solver.guide(*self.outputs(x, t, conditioning, samples), w)
        return schedule.state(*schedule.prediction(guided, x, t), t_prev)

    def outputs(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, samples: range | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the conditional and the unconditional output, both (B, C, h, w) fp32; see `step`."""
        if self._cache and samples and (cached := self._cache.read(samples)):
            conditional, unconditional = (output.to(x.device).float() for output in cached)
            return conditional, unconditional
        both = {
            # The unconditional pass keeps the picture's own micro-conditioning.
            k: torch.cat([v, self._unconditional[k].expand_as(v) if k in self._unconditional else v])
            for k, v in conditioning.items()
        }
        with lora.disabled(self._base.network):
            output = self._base.predict(torch.cat([x, x]), torch.cat([t, t]), both)
        conditional, unconditional = output.chunk(2)
        if self._cache and samples:
            self._cache.write(samples, conditional, unconditional)
        return conditional, unconditional
