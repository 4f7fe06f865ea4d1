import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lcmlora.adapters import combine, formats, lora
from lcmlora.adapters.formats import DIFFUSERS, KOHYA, Adapter
from lcmlora.adapters.metadata import Sampler
from lcmlora.bases import architecture
from lcmlora.bases.base import LoadedBase
from lcmlora.cli.adapters.combining import write_combined
from lcmlora.errors import UserError
from lcmlora.registry.references import AdapterReference
from tests.support import adapters

Miniatures = Callable[[str], Path]
ATTENTION = ".attn"


def _two(miniatures: Miniatures, name: str) -> tuple[LoadedBase, Adapter, Adapter]:
    """Returns a base, a style that changes attention alone (rank 2, alpha 1) and a student of every layer (4, 8)."""
    base = adapters.load(miniatures(name))
    adapters.train(base, rank=2, alpha=1, seed=1)
    style = adapters.adapter_of(base, "style", targets=ATTENTION)
    base = adapters.load(miniatures(name))
    adapters.train(base, rank=4, alpha=8, seed=2)
    return adapters.load(miniatures(name)), style, adapters.adapter_of(base, "student")


def _reference(path: Path, digest: str | None = None, **facts: object) -> AdapterReference:
    base: dict[str, str | None] | None = {"source": f"bases/{digest}", "revision": None, "digest": digest}
    return AdapterReference(path.name, path, base=base if digest else None, **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "style"),
    [
        ("sd15", KOHYA),
        ("sdxl", DIFFUSERS),
        pytest.param("sd15", DIFFUSERS, marks=pytest.mark.slow),
        pytest.param("sdxl", KOHYA, marks=pytest.mark.slow),
    ],
)
def test_one_adapter_is_what_diffusers_draws_with_both(miniatures: Miniatures, tmp_path: Path, name: str, style: str):
    base, first, second = _two(miniatures, name)
    structure = architecture.of_folder(base.folder)
    pipeline = adapters.pipeline(base.folder)
    for part, adapter in (("A", first), ("B", second)):
        formats.write(adapter, tmp_path / f"{part}.safetensors", DIFFUSERS)
        pipeline.load_lora_weights(tmp_path / f"{part}.safetensors", adapter_name=part)
    pipeline.set_adapters(["A", "B"], [0.8, 1.0])
    expected = adapters.forward(base, pipeline.unet)
    pipeline.set_adapters(["B"], [1.0])
    alone = adapters.forward(base, pipeline.unet)
    pipeline.unload_lora_weights()

    whole = combine.combine_adapters([(first, 0.8), (second, 1.0)])
    assert {layer.rank for n, layer in whole.layers.items() if ATTENTION in n} == {6}
    assert {layer.rank for n, layer in whole.layers.items() if ATTENTION not in n} == {4}
    assert formats.write(whole, tmp_path / "one.safetensors", style, structure) == 0
    pipeline.load_lora_weights(tmp_path / "one.safetensors")
    error = (adapters.forward(base, pipeline.unet) - expected).abs().max()
    assert error < 1e-5 < 1e-2 < (alone - expected).abs().max()
    lora.attach(base.network, {n: (layer.down, layer.up) for n, layer in whole.layers.items()}, "one")
    assert (adapters.forward(base) - expected).abs().max() < 1e-5


def test_a_rank_that_is_large_enough_has_no_error_and_a_smaller_one_has_the_reported_error(miniatures: Miniatures):
    _, style, student = _two(miniatures, "sd15")
    whole = combine.combine_adapters([(style, 0.8), (student, 1.0)])
    same, loss = combine.truncate(whole, 6)
    assert loss.overall < 1e-6 and formats.compare(whole, same) < 1e-6
    smaller, loss = combine.truncate(whole, 3)
    assert {layer.rank for layer in smaller.layers.values()} == {3}
    deltas = {n: (layer.delta, smaller.layers[n].delta) for n, layer in whole.layers.items()}
    shares = {n: ((one - other).norm() / one.norm()).item() for n, (one, other) in deltas.items()}
    assert loss.worst_layer == max(shares, key=lambda n: shares[n])
    assert loss.worst == pytest.approx(shares[loss.worst_layer], rel=1e-4)
    lost = sum((one - other).square().sum().item() for one, other in deltas.values())
    assert loss.overall == pytest.approx(
        (lost / sum(d.square().sum().item() for d, _ in deltas.values())) ** 0.5, rel=1e-4
    )
    # No matrix of this rank is nearer: what is lost is the tail of the singular values.
    one = deltas[loss.worst_layer][0]
    tail = torch.linalg.svdvals(one)[3:].norm() / one.norm()
    assert shares[loss.worst_layer] == pytest.approx(tail.item(), rel=1e-4)
    assert 0.05 < loss.overall < loss.worst < 1


def test_half_precision_parts_make_a_half_precision_sum(miniatures: Miniatures, tmp_path: Path):
    _, style, student = _two(miniatures, "sd15")
    half = [replace(adapter, dtype=torch.float16) for adapter in (style, student)]
    whole = combine.combine_adapters([(half[0], 0.8), (half[1], 1.0)])
    assert whole.dtype == torch.float16
    assert 0 < formats.write(whole, tmp_path / "a.safetensors", DIFFUSERS) < 2e-3
    assert combine.combine_adapters([(half[0], 0.8), (student, 1.0)]).dtype == torch.float32


def test_the_folder_of_a_combination_has_its_parts_and_its_sampler(miniatures: Miniatures, tmp_path: Path):
    base, style, student = _two(miniatures, "sdxl")
    structure = architecture.of_folder(base.folder)
    formats.write(style, tmp_path / "style.safetensors", KOHYA, structure)
    formats.write(student, tmp_path / lora.WEIGHTS, DIFFUSERS)
    (tmp_path / "scheduler_config.json").write_text('{"_class_name": "TCDScheduler"}')
    sampler = Sampler("TCDScheduler", 0.3, 50)
    lcm = _reference(tmp_path / lora.WEIGHTS, "a" * 64, model="mini", resolution=16, sampler=sampler)
    out = tmp_path / "styled"
    for rank in (None, 3):  # a combination may be made anew
        made = write_combined(_reference(tmp_path / "style.safetensors"), lcm, (0.8, 1.0), out, structure, rank)
    facts = json.loads((out / "config.json").read_text())
    assert [part["weight"] for part in facts["combined"]] == [0.8, 1.0]
    assert facts["combined"][0]["adapter"] == "style.safetensors"
    assert facts["base"]["digest"] == "a" * 64 and facts["sampler"]["gamma"] == 0.3
    assert facts["rank"] == made.facts.rank == 3 and 0 < facts["truncation"]["overall"] < 1
    assert (out / "scheduler_config.json").is_file()
    bare = adapters.load(base.folder)
    lora.load(bare.network, out / lora.WEIGHTS)
    assert lora.adapted_layers(bare.network) == len(student.layers)


def test_a_folder_that_holds_something_else_is_left_alone(miniatures: Miniatures, tmp_path: Path):
    _, style, _ = _two(miniatures, "sd15")
    formats.write(style, tmp_path / "a.safetensors", DIFFUSERS)
    part = _reference(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="exists and is no earlier combination"):
        write_combined(part, part, (0.8, 1.0), tmp_path)
    assert (tmp_path / "a.safetensors").is_file()


def test_adapters_of_different_bases_are_refused_by_name(miniatures: Miniatures, tmp_path: Path):
    _, style, student = _two(miniatures, "sd15")
    _, other, _ = _two(miniatures, "sdxl")
    with pytest.raises(
        UserError, match=r"student: down_blocks\.1\..*attn2\.to_k takes \(16,\) to 16, and in style .*40"
    ):
        combine.combine_adapters([(other, 0.8), (student, 1.0)])
    formats.write(style, tmp_path / "style.safetensors", DIFFUSERS)
    formats.write(student, tmp_path / "lcm.safetensors", DIFFUSERS)
    one, two = _reference(tmp_path / "style.safetensors", "a" * 64), _reference(tmp_path / "lcm.safetensors", "b" * 64)
    out = tmp_path / "one.safetensors"
    with pytest.raises(
        UserError, match=r"lcm.* was made for bases/b+ \(digest b{12}\.\.\.\), and style.* for bases/a+ "
    ):
        write_combined(one, two, (0.8, 1.0), out)
    assert write_combined(one, two, (0.8, 1.0), out, other_base=True).facts.rank == 6
