"""What a store may hold that no publisher of ours wrote: refused in a line, and nothing of it lands outside."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lcmlora.config import Publish
from lcmlora.errors import UserError
from lcmlora.releases.catalog import find_release, list_releases, pull_release, verify_release
from lcmlora.releases.publish import point_channel, publish_release, yank_release
from tests.support import fuzzing
from tests.support.releases import write_sealed

SHA = hashlib.sha256(b"weights").hexdigest()
PREFIX = f"mini/sha256-{SHA[:12]}"
HEX = "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A directory with one release, and a channel that points to it."""
    settings = Publish(to=str(tmp_path / "store"))
    publish_release(write_sealed(tmp_path / "bundle"), "mini", settings)
    point_channel("mini", SHA, settings)
    return tmp_path / "store"


def seal_again(folder: Path, files: dict[str, str], **more: Any) -> None:
    """Writes SHA256SUMS and a manifest that lists these files, as whoever can write to the store would."""
    sums = "".join(f"{sha256}  {name}\n" for name, sha256 in files.items())
    (folder / "SHA256SUMS").write_bytes(sums.encode("utf-8", "surrogatepass"))
    listed = files | {"SHA256SUMS": hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()}
    rows = [
        {"name": name, "sha256": sha256, "bytes": (folder / name).stat().st_size if (folder / name).is_file() else 1}
        for name, sha256 in listed.items()
    ]
    (folder / "manifest.json").write_text(json.dumps({"model": "mini", "sha256": SHA, "files": rows} | more))


def files_of(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {file["name"]: file["sha256"] for file in manifest["files"] if file["name"] != "SHA256SUMS"}


@pytest.mark.parametrize(
    "name",
    [
        *("..", ".", "", "../evil", "a/b", "/etc/evil", "..\\evil", "C:\\evil", ".hidden", "a\x00b", "a\x1b[31mb"),
        *("a\nb", "a\u202eb", "\u2028", "x" * 201, "é" * 120, "manifest.json", "SHA256SUMS.sig", "Yanked.json"),
    ],
)
def test_names_that_are_no_files_of_a_release_are_refused_and_nothing_is_written(
    store: Path, tmp_path: Path, name: str
):
    folder = store / PREFIX
    seal_again(folder, files_of(folder) | {name: hashlib.sha256(b"evil").hexdigest()})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"manifest\.json: ") as caught:
        pull_release("mini@champion", Publish(to=str(store)), tmp_path / "out", everything=True)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": []}, r"manifest\.json: does not list SHA256SUMS"),
        ({"files": {}}, "expected a JSON object with model, sha256 and files"),
        ({"files": [1]}, "file 1: expected name, bytes and sha256"),
        ({"files": [{"name": "a", "bytes": True, "sha256": HEX}]}, "file 1: expected name, bytes and sha256"),
        ({"files": [{"name": "a", "bytes": -1, "sha256": HEX}]}, "file 1: expected name, bytes and sha256"),
        ({"files": [{"name": "a", "bytes": 1e3, "sha256": HEX}]}, "file 1: expected name, bytes and sha256"),
        ({"files": [{"name": "a", "bytes": 1 << 70, "sha256": HEX}]}, r"lists \d+ bytes, expected \d+ at most"),
        ({"files": [{"name": "a", "bytes": 1, "sha256": "A" * 64}]}, "file 1: expected name, bytes and sha256"),
        ({"files": [{"name": n, "bytes": 1, "sha256": HEX} for n in ("a", "A")]}, "lists a more than once"),
        (
            {"files": [{"name": str(n), "bytes": 1, "sha256": HEX} for n in range(2000)]},
            "lists 2001 files|lists 2000 files, expected 1000 at most",
        ),
        ({"model": "../mini"}, "expected a JSON object with model"),
        ({"model": 3}, "expected a JSON object with model"),
        ({"sha256": "x"}, "expected a JSON object with model, sha256"),
    ],
)
def test_manifests_that_are_none_are_refused(store: Path, change: dict[str, Any], message: str):
    path = store / PREFIX / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        find_release("mini@champion", Publish(to=str(store)))


@pytest.mark.parametrize("content", [b"", b"[", b"\xff", b"[" * 100_000, b'"\\ud800"', b"null", b"9" * 5000, b"[]"])
@pytest.mark.parametrize("name", ["manifest.json", "../channels/champion.json", "yanked.json", "provenance.json"])
def test_what_is_no_record_at_all_is_refused_in_a_line_and_does_not_hide_the_other_releases(
    store: Path, tmp_path: Path, name: str, content: bytes
):
    settings = Publish(to=str(store))
    better = publish_release(write_sealed(tmp_path / "better", weights=b"better"), "mini", settings)
    folder = store / PREFIX
    (folder / name).write_bytes(content)
    if name == "provenance.json":
        seal_again(folder, files_of(folder) | {name: hashlib.sha256(content).hexdigest()})
    with pytest.raises(UserError, match=Path(name).name) as caught:
        find_release("mini@champion", settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    rows = {row.uri: row for row in list_releases(settings)}
    assert rows.keys() == {folder.as_uri(), better} and rows[better].fault is None
    assert bool(rows[folder.as_uri()].fault) == (name in ("manifest.json", "yanked.json"))


def test_a_release_is_found_by_the_digest_of_the_trained_adapter(tmp_path: Path):
    settings, trained = Publish(to=str(tmp_path / "store")), "a" * 64
    publish_release(write_sealed(tmp_path / "old"), "mini", settings)
    uri = publish_release(write_sealed(tmp_path / "new", weights=b"new", adapter=trained), "mini", settings)
    assert find_release(f"mini/sha256-{trained[:12]}", settings) == find_release(uri, settings)
    with pytest.raises(UserError, match="mini/sha256-abcabcabcabc: no such release at"):
        find_release("mini/sha256-abcabcabcabc", settings)
    again = publish_release(write_sealed(tmp_path / "again", weights=b"again", adapter=trained), "mini", settings)
    with pytest.raises(UserError, match=r"is the adapter of mini/sha256-\w+, mini/sha256-\w+; name one of these"):
        find_release(f"mini/sha256-{trained[:12]}", settings)
    place = Path(again.removeprefix("file://"), "manifest.json")
    place.write_text(json.dumps(json.loads(place.read_text()) | {"adapter": "b" * 64}))
    with pytest.raises(UserError, match=r"expected the adapter bbbbbbbbbbbb\.\.\. of manifest\.json; do not use"):
        find_release("mini/sha256-bbbbbbbbbbbb", settings)


def test_a_file_that_is_larger_or_smaller_than_listed_is_not_kept(store: Path, tmp_path: Path):
    weights = store / PREFIX / "pytorch_lora_weights.safetensors"
    for content, message in (
        (b"w" * 5_000_000, "has more than 7 bytes, and 7 are listed"),
        (b"w", "has 1 bytes, and 7 are listed"),
        (b"Weights", "expected sha256 .*, got "),
    ):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=rf"pytorch_lora_weights\.safetensors: {message}"):
            pull_release("mini@champion", Publish(to=str(store)), tmp_path / "out")
        with pytest.raises(UserError, match="pytorch_lora_weights"):
            verify_release("mini@champion", Publish(to=str(store)))
        assert not (tmp_path / "out").exists()


def test_records_of_gigabytes_are_not_read(store: Path):
    for name in ("manifest.json", "SHA256SUMS", "provenance.json", "yanked.json", "../channels/champion.json"):
        path = store / PREFIX / name
        kept = path.read_bytes() if path.exists() else None
        with path.open("wb") as file:
            file.truncate(8 << 30)  # sparse
        with pytest.raises(UserError, match="has more than 8388608 bytes, expected a small file"):
            find_release("mini@champion", Publish(to=str(store)))
        path.unlink() if kept is None else path.write_bytes(kept)
    assert find_release("mini@champion", Publish(to=str(store)))[1] == SHA


def test_of_thousands_of_files_that_nobody_listed_a_few_are_named(store: Path):
    for number in range(3000):
        (store / PREFIX / f"\x1b[31m{number}").touch()
    with pytest.raises(UserError) as caught:
        verify_release("mini@champion", Publish(to=str(store)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[-1].endswith("and 2980 more")
    assert all(line.isprintable() for line in lines)


# --- mutated ------------------------------------------------------------------------------------------------------


def signed_store(root: Path) -> tuple[Publish, dict[str, bytes]]:
    """Returns a store that readers check by a key, and its records by name."""
    pytest.importorskip("model_signing", reason="no model-signing (extra `signing`) here")
    from tests.releases.test_signing import write_keys

    private, public = write_keys(root, "ours")
    settings = Publish(to=str(root / "store"), signing_key=private, verify_key=public)
    publish_release(write_sealed(root / "bundle"), "mini", settings)
    other = publish_release(write_sealed(root / "other", weights=b"other"), "mini", settings)
    point_channel("mini", SHA, settings)
    yank_release(other, settings, reason="worse", who="ann")
    folder = root / "store" / PREFIX
    names = ("manifest.json", "SHA256SUMS", "SHA256SUMS.sig", "provenance.json")
    examples = {name: (folder / name).read_bytes() for name in names}
    examples["../channels/champion.json"] = (folder / "../channels/champion.json").read_bytes()
    examples["yanked.json"] = Path(other.removeprefix("file://"), "yanked.json").read_bytes()
    return settings, examples


def use(settings: Publish, name: str, content: bytes) -> None:
    """Does what readers do, in a copy of the store with this content; whatever is pulled must be what was signed."""
    root = Path(settings.to).parent / f"copy-{os.getpid()}"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(settings.to, root / "store")
    (root / "store" / PREFIX / name).write_bytes(content)
    os.environ["LCMLORA_STATE"] = str(root / "state")
    plain = settings.model_copy(update={"to": str(root / "store"), "signing_key": None, "verify_key": None})
    list_releases(plain, "mini")
    for asked in (plain, plain.model_copy(update={"verify_key": settings.verify_key})):
        out = pull_release("mini@champion", asked, root / ("signed" if asked.verify_key else "plain"))
        assert {path.name for path in out.iterdir()} <= {
            *("pytorch_lora_weights.safetensors", "scheduler_config.json", "provenance.json"),
            *("SHA256SUMS", "SHA256SUMS.sig"),
        }
        assert (out / "pytorch_lora_weights.safetensors").read_bytes() == b"weights"
        assert {path.name for path in root.iterdir()} <= {"plain", "signed", "state", "store"}


def fuzz(root: Path, count: int) -> None:
    settings, examples = signed_store(root)
    words = [
        b"sha256",
        b"model",
        b"bytes",
        b"..",
        SHA.encode(),
        b"mini",
        b"maxi",
        b"2030-01-01T00:00:00Z",
        b"signature",
    ]
    for number, (name, example) in enumerate(sorted(examples.items())):
        share = count // len(examples)
        inputs = fuzzing.mutated([example, *examples.values()], share, seed=21 + number, words=words)
        function: Callable[[bytes], object] = partial(use, settings, name)
        counts = fuzzing.check(function, inputs)
        assert counts["refused"] > share // 2, (name, counts)


def test_mutated_records_are_refused_in_a_line_or_harmless(tmp_path: Path):
    fuzz(tmp_path, fuzzing.QUICK)


@pytest.mark.slow
def test_many_mutated_records_are_refused_in_a_line_or_harmless(tmp_path: Path):
    fuzz(tmp_path, fuzzing.FULL)
