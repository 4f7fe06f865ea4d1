"""Adapters' files and folders: opened within limits, read or refused by name, and never run."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from lcmlora.adapters import formats, lora, peft_settings, tensorfile
from lcmlora.adapters.layer_names import Architecture
from lcmlora.bases import architecture, styled
from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.registry.references import Places, open_adapter

Miniatures = Callable[[str], Path]
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="session")
def sd15(miniatures: Miniatures) -> Architecture:
    return architecture.of_folder(miniatures("sd15"))


def _one() -> dict[str, Tensor]:
    """Returns a kohya file of one layer of sd15's."""
    stem = "lora_unet_" + QUERY.replace(".", "_")
    factors = {f"{stem}.lora_down.weight": torch.ones(4, 16), f"{stem}.lora_up.weight": torch.ones(16, 4)}
    return factors | {f"{stem}.alpha": torch.tensor(4.0)}


def _peft(prefix: str = "unet.") -> dict[str, Tensor]:
    return {f"{prefix}{QUERY}.lora_A.weight": torch.ones(4, 16), f"{prefix}{QUERY}.lora_B.weight": torch.ones(16, 4)}


def _header(entries: object, data: bytes = b"", size: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def _entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 bytes and is cut"),
        (b"\0" * 7, "is cut"),
        (save(_one())[:-40], "not a readable safetensors file"),
        (save(_one())[:60], "is cut"),
        (_header({}, size=1 << 62), "is cut"),
        (_header({"a": _entry("F32", [2], 0, 8), "b": _entry("F32", [2], 4, 12)}, b"\0" * 12), "not a readable"),
        (_header({"a": _entry("F32", [2], 0, 16)}, b"\0" * 16), "not a readable"),
        (_header({"a": _entry("F32", [1 << 62, 1 << 62], 0, 8)}, b"\0" * 8), "not a readable"),
        (_header({"a": _entry("X9", [2], 0, 8)}, b"\0" * 8), "not a readable"),
        (_header([1]), "not a readable"),
        (b"PK\x03\x04" + b"\0" * 60, "is a pickle"),
        (b"\x80\x02}q\x00." + b"\0" * 60, "is a pickle"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(sd15: Architecture, tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        formats.read(path, sd15)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_over_the_limits_is_not_read(sd15: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a.safetensors"
    path.write_bytes(_header({}))
    os.truncate(path, tensorfile.MAX_BYTES + 1)  # takes no room
    with pytest.raises(UserError, match=r"has 8\.6 GB, an adapter at most 8\.6 GB"):
        formats.read(path, sd15)
    path.write_bytes((tensorfile._MAX_HEADER + 1).to_bytes(8, "little"))
    os.truncate(path, tensorfile._MAX_HEADER + 100)
    with pytest.raises(UserError, match=r"its header has 33554433 bytes, an adapter's at most 33554432"):
        formats.read(path, sd15)
    monkeypatch.setattr(tensorfile, "MAX_TENSORS", 2)
    save_file(_one(), path)
    with pytest.raises(UserError, match=r"has 3 tensors, an adapter at most 2"):
        formats.read(path, sd15)


def test_a_pipe_or_a_folder_is_refused_without_blocking(sd15: Architecture, tmp_path: Path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is no file"):
        formats.read(tmp_path / "a.safetensors", sd15)
    with pytest.raises(UserError, match="is no file"):
        formats.read(tmp_path, sd15)
    for ending in ("bin", "CKPT", "pkl", "pt"):
        with pytest.raises(UserError, match="is a pickle, which can run any code"):
            formats.read(tmp_path / f"a.{ending}", sd15)


@pytest.mark.parametrize("place", [".", "peft"])
def test_pefts_own_folder_is_an_adapter(sd15: Architecture, tmp_path: Path, place: str):
    folder = tmp_path / place
    folder.mkdir(exist_ok=True)
    save_file(_peft("base_model.model."), folder / peft_settings.WEIGHTS)
    (folder / peft_settings.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    found = open_adapter(str(folder), Places(tmp_path / "cache"))
    assert formats.read(found.weights, sd15).layers[QUERY].alpha == 8
    assert styled.weights_of("a", _styled_by(folder)) == found.weights


def test_pefts_file_without_its_settings_has_no_strength(tmp_path: Path):
    save_file(_peft("base_model.model."), tmp_path / peft_settings.WEIGHTS)
    with pytest.raises(UserError, match=r"adapter_config\.json: no such file; it has the alpha of .*adapter_model\.s"):
        formats.read(tmp_path / peft_settings.WEIGHTS)


def test_another_programs_config_beside_a_file_does_not_matter(tmp_path: Path):
    save_file(_peft(), tmp_path / "style.safetensors")
    for content in ("[1]", "{", '{"base": {"digest": 5}}'):
        (tmp_path / "config.json").write_text(content)
        found = open_adapter(str(tmp_path / "style.safetensors"), Places(tmp_path / "cache"))
        assert (found.base, found.sampler) == (None, None)


def test_a_name_that_no_file_can_have_is_refused_in_one_line(tmp_path: Path):
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(UserError):
            open_adapter(name, Places(tmp_path))


def _styled_by(folder: Path) -> Base:
    style = {"source": str(folder), "weight": 1.0}
    return Base.model_validate({"source": "x", "resolution": 16, "license": "mit", "style": style})


def test_a_trainers_folder_of_one_adapter_is_read_and_of_several_their_names_are_listed(tmp_path: Path):
    save_file(_one(), tmp_path / "mine.safetensors")
    (tmp_path / "sample").mkdir()
    (tmp_path / "mine.json").write_text("{}")

    def found() -> Path:
        return open_adapter(str(tmp_path), Places(tmp_path / "cache")).weights

    assert found() == tmp_path / "mine.safetensors"
    shutil.copy(tmp_path / "mine.safetensors", tmp_path / "mine-000002.safetensors")
    with pytest.raises(UserError, match=r"has 2 safetensors files; name the one that is meant: mine-000002.*, mine\.s"):
        found()
    (tmp_path / "checkpoint-500").mkdir()
    for name in ("mine.safetensors", "mine-000002.safetensors"):
        (tmp_path / name).rename(tmp_path / "checkpoint-500" / name)
    with pytest.raises(UserError, match=r"name the one that is meant: checkpoint-500/mine-000002"):
        found()
    save_file(_peft(), tmp_path / lora.WEIGHTS)  # diffusers' trainer keeps the last beside its checkpoints
    assert found() == tmp_path / lora.WEIGHTS


def test_the_error_about_a_folder_without_an_adapter_says_what_it_is(tmp_path: Path, miniatures: Miniatures):
    with pytest.raises(UserError, match=r"is not the folder of an adapter: expected pytorch_lora_weights"):
        open_adapter(str(tmp_path), Places(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"is a base .*, not an adapter"):
        open_adapter(str(miniatures("sd15")), Places(tmp_path / "cache"))
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(UserError, match=r"has no safetensors file; .*pytorch_lora_weights\.bin: is a pickle"):
        open_adapter(str(tmp_path), Places(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ("[" * 3000, "nested too deeply"),
        ("[1]", "expected an object"),
        ('{"base": {}, "model": 3}', "model: expected a text, got 3"),
        ('{"base": {"digest": 5}}', "base.digest: expected a text, got 5"),
        ('{"base": {}, "resolution": "512"}', "resolution: expected pixels"),
        ('{"base": {}, "kohya": [1]}', "kohya: expected an object"),
        ('{"base": {}, "params": {"distill": 4}}', "params.distill: expected an object"),
        ('{"base": {}, "sampler": [1]}', "sampler: expected an object"),
        ('{"base": {}, "sampler": {"grid": "50"}}', "expected 1 to 1000 timesteps, got '50'"),
        ('{"base": {}, "sampler": {"gamma": 4}}', "gamma: expected 0 to 1, got 4"),
        ('{"base": {}, "sampler": {"scheduler": null}}', "scheduler: expected a name, got None"),
        ('{"base": {}, "sampler": {"eta": 1}}', "does not know 'eta'"),
    ],
)
def test_facts_beside_an_adapter_are_checked(tmp_path: Path, facts: str, words: str):
    save_file(_peft(), tmp_path / lora.WEIGHTS)
    (tmp_path / "config.json").write_text(facts)
    with pytest.raises(UserError) as caught:
        open_adapter(str(tmp_path), Places(tmp_path / "cache"))
    assert words in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
