"""A user's project in miniature: his pictures, a base for every architecture, and the settings of a run of seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.data.conftest import add, picture
from tests.support import params
from tests.support.miniature import RESOLUTION

OBJECTIVES = {"sd15": "lcm", "sd2": "tcd", "sdxl": "pcm", "ssd1b": "tdd"}  # each at least once
DISTILL = {"steps": 6, "batch": 4, "rank": 4, "alpha": 8, "lr": 1e-2, "warmup": 0, "checkpoint_every": 3}
DISTILL |= {"log_every": 2, "validate_every": 3, "grid": 50}
EVALUATION = {"pictures": 336, "batch": 56, "teacher_steps": 4, "solvers": ["ddim"], "solver_evaluations": [2, 4]}
EVALUATION |= {"guidance_scales": [1.0, 8.5], "choosing_pictures": 16}
EVALUATION |= {"student_steps": [1, 2, 4], "grid_rows": 2, "resamples": 20, "latency_repeats": 1}
TUNE = {"steps": 4, "batch": 4, "checkpoint_every": 4, "validate_every": 2, "validation_pictures": 4}
STUDY = {"pictures": 16, "real": {}, "solver_steps": [2], "student_steps": [2, 4], "guidance_scales": [2.0]}
STUDY |= {"grid_style": "ink", "grid_style_weights": [0.8], "grid_adapter_weights": [0.5, 1.0]}


def make(root: Path, miniatures: Callable[[str], Path], tracking_uri: str, *architectures: str) -> dict[str, Any]:
    """Writes pictures and params.yaml below `root` and returns the settings; a model is named as its base."""
    for number in range(12):
        add(root / "pictures", f"{number}.png", f"subject {number}", picture(number))
        for copy in range(8):  # several of a caption: a study compares with those kept from training
            add(root / "ink", f"{number}-{copy}.png", f"subject {number}", picture(100 + 8 * number + copy))
    raw = params.raw()
    ink = {"data": {"path": str(root / "ink"), "validation": 0, "test": 0.25}}
    raw |= {"models": list(architectures), "styles": {"ink": ink}, "finetunes": {"clay": ink}}
    raw["study"] |= STUDY | {"models": [], "styles": ["ink"], "finetunes": ["clay"]}
    raw["style"] |= TUNE
    raw["finetune"] |= TUNE
    raw["bases"] = {
        name: {
            "source": str(miniatures(name)),
            "resolution": RESOLUTION,
            "license": "apache-2.0",
            "distill": {"objective": OBJECTIVES[name]},
        }
        for name in architectures
    }
    raw["data"] |= {"source": "folder", "path": str(root / "pictures"), "min_side": 16}
    raw["distill"] |= DISTILL
    raw["evaluation"] |= EVALUATION
    raw["registry"]["tracking_uri"] = tracking_uri
    (root / "params.yaml").write_text(yaml.safe_dump(raw))
    return raw
