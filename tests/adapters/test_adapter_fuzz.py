"""Adapters mutated at random: each is read, or refused in one line, within limits of time and memory."""

import json
import math
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lcmlora.adapters import formats, layer_names, lora, peft_settings
from lcmlora.adapters.formats import DIFFUSERS, KOHYA
from lcmlora.adapters.layer_names import Architecture
from lcmlora.registry.references import Places, open_adapter
from tests.support.fuzzing import FULL, QUICK, check, mutated

LAYERS = {"mid_block.attentions.0.proj_in": (4, 4), "mid_block.resnets.0.conv1": (4, 4, 3, 3)}
BASE = Architecture("sd1", LAYERS)
ENDLESS = "(a|a|b|[a-z._0-9]+)+X"
SETTINGS = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["proj_in", "conv1"],
    "alpha_pattern": {"^mid_block.attentions.0.proj_in": 2, "conv1": 1},
    "use_rslora": False,
    "use_dora": False,
}
WORDS = (
    *(b"lora_unet_", b"unet.", b"diffusion_model.", b"base_model.model.", b".lora_A.weight", b".lora_down.weight"),
    *(b".alpha", b".dora_scale", b".hada_w1_a", b"lora_te1_", b"bundle_emb.", b"transformer.", b"double_blocks."),
    *(b'"F16"', b'"BF16"', b'"I8"', b'"F8_E4M3"', b'"F8_E8M0"', b'"F4"', b'"BOOL"', b'"C64"', b'"U16"', b'"F64"'),
    *(b'"shape":[', b'"data_offsets":[', b"__metadata__", b"lora_adapter_metadata", b"alpha_pattern", ENDLESS.encode()),
    *(b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f"),  # Inf, NaN and the largest in fp32
)


def _tensors(down: str, up: str, stem: str, dots: bool) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (outputs, *inputs) in LAYERS.items():
        spelled = stem + (name if dots else name.replace(".", "_"))
        tensors[f"{spelled}.{down}.weight"] = torch.ones(2, *inputs)
        tensors[f"{spelled}.{up}.weight"] = torch.ones(outputs, 2, *(1 for _ in inputs[1:]))
    return tensors


def _examples() -> list[bytes]:
    kohya = _tensors("lora_down", "lora_up", "lora_unet_", dots=False)
    kohya |= {"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(1.0)}
    diffusers = _tensors("lora_A", "lora_B", "unet.", dots=True)
    settings = json.dumps({f"unet.{key}": value for key, value in SETTINGS.items()})
    return [
        save(kohya),
        save(diffusers),
        save(diffusers, metadata={"format": "pt", peft_settings.METADATA: settings}),
        save({name: tensor.half() for name, tensor in diffusers.items()}),
    ]


def _convert(content: bytes) -> None:
    """What `lcmlora convert` does with a file, with a base and without."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.safetensors")
        path.write_bytes(content)
        style = (DIFFUSERS, KOHYA)[len(content) % 2]
        formats.convert(path, path.with_name("b.safetensors"), style, BASE if content[-1:] != b"\0" else None)


def _described(content: bytes) -> None:
    """What `lcmlora convert` does with PEFT's folder and with ours, whose JSON is this."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, peft_settings.WEIGHTS).write_bytes(_PEFT)
        Path(folder, peft_settings.CONFIG).write_bytes(content)
        formats.read(open_adapter(folder, Places(Path(folder, "cache"))).weights, BASE)
        ours = Path(folder, "ours")
        ours.mkdir()
        (ours / lora.WEIGHTS).write_bytes(_PEFT)
        (ours / "config.json").write_bytes(content)
        open_adapter(str(ours), Places(Path(folder, "cache")))


_PEFT = save(_tensors("lora_A", "lora_B", "base_model.model.", dots=True))
_FACTS = {
    "base": {"source": "bases/mini", "revision": None, "digest": "b" * 64},
    "model": "mini",
    "resolution": 16,
    "sampler": {"scheduler": "LCMScheduler", "gamma": 0.3, "grid": 50},
    "distill": {"objective": "tcd", "gamma": 0.3},
    "kohya": {"file": "lcm-lora-mini.safetensors"},
}


def _made_up(count: int, seed: int) -> Iterator[bytes]:
    """Yields files whose header is JSON with odd names, types, shapes, places and settings."""
    chance = random.Random(seed)
    stems = ["unet.", "lora_unet_", "", "base_model.model.", "transformer.", "lora_te_", "diffusion_model."]
    layers = [*LAYERS, "down_blocks.0.attentions.0.proj_in", "double_blocks.0.img_attn", "a" * 5000, "\x1b[2J\n", ""]
    parts = ["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "alpha", "lokr_w1", "weight"]
    types = ["F32", "F16", "BF16", "F64", "I64", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "U16", "X"]
    shapes: list[list[int]] = [[2, 4], [4, 2], [2, 4, 3, 3], [4, 2, 1, 1], [], [0, 4], [4, 0], [1] * 20, [3], [1, 4]]
    wrong = [([1 << 40, 1 << 40], 0), ([-1, 4], 0), ([2.5], -8), (None, 9**30), ("4", 0)]
    sizes = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "F16": 2, "BF16": 2, "U16": 2}
    values: list[object] = [ENDLESS, [ENDLESS], {ENDLESS: 4}, {"conv1": 1e308}, 10**400, -1, 0, None, True, [], {}, "x"]
    keys = [*SETTINGS, "rank_pattern", "exclude_modules", "megatron_core", "use_qalora"]
    for _ in range(count):
        header: dict[str, object] = {}
        data = b""
        for _ in range(chance.randrange(1, 7)):
            layer = chance.choice(layers)
            spelled = layer.replace(".", "_") if chance.random() < 0.5 else layer
            name = f"{chance.choice(stems)}{spelled}.{chance.choice(parts)}"
            kind = chance.choice(types) if chance.random() < 0.5 else "F32"
            shape = chance.choice(shapes)
            length, start = sizes.get(kind, 1) * math.prod(shape), len(data)
            data += chance.choice([bytes(length), b"\0\0\x80?" * (length // 4 + 1), b"\xff" * length])[:length]
            entry: dict[str, object] = {"dtype": kind, "shape": shape, "data_offsets": [start, len(data)]}
            if chance.random() < 0.1:
                odd, place = chance.choice(wrong)
                entry |= {"shape": odd, "data_offsets": [place, len(data)]}
            header[name] = entry
        settings = {f"unet.{chance.choice(keys)}": chance.choice(values) for _ in range(3)}
        if chance.random() < 0.6:
            written = {peft_settings.METADATA: json.dumps(settings)}
            header["__metadata__"] = chance.choice([written, settings, {"a": "b"}])
        text = json.dumps(header).encode()
        yield len(text).to_bytes(8, "little") + text + data


def _inputs(count: int) -> Iterator[bytes]:
    yield from mutated(_examples(), count // 2, 0, WORDS)
    yield from _made_up(count // 4, 1)


def _settings(count: int) -> Iterator[bytes]:
    examples = [json.dumps(SETTINGS).encode(), json.dumps(_FACTS).encode()]
    return mutated(examples, count // 4, 2, WORDS)


@pytest.mark.parametrize("count", [QUICK, pytest.param(FULL, marks=pytest.mark.slow)])
def test_mutated_adapters_are_read_or_refused_in_one_line(count: int):
    layer_names.published()  # once, not in every process
    counts = check(_convert, _inputs(count)) + check(_described, _settings(count))
    assert counts.total() >= count - 4 and counts["taken"] > count // 50 and counts["refused"] > count // 4
