"""What a latent cache holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from lcmlora.config import Data
from lcmlora.data.latents import texts
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.sources.source import fit, open_picture, survey, write_records
from lcmlora.io.files import sha256_file
from tests.data.conftest import data_in
from tests.support.latents import LARGE, Load, records, run, tree


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
    assert cache.manifest.captions == 8
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
    assert [shard.pictures for shard in cache.manifest.shards] == [15, 15, 10]
    for file in [*cache.manifest.shards, cache.manifest.text]:
        path = folder / file.name
        assert path.stat().st_size == file.bytes <= 1 << 20
        assert sha256_file(path) == file.sha256
    with safe_open(folder / "shard-00001.safetensors", "pt") as file:
        assert file.metadata() == {"fingerprint": cache.manifest.fingerprint}
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
    write_records(tmp_path / "pictures" / "train.jsonl", survey(emoji_data).records[:7])
    folder = run(load_base(16), emoji_data, tmp_path)
    with safe_open(folder / "shard-00000.safetensors", "pt") as file:
        assert file.get_tensor("orig_size").tolist() == [[16, 16]] * 7
        assert file.get_tensor("crop_tl").count_nonzero() == 0


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
    write_records(tmp_path / "pictures" / "train.jsonl", survey(data).records)
    cache = LatentCache(run(load_base(16), data, tmp_path))
    assert cache.manifest.text.cut == 2
    assert "2 of 8 captions have more tokens than the text encoder reads" in capsys.readouterr().err
