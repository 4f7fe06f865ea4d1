import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcmlora import bases, config
from lcmlora.bases import description
from lcmlora.errors import UserError
from lcmlora.project import Project
from tests.support import params
from tests.support.miniature import HUB_IDS, PUBLISHED, RESOLUTION

ROOT = Path(__file__).parents[2]


def _params(tmp_path: Path, entries: dict[str, Any] | None = None) -> Path:
    """The shipped params.yaml, with other bases where they are given."""
    raw = params.raw()
    if entries is not None:
        raw |= {"models": list(entries)[:1], "bases": entries}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return tmp_path / "params.yaml"


def test_the_shipped_presets_have_the_papers_adapters_before_anything_is_downloaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    described = description.describe_all(config.load(_params(tmp_path)), Project(ROOT))
    counted = {base.name: (base.unet_parameters, base.lora_parameters, base.adapted_layers) for base in described}
    assert (
        counted
        | {
            "sd15": (859_520_964, 67_252_224, 278),
            "sd21": (865_910_724, 67_776_512, 278),
            "sdxl": (2_567_463_684, 196_751_360, 788),
            "ssd1b": (1_331_334_404, 104_902_656, 423),
        }
        == counted
    )
    description.print_table(described)
    shown = capsys.readouterr().out
    for name, adapter in {
        "sd15": "67,252,224 (278)",
        "ssd1b": "104,902,656 (423)",
        "sdxl": "196,751,360 (788)",
    }.items():
        (line,) = [line for line in shown.splitlines() if line.split()[:1] == [name]]
        assert adapter in line and HUB_IDS[name] in line


@pytest.mark.slow
def test_a_base_that_cannot_be_described_says_why_and_stops_no_other(
    miniatures: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plain = {"resolution": RESOLUTION, "license": "mit"}
    entries = {
        "unknown": plain | {"source": "some/model", "revision": "0" * 40},
        "mine": plain | {"source": str(miniatures("sd2")), "distill": {"rank": 4, "alpha": 4}},
        "broken": plain | {"source": "./broken"},
    }
    _params(tmp_path, entries)
    (tmp_path / "broken" / "unet").mkdir(parents=True)
    (tmp_path / "broken" / "unet" / "config.json").write_text("{")
    command = [sys.executable, "-m", "lcmlora", "bases", "--json"]
    ended = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=True
    )
    rows = json.loads(ended.stdout)
    unknown, mine, broken = rows[:3]  # the published bases follow
    assert unknown["reason"].endswith("run `lcmlora fetch unknown`") and "some/model" in unknown["reason"]
    assert broken["reason"].startswith("broken/unet/config.json: not JSON")
    assert (mine["rank"], mine["adapted_layers"], mine["prediction_type"]) == (4, 278, "v_prediction")
    assert mine["unet_parameters"] == 546_588
    description.print_table(
        [description.Undescribed(**row) if "reason" in row else description.Description(**row) for row in rows]
    )
    shown = capsys.readouterr().out
    for part in ("546,588", "(278)", "v_prediction", "run `lcmlora fetch unknown`", "not JSON"):
        assert part in shown


def test_a_unets_configuration_is_the_fetched_bases_before_its_sources(
    miniatures: Callable[[str], Path], tmp_path: Path
):
    settings = {"resolution": RESOLUTION, "license": "mit", "revision": "0" * 40}
    published = config.Base.model_validate(settings | {"source": HUB_IDS["ssd1b"]})
    assert description.network_config(published, tmp_path / "absent") == PUBLISHED[HUB_IDS["ssd1b"]]
    assert description.network_config(published, miniatures("sd2"))["cross_attention_dim"] == 16
    file = config.Base.model_validate(settings | {"source": "my.safetensors", "config": str(miniatures("sdxl"))})
    assert description.network_config(file, tmp_path / "absent")["cross_attention_dim"] == 40
    other = config.Base.model_validate(settings | {"source": "some/model"})
    with pytest.raises(UserError, match=r"absent/unet/config.json: no such file, .* run `lcmlora fetch absent`"):
        description.network_config(other, tmp_path / "absent")


def test_a_configuration_that_makes_no_unet_is_refused(tmp_path: Path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"block_out_channels": [8], "norm_num_groups": 4}))
    base = config.Base(source=str(tmp_path), resolution=RESOLUTION, license="mit")
    with pytest.raises(UserError, match=r"bases.mine: diffusers cannot build a UNet from its configuration"):
        bases.describe("mine", base, tmp_path, rank=4, alpha=4)
