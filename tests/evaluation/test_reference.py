"""The reference and the evaluation of a miniature base, with features small enough to draw few pictures."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.config import Data
from lcmlora.data.prepare import prepare_pictures
from lcmlora.data.sources.source import Record
from lcmlora.errors import UserError
from lcmlora.evaluation import timings
from lcmlora.evaluation.evaluate import evaluate_student
from lcmlora.evaluation.figures import Metrics
from lcmlora.evaluation.gate import record
from lcmlora.evaluation.image_sets import ImageSets, StudentSettings
from lcmlora.evaluation.measures.distances import Frechet
from lcmlora.evaluation.reference import choose_real, draw_reference
from tests.evaluation.conftest import FIXED, WORDS, Quarters, settings
from tests.support.miniature import RESOLUTION

pytestmark = pytest.mark.usefixtures("small_features")


def run(base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path, **changes: Any) -> Any:
    """Evaluates into the folder in which the adapter lies."""
    root = adapter.parent
    scratch = root / "evaluating"
    scratch.mkdir(exist_ok=True)
    files = (root / "evaluation", root / "metrics" / "mini.json", root / "plots" / "mini_steps.csv", root / "timings")
    found = evaluate_student(base, adapter, data, settings(**changes), pictures, reference, scratch, *files)
    return json.loads(json.dumps(found.plain()))


def outputs(root: Path) -> tuple[Path, Path, Path]:
    """Where a reference is drawn: its scratch folder, itself, and its timings."""
    return root / "s", root / "reference", root / "timings"


def test_the_reference_holds_every_set_with_its_count_and_cost(reference: Path) -> None:
    facts = json.loads((reference / "reference.json").read_text())
    sets = load_file(reference / "features.safetensors")
    drawn = {"teacher@6", "teacher@6/again", "ddim@2", "ddim@4", "dpm++@2", "dpm++@4"}
    assert set(sets) == drawn | {"real", "gallery"}
    assert all(sets[key].shape == (20, 12) and sets[key].dtype == torch.float16 for key in drawn)
    assert "seconds_per_picture" not in facts
    seconds = json.loads((reference.with_name("timings") / "reference.json").read_text())["measured"]
    assert set(seconds["seconds_per_picture"]) == drawn - {"teacher@6/again"}
    assert min(seconds["seconds_per_picture"].values()) > 0
    assert facts["network_evaluations"] == {
        "teacher@6": 12, "teacher@6/again": 12, "ddim@2": 2, "ddim@4": 4, "dpm++@2": 2, "dpm++@4": 4,
    }  # fmt: skip
    assert facts["features"] == {"name": "quarters/12", "dimensions": 12, "distance": "frechet"}
    assert facts["counts"] == {"pictures": 20, "real": 20, "gallery": len(facts["captions"]["gallery"])}
    assert set(facts["prompts"]) == set(facts["captions"]["gallery"]) < set(WORDS)
    assert not set(facts["keys"]["real"]) & set(facts["keys"]["gallery"])
    with Image.open(reference / "pictures" / "dpm++@4.png") as strip:
        assert strip.size == (RESOLUTION, 3 * RESOLUTION)


def test_all_that_is_compared_starts_from_other_noise_than_the_teacher_and_from_the_same(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, tmp_path: Path
) -> None:
    changes = {"solvers": (FIXED,), "solver_evaluations": (12,)}
    facts = draw_reference(
        base, data, settings(**changes), pictures, tmp_path / "s", tmp_path / "reference", tmp_path / "timings"
    )
    sets = load_file(tmp_path / "reference" / "features.safetensors")
    assert torch.equal(sets["ddim@12"], sets["teacher@6/again"])  # the same method, steps and noise
    assert (sets["teacher@6"] - sets["teacher@6/again"]).abs().amax(dim=1).min() > 0.05
    run(base, adapter, data, pictures, tmp_path / "reference", **changes)
    student = load_file(tmp_path / "evaluation" / "features.safetensors")["student@4"]
    image_sets = ImageSets(base, Quarters(base.device), facts.prompts, 20, 8, 3)
    lora.load(base.network, adapter / lora.WEIGHTS)
    one, other = (image_sets.draw("x", StudentSettings(4), seed).features for seed in (1001, 1000))
    torch.testing.assert_close(student.float(), one.float(), atol=0.05, rtol=0)  # a pixel may round the other way
    assert (student - other).abs().amax(dim=1).min() > 0.05


def test_the_same_pictures_are_drawn_in_any_batch(
    base: bases.LoadedBase, data: Data, pictures: Path, reference: Path, tmp_path: Path
) -> None:
    draw_reference(base, data, settings(batch=7), pictures, tmp_path / "s", tmp_path / "other", tmp_path / "timings")
    one, other = (load_file(folder / "features.safetensors") for folder in (reference, tmp_path / "other"))
    for key in one:  # a pixel may round the other way
        torch.testing.assert_close(one[key].float(), other[key].float(), atol=0.05, rtol=0)


def test_a_killed_reference_goes_on_and_draws_nothing_twice(
    base: bases.LoadedBase, data: Data, pictures: Path, reference: Path, tmp_path: Path
) -> None:
    rows: list[int] = []
    hook = base.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    needed = 20 * (12 + 12 + 2 + 4 + 2 + 4)

    def killed(_: Any, args: Any) -> None:
        if sum(rows) > needed / 2:
            raise KeyboardInterrupt

    killer = base.network.register_forward_pre_hook(killed)
    arguments = (base, data, settings(), pictures, tmp_path / "killed", tmp_path / "resumed", tmp_path / "timings")
    with pytest.raises(KeyboardInterrupt):
        draw_reference(*arguments)
    assert not (tmp_path / "resumed").exists()
    killer.remove()
    draw_reference(*arguments)
    hook.remove()
    # Only the batch in which it was killed is begun again: at most 8 pictures at 12 evaluations.
    assert needed <= sum(rows) <= needed + 8 * 12
    for file in ("features.safetensors", "pictures/ddim@2.png"):
        assert (tmp_path / "resumed" / file).read_bytes() == (reference / file).read_bytes()
    assert not (tmp_path / "killed").exists()


def test_too_few_pictures_for_the_features_are_refused_before_anything_is_drawn(
    base: bases.LoadedBase, data: Data, pictures: Path, tmp_path: Path
) -> None:
    base.network = None
    with pytest.raises(UserError, match=r"evaluation.pictures: 12 are too few.*quarters/12.*at least 13"):
        draw_reference(
            base, data, settings(pictures=12), pictures, tmp_path / "s", tmp_path / "out", tmp_path / "timings"
        )


def test_pictures_that_are_not_finite_are_refused_and_not_measured_as_black(
    base: bases.LoadedBase, data: Data, pictures: Path, tmp_path: Path
) -> None:
    base.network.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="mini: ddim, 6 steps, guidance 4: drew pictures that are not finite"):
        draw_reference(base, data, settings(), pictures, *outputs(tmp_path))


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
    metrics = run(base, adapter, data, pictures, reference)
    root = adapter.parent
    assert metrics == json.loads((root / "metrics" / "mini.json").read_text())
    sets = load_file(reference / "features.safetensors")
    student = load_file(root / "evaluation" / "features.safetensors")
    floor = Frechet().between(sets["teacher@6"], sets["teacher@6/again"])
    methods = {"ddim@2", "ddim@4", "dpm++@2", "dpm++@4", "student@1", "student@2", "student@4"}
    assert metrics["floor"] == metrics["distance_teacher"]["teacher"] == floor
    assert set(metrics["distance_teacher"]) == set(metrics["excess"]) == methods | {"teacher"}
    assert metrics["excess"]["teacher"] == 0
    expected = Frechet().between(sets["teacher@6"], student["student@4"])
    assert metrics["distance_teacher"]["student@4"] == expected
    assert metrics["excess"]["student@4"] == expected - floor
    assert set(metrics["distance_real"]) == methods | {"teacher@6"}
    assert set(metrics["retrieval"]) == methods | {"teacher@6", "real"}
    assert all(0 <= share <= 1 for share in metrics["retrieval"].values())
    assert metrics["network_evaluations"]["student@4"] == 4 == metrics["network_evaluations"]["dpm++@4"]
    for key in methods:
        low, high = metrics["intervals"]["excess"][key]
        assert low < metrics["excess"][key] < high
    rivals = {name: metrics["excess"][name] for name in ("ddim@4", "dpm++@4")}
    won = metrics["advantage"]["student@4"]
    assert won["rival"] == min(rivals, key=rivals.__getitem__) and won["network_evaluations"] == 4
    assert won["difference"] == metrics["excess"]["student@4"] - min(rivals.values())
    assert set(metrics["advantage"]) == {"student@2", "student@4"}  # no solver takes one evaluation
    assert set(metrics["diversity"]) == methods | {"teacher@6", "real"}
    assert set(metrics["network_evaluations"]) == methods | {"teacher@6"}
    assert record(Metrics.parse(metrics, "metrics"))["quarters/12/distance_teacher.student_4"] == expected
    with (root / "plots" / "mini_steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    settings_of = ["guidance_scale", "spacing", "karras", "final"]
    figures = ["distance_teacher", "excess", "retrieval"]
    assert list(rows[0]) == ["method", "network_evaluations", "steps", *settings_of, *figures]
    (solver,) = [row for row in rows if (row["method"], row["network_evaluations"]) == ("dpm++", "4")]
    assert [solver[name] for name in ("steps", *settings_of)] == ["2", "4.0", "trailing", "False", "zero"]
    assert [float(row["excess"]) for row in rows if (row["method"], row["steps"]) == ("student", "4")] == [
        expected - floor
    ]


def test_all_is_measured_once_more_by_the_second_features(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path
) -> None:
    metrics = run(base, adapter, data, pictures, reference)
    check, sets = metrics["check"], load_file(reference / "check.safetensors")
    assert check["features"] == {"name": "halves/6", "dimensions": 6, "distance": "frechet"}
    # The colour of a half is the mean of its two quarters.
    quarters = load_file(reference / "features.safetensors")
    assert set(sets) == set(quarters) - {"gallery"}
    halves = quarters["real"].float().unflatten(1, (3, 2, 2)).mean(dim=3).flatten(1)
    torch.testing.assert_close(sets["real"].float(), halves, atol=0.02, rtol=0)
    floor = Frechet().between(sets["teacher@6"], sets["teacher@6/again"])
    assert check["floor"] == floor
    assert check["excess"]["ddim@4"] == Frechet().between(sets["teacher@6"], sets["ddim@4"]) - floor
    assert check["excess"].keys() == metrics["excess"].keys() - {"teacher"}
    assert check["distance_real"].keys() == metrics["distance_real"].keys()
    assert check["advantage"].keys() == metrics["advantage"].keys()
    for student, found in check["advantage"].items():
        rivals = [key for key in check["excess"] if key[:7] != "student"]
        cost = metrics["network_evaluations"]
        best = min((k for k in rivals if cost[k] == cost[student]), key=check["excess"].__getitem__)
        assert (found["rival"], found["difference"]) == (best, check["excess"][student] - check["excess"][best])
        assert found["interval"][0] <= found["difference"] <= found["interval"][1]


def test_too_few_pictures_for_the_second_features_leave_them_out_and_say_why(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, tmp_path: Path
) -> None:
    changes = {"check_features": "scattering", "solvers": (FIXED,), "solver_evaluations": (4,)}
    draw_reference(base, data, settings(**changes), pictures, *outputs(tmp_path))
    assert not (tmp_path / "reference" / "check.safetensors").exists()
    metrics = run(base, adapter, data, pictures, tmp_path / "reference", **changes)
    assert "check" not in metrics
    assert metrics["check_missing"] == "20 pictures are too few for the distance of scattering"


def test_how_long_it_took_is_kept_apart_and_with_it_what_it_was_measured_of(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path
) -> None:
    shutil.copytree(reference.with_name("timings"), adapter.parent / "timings")
    metrics = run(base, adapter, data, pictures, reference)
    of = {key: metrics[key] for key in ("reference_digest", "adapter")}
    found = timings.read(adapter.parent / "timings" / timings.EVALUATION, **of)
    best = {won["rival"] for won in metrics["advantage"].values()}  # one solver at each number of evaluations
    timed = {"teacher@6", "student@1", "student@2", "student@4"} | best
    assert len(best) == 2 and found.latency and set(found.latency.seconds) == timed and found.latency.repeats == 2
    assert all(0 < each.p50 <= each.p95 for each in found.latency.seconds.values())
    assert set(found.seconds_per_picture) == set(metrics["network_evaluations"])  # the reference's among them
    for other in ({"adapter": "0" * 64}, {"reference_digest": "0" * 64}):
        assert timings.read(adapter.parent / "timings" / timings.EVALUATION, **(of | other)) == timings.Measured()


def test_of_a_reference_that_another_machine_drew_there_are_no_seconds(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path
) -> None:
    metrics = run(base, adapter, data, pictures, reference)
    of = {key: metrics[key] for key in ("reference_digest", "adapter")}
    found = timings.read(adapter.parent / "timings" / timings.EVALUATION, **of)
    assert set(found.seconds_per_picture) == {"student@1", "student@2", "student@4"}


def test_the_same_adapter_gives_the_same_bytes_of_all_that_git_and_dvc_keep(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path
) -> None:
    def outputs() -> dict[str, bytes]:
        root = adapter.parent
        files = [path for name in ("evaluation", "metrics", "plots") for path in (root / name).rglob("*")]
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in files if path.is_file()}

    run(base, adapter, data, pictures, reference)
    first = outputs()
    names = {f"pictures/{m}@{n}.png" for m in ("ddim", "dpm++") for n in (2, 4)}
    names |= {f"pictures/{name}.png" for name in ("real", "teacher@6", "student@1", "student@2", "student@4")}
    names |= {"features.safetensors", "grid.png", "steps.png", "pictures/prompts.json"}
    worst = Metrics.read(adapter.parent / "metrics/mini.json").worst
    assert worst and worst.rival
    names |= {f"pictures/@worst/{n}" for n in ("prompts.json", "real.png", "teacher@6.png", "student@4.png")}
    names.add(f"pictures/@worst/{worst.rival}.png")
    assert set(first) == {f"evaluation/{name}" for name in names} | {"metrics/mini.json", "plots/mini_steps.csv"}
    run(base, adapter, data, pictures, reference)
    assert outputs() == first


def test_a_killed_evaluation_goes_on_and_draws_nothing_twice(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, reference: Path
) -> None:
    expected = run(base, adapter, data, pictures, reference)
    rows: list[int] = []
    hook = base.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))

    def killed(_: Any, args: Any) -> None:
        if sum(rows) > 20 * 7 / 2:  # of the pictures' 1 + 2 + 4 evaluations
            raise KeyboardInterrupt

    killer = base.network.register_forward_pre_hook(killed)
    with pytest.raises(KeyboardInterrupt):
        run(base, adapter, data, pictures, reference)
    killer.remove()
    metrics = run(base, adapter, data, pictures, reference)
    hook.remove()
    latency = 3 * (1 + 2 + 4 + 2 * (6 + 1 + 2))  # rows of three turns, of which the first is not counted
    worst = 2 * (4 + 4 + 2 * 6)  # of two captions by the student, the best solver and the teacher
    assert 20 * 7 + latency + worst <= sum(rows) <= (20 + 8) * 7 + latency + worst
    for key in ("excess", "retrieval", "intervals", "diversity"):
        assert metrics[key] == expected[key]


def test_few_real_pictures_leave_the_distance_to_them_out_and_say_why(
    base: bases.LoadedBase, adapter: Path, data: Data, pictures: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    lines = (pictures / "test.jsonl").read_text().splitlines(keepends=True)
    (few / "test.jsonl").write_text("".join(lines[:5]))
    shutil.copy(pictures / "validation.jsonl", few)
    draw_reference(base, data, settings(), few, tmp_path / "scratch", tmp_path / "reference", tmp_path / "timings")
    metrics = run(base, adapter, data, few, tmp_path / "reference")
    assert metrics["distance_real"] is None
    assert metrics["distance_real_missing"] == "5 real test pictures are too few for 12 dimensions"
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
        patch.setattr(Quarters, "name", "eighths/24")
        with pytest.raises(UserError, match=r"quarters/12 for evaluation.features, and this evaluation has eighths/24"):
            run(base, adapter, data, pictures, reference)
    (adapter / "config.json").write_text(json.dumps({"base": {"digest": "f00d"}}))
    with pytest.raises(UserError, match="for the base's digest, and this evaluation has f00d"):
        run(base, adapter, data, pictures, reference)
    assert not (tmp_path / "evaluation").exists() and not (tmp_path / "metrics").exists()


def test_prompts_without_pictures_are_measured_against_the_teacher_alone(
    base: bases.LoadedBase, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(WORDS))
    data = Data(source="prompts", path=tmp_path / "prompts.txt", min_side=8, validation=0.2, test=0.4)
    prepare_pictures(data, 1, tmp_path / "pictures")
    facts = draw_reference(
        base, data, settings(), tmp_path / "pictures", tmp_path / "s", tmp_path / "reference", tmp_path / "timings"
    )
    sets = load_file(tmp_path / "reference" / "features.safetensors")
    assert "real" not in sets and not (tmp_path / "reference/pictures/real.png").exists()
    assert facts.counts.plain() == {"pictures": 20, "real": 0, "gallery": 20}
    assert not any(torch.equal(sets["gallery"], other) for key, other in sets.items() if key != "gallery")
    metrics = run(base, adapter, data, tmp_path / "pictures", tmp_path / "reference")
    assert metrics["distance_real"] is None
    assert metrics["distance_real_missing"] == "the data are prompts, without real pictures"
    assert "real" not in metrics["retrieval"] and "real" not in metrics["diversity"]
    assert metrics["excess"].keys() >= {"student@4", "ddim@4"}
    with Image.open(tmp_path / "evaluation/grid.png") as grid:
        assert grid.size[0] > 0
