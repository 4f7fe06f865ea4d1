"""Bases whose weights have faults: each is refused in one line that names the file."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lcmlora.bases.examination.examine import examine_base
from lcmlora.errors import UserError
from tests.support.base_changes import (
    LFS_POINTER,
    SECOND_SHARD,
    SHARDS,
    TEXT,
    TOKENIZER,
    UNET,
    VAE,
    Change,
    break_link,
    cast,
    change_shards,
    change_tensors,
    change_weight_map,
    cut,
    pickle_part,
    remove,
    set_last_number,
    write,
)

Miniatures = Callable[[str], Path]


HEADER = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'  # of a safetensors file

FAULTS: dict[str, tuple[Change, str]] = {
    # weights
    "no weights": (remove(VAE), "vae: has no diffusion_pytorch_model.safetensors; get the base again"),
    "lfs": (write(UNET, LFS_POINTER), "unet/.* is a Git LFS pointer and not the weights; run `git lfs pull`"),
    "lfs text": (write(TEXT, LFS_POINTER), "text_encoder/model.safetensors: is a Git LFS pointer"),
    "empty file": (write(UNET, b""), "unet/.*: is empty; get it again"),
    "html": (write(VAE, b"<!DOCTYPE html><title>Sign in</title>"), "vae/.*: is a web page and not weights"),
    "cut": (cut(UNET, 1000), "unet/.*: its header is damaged: the file is cut: its tensors end at"),
    "longer": (lambda f: (f / UNET).open("ab").write(b"more"), "the file is longer: its tensors end at"),
    "header": (write(VAE, struct.pack("<Q", 10**15) + b"{}"), "vae/.*: is not a readable safetensors file, or is cut"),
    "hole": (
        write(VAE, struct.pack("<Q", len(HEADER)) + HEADER.replace(b"[0,4]", b"[4,8]") + b"\0" * 8),
        "a does not begin where the tensor before it ends",
    ),
    "shape": (
        write(VAE, struct.pack("<Q", len(HEADER)) + HEADER.replace(b"[1]", b"[2]") + b"\0" * 4),
        r"F32 of shape \[2\] does not fill its bytes",
    ),
    "renamed pickle": (lambda f: torch.save({}, f / VAE), "is a pickle under another name"),
    "nan": (
        change_tensors(UNET, set_last_number(float("nan"))),
        "unet/.*: up_blocks.* has numbers that are not finite",
    ),
    "inf in vae": (
        change_tensors(VAE, set_last_number(float("-inf"))),
        "vae/.*: quant_conv.* has numbers that are not finite",
    ),
    "nan in text": (
        change_tensors(TEXT, set_last_number(float("nan"))),
        "text_encoder/.* has numbers that are not finite",
    ),
    "zeros": (
        change_tensors(UNET, lambda held: [t.zero_() for name, t in held.items() if name.startswith("up_blocks")]),
        r"unet/.*: \d+ of the \d+ bytes of its weights are zeros, as in a file whose download was not finished",
    ),
    "fp8": (
        change_tensors(UNET, cast(torch.float8_e4m3fn)),
        "is F8_E4M3: fp8 weights are not distilled; get the base in",
    ),
    "int8": (change_tensors(VAE, cast(torch.int8)), "is I8: quantised weights are not distilled"),
    "lost tensor": (
        change_tensors(TEXT, lambda held: held.pop(max(held))),
        "text_encoder: lacks a tensor of its configur",
    ),
    "lost in unet": (
        change_tensors(UNET, lambda held: held.pop("conv_in.bias")),
        "unet: lacks a tensor .*: conv_in.bias",
    ),
    "more": (
        change_tensors(VAE, lambda held: held.update(x=torch.zeros(1))),
        "vae: has a tensor that its config.json has no",
    ),
    "pickle": (pickle_part("unet"), "unet: has diffusion_pytorch_model.bin and no .*; that is a pickle"),
    "pickled text": (pickle_part("text_encoder"), "text_encoder: has pytorch_model.bin and no .*; that is a pickle"),
    "half a download": (
        lambda f: (f / UNET).rename(f / f"{UNET}.incomplete"),
        r"unet: has .*\.incomplete, a download that was not finished",
    ),
    "flax": (lambda f: (f / VAE).rename(f / "vae/diffusion_flax_model.msgpack"), "vae: has no .*, but diffusion_flax"),
    "lost blob": (break_link(UNET), "unet/.*: is a link to nothing"),
    "lost vocabulary blob": (break_link(TOKENIZER), "tokenizer/tokenizer.json: is a link to nothing"),
    "pipe": (lambda f: (remove(VAE)(f), os.mkfifo(f / VAE)), "vae/.*: not an ordinary file"),
    "pipe as text": (
        lambda f: (remove(TOKENIZER)(f), os.mkfifo(f / TOKENIZER)),
        "tokenizer/tokenizer.json: not an ordinary file",
    ),
    # shards
    "no shard": (
        change_shards(lambda u: next(u.glob(SECOND_SHARD)).unlink()),
        r"the shard .*-00002-.* is missing \(\d+ of",
    ),
    "no index of shards": (
        change_shards(lambda u: (u / SHARDS).unlink()),
        "unet: has shards and no diffusion_pytorch_model",
    ),
    "cut shard": (
        change_shards(lambda u: os.truncate(p := next(u.glob(SECOND_SHARD)), p.stat().st_size - 1)),
        "-00002-of-.*: its header is damaged: the file is cut",
    ),
    "empty map": (change_shards(change_weight_map(lambda m: m.clear())), "weight_map is empty"),
    "outside": (
        change_shards(change_weight_map(lambda m: m.update(a="../../vae/x.safetensors"))),
        "weight_map names '../../vae/x",
    ),
    "listed": (
        change_shards(change_weight_map(lambda m: m.update({"a.bias": m["conv_in.bias"]}))),
        "lacks a.bias, which the index says it has",
    ),
    "unlisted": (
        change_shards(change_weight_map(lambda m: m.pop("conv_in.bias"))),
        "does not list conv_in.bias, which",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_the_file(mini: Path, fault: str):
    change, message = FAULTS[fault]
    change(mini)
    with pytest.raises(UserError, match=message) as caught:
        examine_base("mine", mini)
    assert "\n" not in str(caught.value) and str(mini) in str(caught.value)
    assert not Path("unpickled").exists()
