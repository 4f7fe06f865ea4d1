"""Every stage has the outcome it had when its version was last raised; docs/staleness.md says what to do if not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lcmlora import stages
from lcmlora.bases.families import Family
from tests.demo.test_pretrain import MODULES
from tests.stages import golden, inputs, raise_version
from tests.stages.inputs import Inputs
from tests.stages.outcomes import OUTCOMES, of_encode


@pytest.fixture(scope="module")
def made(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return inputs.make(tmp_path_factory.mktemp("inputs"), base_folder)


@pytest.mark.parametrize(
    "stage",
    [pytest.param(stage, marks=pytest.mark.slow if stage == "compatibility" else ()) for stage in stages.VERSIONS],
)
def test_a_stage_gives_what_its_version_gave(made: Inputs, tmp_path: Path, stage: str):
    if stage in ("pretrain", "prepare") and not (MODULES / "@iconify-json").is_dir():
        pytest.skip("the artwork is not installed")
    golden.check(stage, OUTCOMES[stage](made, tmp_path))


def test_another_scaling_of_the_vae_is_noticed_and_its_version_can_be_raised(
    made: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scale = Family.latent_scale
    monkeypatch.setattr(Family, "latent_scale", lambda family, vae: 1.02 * scale(family, vae))
    outcome = of_encode(made, tmp_path)
    with pytest.raises(AssertionError, match=r"shard-00000\.latent_mean\.log_size: was ") as error:
        golden.check("encode", outcome)
    assert "run `python -m tests.stages.raise_version encode`" in str(error.value)

    # As that command does it, on copies of the files that it writes.
    source, kept = tmp_path / "stages.py", tmp_path / "golden.json"
    source.write_text(Path(stages.__file__).read_text())
    kept.write_text(golden.FILE.read_text())
    monkeypatch.setattr(stages, "__file__", str(source))
    monkeypatch.setattr(golden, "FILE", kept)
    monkeypatch.setattr(stages, "VERSIONS", dict(stages.VERSIONS))
    before = stages.VERSIONS["encode"]
    assert raise_version.keep_outcome("encode", outcome) == f"encode: version {before + 1}"
    golden.check("encode", outcome)
    (raised,) = re.findall(r'^    "encode": (\d+),', source.read_text(), flags=re.MULTILINE)
    assert int(raised) == before + 1
    assert raise_version.keep_outcome("encode", outcome).endswith("nothing to raise")


def test_a_version_that_was_raised_by_hand_is_noticed(monkeypatch: pytest.MonkeyPatch):
    kept = golden.load()["encode"]
    monkeypatch.setattr(stages, "VERSIONS", stages.VERSIONS | {"encode": kept["version"] + 1})
    with pytest.raises(
        AssertionError, match=r"Do not edit that number: `python -m tests\.stages\.raise_version encode`"
    ):
        golden.check("encode", kept["outcome"])


def test_a_difference_is_one_that_no_rounding_makes():
    kept = {"sums": [1.0, -0.25], "text": "a", "pictures": 3}
    assert golden.differences(kept, {"sums": [1.002, -0.251], "text": "a", "pictures": 3}) == []
    found = golden.differences(kept, {"sums": [1.02, -0.25], "text": "b", "new": 1})
    assert found == ["new: is new", "pictures: is missing", "sums.0: was 1.0, is 1.02", "text: was 'a', is 'b'"]
