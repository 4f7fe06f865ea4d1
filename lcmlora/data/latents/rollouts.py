"""Teacher rollouts: latents of prompts without pictures, which the teacher draws by guided DDIM.

The latent cache has them in place of latents of pictures, as `latent_mean` with a variance of almost zero. With
`states` it also has the latents of all steps, from which a distillation can start (the idea of arXiv 2511.20410).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Rollouts
from lcmlora.data.sources.source import Record
from lcmlora.diffusion import sampling
from lcmlora.diffusion.noise import generator
from lcmlora.diffusion.teacher import Teacher
from lcmlora.errors import UserError

SHARD_ROWS = 512  # at most; a run that is killed loses no more rollouts than that
MIN_LOGVAR = -30.0  # the lowest log-variance of diffusers' DiagonalGaussianDistribution


class RolloutEncoder:
    """A function from the records (N,) of a batch to the rows of a shard (cache.py), drawn by the teacher.

    If the settings ask for them, the rows have `states` (N, steps + 1, C, h, w) fp16: the latents at t = 0, then at
    every solver timestep, ascending.
    """

    def __init__(self, base: LoadedBase, settings: Rollouts) -> None:
        """Args:
        base: with its network and text encoders.
        """
        self._base, self._settings = base, settings
        self._teacher = Teacher(base, base.unconditional(), settings.steps)

    def __call__(self, records: list[Record]) -> dict[str, Tensor]:
        """Raises UserError if a latent is not finite."""
        base, teacher, count = self._base, self._teacher, len(records)
        conditioning = sampling.text_conditioning(base, [record.caption for record in records])
        # Each prompt has noise of its own, so that a list that grows changes no latent.
        noise = [torch.randn(base.latent_shape, generator=generator("rollout", record.sha256)) for record in records]
        x = torch.stack(noise).to(base.device)
        w = torch.full((count,), self._settings.w, device=base.device)
        states = [x]
        for row in reversed(range(self._settings.steps)):
            t, t_prev = (v[row].expand(count) for v in (teacher.t, teacher.t_prev))
            x = teacher.step(x, t, t_prev, w, conditioning)
            states.insert(0, x if self._settings.states else x[:0])
        finite = x.half().isfinite().flatten(1).all(1)
        if not finite.all():
            raise UserError(
                f"{records[int(finite.int().argmin())].key}: the teacher's latent is not finite (NaN or infinite); "
                f"lower encode.rollouts.w, or is {base.folder} whole? ({base.dtype})"
            )
        rows = {
            "latent_mean": x.half().cpu(),
            "latent_logvar": torch.full(x.shape, MIN_LOGVAR, dtype=torch.float16),
            "orig_size": torch.full((count, 2), base.resolution, dtype=torch.int32),
            "crop_tl": torch.zeros(count, 2, dtype=torch.int32),
        }
        return rows | ({"states": torch.stack(states, dim=1).half().cpu()} if self._settings.states else {})
