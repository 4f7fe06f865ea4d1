"""Bases fetched: linked, downloaded, and refused where something is in the way."""

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub.utils import filter_repo_objects

from lcmlora.bases import fetching
from lcmlora.config import Base
from lcmlora.errors import Unavailable, UserError
from tests.support.miniature import RESOLUTION, save_base
from tests.support.together import at_once


def _settings(source: str | Path) -> Base:
    return Base(source=str(source), resolution=RESOLUTION, license="mit")


def test_fetch_links_a_local_folder_once_and_follows_a_change(base_folder: Path, tmp_path: Path):
    root = tmp_path / "bases"
    for _ in range(2):
        folder = fetching.fetch("mine", _settings(base_folder), root)
    assert folder == root / "mine" and folder.resolve() == base_folder.resolve()
    other = save_base(tmp_path / "other")
    assert fetching.fetch("mine", _settings(other), root).resolve() == other.resolve()


def _fetched(base_folder: Path, root: Path) -> Path:
    return fetching.fetch("mine", _settings(base_folder), root).resolve()


@pytest.mark.slow
def test_twelve_processes_fetch_one_base(base_folder: Path, tmp_path: Path):
    root = tmp_path / "bases"
    assert at_once(_fetched, base_folder, root) == [base_folder.resolve()] * 12
    assert not list(root.glob(".mine*"))


def test_fetch_never_replaces_a_folder_in_the_way_of_a_link(base_folder: Path, tmp_path: Path):
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match="is in the way of the link"):
        fetching.fetch("mine", _settings(base_folder), tmp_path / "bases")


def test_fetch_requires_a_pinned_revision_of_a_hub_id_and_an_existing_folder(tmp_path: Path):
    with pytest.raises(UserError, match="some/model is a hub id and needs a pinned commit"):
        fetching.fetch("mine", _settings("some/model"), tmp_path)
    with pytest.raises(UserError, match=r"nowhere: no such base folder"):
        fetching.fetch("mine", _settings("./nowhere"), tmp_path)


def _hub(revision: str) -> Base:
    return Base(source="some/base", revision=revision, resolution=RESOLUTION, license="mit")


def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_an_incomplete_download_is_refused_and_can_be_repeated(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _offline(monkeypatch)  # the hub's client takes what is there
    settings, target = _hub("a" * 40), tmp_path / "mine"
    with pytest.raises(Unavailable, match=r"bases.mine: cannot download some/base at aaaa"):
        fetching.fetch("mine", settings, tmp_path)
    assert not target.exists()
    shutil.copytree(base_folder, target)
    (tmp_path / ".mine.begun").write_text(f"some/base@{'a' * 40} \n")
    tokenizer = target / "tokenizer" / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=r"or what arrived of it, is no base .*/tokenizer: has no vocab\.json and"):
            fetching.fetch("mine", settings, tmp_path)
    tokenizer.write_bytes(content)
    assert fetching.fetch("mine", settings, tmp_path) == target
    assert fetching.fetch("mine", settings, tmp_path) == target and not (tmp_path / ".mine.begun").exists()


@pytest.mark.parametrize("marker", ["mine/.revision", ".mine.begun"])
def test_files_of_another_revision_are_not_taken_for_the_requested_one(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str
):
    _offline(monkeypatch)
    shutil.copytree(base_folder, tmp_path / "mine")
    (tmp_path / marker).write_text(f"some/base@{'a' * 40} \n")
    with pytest.raises(Unavailable, match="cannot download some/base at bbbb"):
        fetching.fetch("mine", _hub("b" * 40), tmp_path)


def test_fetch_never_replaces_a_folder_in_the_way_of_a_download(base_folder: Path, tmp_path: Path):
    shutil.copytree(base_folder, tmp_path / "mine")
    with pytest.raises(UserError, match="is in the way of the download of some/base"):
        fetching.fetch("mine", _hub("a" * 40), tmp_path)
    assert (tmp_path / "mine" / "unet" / "config.json").is_file()


CONFIGS = ["model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"]
TOKENIZER = ["merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json"]
HUB = {
    "sd15": [
        *CONFIGS,
        *(f"tokenizer/{file}" for file in TOKENIZER),
        "feature_extractor/preprocessor_config.json",
        "text_encoder/config.json",
        "safety_checker/config.json",
        *(f"safety_checker/{f}" for f in ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")),
        *(f"text_encoder/{f}" for f in ("model.safetensors", "model.fp16.safetensors", "pytorch_model.fp16.bin")),
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        *(f"{part}/diffusion_pytorch_model{v}.safetensors" for part in ("unet", "vae") for v in ("", ".fp16")),
        *("v1-5-pruned-emaonly.ckpt", "v1-5-pruned-emaonly.safetensors", "v1-5-pruned.safetensors", "README.md"),
    ],
    "sd21": [
        *CONFIGS,
        *(f"tokenizer/{file}" for file in TOKENIZER),
        "feature_extractor/preprocessor_config.json",
        "text_encoder/config.json",
        *(f"text_encoder/{f}" for f in ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")),
        *(f"{part}/diffusion_pytorch_model{v}.safetensors" for part in ("unet", "vae") for v in ("", ".fp16")),
        *("v2-1_768-ema-pruned.ckpt", "v2-1_768-ema-pruned.safetensors", "v2-1_768-nonema-pruned.safetensors"),
    ],
    "sdxl": [
        *CONFIGS,
        *(f"tokenizer{n}/{file}" for n in ("", "_2") for file in TOKENIZER),
        *(f"text_encoder{n}/config.json" for n in ("", "_2")),
        *(f"text_encoder{n}/model{v}.safetensors" for n in ("", "_2") for v in ("", ".fp16")),
        *(
            f"text_encoder{n}/{f}"
            for n in ("", "_2")
            for f in ("model.onnx", "openvino_model.bin", "flax_model.msgpack")
        ),
        *("text_encoder_2/model.onnx_data", "unet/model.onnx", "unet/model.onnx_data", "unet/openvino_model.xml"),
        *(f"{p}/diffusion_pytorch_model{v}.safetensors" for p in ("unet", "vae", "vae_1_0") for v in ("", ".fp16")),
        *(f"vae_{part}/{f}" for part in ("decoder", "encoder") for f in ("config.json", "model.onnx")),
        *("vae_1_0/config.json", "sd_xl_base_1.0.safetensors", "sd_xl_base_1.0_0.9vae.safetensors"),
        *("sd_xl_offset_example-lora_1.0.safetensors", "LICENSE.md", "files.txt", "01.png"),
    ],
    "ssd1b": [
        *CONFIGS,
        *(f"tokenizer{n}/{file}" for n in ("", "_2") for file in (*TOKENIZER, "added_tokens.json")),
        *(f"text_encoder{n}/config.json" for n in ("", "_2")),
        *(f"text_encoder{n}/model{v}.safetensors" for n in ("", "_2") for v in ("", ".fp16")),
        *(f"{part}/diffusion_pytorch_model{v}.safetensors" for part in ("unet", "vae") for v in ("", ".fp16")),
        *("SSD-1B.safetensors", "SSD-1B-A1111.safetensors", "README.md"),
    ],
}


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("preset", HUB)
def test_a_download_is_the_pipelines_parts_in_one_precision(preset: str, variant: str | None):
    files = list(filter_repo_objects(HUB[preset], allow_patterns=fetching.download_patterns(variant)))
    ending = f".{variant}.safetensors" if variant else ".safetensors"
    expected = {"unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"}
    if preset in ("sdxl", "ssd1b"):
        expected.add("text_encoder_2/model")
    assert {file for file in files if file.endswith(".safetensors")} == {stem + ending for stem in expected}
    small = {file for file in files if not file.endswith(".safetensors")}
    assert small == {
        file
        for file in HUB[preset]
        if file.endswith((".json", ".txt")) and not file.startswith(("safety_checker", "vae_", "files"))
    }


def test_a_hub_that_does_not_answer_is_unavailable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    base = Base(source="team/base", revision="0" * 40, resolution=64, license="mit")
    with pytest.raises(Unavailable, match=r"^bases\.mine: the hub does not answer: "):
        fetching.base_state("mine", base)


def test_a_change_behind_a_link_changes_the_state_of_a_local_base(base_folder: Path, tmp_path: Path):
    folder, elsewhere = shutil.copytree(base_folder, tmp_path / "mine"), tmp_path / "elsewhere"
    (folder / "unet").rename(elsewhere)
    (folder / "unet").symlink_to(elsewhere)
    (elsewhere / "above").symlink_to(folder)  # which leads to itself
    before = fetching.base_state("mine", _settings(folder))
    assert fetching.base_state("mine", _settings(folder)) == before
    (elsewhere / "config.json").write_text("{}")
    assert fetching.base_state("mine", _settings(folder)) != before
