"""The examination of a base without faults: its forms, digests and records."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lcmlora import bases
from lcmlora.bases import fetching, folders
from lcmlora.bases.examination.examine import RECORDS, examine_base
from lcmlora.errors import UserError
from lcmlora.io.files import sha256_folder
from tests.support.base_changes import (
    INDEX,
    TEXT,
    TEXT_2,
    TOKENIZER,
    TOKENIZER_CONFIG,
    UNET,
    VAE,
    add_one,
    cast,
    change_tensors,
    change_tokenizer,
    remove,
    set_keys,
    set_last_number,
    settings_of,
    split_unet,
    split_vocabulary,
)
from tests.support.miniature import ARCHITECTURES, SDXL_FAMILY, save_base

Miniatures = Callable[[str], Path]


def _unused(folder: Path) -> None:
    """Adds files that repositories of the hub have and that are not loaded."""
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    (folder / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"")
    (folder / "safety_checker").mkdir()


def _positions(held: dict[str, torch.Tensor]) -> None:
    """Gives the tensors the names that transformers wrote before 4.31, with its buffer, as in the published SD-V1.5."""
    old = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in held.items()}
    held.clear()
    held.update(old | {"text_model.embeddings.position_ids": torch.arange(24)[None]})


def _old_attention(held: dict[str, torch.Tensor]) -> None:
    """Gives the tensors the names that diffusers wrote before 0.15, as in the published VAEs."""
    for name in [name for name in held if ".attentions.0." in name]:
        new = name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value")
        held[new.replace("to_out.0", "proj_attn")] = held.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        set_keys(
            INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], requires_safety_checker=True
        ),
        set_keys(INDEX, safety_checker=[None, None], requires_safety_checker=True),
        split_vocabulary,
        split_unet,
        _unused,
        change_tensors(TEXT, _positions),
        change_tensors(VAE, _old_attention),
        change_tensors(UNET, cast(torch.bfloat16)),
        change_tensors(VAE, lambda held: held.update({n: t.double() for n, t in held.items() if n.endswith("bias")})),
    ],
)
def test_the_other_forms_of_published_bases_are_accepted_and_load(mini: Path, change: Callable[[Path], Any]):
    change(mini)
    base = bases.load("mine", settings_of(mini), mini, device=torch.device("cpu"))
    assert base.network is not None and base.text_encoders
    assert all(p.isfinite().all() and not p.is_meta for m in (base.network, base.vae) for p in m.parameters())


@pytest.mark.parametrize("architecture", ("mini", *ARCHITECTURES))
def test_every_architecture_is_accepted_with_its_precision(miniatures: Miniatures, architecture: str):
    folder = miniatures(architecture)
    found = examine_base("mine", folder)
    assert found.unet_digest == sha256_folder(folder / "unet")
    parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if architecture in SDXL_FAMILY else [])]
    assert found.dtypes == dict.fromkeys(parts, "fp32")
    assert str(found) == f"{', '.join(f'{part} fp32' for part in parts)}; digest {found.digest[:12]}"


def test_a_part_of_several_precisions_has_all_of_them(mini: Path):
    change_tensors(UNET, lambda held: held.update({n: t.half() for n, t in held.items() if n.endswith("weight")}))(mini)
    assert examine_base("mine", mini).dtypes["unet"] == "fp16+fp32"


def test_the_error_is_the_first_fault_with_the_number_of_the_others(mini: Path):
    remove(VAE, TEXT)(mini)
    with pytest.raises(UserError, match=r"vae: has no .*\(the first of 2 faults\)$"):
        examine_base("mine", mini)


@pytest.mark.parametrize(
    "change",
    [
        *(change_tensors(file, add_one) for file in (UNET, VAE, TEXT, TEXT_2)),
        set_keys("unet/config.json", norm_eps=1e-3),
        set_keys("vae/config.json", scaling_factor=0.5),
        set_keys("scheduler/scheduler_config.json", prediction_type="v_prediction"),
        set_keys("scheduler/scheduler_config.json", beta_end=0.013),
        set_keys(TOKENIZER_CONFIG, model_max_length=20),
        set_keys(TOKENIZER_CONFIG, pad_token="<|startoftext|>"),
        change_tokenizer(lambda model: model["merges"].reverse()),
        set_keys(INDEX, force_zeros_for_empty_prompt=False),
    ],
)
def test_the_digest_changes_with_every_part_that_draws(
    sdxl: Path, miniatures: Miniatures, change: Callable[[Path], Any]
):
    before = examine_base("mine", miniatures("sdxl"))
    assert examine_base("mine", sdxl) == before  # a copy is the same base
    change(sdxl)
    after = examine_base("mine", sdxl)
    assert after.digest != before.digest
    assert (after.unet_digest == before.unet_digest) == (sha256_folder(sdxl / "unet") == before.unet_digest)


@pytest.mark.parametrize(
    "change",
    [
        set_keys(INDEX, _diffusers_version="0.99.0", safety_checker=[None, None]),
        set_keys("vae/config.json", _diffusers_version="0.99.0", new_option=None),
        set_keys("text_encoder/config.json", transformers_version="9.9.9", dtype="float16"),
        set_keys("scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        split_vocabulary,
        lambda folder: (folder / "README.md").write_text("More of it."),
        lambda folder: (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02"),
    ],
)
def test_the_digest_is_the_same_where_nothing_that_draws_has_changed(
    sdxl: Path, miniatures: Miniatures, change: Callable[[Path], Any]
):
    change(sdxl)
    assert examine_base("mine", sdxl).digest == examine_base("mine", miniatures("sdxl")).digest


def test_a_fetched_base_is_read_once_and_again_when_a_file_changes(mini: Path, tmp_path: Path):
    root = tmp_path / "bases"
    folder = fetching.fetch("mine", settings_of(mini), root)
    first, record = examine_base("mine", folder), root / RECORDS / "mine.json"
    recorded = json.loads(record.read_text())
    assert recorded["digest"] == first.digest
    # The record is believed while no file has changed: nothing is read again.
    record.write_text(json.dumps(recorded | {"digest": "kept"}))
    assert folders.identity(settings_of(mini), folder)["digest"] == "kept"
    loaded = bases.load("mine", settings_of(mini), folder, device=torch.device("cpu"), parts=())
    assert loaded.examination.digest == "kept"
    change_tensors(VAE, add_one)(mini)
    assert folders.identity(settings_of(mini), folder)["digest"] not in ("kept", first.digest)
    assert json.loads(record.read_text())["digest"] not in ("kept", first.digest)
    # A damaged record and one of another version are written again.
    for damaged in ("{", json.dumps(recorded | {"version": 1, "digest": "kept"})):
        record.write_text(damaged)
        assert examine_base("mine", folder).digest == json.loads(record.read_text())["digest"] != "kept"
    assert examine_base("mine", folder).unet_digest == first.unet_digest
    change_tensors(VAE, set_last_number(float("nan")))(mini)
    with pytest.raises(UserError, match="not finite"):
        bases.load("mine", settings_of(mini), folder, device=torch.device("cpu"), parts=())


def test_a_base_that_was_never_fetched_is_examined_without_a_record(mini: Path):
    change_tensors(TEXT, set_last_number(float("nan")))(mini)
    with pytest.raises(UserError, match="not finite"):
        bases.load("mine", settings_of(mini), mini, device=torch.device("cpu"), parts=("network",))
    assert [path.name for path in mini.parent.iterdir()] == ["mini"]


def test_a_faulty_base_is_not_linked(mini: Path, tmp_path: Path):
    remove(TOKENIZER)(mini)
    with pytest.raises(UserError, match=r"tokenizer: has no vocab\.json and merges\.txt"):
        fetching.fetch("mine", settings_of(mini), tmp_path / "bases")
    assert not (tmp_path / "bases" / "mine").exists()


def test_the_error_about_a_folder_that_is_no_base_says_what_it_seems_to_be(mini: Path, tmp_path: Path):
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    (tmp_path / "hub" / "snapshots").mkdir(parents=True)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "dreams.safetensors").touch()
    (mini / "transformer").mkdir()
    remove("unet")(mini)
    for path, message in {
        tmp_path / "base.gguf": "is a file; expected a diffusers folder, or a checkpoint that ends in .safetensors",
        tmp_path / "hub": "it is a repository in the hub's cache: name the folder of a commit below its snapshots/",
        tmp_path / "whole": "if dreams.safetensors is the whole checkpoint, set source to that file",
        tmp_path: "name .*mini, which has one",
        mini: r"its network is a transformer \(as Flux, SD3 or PixArt\)",
    }.items():
        with pytest.raises(UserError, match=message):
            fetching.fetch("mine", settings_of(path), tmp_path / "bases")
    with pytest.raises(UserError, match="is a pickle"):
        fetching.fetch("mine", settings_of(Path("MODEL.CKPT")), tmp_path / "bases")


def test_a_variant_is_examined_in_its_own_files(mini: Path, tmp_path: Path):
    half = save_base(tmp_path / "half", variant="fp16")
    for path in half.rglob("*.fp16.safetensors"):
        shutil.copyfile(path, mini / path.relative_to(half))
    plain, fp16 = examine_base("mine", mini), examine_base("mine", mini, "fp16")
    assert fp16.digest == examine_base("mine", half, "fp16").digest != plain.digest
    assert (plain.dtypes["unet"], fp16.dtypes["unet"]) == ("fp32", "fp16")
    assert (folders.variant(mini), folders.variant(half)) == (None, "fp16")
    with pytest.raises(UserError, match=r"bases.mine.variant: .*/unet has .*fp16.safetensors alone; set the key"):
        examine_base("mine", half)


def test_shards_of_a_variant_need_the_key(mini: Path):
    split_unet(mini, "fp16")
    with pytest.raises(UserError, match=r"bases.mine.variant: .*/unet has .*fp16-0.* alone; set the key"):
        examine_base("mine", mini)
