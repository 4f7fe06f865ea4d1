"""Bases with faults, each of which somebody had; none may be drawn or distilled with."""

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from lcmlora import bases
from lcmlora.bases import fetching, folders
from lcmlora.bases.examination import examine, structure
from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.io.files import sha256_folder
from tests.support.fuzzing import FULL, QUICK, check, mutated
from tests.support.miniature import ARCHITECTURES, RESOLUTION, SDXL_FAMILY, save_base

Miniatures = Callable[[str], Path]
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT, TEXT_2 = "text_encoder/model.safetensors", "text_encoder_2/model.safetensors"
INDEX, TOKENIZER, TOKENIZER_CONFIG = "model_index.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"


def _settings(source: Path, **changes: object) -> Base:
    return Base.model_validate({"source": str(source), "resolution": RESOLUTION, "license": "mit"} | changes)


@pytest.fixture
def mini(base_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base_folder, tmp_path / "mini")


@pytest.fixture
def sdxl(miniatures: Miniatures, tmp_path: Path) -> Path:
    return shutil.copytree(miniatures("sdxl"), tmp_path / "sdxl")


def _set(file: str, **changes: object) -> Callable[[Path], None]:
    """Returns what changes keys of a JSON file of a base."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _remove(*paths: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for path in paths:
            shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return change


def _write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content) and None


def _cut(file: str, bytes_less: int) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / file, (folder / file).stat().st_size - bytes_less)


def _tensors(file: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Returns what changes the tensors of a file of a base."""

    def apply(folder: Path) -> None:
        held = load_file(folder / file)
        change(held)
        save_file(held, folder / file)

    return apply


def _first(value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    """Returns what sets one number in the last tensor."""
    return lambda held: held[max(held)].view(-1)[-1:].fill_(value)


def _cast(dtype: torch.dtype) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda held: held.update({name: tensor.to(dtype) for name, tensor in held.items()})


def _vocabulary(folder: Path, part: str = "tokenizer") -> None:
    """Writes vocab.json and merges.txt for the tokenizer.json, as transformers before 5 does."""
    model = json.loads((folder / part / "tokenizer.json").read_text())["model"]
    (folder / part / "vocab.json").write_text(json.dumps(model["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"])]
    (folder / part / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / part / "tokenizer.json").unlink()


def _without(*files: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        _vocabulary(folder)
        _remove(*(f"tokenizer/{file}" for file in files))(folder)

    return change


def _vocabulary_of(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Returns what changes the model in tokenizer.json."""

    def apply(folder: Path) -> None:
        read = json.loads((folder / TOKENIZER).read_text())
        change(read["model"])
        (folder / TOKENIZER).write_text(json.dumps(read))

    return apply


def _pickled(part: str) -> Callable[[Path], None]:
    """Returns what makes the weights of a part a pickle that leaves a mark if anybody reads it."""

    class Mark:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("unpickled",)

    def change(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        stem = "pytorch_model" if file.name.startswith("model") else "diffusion_pytorch_model"
        file.unlink()
        torch.save(Mark(), folder / part / f"{stem}.bin")

    return change


def _sharded(folder: Path, variant: str | None = None) -> None:
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet", max_shard_size="100KB", variant=variant)


def _shards(change: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        _sharded(folder)
        change(folder / "unet")

    return apply


SECOND_SHARD = "diffusion_pytorch_model-00002-of-*.safetensors"
SHARDS = "diffusion_pytorch_model.safetensors.index.json"


def _weight_map(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def apply(unet: Path) -> None:
        read = json.loads((unet / SHARDS).read_text())
        change(read["weight_map"])
        (unet / SHARDS).write_text(json.dumps(read))

    return apply


def _link(file: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to("/nowhere/blobs/0123")

    return apply


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"
HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'

FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    # model_index.json
    "no index": (_remove(INDEX), "needs model_index.json, and there is none"),
    "index is a list": (_write(INDEX, b"[]"), "model_index.json: expected an object"),
    "index is cut": (_cut(INDEX, 40), "model_index.json: not JSON"),
    "flux": (_set(INDEX, _class_name="FluxPipeline"), "_class_name is 'FluxPipeline'; expected StableDiffusionPip"),
    "sd3": (_set(INDEX, _class_name="StableDiffusion3Pipeline"), "_class_name is 'StableDiffusion3Pipeline'; expected"),
    "no class": (_set(INDEX, _class_name=None), "_class_name is 'None'; expected StableDiffusionPipeline or"),
    "inpainting": (_set(INDEX, _class_name="StableDiffusionInpaintPipeline"), "'.*'; .*; this one is for inpainting"),
    "lcm": (_set(INDEX, _class_name="LatentConsistencyModelPipeline"), "this one is distilled already"),
    "refiner": (_set(INDEX, requires_aesthetics_score=True), "this is SDXL's refiner"),
    "unknown part": (
        _set(INDEX, transformer=["diffusers", "DiT"]),
        r"names the part transformer \(DiT\), which Stable",
    ),
    "unet null": (_set(INDEX, unet=[None, None]), "unet is null, and StableDiffusionPipeline draws with it"),
    "vae unnamed": (_set(INDEX, vae=None), "vae is null, and StableDiffusionPipeline draws with it"),
    "tiny vae": (_set(INDEX, vae=["diffusers", "AutoencoderTiny"]), "vae is 'AutoencoderTiny'; expected AutoencoderKL"),
    "t5": (
        _set(INDEX, text_encoder=["transformers", "T5EncoderModel"]),
        "text_encoder is 'T5Enc.*'; expected CLIPText",
    ),
    "t5 words": (
        _set(INDEX, tokenizer=["transformers", "T5Tokenizer"]),
        "tokenizer is 'T5Tokenizer'; expected CLIPTok",
    ),
    "a number": (_set(INDEX, unet=7), "unet is 7, and Stable"),
    # configurations
    "other unet": (
        _set("unet/config.json", _class_name="UNetMotionModel"),
        "_class_name is 'UNetMotionModel'; expected",
    ),
    "other vae": (_set("vae/config.json", _class_name="AutoencoderTiny"), "_class_name is 'AutoencoderTiny'; expected"),
    "guided lcm": (_set("unet/config.json", time_cond_proj_dim=256), "time_cond_proj_dim is 256.*distilled already"),
    "inpainting unet": (_set("unet/config.json", in_channels=9), "in_channels is 9 and the VAE's latents have 4"),
    "learned sigma": (_set("unet/config.json", out_channels=8), "out_channels is 8 and the VAE's latents have 4"),
    "upscaler": (_set("unet/config.json", num_class_embeds=1000), "num_class_embeds is 1000: .* class labels"),
    "kandinsky": (_set("unet/config.json", addition_embed_type="text"), "addition_embed_type is 'text'; expected null"),
    "sdxl unet": (
        _set("unet/config.json", addition_embed_type="text_time"),
        "'text_time', and the base has 1 text enc",
    ),
    "other text": (
        _set("unet/config.json", cross_attention_dim=20),
        "cross_attention_dim is 20, and the text encoders g",
    ),
    "wider": (_set("unet/config.json", block_out_channels=[8, 24]), r"has shape \(\d.*\), and by its config.json \(\d"),
    "deeper": (_set("unet/config.json", layers_per_block=2), r"unet: lacks \d+ tensors of its configuration: down_blo"),
    "shallower": (
        _set("vae/config.json", layers_per_block=0),
        r"vae: has \d+ tensors that its config.json has no place",
    ),
    "endless": (
        _set("unet/config.json", layers_per_block=10**7),
        "layers_per_block and transformer_layers_per_block mak",
    ),
    "endless text": (
        _set("text_encoder/config.json", num_hidden_layers=10**7),
        "num_hidden_layers is 10000000; expected",
    ),
    "huge": (
        _set("unet/config.json", block_out_channels=[10**12, 8]),
        "block_out_channels is 1000000000000, out of all",
    ),
    "no blocks": (_set("unet/config.json", block_out_channels=[]), "block_out_channels: expected a list"),
    "unknown block": (
        _set("unet/config.json", mid_block_type="Mine"),
        "no UNet2DConditionModel can be built from it: Va",
    ),
    "quantised": (
        _set("unet/config.json", quantization_config={"bits": 4}),
        "quantization_config is set: quantised weig",
    ),
    "flow vae": (_set("vae/config.json", shift_factor=0.1), "shift_factor is set"),
    "no scale": (_set("vae/config.json", scaling_factor=0), "scaling_factor is 0; expected a positive number"),
    "bert": (
        _set("text_encoder/config.json", model_type="bert"),
        "model_type is 'bert'; expected a text encoder of CL",
    ),
    "activation": (
        _set("text_encoder/config.json", hidden_act="mine"),
        "no CLIPTextModel can be built from it: KeyErr",
    ),
    # schedule
    "flow": (
        _write("scheduler/scheduler_config.json", b'{"shift": 3.0}'),
        "has no beta_schedule; expected a diffusion",
    ),
    "no schedule": (_remove("scheduler/scheduler_config.json"), "scheduler_config.json: No such file"),
    "odd betas": (
        _set("scheduler/scheduler_config.json", beta_schedule="mine"),
        "cannot make a schedule of it: NotImpl",
    ),
    "negative": (_set("scheduler/scheduler_config.json", beta_end=-1), "cannot make a schedule of it"),
    "rising": (_set("scheduler/scheduler_config.json", trained_betas=[-1e-3] * 1000), "its betas are no schedule"),
    "endless t": (
        _set("scheduler/scheduler_config.json", num_train_timesteps=10**9),
        "num_train_timesteps is 1000000000",
    ),
    "odd target": (
        _set("scheduler/scheduler_config.json", prediction_type="flow"),
        "prediction_type is 'flow'; expecte",
    ),
    # tokenizers
    "no vocabulary": (_remove(TOKENIZER), "tokenizer: has no vocab.json and merges.txt, and no .*the same tokens"),
    "empty tokenizer": (
        _remove(TOKENIZER, TOKENIZER_CONFIG),
        "tokenizer: has no vocab.json and merges.txt, and no tok",
    ),
    "no merges": (
        _without("merges.txt"),
        "tokenizer: has no merges.txt, and no tokenizer.json that would hold them; ge",
    ),
    "merges alone": (_without("vocab.json"), "tokenizer: has no vocab.json, and no tokenizer.json"),
    "no length": (_remove(TOKENIZER_CONFIG), "tokenizer: has no tokenizer_config.json, which tells how many tokens"),
    "length unset": (_set(TOKENIZER_CONFIG, model_max_length=None), "model_max_length is None; expected the 24 tokens"),
    "too long": (_set(TOKENIZER_CONFIG, model_max_length=77), "model_max_length is 77; expected the 24 tokens"),
    "huge length": (
        _set(TOKENIZER_CONFIG, model_max_length=10**30),
        "model_max_length is 1000.*; expected the 24 tokens",
    ),
    "t5 class": (
        _set(TOKENIZER_CONFIG, tokenizer_class="T5Tokenizer"),
        "tokenizer_class is 'T5Tokenizer'; expected CLI",
    ),
    "empty merges": (_vocabulary_of(lambda m: m.update(merges=[])), "has an empty vocabulary or no merges"),
    "cut vocabulary": (
        _vocabulary_of(lambda m: m.update(vocab=dict(list(m["vocab"].items())[:300]))),
        "merges name '.*', which the vocabulary does not have",
    ),
    "small vocabulary": (
        _vocabulary_of(lambda m: m.update(vocab=dict(list(m["vocab"].items())[:256]), merges=[["a", "b</w>"]])),
        "merges name|has a vocabulary of|cannot read it",
    ),
    "larger vocabulary": (
        _set("text_encoder/config.json", vocab_size=400),
        r"goes up to token 528, and the text encoder's embedding has 400 rows",
    ),
    "other vocabulary": (
        _set("text_encoder/config.json", vocab_size=49408),
        r"has a vocabulary of 529 tokens, and the text encoder's embedding 49408 rows",
    ),
    "word pieces": (_vocabulary_of(lambda m: m.update(type="WordPiece")), r"expected the byte-pair encoding"),
    "tokenizer lfs": (_write(TOKENIZER, LFS), "tokenizer.json: is a Git LFS pointer and not the file; run `git lfs pu"),
    "tokenizer html": (_write(TOKENIZER, b"<html>404</html>"), "tokenizer.json: not JSON"),
    # weights
    "no weights": (_remove(VAE), "vae: has no diffusion_pytorch_model.safetensors; get the base again"),
    "lfs": (_write(UNET, LFS), "unet/.* is a Git LFS pointer and not the weights; run `git lfs pull`"),
    "lfs text": (_write(TEXT, LFS), "text_encoder/model.safetensors: is a Git LFS pointer"),
    "empty file": (_write(UNET, b""), "unet/.*: is empty; get it again"),
    "html": (_write(VAE, b"<!DOCTYPE html><title>Sign in</title>"), "vae/.*: is a web page and not weights"),
    "cut": (_cut(UNET, 1000), "unet/.*: its header is damaged: the file is cut: its tensors end at"),
    "longer": (lambda f: (f / UNET).open("ab").write(b"more"), "the file is longer: its tensors end at"),
    "header": (_write(VAE, struct.pack("<Q", 10**15) + b"{}"), "vae/.*: is not a readable safetensors file, or is cut"),
    "hole": (
        _write(VAE, struct.pack("<Q", len(HEADER)) + HEADER.replace(b"[0,4]", b"[4,8]") + b"\0" * 8),
        "a does not begin where the tensor before it ends",
    ),
    "shape": (
        _write(VAE, struct.pack("<Q", len(HEADER)) + HEADER.replace(b"[1]", b"[2]") + b"\0" * 4),
        r"F32 of shape \[2\] does not fill its bytes",
    ),
    "renamed pickle": (lambda f: torch.save({}, f / VAE), "is a pickle under another name"),
    "nan": (_tensors(UNET, _first(float("nan"))), "unet/.*: up_blocks.* has numbers that are not finite"),
    "inf in vae": (_tensors(VAE, _first(float("-inf"))), "vae/.*: quant_conv.* has numbers that are not finite"),
    "nan in text": (_tensors(TEXT, _first(float("nan"))), "text_encoder/.* has numbers that are not finite"),
    "zeros": (
        _tensors(UNET, lambda held: [t.zero_() for name, t in held.items() if name.startswith("up_blocks")]),
        r"unet/.*: \d+ of the \d+ bytes of its weights are zeros, as in a file whose download was not finished",
    ),
    "fp8": (_tensors(UNET, _cast(torch.float8_e4m3fn)), "is F8_E4M3: fp8 weights are not distilled; get the base in"),
    "int8": (_tensors(VAE, _cast(torch.int8)), "is I8: quantised weights are not distilled"),
    "lost tensor": (_tensors(TEXT, lambda held: held.pop(max(held))), "text_encoder: lacks a tensor of its configur"),
    "lost in unet": (_tensors(UNET, lambda held: held.pop("conv_in.bias")), "unet: lacks a tensor .*: conv_in.bias"),
    "more": (
        _tensors(VAE, lambda held: held.update(x=torch.zeros(1))),
        "vae: has a tensor that its config.json has no",
    ),
    "pickle": (_pickled("unet"), "unet: has diffusion_pytorch_model.bin and no .*; that is a pickle"),
    "pickled text": (_pickled("text_encoder"), "text_encoder: has pytorch_model.bin and no .*; that is a pickle"),
    "half a download": (
        lambda f: (f / UNET).rename(f / f"{UNET}.incomplete"),
        r"unet: has .*\.incomplete, a download that was not finished",
    ),
    "flax": (lambda f: (f / VAE).rename(f / "vae/diffusion_flax_model.msgpack"), "vae: has no .*, but diffusion_flax"),
    "lost blob": (_link(UNET), "unet/.*: is a link to nothing"),
    "lost vocabulary blob": (_link(TOKENIZER), "tokenizer/tokenizer.json: is a link to nothing"),
    "pipe": (lambda f: (_remove(VAE)(f), os.mkfifo(f / VAE)), "vae/.*: not an ordinary file"),
    "pipe as text": (
        lambda f: (_remove(TOKENIZER)(f), os.mkfifo(f / TOKENIZER)),
        "tokenizer/tokenizer.json: not an ordinary file",
    ),
    # shards
    "no shard": (_shards(lambda u: next(u.glob(SECOND_SHARD)).unlink()), r"the shard .*-00002-.* is missing \(\d+ of"),
    "no index of shards": (_shards(lambda u: (u / SHARDS).unlink()), "unet: has shards and no diffusion_pytorch_model"),
    "cut shard": (
        _shards(lambda u: os.truncate(p := next(u.glob(SECOND_SHARD)), p.stat().st_size - 1)),
        "-00002-of-.*: its header is damaged: the file is cut",
    ),
    "empty map": (_shards(_weight_map(lambda m: m.clear())), "weight_map is empty"),
    "outside": (_shards(_weight_map(lambda m: m.update(a="../../vae/x.safetensors"))), "weight_map names '../../vae/x"),
    "listed": (
        _shards(_weight_map(lambda m: m.update({"a.bias": m["conv_in.bias"]}))),
        "lacks a.bias, which the index says it has",
    ),
    "unlisted": (_shards(_weight_map(lambda m: m.pop("conv_in.bias"))), "does not list conv_in.bias, which"),
}

SDXL_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer_2": (_remove("tokenizer_2"), "names tokenizer_2, and there is no tokenizer_2/"),
    "no text_encoder_2": (_remove("text_encoder_2"), "names text_encoder_2, and there is no text_encoder_2/"),
    "text_encoder_2 null": (_set(INDEX, text_encoder_2=[None, None]), "text_encoder_2 is null, and StableDiffusionXL"),
    "tokenizer_2 unnamed": (_set(INDEX, tokenizer_2=None), "tokenizer_2 is null, and StableDiffusionXL"),
    "text_encoder null": (_set(INDEX, text_encoder=[None, None]), "text_encoder is null, and StableDiffusionXL"),
    "second without projection": (
        _set(INDEX, text_encoder_2=["transformers", "CLIPTextModel"]),
        "text_encoder_2 is 'CLIPTextModel'; expected CLIPTextModelWithProjection",
    ),
    "no projection": (_tensors(TEXT_2, lambda held: held.pop("text_projection.weight")), "text_encoder_2: lacks a ten"),
    "no vocabulary": (_remove("tokenizer_2/tokenizer.json"), "tokenizer_2: has no vocab.json and merges.txt"),
    "first as second": (
        lambda f: (shutil.rmtree(f / "text_encoder_2"), shutil.copytree(f / "text_encoder", f / "text_encoder_2")),
        "cross_attention_dim is 40, and the text encoders give 32",
    ),
    "no end of text": (_set("text_encoder_2/config.json", eos_token_id=7), "ends a text with token 528, and the text"),
    "refiner": (_set("unet/config.json", addition_time_embed_dim=200), "projection_class_embeddings_input_dim is"),
    "plain unet": (
        _set("unet/config.json", addition_embed_type=None),
        "addition_embed_type is None, and the base has 2",
    ),
    "nan": (_tensors(TEXT_2, _first(float("nan"))), "text_encoder_2/.* has numbers that are not finite"),
    "named as sd": (_set(INDEX, _class_name="StableDiffusionPipeline"), "names the part text_encoder_2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_the_file(mini: Path, fault: str):
    change, message = FAULTS[fault]
    change(mini)
    with pytest.raises(UserError, match=message) as caught:
        examine.examine("mine", mini)
    assert "\n" not in str(caught.value) and str(mini) in str(caught.value)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("fault", SDXL_FAULTS)
def test_a_fault_of_sdxls_own_parts_is_one_line(sdxl: Path, fault: str):
    change, message = SDXL_FAULTS[fault]
    change(sdxl)
    with pytest.raises(UserError, match=message) as caught:
        examine.examine("mine", sdxl)
    assert "\n" not in str(caught.value)


def _unused(folder: Path) -> None:
    """What lies in repositories of the hub besides what is loaded."""
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"\x80\x02")
    (folder / "unet/diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"")
    (folder / "safety_checker").mkdir()


def _positions(held: dict[str, torch.Tensor]) -> None:
    """Names and tensors of the published SD-V1.5, which transformers wrote before 4.31."""
    old = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in held.items()}
    held.clear()
    held.update(old | {"text_model.embeddings.position_ids": torch.arange(24)[None]})


def _old_attention(held: dict[str, torch.Tensor]) -> None:
    """Names of diffusers before 0.15, which the published VAEs have."""
    for name in [name for name in held if ".attentions.0." in name]:
        new = name.replace("to_q", "query").replace("to_k", "key").replace("to_v", "value")
        held[new.replace("to_out.0", "proj_attn")] = held.pop(name)


@pytest.mark.parametrize(
    "change",
    [
        _set(INDEX, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"], requires_safety_checker=True),
        _set(INDEX, safety_checker=[None, None], requires_safety_checker=True),
        _vocabulary,
        _sharded,
        _unused,
        _tensors(TEXT, _positions),
        _tensors(VAE, _old_attention),
        _tensors(UNET, _cast(torch.bfloat16)),
        _tensors(VAE, lambda held: held.update({n: t.double() for n, t in held.items() if n.endswith("bias")})),
    ],
)
def test_a_base_in_another_of_the_published_shapes_is_taken_and_loads(mini: Path, change: Callable[[Path], Any]):
    change(mini)
    base = bases.load("mine", _settings(mini), mini, device=torch.device("cpu"))
    assert base.network is not None and base.text_encoders
    assert all(p.isfinite().all() and not p.is_meta for m in (base.network, base.vae) for p in m.parameters())


@pytest.mark.parametrize("architecture", ("mini", *ARCHITECTURES))
def test_every_architecture_is_taken_and_its_precision_told(miniatures: Miniatures, architecture: str):
    folder = miniatures(architecture)
    found = examine.examine("mine", folder)
    assert found.unet == sha256_folder(folder / "unet")
    parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if architecture in SDXL_FAMILY else [])]
    assert found.dtypes == dict.fromkeys(parts, "fp32")
    assert str(found) == f"{', '.join(f'{part} fp32' for part in parts)}; digest {found.digest[:12]}"


def test_of_several_precisions_each_is_told(mini: Path):
    _tensors(UNET, lambda held: held.update({n: t.half() for n, t in held.items() if n.endswith("weight")}))(mini)
    assert examine.examine("mine", mini).dtypes["unet"] == "fp16+fp32"


def test_the_first_fault_is_told_with_how_many_more_there_are(mini: Path):
    _remove(VAE, TEXT)(mini)
    with pytest.raises(UserError, match=r"vae: has no .*\(and 1 more faults; this one is told first\)$"):
        examine.examine("mine", mini)


def _noise(held: dict[str, torch.Tensor]) -> None:
    held[max(held)] += 1


@pytest.mark.parametrize(
    "change",
    [
        *(_tensors(file, _noise) for file in (UNET, VAE, TEXT, TEXT_2)),
        _set("unet/config.json", norm_eps=1e-3),
        _set("vae/config.json", scaling_factor=0.5),
        _set("scheduler/scheduler_config.json", prediction_type="v_prediction"),
        _set("scheduler/scheduler_config.json", beta_end=0.013),
        _set(TOKENIZER_CONFIG, model_max_length=20),
        _set(TOKENIZER_CONFIG, pad_token="<|startoftext|>"),
        _vocabulary_of(lambda model: model["merges"].reverse()),
        _set(INDEX, force_zeros_for_empty_prompt=False),
    ],
)
def test_the_digest_changes_with_every_part_that_draws(
    sdxl: Path, miniatures: Miniatures, change: Callable[[Path], Any]
):
    before = examine.examine("mine", miniatures("sdxl"))
    assert examine.examine("mine", sdxl) == before  # a copy is the same base
    change(sdxl)
    after = examine.examine("mine", sdxl)
    assert after.digest != before.digest
    assert (after.unet == before.unet) == (sha256_folder(sdxl / "unet") == before.unet)


@pytest.mark.parametrize(
    "change",
    [
        _set(INDEX, _diffusers_version="0.99.0", safety_checker=[None, None]),
        _set("vae/config.json", _diffusers_version="0.99.0", new_option=None),
        _set("text_encoder/config.json", transformers_version="9.9.9", dtype="float16"),
        _set("scheduler/scheduler_config.json", _class_name="DDIMScheduler"),
        _vocabulary,
        lambda folder: (folder / "README.md").write_text("More of it."),
        lambda folder: (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02"),
    ],
)
def test_the_digest_is_the_same_where_nothing_that_draws_has_changed(
    sdxl: Path, miniatures: Miniatures, change: Callable[[Path], Any]
):
    change(sdxl)
    assert examine.examine("mine", sdxl).digest == examine.examine("mine", miniatures("sdxl")).digest


def test_a_fetched_base_is_read_once_and_again_when_a_file_changes(mini: Path, tmp_path: Path):
    root = tmp_path / "bases"
    folder = fetching.fetch("mine", _settings(mini), root)
    found, record = examine.examine("mine", folder), root / examine.RECORDS / "mine.json"
    kept = json.loads(record.read_text())
    assert kept["found"]["digest"] == found.digest
    # What the record says is believed while no file has changed: nothing is read again.
    record.write_text(json.dumps(kept | {"found": kept["found"] | {"digest": "kept"}}))
    assert folders.identity(_settings(mini), folder)["digest"] == "kept"
    assert bases.load("mine", _settings(mini), folder, device=torch.device("cpu"), parts=()).examined.digest == "kept"
    _tensors(VAE, _noise)(mini)
    assert folders.identity(_settings(mini), folder)["digest"] not in ("kept", found.digest)
    assert json.loads(record.read_text())["found"]["digest"] not in ("kept", found.digest)
    record.write_text("{")  # of a record that says nothing another is made
    assert examine.examine("mine", folder).unet == found.unet
    _tensors(VAE, _first(float("nan")))(mini)
    with pytest.raises(UserError, match="not finite"):
        bases.load("mine", _settings(mini), folder, device=torch.device("cpu"), parts=())


def test_a_base_that_was_never_fetched_is_examined_too_and_leaves_nothing_behind(mini: Path):
    _tensors(TEXT, _first(float("nan")))(mini)
    with pytest.raises(UserError, match="not finite"):
        bases.load("mine", _settings(mini), mini, device=torch.device("cpu"), parts=("network",))
    assert [path.name for path in mini.parent.iterdir()] == ["mini"]


def test_a_faulty_base_is_not_linked(mini: Path, tmp_path: Path):
    _remove(TOKENIZER)(mini)
    with pytest.raises(UserError, match=r"tokenizer: has no vocab\.json and merges\.txt"):
        fetching.fetch("mine", _settings(mini), tmp_path / "bases")
    assert not (tmp_path / "bases" / "mine").exists()


def test_what_is_no_base_folder_says_what_it_seems_to_be(mini: Path, tmp_path: Path):
    (tmp_path / "base.gguf").write_bytes(b"GGUF")
    (tmp_path / "hub" / "snapshots").mkdir(parents=True)
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "dreams.safetensors").touch()
    (mini / "transformer").mkdir()
    _remove("unet")(mini)
    for path, message in {
        tmp_path / "base.gguf": "is a file; expected a diffusers folder, or a checkpoint that ends in .safetensors",
        tmp_path / "hub": "it is a repository in the hub's cache: name the folder of a commit below its snapshots/",
        tmp_path / "whole": "if dreams.safetensors is the whole checkpoint, set source to that file",
        tmp_path: "name .*mini, which has one",
        mini: r"its network is a transformer \(as Flux, SD3 or PixArt\)",
    }.items():
        with pytest.raises(UserError, match=message):
            fetching.fetch("mine", _settings(path), tmp_path / "bases")
    with pytest.raises(UserError, match="is a pickle"):
        fetching.fetch("mine", _settings(Path("MODEL.CKPT")), tmp_path / "bases")


def test_a_variant_is_examined_in_its_own_files(mini: Path, tmp_path: Path):
    half = save_base(tmp_path / "half", variant="fp16")
    for path in half.rglob("*.fp16.safetensors"):
        shutil.copyfile(path, mini / path.relative_to(half))
    plain, fp16 = examine.examine("mine", mini), examine.examine("mine", mini, "fp16")
    assert fp16.digest == examine.examine("mine", half, "fp16").digest != plain.digest
    assert (plain.dtypes["unet"], fp16.dtypes["unet"]) == ("fp32", "fp16")
    assert (folders.variant(mini), folders.variant(half)) == (None, "fp16")
    with pytest.raises(UserError, match=r"bases.mine.variant: .*/unet has .*fp16.safetensors alone; set the key"):
        examine.examine("mine", half)


def test_shards_of_a_variant_are_asked_for_by_the_key(mini: Path):
    _sharded(mini, "fp16")
    with pytest.raises(UserError, match=r"bases.mine.variant: .*/unet has .*fp16-0.* alone; set the key"):
        examine.examine("mine", mini)


def _inputs(folder: Path, count: int) -> Iterator[bytes]:
    """Yields the name of a file of the base, a zero, and what it holds instead; or the name of one that is missing."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number in range(count):
        path = files[number % len(files)]
        name = path.relative_to(folder).as_posix().encode()
        content = path.read_bytes()
        words = (b'"vocab"', b"F16", b"F8_E4M3", b"[0,0]", b"null", b"1e400", b"[]", b"UNet2DConditionModel")
        if number % 50 == 49:
            yield name
        else:
            # A change in the weights themselves is a number like any other, and the header decides.
            reach = content[:20_000] if path.suffix == ".safetensors" else content
            (changed,) = mutated([reach], 1, number, words)
            yield name + b"\0" + changed + content[len(reach) :]


def _use(content: bytes) -> None:
    """Loads a base one of whose files is another."""
    name, there, changed = content.partition(b"\0")
    folder = Path(os.environ["LCMLORA_FUZZED_BASE"])
    copy = folder.with_name(f"copy-{os.getpid()}")
    shutil.rmtree(copy, ignore_errors=True)
    for path in folder.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.relative_to(folder).as_posix().encode() != name:
                target.symlink_to(path)
            elif there:
                target.write_bytes(changed)
    base = bases.load("mine", _settings(copy), copy, device=torch.device("cpu"))
    base.encode_text(["red apple", ""])


@pytest.mark.parametrize("count", [QUICK, pytest.param(FULL, marks=pytest.mark.slow)])
def test_a_mutated_base_is_refused_in_one_line_or_loads(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
):
    plain = shutil.copytree(base_folder, tmp_path / "plain")
    _vocabulary(plain)
    whole = shutil.copytree(base_folder, tmp_path / "whole")
    for folder in (plain, whole):
        monkeypatch.setenv("LCMLORA_FUZZED_BASE", str(folder))
        counts = check(_use, _inputs(folder, count // 2), memory=8 << 30)
        assert counts["refused"] > count // 8


def test_a_configuration_that_asks_for_millions_of_layers_is_not_built():
    for changes in ({"layers_per_block": [2, 10**6]}, {"transformer_layers_per_block": [[1, 10**6], 2]}):
        with pytest.raises(UserError, match="make over 1024 layers"):
            structure.check_unet(Path("config.json"), {"block_out_channels": [8, 8]} | changes)
