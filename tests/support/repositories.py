"""Git and DVC repositories in miniature, whose stages are done in a moment, and whether their processes live."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def make(root: Path, stages: str) -> Path:
    """Makes `root` a repository with this dvc.yaml and returns it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "dvc.yaml").write_text(stages)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True, env=environment)
    return root


def alive(pid: int) -> bool:
    """Returns whether a process of this number runs and has not ended as a zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")
