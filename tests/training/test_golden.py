import json
from pathlib import Path

import pytest

from lcmlora.data.latents.cache import LatentCache
from tests.support import golden


@pytest.mark.parametrize("objective", golden.OBJECTIVES)
def test_the_losses_are_the_golden_ones(objective: str, base_folder: Path, cache: LatentCache, tmp_path: Path):
    """`python -m tests.support.golden` writes them again after a change on purpose."""
    expected = json.loads(golden.FILE.read_text())[objective]
    # Machines round differently; a change of method changes the losses by several per cent.
    assert golden.losses(objective, base_folder, cache, tmp_path) == pytest.approx(expected, rel=1e-3)
