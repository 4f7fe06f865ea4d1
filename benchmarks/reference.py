"""The reference recipe: a step of LCM-LoRA distillation as the common training scripts take it.

Written from the recipe's description, with diffusers, PEFT and torch used as those scripts use them:

* two UNets, teacher and student, both in fp32 under autocast, so that frozen weights are cast again in every pass;
* pictures and captions, of which VAE and text encoders make latents and embeddings in every step;
* the teacher's conditional and unconditional passes one after the other;
* PEFT's own forward; AdamW as torch makes it, over all parameters of the UNet; `.item()` of the loss in every step.

Errors of those scripts that change their speed are corrected: gradients are clipped (there the list of parameters is
empty by then), autocast has the precision of the settings (there fp16), and only one process is measured. The costs of
optional loaders, loggers and launchers are left out, in the recipe's favour.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.bases.families import Conditioning
from lcmlora.bases.schedule import Prediction
from lcmlora.config import Distill
from lcmlora.diffusion import solver
from lcmlora.diffusion.objectives import pseudo_huber
from lcmlora.training.batches import Batch


class Reference:
    """The recipe over a base; `step` takes one optimization step."""

    def __init__(
        self, base: bases.LoadedBase, teacher: bases.LoadedBase, settings: Distill, dtype: torch.dtype
    ) -> None:
        """Args:
        base: becomes the student; its UNet in fp32, VAE and text encoders, if there are any, in `dtype`.
        teacher: the same base again.
        dtype: of autocast; with fp32 there is none.
        """
        self.base, self.teacher, self._settings, self._dtype = base, teacher, settings, dtype
        lora.inject(base.network, settings.rank, settings.alpha, settings.seed)
        self._trained = [p for p in base.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            base.network.parameters(), lr=settings.lr, betas=(0.9, 0.999), weight_decay=settings.weight_decay, eps=1e-8
        )
        warmup = max(1, settings.warmup)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / warmup))
        upper, lower = solver.ddim_grid(len(base.schedule), settings.grid)
        self._t, self._t_prev = upper.to(base.device), lower.to(base.device)
        self._weight = solver.loss_weights(base.schedule, self._t, settings.weighting)

    def encode(self, batch: Batch, pictures: Tensor, captions: list[str]) -> Batch:
        """Returns the batch with latents and embeddings computed from (B, 3, H, W) pictures in [-1, 1] and captions."""
        mean, logvar = self.base.encode_pictures(pictures.to(self.base.device))
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        conditioning = self.base.encode_text(captions)
        kept = {name: value for name, value in batch.conditioning.items() if name not in conditioning}
        return Batch(batch.sample_indices, z, batch.noise, batch.index, batch.w, batch.u, conditioning | kept)

    def step(self, batch: Batch, unconditional: Conditioning) -> Tensor:
        """Trains on the batch and returns the loss of each sample, (B,)."""
        t, t_prev = self._t[batch.index], self._t_prev[batch.index]
        x = self.base.schedule.state(batch.z, batch.noise, t)
        x0, _ = self._predict(self.base, x, t, batch.conditioning)
        online = solver.consistency(x, x0, t)
        with torch.no_grad():
            no_text = batch.conditioning | {k: v.expand_as(batch.conditioning[k]) for k, v in unconditional.items()}
            x0, noise = self._predict(self.teacher, x, t, batch.conditioning)
            x0_without, noise_without = self._predict(self.teacher, x, t, no_text)
            x0, noise = (solver.guide(*pair, batch.w) for pair in ((x0, x0_without), (noise, noise_without)))
            x_prev = self.base.schedule.state(x0, noise, t_prev)
            x0, _ = self._predict(self.base, x_prev, t_prev, batch.conditioning)
            target = solver.consistency(x_prev, x0, t_prev)
        losses = self._weight[batch.index] * pseudo_huber(online, target, self._settings.huber_c)
        loss = losses.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self._settings.max_grad_norm)
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()  # for the progress bar
        return losses.detach()

    def _predict(self, base: bases.LoadedBase, x: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """Returns the base's prediction for x (B, C, h, w) at t (B,)."""
        with torch.autocast(x.device.type, self._dtype, enabled=self._dtype != torch.float32):
            output = base.predict(x, t, conditioning)
        return base.schedule.prediction(output, x, t)
