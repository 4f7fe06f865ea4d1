"""Whose settings a base gets: its own, its family's, the package's; and that today's numbers are what they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from lcmlora import config
from lcmlora.errors import UserError
from lcmlora.settings import presets

ROOT = Path(__file__).parents[2]
SHARED: dict[str, dict[str, Any]] = {
    "encode": {
        "rollouts": {"steps": 50, "w": 7.5, "states": False},
        "shard_mb": 256,
        "shards": None,
        "aspect_buckets": False,
        "bucket_pictures": 64,
        "text_cache_mb": 2000,
        "device": "auto",
    },
    "distill": {
        "seed": 0,
        "steps": 1000,
        "accumulate": 1,
        "lr": 1e-4,
        "warmup": 20,
        "cooldown": 0.5,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optimizer": "adamw",
        "ema": 0.99,
        "empty_prompts": 0.0,
        "precision": "auto",
        "checkpointing": "auto",
        "compile": False,
        "device": "auto",
        "checkpoint_every": 200,
        "log_every": 10,
        "validate_every": 100,
        "validation_pictures": 16,
        "window": 1 << 18,
        "objective": "lcm",
        "phases": 4,
        "gamma": 0.3,
        "target": "stop-gradient",
        "rank": 64,
        "alpha": 64.0,
        "w_min": 7.5,
        "w_max": 7.5,
        "grid": 50,
        "huber_c": 0.001,
        "weighting": "uniform",
        "trajectory": 0.0,
        "rollout": 0.0,
    },
    "evaluation": {
        "seed": 1000,
        "pictures": 512,
        "features": "efficientnet-lite0",
        "features_source": None,
        "check_features": "scattering",
        "check_features_source": None,
        "scores": [],
        "scores_source": {},
        "guidance_scale": 8.5,
        "teacher_steps": 50,
        "solvers": ["ddim", "dpm++", "unipc", "euler"],
        "solver_evaluations": [1, 2, 4, 8, 16, 32],
        "guidance_scales": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        "choosing_pictures": 128,
        "student_steps": [1, 2, 4, 8, 16],
        "prompts": None,
        "worst_captions": 10,
        "grid_rows": 8,
        "resamples": 1000,
        "latency_repeats": 20,
        "device": "auto",
    },
}
EMOJI = {
    "encode": {"batch": 64, "rollouts": {"steps": 20, "w": 2.0, "states": False}},
    "distill": {
        "objective": "tcd",
        "steps": 700,
        "batch": 16,
        "lr": 1e-3,
        "ema": 0.98,
        "w_min": 2.0,
        "w_max": 2.0,
        "grid": 20,
        "weighting": "snr+1",
        "checkpoint_every": 50,
    },
    "evaluation": {
        "batch": 32,
        "guidance_scale": 3.0,
        "solver_evaluations": [1, 2, 4, 8, 16],
        "latency_repeats": 10,
    },
}
TODAY = {
    "emoji": (64, EMOJI),
    "sd15": (512, {"encode": {"batch": 16}, "distill": {"batch": 16}, "evaluation": {"batch": 16, "features": "clip"}}),
    "sd21": (768, {"encode": {"batch": 8}, "distill": {"batch": 16}, "evaluation": {"batch": 8, "features": "clip"}}),
    "sdxl": (
        1024,
        {
            "encode": {"batch": 4},
            "distill": {"batch": 8},
            "evaluation": {
                "batch": 4,
                "features": "clip",
                "solver_evaluations": [1, 2, 4, 8, 16],
                "choosing_pictures": 64,
            },
        },
    ),
}
TODAY["ssd1b"] = TODAY["sdxl"]
LICENSED = {"license": "mit"}


def load(tmp_path: Path, **changes: Any) -> config.Config:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump({"models": [], "data": {"source": "folder", "path": "in"}} | changes))
    return config.load(path)


@pytest.mark.parametrize("model", TODAY)
def test_every_shipped_base_has_the_settings_that_its_figures_were_made_with(model: str):
    loaded = config.load(ROOT / "params.yaml")
    resolution, own = TODAY[model]
    assert loaded.base(model).resolution == resolution
    for section, changes in own.items():
        assert getattr(loaded, f"{section}_for")(model).model_dump(mode="json") == SHARED[section] | changes


def test_the_emoji_bases_data_styles_and_study_are_what_they_were():
    loaded = config.load(ROOT / "params.yaml")
    data = {"min_side": 64, "max_aspect": 2.0, "validation": 0.09, "test": 0.16, "seed": 0, "copies": 4}
    assert loaded.data.model_dump(include=set(data)) == data
    for kind, name, numbers in (
        ("style", "noto-v1", {"lr": 1e-3, "rank": 16, "weight_decay": 0.0, "precision": "auto"}),
        ("finetune", "noto-v1-full", {"lr": 1e-4, "rank": None, "weight_decay": 0.01, "precision": "fp32"}),
    ):
        pictures, training = loaded.variation("emoji", kind, name)
        assert (pictures.styles, pictures.copies) == (("noto-v1",), 8)
        shared = {"seed": 0, "steps": 400, "batch": 16, "warmup": 20, "cooldown": 0.5, "max_grad_norm": 1.0}
        shared |= {"ema": 0.99, "empty_prompts": 0.1, "checkpoint_every": 50, "log_every": 10, "validate_every": 50}
        expected = shared | {"validation_pictures": 32} | numbers
        assert training.model_dump(include=set(expected)) == expected
    assert loaded.study is not None
    study = {"pictures": 1024, "weights": (0.8, 1.0), "solver_steps": (1, 2, 4, 8, 16), "student_steps": (1, 2, 4, 8)}
    study |= {"steps": 4, "guidance_scales": (1.5, 2.0, 3.0), "grid_style_weights": (0.0, 0.4, 0.8, 1.2)}
    study |= {"grid_adapter_weights": (0.0, 0.5, 1.0, 1.5), "real": {"copies": 32}}
    assert loaded.study.model_dump(include=set(study)) == study
    asked = {"steps": 4, "min_retrieval": 0.8, "min_diversity": 0.85, "max_excess": None, "champion": True}
    assert loaded.gate.deciding() == asked | {"beyond_chance": True, "limits": {}, "compatible": []}


def test_a_published_base_needs_no_entry_and_an_entry_under_its_name_changes_it(tmp_path: Path):
    plain = load(tmp_path, models=["sdxl"])
    assert plain.base("sdxl").revision == "462165984030d82259a11f4367a4eed129e94a7b"
    changed = load(tmp_path, models=["sdxl"], bases={"sdxl": {"encode": {"batch": 2}}}, distill={"steps": 9})
    assert changed.base("sdxl") == plain.base("sdxl").model_copy(update={"encode": {"batch": 2}})
    assert (changed.encode_for("sdxl").batch, changed.distill_for("sdxl").steps) == (2, 9)


def test_a_hub_id_of_a_published_base_is_known_under_any_name(tmp_path: Path):
    mine = load(tmp_path, bases={"mine": {"source": "segmind/SSD-1B"}}).base("mine")
    assert mine == load(tmp_path).base("ssd1b")
    other = {"source": "segmind/SSD-1B", "revision": "0" * 40} | LICENSED
    found = load(tmp_path, bases={"mine": other}).base("mine")
    assert (found.like, found.resolution, found.variant) == ("sdxl", 1024, None)


def test_a_base_that_says_like_gets_that_familys_settings(tmp_path: Path):
    mine = {"source": "me/my-xl", "revision": "0" * 40, "like": "sdxl"} | LICENSED
    loaded = load(tmp_path, models=["mine"], bases={"mine": mine | {"distill": {"batch": 4}}})
    assert loaded.base("mine").resolution == 1024
    assert loaded.distill_for("mine") == loaded.distill_for("sdxl").model_copy(update={"batch": 4})
    assert loaded.evaluation_for("mine") == loaded.evaluation_for("sdxl")
    style = load(tmp_path, models=["mine"], bases={"mine": mine}, styles={"ink": {"training": {"rank": 4}}})
    assert style.variation("mine", "style", "ink")[1].model_dump(include={"lr", "batch", "rank"}) == {
        "lr": 1e-4,
        "batch": 8,
        "rank": 4,
    }
    assert load(tmp_path, bases={"mine": mine | {"like": "ssd1b"}}).base("mine").like == "sdxl"


def folder(root: Path, unet: dict[str, Any], levels: int = 4) -> Path:
    """Writes the configurations of a base, as diffusers does."""
    for part, content in (("unet", unet), ("vae", {"block_out_channels": [128] * levels})):
        (root / part).mkdir(parents=True)
        (root / part / "config.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("unet", "like", "resolution"),
    [
        ({"cross_attention_dim": 768, "sample_size": 64}, "sd15", 512),
        ({"cross_attention_dim": 1024, "sample_size": 64}, "sd21", 512),  # stable-diffusion-2-1-base
        ({"cross_attention_dim": 2048, "addition_embed_type": "text_time", "sample_size": 128}, "sdxl", 1024),
        ({"cross_attention_dim": 1024}, "sd21", 768),
    ],
)
def test_a_folder_is_recognised_by_its_unet_and_says_its_resolution(
    tmp_path: Path, unet: dict[str, Any], like: str, resolution: int
):
    source = folder(tmp_path / "base", unet)
    loaded = load(tmp_path, models=["mine"], bases={"mine": {"source": str(source)} | LICENSED})
    assert (loaded.base("mine").like, loaded.base("mine").resolution) == (like, resolution)
    assert loaded.distill_for("mine") == loaded.distill_for(like)


def test_the_emoji_bases_folder_says_64_pixels_and_is_of_no_family():
    completed = presets.complete("emoji", {"source": str(ROOT / "bases/emoji")})
    assert (completed.values["resolution"], completed.values.get("like")) == (64, None)


def single_file(path: Path, width: int, *, sdxl: bool) -> Path:
    """Writes a checkpoint in the original layout with a layer of its UNet, and one of SDXL's second text encoder."""
    block = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0"
    tensors = {f"{block}.attn2.to_k.weight": np.zeros((4, width), np.float16)}
    if sdxl:
        tensors["conditioner.embedders.1.model.ln_final.weight"] = np.zeros(8, np.float16)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(("width", "sdxl", "like"), [(768, False, "sd15"), (1024, False, "sd21"), (2048, True, "sdxl")])
def test_a_single_file_is_recognised_by_its_header(tmp_path: Path, width: int, sdxl: bool, like: str):
    source = single_file(tmp_path / "my.safetensors", width, sdxl=sdxl)
    loaded = load(tmp_path, models=["mine"], bases={"mine": {"source": str(source)} | LICENSED})
    assert loaded.base("mine").like == like
    assert loaded.base("mine").resolution == loaded.base(like).resolution


def test_a_single_file_goes_with_the_family_of_its_config(tmp_path: Path):
    entry = {"source": str(tmp_path / "absent.safetensors"), "config": "segmind/SSD-1B"} | LICENSED
    assert load(tmp_path, bases={"mine": entry}).base("mine").like == "sdxl"


def write_like(source: str) -> str:
    return rf"{source}.*; write `like: sd15` or `like: sd21` or `like: sdxl`, whose settings it then gets"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"source": "me/unknown"}, write_like("me/unknown is none of the published bases")),
        ({"source": "narrow"}, write_like("narrow/unet/config.json has the width of no known family")),
        ({"source": "narrow", "resolution": 64}, write_like("narrow") + r"; or write bases\.mine\.distill\.batch"),
        ({"source": "broken"}, write_like("broken/unet/config.json: not JSON")),
        ({"source": "absent.safetensors"}, write_like("absent.safetensors: cannot be read: No such file")),
        ({"source": "damaged.safetensors"}, write_like("damaged.safetensors: cannot be read")),
        ({"source": "me/unknown", "like": "sd3"}, "like: got 'sd3': expected one of sd15, sd21, sdxl"),
        ({"source": "wide", "like": "sd15"}, "like: sd15, and wide/unet/config.json is of sdxl; write `like: sdxl`"),
    ],
)
def test_a_base_of_no_known_family_is_an_error_that_says_what_to_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], message: str
):
    monkeypatch.chdir(tmp_path)
    folder(Path("narrow"), {"cross_attention_dim": 128})
    folder(Path("wide"), {"cross_attention_dim": 2048, "addition_embed_type": "text_time"})
    folder(Path("broken"), {})
    Path("broken/unet/config.json").write_text("{")
    Path("damaged.safetensors").write_bytes(b"\x10\0")
    with pytest.raises(UserError, match=f"params.yaml: bases.mine: .*{message}") as caught:
        load(tmp_path, models=["mine"], bases={"mine": entry | LICENSED})
    assert "\n" not in str(caught.value)


def test_a_base_of_no_family_that_says_all_itself_needs_none(tmp_path: Path):
    own = {"encode": {"batch": 2}, "distill": {"batch": 2}, "evaluation": {"batch": 2}}
    entry = {"source": "me/unknown", "resolution": 96} | LICENSED | own
    assert load(tmp_path, models=["mine"], bases={"mine": entry}).distill_for("mine").batch == 2


def test_a_base_that_is_in_no_model_may_be_incomplete_and_not_wrong(tmp_path: Path):
    entry = {"source": "me/unknown", "resolution": 96} | LICENSED
    loaded = load(tmp_path, models=["sd15"], bases={"mine": entry})
    with pytest.raises(UserError, match=r"bases\.mine: its family is not known"):
        loaded.distill_for("mine")
    with pytest.raises(
        UserError, match=r"params\.yaml: bases\.mine\.distill\.stepz: there is no such key; did you mean steps\?$"
    ):
        load(tmp_path, models=["sd15"], bases={"mine": entry | {"distill": {"stepz": 1}}})


def test_a_fault_is_told_once_and_where_it_stands(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        load(tmp_path, models=["sd15", "sdxl"], distill={"lr": 0}, bases={"sdxl": {"distill": {"batch": "x"}}})
    lines = str(caught.value).splitlines()
    assert [line.split(" got ")[0] for line in lines] == [
        f"{tmp_path}/params.yaml: distill.lr:",
        f"{tmp_path}/params.yaml: bases.sdxl.distill.batch:",
    ]
