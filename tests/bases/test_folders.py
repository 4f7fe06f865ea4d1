"""The identity of a base, and the comparison of identities."""

import json
import shutil
from pathlib import Path

from lcmlora.bases import folders
from tests.support.base_changes import settings_of


def test_bases_are_compared_by_all_parts_and_old_identities_by_their_unet():
    new = {"source": "x", "digest": "a" * 64, "unet": "u" * 64}
    old = {"source": "x", "digest": "u" * 64}  # before the digest covered more
    assert folders.same_base(new, dict(new)) and folders.same_base(old, dict(old))
    assert folders.same_base(new, old) and folders.same_base(old, new)
    assert folders.same_base(new, old | {"unet": None})  # as the registry gives a version without the tag
    assert not folders.same_base(new, new | {"digest": "b" * 64})
    assert "their UNets are the same" in folders.difference(new, new | {"digest": "b" * 64})
    assert not folders.same_base(old, new | {"unet": "v" * 64})
    assert not folders.same_base({}, {})


def test_the_identity_changes_with_the_weights(base_folder: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(base_folder, folder)
    before = folders.identity(settings_of(folder), folder)
    assert before == folders.identity(settings_of(folder), base_folder) | {"source": str(folder)}
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"changed": 1}))
    assert folders.identity(settings_of(folder), folder)["digest"] != before["digest"]
