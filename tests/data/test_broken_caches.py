"""Latent caches with files that are missing, damaged or malformed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcmlora.config import Data
from lcmlora.data.latents.cache import LatentCache
from lcmlora.errors import UserError
from tests.support.latents import LARGE, Load, run


def test_a_folder_without_manifest_is_an_error_that_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json.*lcmlora encode emoji"):
        LatentCache(tmp_path / "emoji")


def test_a_missing_or_cut_shard_is_an_error_when_the_cache_is_opened(
    load_base: Load, listed: Data, tmp_path: Path
) -> None:
    folder = run(load_base(LARGE), listed, tmp_path)
    shard = folder / "shard-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: has \d+ bytes and .*lcmlora encode mini"):
        LatentCache(folder)
    shard.write_bytes(b"\xff" * len(content))
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: cannot be read .*lcmlora encode mini"):
        LatentCache(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: is missing.*lcmlora encode mini"):
        LatentCache(folder)


@pytest.mark.parametrize("name", ["shard-00000.safetensors", "text.safetensors"])
def test_verify_finds_a_single_changed_byte(load_base: Load, listed: Data, tmp_path: Path, name: str) -> None:
    folder = run(load_base(16), listed, tmp_path)
    cache = LatentCache(folder)
    cache.verify()
    with (folder / name).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match=rf"{name}: is damaged.*lcmlora encode mini"):
        cache.verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: [manifest], "version none, expected 1"),
        (lambda manifest: manifest | {"version": 2}, "version 2, expected 1"),
        (lambda manifest: {k: v for k, v in manifest.items() if k != "latent_shape"}, "latent_shape: Field required"),
        (lambda manifest: manifest | {"latent_shape": [4, 8]}, "latent_shape"),
        (lambda manifest: manifest | {"shards": []}, "shards: List should have at least 1 item"),
        (lambda manifest: manifest | {"shards": [manifest["shards"][0] | {"name": "../../x"}]}, r"shards\.0\.name"),
        (
            lambda manifest: manifest | {"shards": [manifest["shards"][0] | {"bucket": 1}]},
            "of a bucket that is not among",
        ),
        (lambda manifest: manifest | {"at": "s3://b/x"}, "rows: is missing"),
        (lambda manifest: manifest | {"text": "text.safetensors"}, "text: Input should be"),
        (lambda manifest: manifest | {"pictures": -1}, "pictures: Input should be"),
    ],
)
def test_a_malformed_manifest_is_one_line(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    out = tmp_path / "latents"
    out.mkdir()
    entry = {"name": "a.safetensors", "bytes": 1, "sha256": "0" * 64}
    manifest = {"version": 1, "kind": "sd", "pictures": 1, "resolution": 8, "latent_shape": [4, 1, 1], "text": entry}
    manifest["shards"] = [entry | {"pictures": 1}]
    (out / "manifest.json").write_text(json.dumps(change(manifest)))
    with pytest.raises(UserError, match=rf"manifest\.json: .*{message}.*make the cache again") as caught:
        LatentCache(out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 5000, b'{"version": NaN}', b'"\\ud800"'])
def test_a_manifest_that_is_not_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: .*make the cache again"):
        LatentCache(tmp_path)
