"""Raises the versions of stages whose results have changed on purpose, and keeps the new results as golden outcomes.

python -m tests.stages.raise_version encode           raises the version, keeps the outcome
python -m tests.stages.raise_version --keep encode    keeps the outcome: only the test has changed

A raised version needs its line in lcmlora/projects/upgrade/history.py and in CHANGELOG.md, which it names.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import torch

from lcmlora import config, stages
from lcmlora.dvc_files import resolved
from lcmlora.project import Project
from tests.stages import golden, inputs
from tests.stages.outcomes import OUTCOMES
from tests.support.miniature import save_base

ROOT = Path(__file__).parents[2]
HISTORY = "lcmlora/projects/upgrade/history.py"


def keep_outcome(stage: str, outcome: dict[str, object], *, same_version: bool = False) -> str:
    """Keeps the outcome as golden, raises the version if the outcome has changed, and returns a line that says so."""
    kept = golden.load().get(stage)
    if kept and not same_version:
        if not golden.differences(kept["outcome"], golden._rounded(outcome)):
            return f"{stage}: gives what version {kept['version']} gave; nothing to raise"
        stages.VERSIONS[stage] = kept["version"] + 1
        path = Path(stages.__file__)
        text, changed = re.subn(
            rf'^(    "{stage}": )\d+,', rf"\g<1>{kept['version'] + 1},", path.read_text(), flags=re.M
        )
        assert changed == 1, f"{path}: has no version of {stage}"
        path.write_text(text)
    golden.keep(stage, outcome)
    return f"{stage}: version {stages.VERSIONS[stage]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="+", choices=list(stages.VERSIONS), metavar="STAGE")
    parser.add_argument("--keep", action="store_true", help="leave the version: only the test has changed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "inputs").mkdir()
        made = inputs.make(work / "inputs", save_base(work / "mini"))
        for stage in arguments.stages:
            (work / stage).mkdir()
            before = stages.VERSIONS[stage]
            print(keep_outcome(stage, OUTCOMES[stage](made, work / stage), same_version=arguments.keep))
            if stages.VERSIONS[stage] != before:
                print(f"say what changed in {HISTORY} and in CHANGELOG.md, as `{stage}` {stages.VERSIONS[stage]}")
    if resolved.refresh(config.load(ROOT / "params.yaml"), Project(ROOT).resolved):
        print("resolved.yaml: is up to date now; `dvc status` says what is stale", file=sys.stderr)


if __name__ == "__main__":
    main()
