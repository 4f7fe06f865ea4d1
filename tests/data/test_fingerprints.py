import os
from pathlib import Path

import pytest

from lcmlora.data import fingerprints
from lcmlora.errors import UserError


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for name in ("a/cat.png", "a/cat.txt", "b/dog.png"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    return tmp_path / "in"


def grow(pictures: Path) -> None:
    (pictures / "b/owl.png").write_text("owl")


def shrink(pictures: Path) -> None:
    (pictures / "a/cat.txt").unlink()


def rename(pictures: Path) -> None:
    (pictures / "a/cat.txt").rename(pictures / "a/kitten.txt")


def rewrite_with_the_same_size(pictures: Path) -> None:
    (pictures / "a/cat.txt").write_text("A/CAT.TXT")
    os.utime(pictures / "a/cat.txt", ns=(1, 1))


@pytest.mark.parametrize("change", [grow, shrink, rename, rewrite_with_the_same_size])
def test_a_change_below_the_folder_changes_the_fingerprint_and_looking_does_not(change, pictures: Path):
    before = fingerprints.fingerprint(pictures)
    assert fingerprints.fingerprint(pictures) == before
    change(pictures)
    assert fingerprints.fingerprint(pictures) != before


def test_what_links_lead_to_counts_where_they_are_followed(pictures: Path, tmp_path: Path):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "fox.txt").write_text("a fox")
    (pictures / "more").symlink_to(outside)
    (pictures / "fox.txt").symlink_to(outside / "fox.txt")
    refused, followed = fingerprints.fingerprint(pictures), fingerprints.fingerprint(pictures, "follow")
    assert refused != followed
    (outside / "fox.txt").write_text("an owl instead")
    assert fingerprints.fingerprint(pictures) == refused
    assert fingerprints.fingerprint(pictures, "follow") != followed


def test_a_file_is_known_by_its_bytes(tmp_path: Path):
    lock = tmp_path / "package-lock.json"
    lock.write_text("{}")
    before = fingerprints.fingerprint(lock)
    os.utime(lock, ns=(1, 1))
    assert fingerprints.fingerprint(lock) == before
    lock.write_text("[]")
    assert fingerprints.fingerprint(lock) != before


def test_what_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere: no such file or folder$"):
        fingerprints.fingerprint(tmp_path / "nowhere")
