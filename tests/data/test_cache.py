from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lcmlora.bases.base import LoadedBase
from lcmlora.config import Data, Encode
from lcmlora.data.latents import texts
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.encode import encode
from lcmlora.data.sources.source import Record, find, fit, open_picture, read_records, write_records
from lcmlora.errors import UserError
from lcmlora.io.files import locked, sha256_file
from lcmlora.parallel import ranks
from lcmlora.parallel.ranks import Ranks
from tests.data.conftest import add, data_in, load_encoders, picture

SETTINGS = Encode(batch=5, shard_mb=1, device="cpu")
LARGE = 128  # pixels; the latent is 4 x 64 x 64, and 1 MB holds 15 of them
Load = Callable[..., LoadedBase]


@pytest.fixture
def listed(folder: Path, tmp_path: Path) -> Data:
    """Forty pictures of various shapes under eight captions, all of them for training."""
    for number in range(8, 40):
        add(folder, f"{number:02d}.png", f"subject {number % 8}", picture(number, (40 + number % 7, 40 + number % 5)))
    data = data_in(folder)
    write_records(tmp_path / "pictures" / "train.jsonl", find(data)[0])
    return data


def run(base: LoadedBase, data: Data, tmp_path: Path, settings: Encode = SETTINGS, out: str = "latents/mini") -> Path:
    encode(base, data, settings, tmp_path / "pictures", tmp_path / "scratch", tmp_path / out)
    return tmp_path / out


def records(tmp_path: Path) -> list[Record]:
    return read_records(tmp_path / "pictures" / "train.jsonl")


def count_batches(base: LoadedBase, fail_after: int | None = None) -> list[int]:
    """Notes the size of every batch that the VAE is given; the process "dies" after `fail_after` of them."""
    sizes: list[int] = []
    real = base.encode_pictures

    def counted(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(sizes) == fail_after:
            raise KeyboardInterrupt
        sizes.append(len(pictures))
        return real(pictures)

    base.encode_pictures = counted  # type: ignore[method-assign]
    return sizes


def tree(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


# --- what a cache holds


def test_latents_equal_a_direct_encoding_within_fp16(load_base: Load, listed: Data, tmp_path: Path) -> None:
    base = load_base(16)
    cache = LatentCache(run(base, listed, tmp_path))
    rows = torch.tensor([39, 0, 17])
    fitted = [fit(open_picture(listed, records(tmp_path)[r]), 16)[0] for r in rows.tolist()]
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) for image in fitted])
    mean, logvar = base.encode_pictures(pixels / 127.5 - 1)
    cached_mean, cached_logvar = cache.latents(rows)
    assert cached_mean.dtype == cached_logvar.dtype == torch.float32
    assert cached_mean.shape == (3, *cache.latent_shape) == (3, 4, 8, 8)
    torch.testing.assert_close(cached_mean, mean, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cached_logvar, logvar, rtol=1e-3, atol=1e-4)


def test_embeddings_are_stored_once_for_each_caption(load_base: Load, listed: Data, tmp_path: Path) -> None:
    base = load_base(16)
    cache = LatentCache(run(base, listed, tmp_path))
    assert cache.manifest["captions"] == 8
    with safe_open(tmp_path / "latents" / "mini" / "text.safetensors", "pt") as file:
        assert file.get_slice("encoder_hidden_states").get_shape() == [8, 24, 16]
    rows = torch.tensor([5, 30, 5])
    conditioning = cache.conditioning(rows)
    expected = base.encode_text([records(tmp_path)[r].caption for r in rows.tolist()])
    assert conditioning.keys() == expected.keys() == {"encoder_hidden_states"}
    torch.testing.assert_close(conditioning["encoder_hidden_states"], expected["encoder_hidden_states"])
    empty = base.unconditional()["encoder_hidden_states"]
    torch.testing.assert_close(cache.unconditional()["encoder_hidden_states"], empty)


def test_sdxl_conditioning_has_pooled_text_and_sizes_as_height_and_width(
    load_base: Load, listed: Data, tmp_path: Path
) -> None:
    base = load_base(16, sdxl=True)
    cache = LatentCache(run(base, listed, tmp_path))
    row = next(i for i, r in enumerate(records(tmp_path)) if r.width > r.height + 2)
    record, rows = records(tmp_path)[row], torch.tensor([0, row])
    conditioning = cache.conditioning(rows)
    assert {name: tuple(value.shape) for name, value in conditioning.items()} == {
        "encoder_hidden_states": (2, 24, 40),
        "text_embeds": (2, 12),
        "time_ids": (2, 6),
    }
    _, (top, left) = fit(open_picture(listed, record), 16)
    assert conditioning["time_ids"][1].tolist() == [record.height, record.width, top, left, 16, 16]
    sizes, crops = torch.tensor([[record.height, record.width]]), torch.tensor([[top, left]])
    torch.testing.assert_close(conditioning["time_ids"][1:], base.micro_conditioning(sizes, crops)["time_ids"])
    expected = base.encode_text([records(tmp_path)[r].caption for r in rows.tolist()])
    torch.testing.assert_close(conditioning["text_embeds"], expected["text_embeds"])
    assert all(value.count_nonzero() == 0 for value in cache.unconditional().values())


def test_shards_keep_to_their_size_and_the_manifest_to_the_shards(
    load_base: Load, listed: Data, tmp_path: Path
) -> None:
    folder = run(load_base(LARGE), listed, tmp_path)
    cache = LatentCache(folder)
    assert [shard["pictures"] for shard in cache.manifest["shards"]] == [15, 15, 10]
    for entry in [*cache.manifest["shards"], cache.manifest["text"]]:
        path = folder / entry["name"]
        assert path.stat().st_size == entry["bytes"] <= 1 << 20
        assert sha256_file(path) == entry["sha256"]
    with safe_open(folder / "shard-00001.safetensors", "pt") as file:
        assert file.metadata() == {"fingerprint": cache.manifest["fingerprint"]}
        digests = [bytes(key).hex() for key in file.get_tensor("key").tolist()]
        assert digests == [r.sha256[:32] for r in records(tmp_path)[15:30]]
    assert len((folder / "captions-00001.jsonl").read_text().splitlines()) == 15
    assert len(cache) == 40
    cache.verify()
    assert cache.digest == sha256_file(folder / "manifest.json")


def test_mapped_shards_give_the_rows_that_memory_gives(load_base: Load, listed: Data, tmp_path: Path) -> None:
    folder = run(load_base(LARGE), listed, tmp_path)
    in_memory, mapped = LatentCache(folder), LatentCache(folder, ram_bytes=0)
    rows = torch.tensor([39, 14, 15, 0, 30, 29, 14])
    for expected, got in zip(in_memory.latents(rows), mapped.latents(rows), strict=True):
        assert torch.equal(expected, got)
    with pytest.raises(IndexError):
        mapped.latents(torch.tensor([40]))


def test_a_half_precision_base_keeps_its_text_in_fp16(load_base: Load, listed: Data, tmp_path: Path) -> None:
    base = load_base(16)
    base.dtype = torch.bfloat16
    cache = LatentCache(run(base, listed, tmp_path))
    with safe_open(tmp_path / "latents" / "mini" / "text.safetensors", "pt") as file:
        assert file.get_tensor("encoder_hidden_states").dtype == torch.float16
    assert cache.conditioning(torch.tensor([0]))["encoder_hidden_states"].dtype == torch.float32


def test_the_same_input_gives_the_same_bytes(load_base: Load, listed: Data, tmp_path: Path) -> None:
    first = run(load_base(LARGE), listed, tmp_path, out="first")
    second = run(load_base(LARGE), listed, tmp_path, out="second")
    assert tree(first) == tree(second)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_emoji_are_drawn_at_the_resolution_of_the_base(load_base: Load, emoji_data: Data, tmp_path: Path) -> None:
    write_records(tmp_path / "pictures" / "train.jsonl", find(emoji_data)[0][:7])
    folder = run(load_base(16), emoji_data, tmp_path)
    with safe_open(folder / "shard-00000.safetensors", "pt") as file:
        assert file.get_tensor("orig_size").tolist() == [[16, 16]] * 7
        assert file.get_tensor("crop_tl").count_nonzero() == 0


# --- kills, full disks, broken pictures


def test_a_killed_run_encodes_no_finished_shard_again(load_base: Load, listed: Data, tmp_path: Path) -> None:
    undisturbed = run(load_base(LARGE), listed, tmp_path, out="undisturbed")
    base = load_base(LARGE)
    count_batches(base, fail_after=5)  # of the eight: three make a shard
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    assert not (tmp_path / "latents").exists()
    (files,) = (tmp_path / "scratch").glob("*/files")
    (files / ".shard-00001.safetensors.1.part").write_bytes(b"what a kill leaves half written")
    base = load_base(LARGE)
    sizes = count_batches(base)
    assert tree(run(base, listed, tmp_path)) == tree(undisturbed)
    assert sizes == [5] * 5


def test_a_finished_shard_that_was_damaged_is_encoded_again(load_base: Load, listed: Data, tmp_path: Path) -> None:
    undisturbed = run(load_base(LARGE), listed, tmp_path, out="undisturbed")
    base = load_base(LARGE)
    count_batches(base, fail_after=6)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    (shard,) = (tmp_path / "scratch").rglob("shard-00000.safetensors")
    with shard.open("r+b") as file:
        file.seek(-9, os.SEEK_END)
        file.write(b"\xff")
    base = load_base(LARGE)
    sizes = count_batches(base)
    assert tree(run(base, listed, tmp_path)) == tree(undisturbed)
    assert sizes == [5] * 5


def test_other_settings_do_not_reuse_unfinished_work(load_base: Load, listed: Data, tmp_path: Path) -> None:
    base = load_base(LARGE)
    count_batches(base, fail_after=6)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    base = load_base(LARGE)
    sizes = count_batches(base)
    run(base, listed, tmp_path, Encode(batch=8, shard_mb=1))
    assert sum(sizes) == 40


def test_a_second_run_on_the_same_work_is_refused(load_base: Load, listed: Data, tmp_path: Path) -> None:
    base = load_base(LARGE)
    count_batches(base, fail_after=1)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    (work,) = (tmp_path / "scratch").iterdir()
    with locked(work), pytest.raises(UserError, match="another run"):
        run(base, listed, tmp_path)


def test_a_latent_that_is_not_finite_is_refused_by_the_name_of_its_picture(
    load_base: Load, listed: Data, tmp_path: Path
) -> None:
    base = load_base(16)
    real = base.encode_pictures
    twelfth = records(tmp_path)[12]
    broken = torch.from_numpy(np.asarray(fit(open_picture(listed, twelfth), 16)[0]).copy()).permute(2, 0, 1)

    def overflowing(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, logvar = real(pictures)
        mean[(pictures == broken / 127.5 - 1).flatten(1).all(1)] *= 1e9  # finite, but not in fp16
        return mean, logvar

    base.encode_pictures = overflowing  # type: ignore[method-assign]
    with pytest.raises(UserError, match=rf"^{twelfth.key}: its latent is not finite"):
        run(base, listed, tmp_path)
    assert not (tmp_path / "latents").exists()


def test_a_text_encoder_that_gives_nan_is_refused(load_base: Load, listed: Data, tmp_path: Path) -> None:
    base = load_base(16)
    base.text_encoders[0].get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"encoder_hidden_states of caption 'subject 0' is not finite"):
        run(base, listed, tmp_path)


def test_a_disk_that_fills_up_is_one_line_and_the_finished_shards_stay(
    load_base: Load, listed: Data, tmp_path: Path
) -> None:
    base = load_base(LARGE)
    count_batches(base, fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    real = os.fsync
    with pytest.MonkeyPatch.context() as patch:  # where a disk that has promised room says that there is none

        def full(descriptor: int) -> None:
            if "shard-00001" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        patch.setattr(os, "fsync", full)
        message = r"shard-00001\.safetensors: no disk space: the latent cache needs \d+ bytes more"
        with pytest.raises(UserError, match=message) as error:
            run(load_base(LARGE), listed, tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "latents").exists()
    base = load_base(LARGE)
    sizes = count_batches(base)
    assert len(LatentCache(run(base, listed, tmp_path))) == 40
    assert sizes == [5] * 5


def test_too_small_a_disk_is_refused_before_anything_is_encoded(
    load_base: Load, listed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1_000_000})())
    base = load_base(LARGE)
    sizes = count_batches(base)
    needed = 40 * (2 * 2 * 4 * 64 * 64 + 36) + 9 * 24 * 16 * 4
    with pytest.raises(UserError, match=rf"needs {needed} bytes more in .*scratch and 1000000 are free"):
        run(base, listed, tmp_path)
    assert sizes == []


@pytest.mark.parametrize("sdxl", [False, True])
def test_of_too_much_text_the_token_ids_are_kept_and_give_the_same_conditioning(
    load_base: Load,
    listed: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sdxl: bool,
) -> None:
    base = load_base(16, sdxl=sdxl)
    whole = LatentCache(run(base, listed, tmp_path, out="whole"))
    monkeypatch.setattr(texts, "_MB", 1)
    cache = LatentCache(run(base, listed, tmp_path, out="tokens"))
    assert "embeddings of 8 captions are over encode.text_cache_mb" in capsys.readouterr().err
    assert cache.tokenized and not whole.tokenized
    cache.embed = base.encode_tokens
    rows = torch.tensor([5, 0, 5, 39])
    ours, expected = cache.conditioning(rows), whole.conditioning(rows)
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value)
    assert cache.unconditional().keys() == whole.unconditional().keys()


def test_captions_that_the_text_encoder_cuts_are_counted(
    load_base: Load, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (1, 2):
        (folder / f"{number}.txt").write_text(f"a cat {number} " * 40)
    data = data_in(folder)
    write_records(tmp_path / "pictures" / "train.jsonl", find(data)[0])
    cache = LatentCache(run(load_base(16), data, tmp_path))
    assert cache.manifest["text"]["cut"] == 2
    assert "2 of 8 captions have more tokens than the text encoder reads" in capsys.readouterr().err


def test_no_list_or_an_empty_one_is_an_error_that_says_what_to_run(load_base: Load, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lcmlora prepare"):
        run(load_base(16), data_in(tmp_path), tmp_path)
    write_records(tmp_path / "pictures" / "train.jsonl", [])
    with pytest.raises(UserError, match="lists no pictures"):
        run(load_base(16), data_in(tmp_path), tmp_path)


# --- many processes


def _encode_as(rank: int, environment: dict[str, str], dies: bool, load: Callable[[], LoadedBase], *rest: Any) -> None:
    """One of the processes: what a launcher would set is in `environment`."""
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    base = load()
    if dies:
        base.encode_pictures = lambda pictures: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    with ranks.connected("cpu") as place:
        encode(base, *rest, place)


def encode_in(processes: int, folder: Path, data: Data, tmp_path: Path, out: str, killed: int | None = None) -> Path:
    """Encodes in so many processes that talk over gloo; process `killed` dies at its first batch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once, not in each of them
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    rest = (data, SETTINGS, tmp_path / "pictures", tmp_path / "scratch", tmp_path / out)
    load = partial(load_encoders, folder, LARGE)
    started = [
        context.Process(target=_encode_as, args=(rank, environment, rank == killed, load, *rest))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    failed = [process.exitcode != 0 for process in started]
    assert failed == [killed is not None] * processes
    return tmp_path / out


@pytest.mark.slow
def test_two_processes_write_the_bytes_that_one_writes(
    load_base: Load, base_folder: Path, listed: Data, tmp_path: Path
) -> None:
    alone = run(load_base(LARGE), listed, tmp_path, out="alone")
    assert tree(encode_in(2, base_folder, listed, tmp_path, "two")) == tree(alone)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_killed_process_left_three_others_finish(
    load_base: Load, base_folder: Path, listed: Data, tmp_path: Path
) -> None:
    undisturbed = run(load_base(LARGE), listed, tmp_path, out="undisturbed")
    base = load_base(LARGE)
    count_batches(base, fail_after=4)
    with pytest.raises(KeyboardInterrupt):
        run(base, listed, tmp_path)
    assert tree(encode_in(3, base_folder, listed, tmp_path, "three")) == tree(undisturbed)


@pytest.mark.slow
def test_one_process_encodes_only_what_the_killed_one_of_two_had_to(
    load_base: Load, base_folder: Path, listed: Data, tmp_path: Path
) -> None:
    undisturbed = run(load_base(LARGE), listed, tmp_path, out="undisturbed")
    encode_in(2, base_folder, listed, tmp_path, "latents/mini", killed=1)
    assert not (tmp_path / "latents").exists()
    base = load_base(LARGE)
    sizes = count_batches(base)
    assert tree(run(base, listed, tmp_path)) == tree(undisturbed)
    assert sizes == [5] * 3  # the second of three shards


def test_processes_with_scratch_folders_of_their_own_are_told_so(
    load_base: Load, listed: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gather(into: list[object], mine: object) -> None:
        into[:] = [mine, mine]

    monkeypatch.setattr("torch.distributed.all_gather_object", gather)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    monkeypatch.setattr("lcmlora.data.latents.store._VISIBLE", 0.0)
    rest = (listed, SETTINGS, tmp_path / "pictures", tmp_path / "scratch", tmp_path / "latents/mini")
    with pytest.raises(UserError, match=r"shard-00001\.safetensors: is not there.*one and the same scratch folder"):
        encode(load_base(LARGE), *rest, Ranks(0, 2))
    assert not (tmp_path / "latents").exists()


# --- a cache that is not whole


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
        (lambda told: [told], "version none, expected 1"),
        (lambda told: told | {"version": 2}, "version 2, expected 1"),
        (lambda told: {k: v for k, v in told.items() if k != "latent_shape"}, "latent_shape: Field required"),
        (lambda told: told | {"latent_shape": [4, 8]}, "latent_shape"),
        (lambda told: told | {"shards": []}, "shards: List should have at least 1 item"),
        (lambda told: told | {"shards": [told["shards"][0] | {"name": "../../x"}]}, r"shards\.0\.name"),
        (lambda told: told | {"shards": [told["shards"][0] | {"bucket": 1}]}, "of a bucket that is not among"),
        (lambda told: told | {"at": "s3://b/x"}, "rows: is missing"),
        (lambda told: told | {"text": "text.safetensors"}, "text: Input should be"),
        (lambda told: told | {"pictures": -1}, "pictures: Input should be"),
    ],
)
def test_a_manifest_that_does_not_say_what_a_cache_has_is_one_line(
    tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    out = tmp_path / "latents"
    out.mkdir()
    entry = {"name": "a.safetensors", "bytes": 1, "sha256": "0" * 64}
    told = {"version": 1, "kind": "sd", "pictures": 1, "resolution": 8, "latent_shape": [4, 1, 1], "text": entry}
    told["shards"] = [entry | {"pictures": 1}]
    (out / "manifest.json").write_text(json.dumps(change(told)))
    with pytest.raises(UserError, match=rf"manifest\.json: .*{message}.*make the cache again") as caught:
        LatentCache(out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 5000, b'{"version": NaN}', b'"\\ud800"'])
def test_a_manifest_that_is_no_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: .*make the cache again"):
        LatentCache(tmp_path)
