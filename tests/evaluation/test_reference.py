"""The reference and the evaluation of a miniature base, with features small enough to draw few pictures."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lcmlora import bases, lora
from lcmlora.config import Base, Data, Evaluation
from lcmlora.data.prepare import prepare
from lcmlora.data.sources import Record
from lcmlora.errors import UserError
from lcmlora.evaluation import features
from lcmlora.evaluation.evaluate import evaluate
from lcmlora.evaluation.gate import record
from lcmlora.evaluation.metrics import frechet_distance
from lcmlora.evaluation.reference import Artist, choose_real, draw_reference
from tests.miniature import RESOLUTION

WORDS = ["red apple", "green tree", "tree", "fruit", "red fruit", "green apple", "apple tree", "food"]


class Quarters:
    """The mean colour of each quarter of a picture."""

    name = "quarters/12"
    dimensions = 12

    def __init__(self, device: torch.device) -> None:
        del device

    def __call__(self, pictures: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(pictures, 2).flatten(1) * 10


@pytest.fixture(autouse=True, scope="module")
def small_features() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(features.FEATURES, "efficientnet-lite0", Quarters)
        yield


def settings(**changes: Any) -> Evaluation:
    values: dict[str, Any] = {
        "seed": 1000, "pictures": 20, "batch": 8, "features": "efficientnet-lite0", "guidance_scale": 4.0,
        "teacher_steps": 6, "solvers": ("ddim", "dpm++"), "solver_steps": (1, 2), "student_steps": (1, 2, 4),
        "grid_rows": 3, "device": "cpu",
    }  # fmt: skip
    return Evaluation(**values | changes)


def made_of(base_folder: Path) -> Base:
    return Base(source=str(base_folder), resolution=RESOLUTION, license="apache-2.0")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Ninety-six pictures under eight captions."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for i in range(96):
        pixels = torch.randint(0, 256, (3, 3, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((20, 24), Image.Resampling.NEAREST).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(WORDS[i % len(WORDS)])
    return Data(source="folder", path=folder, min_side=8, max_aspect=2.0, validation=0.4, seed=0)


@pytest.fixture(scope="module")
def pictures(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "pictures"
    prepare(data, 1, out)
    return out


@pytest.fixture
def adapter(base_folder: Path, tmp_path: Path) -> Path:
    """What evaluate reads of an adapter's folder; the weights are in the UNet."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    identity = bases.identity(made_of(base_folder), base_folder)
    sampler = {"scheduler": "LCMScheduler", "gamma": None, "grid": 50}
    (folder / "config.json").write_text(json.dumps({"base": identity, "sampler": sampler}))
    return folder


@pytest.fixture(scope="module")
def reference(base_folder: Path, data: Data, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    base = bases.load("mini", made_of(base_folder), base_folder, device=torch.device("cpu"))
    draw_reference(base, data, settings(), pictures, root / "scratch", root / "reference")
    return root / "reference"


def with_adapter(base: bases.LoadedBase) -> bases.LoadedBase:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lora.inject(base.unet, 4, 4.0, 0).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return base


def run(base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path, **changes: Any) -> Any:
    """Evaluates into the folder in which the adapter lies."""
    root = adapter.parent
    files = (root / "evaluation", root / "metrics" / "mini.json", root / "plots" / "mini_steps.csv")
    return evaluate(base, adapter, data, settings(**changes), pictures, reference, *files)


def test_the_reference_holds_every_set_with_its_count_and_cost(reference: Path) -> None:
    facts = json.loads((reference / "reference.json").read_text())
    sets = load_file(reference / "features.safetensors")
    drawn = {"teacher@6", "teacher@6/again", "ddim@1", "ddim@2", "dpm++@1", "dpm++@2"}
    assert set(sets) == drawn | {"real", "gallery"}
    assert all(sets[key].shape == (20, 12) and sets[key].dtype == torch.float16 for key in drawn)
    assert set(facts["seconds_per_picture"]) == drawn and min(facts["seconds_per_picture"].values()) > 0
    assert facts["network_evaluations"] == {
        "teacher@6": 12, "teacher@6/again": 12, "ddim@1": 2, "ddim@2": 4, "dpm++@1": 2, "dpm++@2": 4,
    }  # fmt: skip
    assert facts["features"] == {"name": "quarters/12", "dimensions": 12}
    assert facts["counts"] == {"pictures": 20, "real": 20, "gallery": len(facts["captions"]["gallery"])}
    assert set(facts["prompts"]) == set(facts["captions"]["gallery"]) < set(WORDS)
    assert not set(facts["keys"]["real"]) & set(facts["keys"]["gallery"])
    with Image.open(reference / "pictures" / "dpm++@2.png") as strip:
        assert strip.size == (RESOLUTION, 3 * RESOLUTION)


def test_all_that_is_compared_starts_from_other_noise_than_the_teacher_and_from_the_same(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, tmp_path: Path
) -> None:
    changes = {"solvers": ("ddim",), "solver_steps": (6,)}
    facts = draw_reference(base, data, settings(**changes), pictures, tmp_path / "s", tmp_path / "reference")
    sets = load_file(tmp_path / "reference" / "features.safetensors")
    assert torch.equal(sets["ddim@6"], sets["teacher@6/again"])  # the same method, steps and noise
    assert (sets["teacher@6"] - sets["teacher@6/again"]).abs().amax(dim=1).min() > 0.05
    run(with_adapter(base), adapter, data, pictures, tmp_path / "reference", **changes)
    student = load_file(tmp_path / "evaluation" / "features.safetensors")["student@4"]
    artist = Artist(base, Quarters(base.device), settings(), facts["prompts"])
    assert torch.equal(student, artist.draw("x", "lcm", 4, 1001, None).features)
    assert not torch.equal(student, artist.draw("x", "lcm", 4, 1000, None).features)


def test_the_same_pictures_are_drawn_in_any_batch(
    base: bases.LoadedBase, data: Data, pictures: Path, reference: Path, tmp_path: Path
) -> None:
    draw_reference(base, data, settings(batch=7), pictures, tmp_path / "s", tmp_path / "other")
    one, other = (load_file(folder / "features.safetensors") for folder in (reference, tmp_path / "other"))
    for key in one:  # a pixel may round the other way
        torch.testing.assert_close(one[key].float(), other[key].float(), atol=0.05, rtol=0)


def test_a_killed_reference_goes_on_and_draws_nothing_twice(
    base: bases.LoadedBase, data: Data, pictures: Path, reference: Path, tmp_path: Path
) -> None:
    rows: list[int] = []
    hook = base.unet.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    needed = 20 * (12 + 12 + 2 + 4 + 2 + 4)

    def killed(_: Any, args: Any) -> None:
        if sum(rows) > needed / 2:
            raise KeyboardInterrupt

    killer = base.unet.register_forward_pre_hook(killed)
    arguments = (base, data, settings(), pictures, tmp_path / "killed", tmp_path / "resumed")
    with pytest.raises(KeyboardInterrupt):
        draw_reference(*arguments)
    assert not (tmp_path / "resumed").exists()
    killer.remove()
    draw_reference(*arguments)
    hook.remove()
    # Only the batch in which it was killed is begun again: at most 8 pictures at 12 evaluations.
    assert needed <= sum(rows) <= needed + 8 * 12
    for file in ("features.safetensors", "pictures/ddim@1.png"):
        assert (tmp_path / "resumed" / file).read_bytes() == (reference / file).read_bytes()
    assert list((tmp_path / "killed").iterdir()) == []


def test_too_few_pictures_for_the_features_are_refused_before_anything_is_drawn(
    base: bases.LoadedBase, data: Data, pictures: Path, tmp_path: Path
) -> None:
    base.unet = None
    with pytest.raises(UserError, match=r"evaluation.pictures: 12 are too few.*quarters/12.*at least 13"):
        draw_reference(base, data, settings(pictures=12), pictures, tmp_path / "s", tmp_path / "out")


def test_pictures_that_are_not_finite_are_refused_and_not_measured_as_black(
    base: bases.LoadedBase, data: Data, pictures: Path, tmp_path: Path
) -> None:
    base.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="mini: ddim at 6 steps drew pictures that are not finite"):
        draw_reference(base, data, settings(), pictures, tmp_path / "s", tmp_path / "out")


def test_real_pictures_are_spread_over_captions_and_apart_from_the_gallery() -> None:
    records = [Record(f"{c}{n}", c, f"{n * 7 % 10}{c}", 8, 8) for c in "abc" for n in range(10)] + [
        Record("d0", "d", "0", 8, 8)
    ]
    real, gallery = choose_real(records, ["a", "b", "c", "d"], 10)
    shown = [record.caption for record in real]
    assert set(shown[:4]) == set("abcd")  # a round takes one picture of every caption that has one left
    assert set(shown[4:7]) == set(shown[7:]) == set("abc")
    assert [record.caption for record in gallery] == list("aaaabbbbccccd")
    assert {r.key for r in real} & {r.key for r in gallery} == {"d0"}  # it has no other


def test_the_metrics_agree_with_the_pictures_and_each_other(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path
) -> None:
    metrics = run(with_adapter(base), adapter, data, pictures, reference)
    root = adapter.parent
    assert metrics == json.loads((root / "metrics" / "mini.json").read_text())
    sets = load_file(reference / "features.safetensors")
    student = load_file(root / "evaluation" / "features.safetensors")
    floor = frechet_distance(sets["teacher@6"], sets["teacher@6/again"])
    methods = {"ddim@1", "ddim@2", "dpm++@1", "dpm++@2", "student@1", "student@2", "student@4"}
    assert metrics["floor"] == metrics["frechet_teacher"]["teacher"] == floor
    assert set(metrics["frechet_teacher"]) == set(metrics["excess"]) == methods | {"teacher"}
    assert metrics["excess"]["teacher"] == 0
    expected = frechet_distance(sets["teacher@6"], student["student@4"])
    assert metrics["frechet_teacher"]["student@4"] == expected
    assert metrics["excess"]["student@4"] == expected - floor
    assert set(metrics["frechet_real"]) == methods | {"teacher@6"}
    assert set(metrics["retrieval"]) == methods | {"teacher@6", "real"}
    assert all(0 <= share <= 1 for share in metrics["retrieval"].values())
    assert metrics["network_evaluations"]["student@4"] == 4 == metrics["network_evaluations"]["dpm++@2"]
    assert set(metrics["seconds_per_picture"]) == set(metrics["network_evaluations"]) == methods | {"teacher@6"}
    assert record(metrics)["frechet_teacher.student_4"] == expected
    with (root / "plots" / "mini_steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert list(rows[0]) == ["method", "steps", "network_evaluations", "frechet_teacher", "excess", "retrieval"]
    assert [float(row["excess"]) for row in rows if (row["method"], row["steps"]) == ("student", "4")] == [
        expected - floor
    ]


def test_the_same_adapter_gives_the_same_features_and_the_same_grid(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path
) -> None:
    def outputs() -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in (adapter.parent / "evaluation").iterdir()}

    run(with_adapter(base), adapter, data, pictures, reference)
    first = outputs()
    assert set(first) == {"features.safetensors", "grid.png", "steps.png"}
    run(base, adapter, data, pictures, reference)
    assert outputs() == first


def test_few_real_pictures_leave_the_distance_to_them_out_and_say_why(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    lines = (pictures / "validation.jsonl").read_text().splitlines(keepends=True)
    (few / "validation.jsonl").write_text("".join(lines[:5]))
    draw_reference(base, data, settings(), few, tmp_path / "scratch", tmp_path / "reference")
    metrics = run(with_adapter(base), adapter, data, few, tmp_path / "reference")
    assert metrics["frechet_real"] is None
    assert metrics["frechet_real_missing"] == "5 real validation pictures are too few for 12 dimensions"
    assert "real" not in metrics["retrieval"]  # all five are the gallery


def test_a_reference_that_does_not_fit_is_refused_by_what_differs(
    base: bases.LoadedBase,
    adapter: Path,
    data: Data,
    pictures: Path,
    reference: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    with pytest.raises(
        UserError, match=r"drawn with 1000 for evaluation.seed, and this evaluation has 7.*reference@mini"
    ):
        run(base, adapter, data, pictures, reference, seed=7)
    with pytest.raises(UserError, match="60 is more than the 50 timesteps"):
        run(base, adapter, data, pictures, reference, student_steps=(60,))
    with pytest.raises(UserError, match=r"reference.json: is missing; run `lcmlora reference` first"):
        run(base, adapter, data, pictures, tmp_path / "nowhere")
    with monkeypatch.context() as patch:
        patch.setattr(Quarters, "name", "halves/6")
        with pytest.raises(UserError, match=r"quarters/12 for evaluation.features, and this evaluation has halves/6"):
            run(base, adapter, data, pictures, reference)
    (adapter / "config.json").write_text(json.dumps({"base": {"digest": "f00d"}}))
    with pytest.raises(UserError, match="for the base's digest, and this evaluation has f00d"):
        run(base, adapter, data, pictures, reference)
    assert not (tmp_path / "evaluation").exists() and not (tmp_path / "metrics").exists()
