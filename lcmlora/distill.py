"""Latent consistency distillation of a LoRA: the training loop, readable from top to bottom.

One frozen base serves as teacher (adapter off), student (adapter on, with gradients) and target (adapter on, without).
A step costs four UNet forwards and one backward: the student, the teacher's conditional and unconditional passes in
one batch, and the target. It reads the latent cache only: no VAE and no text encoder is in memory.
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lcmlora import diffusion, lora, objectives
from lcmlora.bases import Conditioning, LoadedBase, unet_forward
from lcmlora.checkpoint import Checkpoints
from lcmlora.config import Distill
from lcmlora.data.cache import LatentCache
from lcmlora.errors import UserError
from lcmlora.files import atomic_folder, write_json
from lcmlora.progress import track


class Logger(Protocol):
    """Where figures go while the loop runs."""

    def log(self, metrics: dict[str, float], step: int) -> None: ...


class NullLogger:
    """Keeps nothing; the loop never asks whether anybody listens."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        del metrics, step


@dataclass
class Batch:
    """One step's samples and all its randomness, on the device."""

    z: Tensor  # (B, C, h, w) clean latents, drawn anew from the VAE's posterior
    noise: Tensor  # (B, C, h, w)
    index: Tensor  # (B,) int64, rows of the solver's grid
    w: Tensor  # (B,) guidance in the papers' convention
    conditioning: Conditioning


class Batches:
    """Step -> batch as a pure function of the seed, so that a resumed run sees what an undisturbed one would."""

    def __init__(self, cache: LatentCache, settings: Distill, device: torch.device) -> None:
        self._cache = cache
        self._settings = settings
        self._device = device
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def _rows(self, step: int) -> Tensor:
        """Rows of the cache, (B,): every picture once in an epoch, in an order of its own."""
        count, batch = len(self._cache), self._settings.batch
        rows = []
        for position in range(step * batch, (step + 1) * batch):
            epoch, offset = divmod(position, count)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
                self._epoch, self._order = epoch, torch.randperm(count, generator=generator)
            rows.append(self._order[offset])
        return torch.stack(rows)

    def draw(self, step: int) -> Batch:
        # Drawn on the CPU: a GPU then trains on the very same numbers.
        s = self._settings
        generator = torch.Generator().manual_seed((s.seed + 1) * 1_000_003 + step)
        rows = self._rows(step)
        mean, logvar = self._cache.latents(rows)
        z = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        # One grid point per stratum: each is uniform by itself, and a step's loss hardly depends on the draw.
        strata = torch.arange(s.batch) + torch.rand(s.batch, generator=generator)
        index = (strata * s.grid / s.batch).long().clamp_(max=s.grid - 1)
        index = index[torch.randperm(s.batch, generator=generator)]
        w = s.w_min + (s.w_max - s.w_min) * torch.rand(s.batch, generator=generator)
        conditioning = {k: v.to(self._device) for k, v in self._cache.conditioning(rows).items()}
        return Batch(
            z.to(self._device), noise.to(self._device), index.to(self._device), w.to(self._device), conditioning
        )


class Teacher:
    """The base with its adapter off, taking one guided DDIM step on a grid whose every step has its loss weight."""

    def __init__(self, base: LoadedBase, unconditional: Conditioning, settings: Distill) -> None:
        self._base = base
        self._unconditional = {k: v.to(base.device) for k, v in unconditional.items()}
        upper, lower = diffusion.ddim_grid(len(base.alphas_cumprod), settings.grid)
        self.t, self.t_prev = upper.to(base.device), lower.to(base.device)
        self.weight = diffusion.loss_weights(base.alphas_cumprod, self.t, settings.weighting)

    @torch.no_grad()
    def step(self, x: Tensor, t: Tensor, t_prev: Tensor, w: Tensor, conditioning: Conditioning) -> Tensor:
        """Returns zhat_{t_n} (B, C, h, w): the DDIM step from t to t_prev with guidance w (B,)."""
        base = self._base
        both = {
            # The unconditional pass keeps the picture's own micro-conditioning.
            k: torch.cat([v, v if k == "time_ids" else self._unconditional[k].expand_as(v)])
            for k, v in conditioning.items()
        }
        with lora.disabled(base.unet):
            output = unet_forward(base.unet, torch.cat([x, x]), torch.cat([t, t]), both)
        conditional, unconditional = output.chunk(2)
        guided = diffusion.guide(conditional, unconditional, w)
        alpha, sigma = diffusion.alpha_sigma(base.alphas_cumprod, t)
        x0 = diffusion.predicted_x0(guided, x, alpha, sigma, base.prediction_type)
        noise = diffusion.predicted_noise(guided, x, alpha, sigma, base.prediction_type)
        return diffusion.ddim_step(x0, noise, *diffusion.alpha_sigma(base.alphas_cumprod, t_prev))


def loss_of(base: LoadedBase, teacher: Teacher, objective: objectives.Objective, batch: Batch) -> Tensor:
    """Returns the weighted mean loss of a batch, a scalar with gradients to the adapter alone."""
    t, t_prev = teacher.t[batch.index], teacher.t_prev[batch.index]
    x = diffusion.add_noise(batch.z, batch.noise, *diffusion.alpha_sigma(base.alphas_cumprod, t))
    x_prev = teacher.step(x, t, t_prev, batch.w, batch.conditioning)

    def student(latents: Tensor, timesteps: Tensor) -> Tensor:
        output = unet_forward(base.unet, latents, timesteps, batch.conditioning)
        alpha, sigma = diffusion.alpha_sigma(base.alphas_cumprod, timesteps)
        return diffusion.predicted_x0(output, latents, alpha, sigma, base.prediction_type)

    return (teacher.weight[batch.index] * objective(student, x, t, x_prev, t_prev)).mean()


class Optimization:
    """AdamW over the adapter, clipping, the moving average, and everything a checkpoint must hold of them."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Distill) -> None:
        self._settings = settings
        self._list: list[Tensor] = list(parameters.values())
        self._average = [p.detach().clone() for p in self._list]
        self._adamw = torch.optim.AdamW(self._list, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)

    def rate(self, step: int) -> float:
        """Linear warm-up, constant, then linear to zero over the last `cooldown` of the steps."""
        s = self._settings
        warm = min(1.0, (step + 1) / s.warmup) if s.warmup else 1.0
        cool = min(1.0, (s.steps - step) / (s.cooldown * s.steps)) if s.cooldown else 1.0
        return s.lr * warm * cool

    def step(self, step: int) -> Tensor:
        """Applies the gradients and returns their norm before clipping. A non-finite gradient changes nothing.

        The host never waits: the fused kernel divides by the clipping factor and skips on `found_inf` by itself.
        """
        for group in self._adamw.param_groups:
            group["lr"] = self.rate(step)
        gradients = [p.grad for p in self._list if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        # torch's contract with fused optimizers (GradScaler uses it); the stubs do not know it.
        kernel: Any = self._adamw
        kernel.grad_scale = (norm / self._settings.max_grad_norm).clamp(min=1.0)
        kernel.found_inf = (~norm.isfinite()).float()
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        # Early weights are forgotten quickly, or a short run would average over its start.
        decay = min(self._settings.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, [p.detach() for p in self._list], 1 - decay)
        return norm

    def state(self) -> dict[str, Any]:
        return {
            "parameters": [p.detach() for p in self._list],
            "average": self._average,
            "adamw": self._adamw.state_dict(),
        }

    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self._list, state["parameters"])
        torch._foreach_copy_(self._average, state["average"])
        self._adamw.load_state_dict(state["adamw"])

    @torch.no_grad()
    def use_average(self, dtype: torch.dtype) -> None:
        """Puts the average, rounded as the file will round it, into the live student."""
        for parameter, average in zip(self._list, self._average, strict=True):
            parameter.copy_(average.to(dtype))


def distill(
    base: LoadedBase,
    cache: LatentCache,
    settings: Distill,
    scratch: Path,
    out: Path,
    *,
    identity: dict[str, Any],
    run: dict[str, Any],
    logger: Logger,
) -> dict[str, Any]:
    """Trains the adapter and writes the folder `out`; returns its config.json.

    Args:
        base: with its UNet loaded, bare; it carries the adapter, active, when this returns.
        scratch: a locked folder of this configuration alone; a checkpoint in it is continued.
        identity: what config.json says of the base.
        run: where the figures are logged, written to run.json.

    Raises:
        UserError: the cache was made for other latents, holds less than a batch, or the loss is not finite.
    """
    if cache.latent_shape != base.latent_shape:
        raise UserError(
            f"the latent cache holds {cache.latent_shape}, {base.name} needs {base.latent_shape}: encode again"
        )
    if len(cache) < settings.batch:
        raise UserError(f"distill.batch: {settings.batch} is more than the {len(cache)} pictures of the cache")
    parameters = lora.inject(base.unet, settings.rank, settings.alpha, settings.seed)
    if base.dtype == torch.float32:
        lora.merge_forwards(base.unet)
    optimization = Optimization(parameters, settings)
    checkpoints = Checkpoints(scratch)
    start = 0
    state = checkpoints.load()
    if state:
        optimization.restore(state["optimization"])
        start = state["step"]
    batches = Batches(cache, settings, base.device)
    teacher = Teacher(base, cache.unconditional(), settings)
    objective = objectives.make(settings)

    losses: list[Tensor] = []
    last_loss = state["loss"] if state else float("nan")
    progress = track(
        range(start, settings.steps), "distill", total=settings.steps, completed=start, unit=settings.batch
    )
    began = time.monotonic()
    for step in progress:
        loss = loss_of(base, teacher, objective, batches.draw(step))
        loss.backward()
        norm = optimization.step(step)
        losses.append(loss.detach())
        done = step + 1
        if done % settings.log_every == 0 or done == settings.steps:
            last_loss = torch.stack(losses).mean().item()
            if not last_loss == last_loss:
                raise UserError(f"step {done}: the loss is not finite; lower distill.lr or raise distill.precision")
            rate = len(losses) * settings.batch / (time.monotonic() - began)
            figures = {"loss": last_loss, "gradient_norm": norm.item(), "learning_rate": optimization.rate(step)}
            logger.log(figures | {"images_per_second": rate}, done)
            progress.note(loss=last_loss)
            losses, began = [], time.monotonic()
        if done % settings.checkpoint_every == 0 or done == settings.steps:
            checkpoints.save({"optimization": optimization.state(), "step": done, "loss": last_loss})

    # Weights of a half-precision base are released in fp16, as the published adapters are.
    dtype = torch.float32 if base.dtype == torch.float32 else torch.float16
    optimization.use_average(dtype)
    facts = {
        "model": base.name,
        "base": identity,
        "prediction_type": base.prediction_type,
        "data_digest": cache.digest,
        "pictures": len(cache),
        "distill": settings.model_dump(mode="json"),
        "steps": settings.steps,
        "final_loss": last_loss,
        "seed": settings.seed,
        "adapted_layers": lora.adapted_layers(base.unet),
        "lora_parameters": sum(p.numel() for p in parameters.values()),
        "versions": versions(),
    }
    with atomic_folder(out) as folder:
        tensors = lora.state_dict(base.unet)
        lora.save_file(tensors, folder / lora.WEIGHTS, dtype=dtype, metadata=lora.adapter_metadata(settings.rank))
        write_json(folder / "scheduler_config.json", scheduler_config(base, settings.grid))
        write_json(folder / "config.json", facts)
        write_json(folder / "run.json", run)
        _save_probe(base, cache, settings, folder / "probe.safetensors")
    return facts


def versions() -> dict[str, str]:
    """Returns the versions that decide what a run computes."""
    return {"python": platform.python_version()} | {name: version(name) for name in ("torch", "diffusers", "peft")}


def scheduler_config(base: LoadedBase, grid: int) -> dict[str, Any]:
    """Returns the LCMScheduler configuration that belongs to an adapter of this base."""
    from diffusers import LCMScheduler

    return dict(LCMScheduler.from_config(base.scheduler_config, original_inference_steps=grid).config)


@torch.no_grad()
def _save_probe(base: LoadedBase, cache: LatentCache, settings: Distill, path: Path) -> None:
    """Writes one forward of the live student and of the base alone, for whoever reloads the file to compare with."""
    batch = Batches(cache, settings, base.device).draw(0)
    latents = batch.noise[:2]
    timesteps = torch.tensor([len(base.alphas_cumprod) - 1, len(base.alphas_cumprod) // 2], device=base.device)
    conditioning = {k: v[:2].contiguous() for k, v in batch.conditioning.items()}
    student = unet_forward(base.unet, latents, timesteps, conditioning)
    with lora.disabled(base.unet):
        alone = unet_forward(base.unet, latents, timesteps, conditioning)
    tensors = {"latents": latents, "timesteps": timesteps, "student": student, "base": alone} | conditioning
    from safetensors.torch import save_file

    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, path)
