"""The teacher of a distillation: the base with its adapter off, taking guided DDIM steps on a grid of timesteps."""

from __future__ import annotations

import torch
from torch import Tensor

from lcmlora.adapters import lora
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families.family import Conditioning
from lcmlora.diffusion import solver
from lcmlora.diffusion.teacher_cache import TeacherCache


class Teacher:
    """The base alone, whatever adapter it carries.

    t, t_prev: the grid's timesteps, ascending, and what each steps to, both (N,) int64 on the base's device.
    """

    def __init__(
        self, base: LoadedBase, unconditional: Conditioning, grid: int, cache: TeacherCache | None = None
    ) -> None:
        """Args:
        unconditional: one row, without what belongs to the picture (micro-conditioning).
        grid: points of the grid, N of arXiv 2310.04378, Algorithm 1.
        cache: what was said of samples before.
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
        places: range | None = None,
    ) -> Tensor:
        """Returns zhat_{t_n} (B, C, h, w): the DDIM step from t to t_prev with guidance w (B,).

        Args:
            places: in the stream, where x is the noisy state that belongs to them.
        """
        schedule = self._base.schedule
        guided = solver.guide(*self._outputs(x, t, conditioning, places), w)
        return schedule.state(*schedule.prediction(guided, x, t), t_prev)

    def _outputs(self, x: Tensor, t: Tensor, conditioning: Conditioning, places: range | None) -> tuple[Tensor, Tensor]:
        """Returns the conditional and the unconditional output, both (B, C, h, w) fp32."""
        if self._cache and places and (known := self._cache.read(places)):
            conditional, unconditional = (output.to(x.device).float() for output in known)
            return conditional, unconditional
        both = {
            # The unconditional pass keeps the picture's own micro-conditioning.
            k: torch.cat([v, self._unconditional[k].expand_as(v) if k in self._unconditional else v])
            for k, v in conditioning.items()
        }
        with lora.disabled(self._base.network):
            output = self._base.predict(torch.cat([x, x]), torch.cat([t, t]), both)
        conditional, unconditional = output.chunk(2)
        if self._cache and places:
            self._cache.write(places, conditional, unconditional)
        return conditional, unconditional
