"""The embedded base: a small Stable Diffusion checkpoint, trained from scratch on emoji.

Three parts are trained in order, each resumable: the tokenizer (byte-pair encoding over the captions), the VAE, then
the UNet together with its text encoder on latents that were encoded once. Further rounds continue VAE, UNet and text
encoder. The result is an ordinary diffusers folder that `StableDiffusionPipeline.from_pretrained` loads, so all other
stages treat it as they treat SD-V1.5.
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lcmlora.bases.schedule import Schedule
from lcmlora.data.sources import emoji
from lcmlora.io.files import atomic_folder, atomic_write, write_json
from lcmlora.patches import bars
from lcmlora.patches.torch_internals import foreach_lerp_
from lcmlora.progress import track
from lcmlora.settings.pretrain import Recipe

TOKENS = 24  # CLIP has 77; emoji captions are short, and cross-attention costs time for every token

# Stable Diffusion 2's own schedule. With noise prediction the loss at the noisiest steps, where a picture's layout and
# colours are decided, hardly depends on the caption: an hour's training then leaves them undecided.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "v_prediction",
}


def pretrain_base(config: Recipe, modules: Path, scratch: Path, out: Path, device: torch.device) -> None:
    """Trains the base and writes it as a diffusers folder to `out`; a killed run continues from `scratch`.

    Args:
        modules: the node_modules folder with the emoji artwork.
        scratch: folder for rendered pictures, latents and checkpoints; may be deleted after success.

    Raises:
        UserError: the artwork is not installed, or a group or style is not known.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    subjects = emoji.subjects(modules, config.vae_groups)
    captions, pictures, styles = _pictures(config, modules, subjects, scratch)
    of_group = np.array([subject.group in config.groups for subject in captions])
    rows = np.flatnonzero(np.isin(styles, config.base_styles) & of_group)
    tokenizer = train_tokenizer(subjects, config.vocabulary)
    variants = _CaptionVariants([captions[r] for r in rows], tokenizer)
    torch.manual_seed(config.seed)
    vae = _new_vae(config).to(device)
    denoiser = _new_denoiser(config, tokenizer).to(device)
    for number in range(len(config.rounds)):
        store = scratch / f"round-{number}"
        vae = _train_vae(config, number, vae, pictures, store)
        latents = _encode(vae, pictures, rows, store)
        denoiser = _train_denoiser(config, number, denoiser, latents, variants, store)
    with atomic_folder(out) as folder:
        _save(folder, vae, denoiser.unet, denoiser.text_encoder, tokenizer)


def _render_style(modules: Path, groups: tuple[str, ...], style: str, size: int, copies: int) -> np.ndarray:
    art = emoji.artwork(modules, style)
    return np.stack(
        [
            np.asarray(emoji.render(art, s.code, size, emoji.Placement.draw(f"{style}/{s.code}/{copy}")))
            for s in emoji.subjects(modules, groups)
            if s.code in art.icons
            for copy in range(copies)
        ]
    )


def _pictures(
    config: Recipe, modules: Path, subjects: tuple[emoji.Subject, ...], scratch: Path
) -> tuple[list[emoji.Subject], np.ndarray, np.ndarray]:
    """Returns the subject, the picture (H, W, 3, uint8) and the style of every rendering of every style."""
    rendered_subjects: list[emoji.Subject] = []
    styles: list[str] = []
    for style in config.vae_styles:
        art = emoji.artwork(modules, style)
        of_style = [s for s in subjects if s.code in art.icons for _ in range(config.copies)]
        rendered_subjects += of_style
        styles += [style] * len(of_style)
    store = scratch / "pictures.npy"
    if not store.exists():
        jobs = [(modules, config.vae_groups, style, config.size, config.copies) for style in config.vae_styles]
        with ProcessPoolExecutor() as pool:
            rendered = list(track(pool.map(_render_style, *zip(*jobs, strict=True)), "render styles", total=len(jobs)))
        atomic_write(store, lambda path: _save_array(path, np.concatenate(rendered)))
    return rendered_subjects, np.load(store, mmap_mode="r"), np.array(styles)


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save would append .npy to a temporary name
        np.save(file, array)


def _to_tensor(pictures: np.ndarray, device: torch.device) -> Tensor:
    """Returns pictures (B, H, W, 3) uint8 as a tensor (B, 3, H, W) fp32 in [-1, 1]."""
    return torch.from_numpy(pictures).to(device).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous()


def train_tokenizer(subjects: tuple[emoji.Subject, ...], size: int) -> CLIPTokenizer:
    """Returns a CLIP tokenizer of at most `size` tokens whose merges were learned from labels and tags."""
    from tokenizers import pre_tokenizers
    from tokenizers.trainers import BpeTrainer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = alphabet + [letter + "</w>" for letter in alphabet]
    special = ["<|startoftext|>", "<|endoftext|>"]
    learner = CLIPTokenizer({t: i for i, t in enumerate(base + special)}, []).backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
        # Tokens of equal count are ordered by id. Without this line a letter at a word's end gets an id by chance, from
        # the order of a hash map.
        special_tokens=special + base,
    )
    texts = [text for s in subjects for text in (s.label, *s.tags)]
    learner.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]][: size - len(base) - len(special)]
    tokens = base + ["".join(m) for m in merges] + special
    return CLIPTokenizer({t: i for i, t in enumerate(tokens)}, merges, model_max_length=TOKENS)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Returns token ids (B, TOKENS), int64, padded and truncated as the Stable Diffusion pipeline does."""
    return tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt").input_ids


M = TypeVar("M", bound=nn.Module)


class _Average(Generic[M]):
    """Exponential moving average of a module's weights, with a smaller decay in the first steps."""

    def __init__(self, module: M, decay: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)


def _rate(step: int, steps: int, warmup: int) -> float:
    """Returns the learning rate's factor: linear warm-up, constant, then linear to zero over the last quarter."""
    return min((step + 1) / warmup, 1.0) * min(1.0, (steps - step) / (0.25 * steps))


def _train(
    name: str,
    module: M,
    loss_of: Callable[[Any, int], Tensor],
    steps: int,
    lr: float,
    ema: float,
    checkpoint_every: int,
    scratch: Path,
) -> M:
    """Minimizes `loss_of(module, step)` and returns the averaged module.

    Args:
        loss_of: must derive all its random numbers from the step, so that a killed run continues as it would have.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    done = scratch / f"{name}.pt"
    module.train().requires_grad_(True)
    average = _Average(module, ema)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    start = 0
    if done.exists():
        state = torch.load(done, weights_only=True, map_location=next(module.parameters()).device)
        module.load_state_dict(state["module"])
        average.module.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    progress = track(range(start, steps), name, total=steps, completed=start)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = lr * _rate(step, steps, warmup=100)
        loss = loss_of(module, step)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(module, step)
        if step % 50 == 0:
            progress.note(loss=loss.item())
        if (step + 1) % checkpoint_every == 0 or step + 1 == steps:
            state = {
                "module": module.state_dict(),
                "average": average.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            atomic_write(done, partial(torch.save, state))
    return average.module.eval()


def _generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def _new_vae(config: Recipe) -> AutoencoderKL:
    widths = config.vae_channels
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=config.size,
        scaling_factor=1.0,
    )


def _train_vae(config: Recipe, number: int, vae: AutoencoderKL, pictures: np.ndarray, scratch: Path) -> AutoencoderKL:
    first = sum(r.vae_steps for r in config.rounds[:number])
    device = vae.device

    def loss_of(module: Any, step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, first + step))
        rows = np.sort(rng.integers(len(pictures), size=config.vae_batch))
        x = _to_tensor(pictures[rows], device)
        posterior = module.encode(x).latent_dist
        y = module.decode(posterior.sample(_generator(config.seed, first + step, device))).sample
        # Without a term for edges the VAE blurs outlines, which are most of what emoji consist of.
        edges = sum(F.l1_loss(y.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
        return F.l1_loss(y, x) + 0.5 * edges + config.vae_kl * posterior.kl().mean()

    steps = config.rounds[number].vae_steps
    vae = _train("vae", vae, loss_of, steps, config.vae_lr, 0.99, config.checkpoint_every, scratch)
    _whiten(vae, pictures, config.seed)
    return vae


@torch.no_grad()
def _whiten(vae: AutoencoderKL, pictures: np.ndarray, seed: int) -> None:
    """Makes every latent channel zero-mean and unit-variance by rewriting the two 1x1 convolutions around it.

    A scaling_factor alone cannot do this. Whoever loads the folder needs to know nothing about it.
    """
    rows = np.sort(np.random.default_rng(seed).choice(len(pictures), size=min(2048, len(pictures)), replace=False))
    batches = np.array_split(rows, 32)
    z = torch.cat([vae.encode(_to_tensor(pictures[r], vae.device)).latent_dist.mean for r in batches])
    mean, std = z.mean(dim=(0, 2, 3)), z.std(dim=(0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std.view(-1, 1, 1, 1)
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += torch.einsum("oc,c->o", post.weight[:, :, 0, 0], mean)
    post.weight *= std.view(1, -1, 1, 1)


@torch.no_grad()
def _encode(vae: AutoencoderKL, pictures: np.ndarray, rows: np.ndarray, scratch: Path) -> Tensor:
    """Returns the posterior means of the pictures in these rows, (N, C, h, w) fp16."""
    store = scratch / "latents.pt"
    if not store.exists():
        batches = np.array_split(rows, max(1, len(rows) // 128))
        z = [
            vae.encode(_to_tensor(pictures[r], vae.device)).latent_dist.mean.half().cpu()
            for r in track(batches, "encode")
        ]
        atomic_write(store, lambda path: torch.save(torch.cat(z), path))
    return torch.load(store, weights_only=True)


class _Denoiser(nn.Module):
    """UNet and text encoder as one module, for one optimizer and one average."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder


def _new_denoiser(config: Recipe, tokenizer: CLIPTokenizer) -> _Denoiser:
    widths = config.unet_channels
    levels = len(widths)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            projection_dim=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=config.text_layers,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=config.size // 2 ** (len(config.vae_channels) - 1),
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        block_out_channels=widths,
        layers_per_block=1,
        # Attention at the finest level would double the cost of a step, and emoji hardly need it.
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (levels - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (levels - 1), "UpBlock2D"),
        cross_attention_dim=config.text_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return _Denoiser(unet.to(memory_format=torch.channels_last), text_encoder)


def _train_denoiser(
    config: Recipe, number: int, model: _Denoiser, latents: Tensor, captions: _CaptionVariants, scratch: Path
) -> _Denoiser:
    first = sum(r.unet_steps for r in config.rounds[:number])
    device = model.unet.device
    scheduler = DDIMScheduler(**SCHEDULE)
    schedule = Schedule.variance_preserving(scheduler.alphas_cumprod, scheduler.config.prediction_type).to(device)

    def loss_of(module: Any, step: int) -> Tensor:
        rng = random.Random(f"{config.seed}/{first + step}")
        rows = rng.choices(range(len(latents)), k=config.batch)
        ids = captions.draw(rows, rng, config.caption_dropout).to(device)
        generator = _generator(config.seed, first + step, device)
        z = latents[rows].to(device).float()
        noise = torch.randn(z.shape, generator=generator, device=device)
        # One timestep in each stratum, so that the loss of a step hardly depends on which timesteps it has.
        strata = torch.arange(config.batch, device=device) + torch.rand(
            config.batch, generator=generator, device=device
        )
        t = (strata * len(schedule) / config.batch).long().clamp_(max=len(schedule) - 1)
        alpha, sigma = schedule.level(t)
        x, v = schedule.state(z, noise, t), schedule.target(z, noise, t)
        prediction = module.unet(x, t, module.text_encoder(ids).last_hidden_state).sample
        snr = (alpha / sigma).square()
        weight = snr.clamp(max=5.0) / (snr + 1)  # min-SNR-5, arXiv 2303.09556, for v prediction
        return (weight * (prediction - v).square().mean(dim=(1, 2, 3))).mean()

    steps = config.rounds[number].unet_steps
    return _train("unet", model, loss_of, steps, config.lr, config.ema, config.checkpoint_every, scratch)


class _CaptionVariants:
    """Captions as token ids: each subject's label alone and with up to three of its tags."""

    _VARIANTS = 8

    def __init__(self, subjects: list[emoji.Subject], tokenizer: CLIPTokenizer) -> None:
        unique = list(dict.fromkeys(subjects))
        texts = [text for s in unique for text in self._texts(s)]
        self._ids = tokenize(tokenizer, texts).view(len(unique), self._VARIANTS, TOKENS)
        self._empty = tokenize(tokenizer, [""])[0]
        place = {s: i for i, s in enumerate(unique)}
        self._subject = [place[s] for s in subjects]

    def _texts(self, subject: emoji.Subject) -> Iterator[str]:
        rng = random.Random(subject.code)
        for variant in range(self._VARIANTS):
            tags = rng.sample(subject.tags, min(variant % 4, len(subject.tags)))
            yield ", ".join([subject.label, *tags])

    def draw(self, rows: list[int], rng: random.Random, dropout: float) -> Tensor:
        """Returns random captions of these rows, (len(rows), TOKENS) int64; a share `dropout` of them is empty."""
        return torch.stack(
            [
                self._empty if rng.random() < dropout else self._ids[self._subject[r], rng.randrange(self._VARIANTS)]
                for r in rows
            ]
        )


def _save(
    folder: Path,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae.half().cpu(),
        unet=unet.half().cpu(),
        text_encoder=text_encoder.half().cpu(),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with bars.hidden():
        pipeline.save_pretrained(folder)
    # transformers loads in the precision of the file, diffusers in fp32. A pipeline has to have one of them.
    text = folder / "text_encoder" / "config.json"
    write_json(text, json.loads(text.read_text()) | {"dtype": "float32"})
    if not (folder / "tokenizer" / "vocab.json").exists():
        # transformers 5 writes tokenizer.json alone. Older programs read the two files of CLIP.
        model = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())["model"]
        (folder / "tokenizer" / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False))
        lines = ["#version: 0.2"] + [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        (folder / "tokenizer" / "merges.txt").write_text("\n".join(lines) + "\n")
