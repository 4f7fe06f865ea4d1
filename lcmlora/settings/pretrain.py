"""How the embedded emoji base was made: the settings of the frozen stage `pretrain`.

They stand in no params.yaml, since the base's weights are in Git and every figure of the documentation rests on them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lcmlora.settings.fields import Positive, Seed, Share, Strict


class Round(Strict):
    """How long one round of `pretrain` trains its two parts."""

    vae_steps: Positive
    unet_steps: Positive


class Recipe(Strict):
    """How a base of emoji is trained from nothing."""

    seed: Seed = 0
    groups: tuple[str, ...] = ("animals-nature",)
    """What the UNet sees, of `vae_groups`."""
    base_styles: tuple[str, ...] = ("noto", "twemoji", "fluent-emoji-flat")
    """What the UNet sees, of `vae_styles`. The other two are left for style LoRAs and fine-tunes."""
    vae_groups: tuple[str, ...] = ("smileys-emotion", "animals-nature", "food-drink", "activities")
    vae_styles: tuple[str, ...] = ("noto", "twemoji", "fluent-emoji-flat", "noto-v1", "fluent-emoji")
    size: Positive = 64
    """Pixels."""
    copies: Positive = 20
    """Random placements of each emoji."""
    vocabulary: Positive = 2000
    """Tokens."""
    latent_channels: Positive = 4
    vae_channels: tuple[int, ...] = (16, 32, 64)
    vae_batch: Positive = 32
    vae_lr: float = 2e-3
    vae_kl: float = 1e-7
    text_width: Positive = 128
    text_layers: Positive = 2
    unet_channels: tuple[int, ...] = (48, 96, 128)
    batch: Positive = 32
    lr: float = 8e-4
    ema: Share = 0.998
    caption_dropout: Share = 0.1
    rounds: Annotated[tuple[Round, ...], Field(min_length=1)] = (
        Round(vae_steps=1600, unet_steps=7600),
        Round(vae_steps=1500, unet_steps=6000),
    )
    """Each goes on from the averaged weights of the last one, with a fresh optimizer and the rate's whole course."""
    checkpoint_every: Positive = 200
