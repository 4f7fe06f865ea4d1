"""The search of the solvers' best settings: what it finds, what it costs, and that the gate compares with it."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lcmlora import bases, config
from lcmlora.config import Data, Evaluation, Gate
from lcmlora.diffusion import sampling
from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.evaluation.evaluate import evaluate_student
from lcmlora.evaluation.figures import Key, Metrics, Trial
from lcmlora.evaluation.gate import gate_failures
from lcmlora.evaluation.image_sets import ImageSets
from lcmlora.evaluation.measures.distances import distance, named
from lcmlora.evaluation.reference import Reference, draw_reference
from lcmlora.evaluation.sets.captions import choosing, reporting
from lcmlora.evaluation.sets.solver_search import best_trial, most_evaluations, search_settings
from tests.evaluation.conftest import FIXED, Quarters, settings, write_adapter

pytestmark = pytest.mark.usefixtures("small_features")

ROOT = Path(__file__).parents[2]
BUDGET = 200_000  # network evaluations that the choice may take on the emoji base


def emoji(**changes: Any) -> Evaluation:
    return config.load(ROOT / "params.yaml").evaluation_for("emoji").model_copy(update=changes)


def trials_of(solver: str, evaluation: Evaluation, measure: Callable[[SolverSettings], float]) -> Iterator[Trial]:
    """Yields the trials of a search in which settings are as far from the teacher as `measure` says."""

    def tried(settings: SolverSettings, best: SolverSettings | None) -> Trial:
        del best
        distance = measure(settings)
        return Trial(settings=settings, distance=distance if math.isfinite(distance) else None, pictures=8)

    return search_settings(solver, evaluation, tried)


def found(solver: str, measure: Any, evaluation: Evaluation) -> dict[int, SolverSettings]:
    """Returns the best settings of a solver by its number of evaluations."""
    trials: dict[int, list[Trial]] = {}
    for trial in trials_of(solver, evaluation, measure):
        trials.setdefault(trial.settings.evaluations, []).append(trial)
    return {count: best_trial(each).settings for count, each in trials.items()}


def test_the_search_finds_the_planted_settings_at_every_number_of_evaluations() -> None:
    scales = {2: 1.0, 4: 3.0, 8: 4.0, 16: 5.0}

    def planted(tried: SolverSettings) -> float:
        wanted = scales.get(tried.evaluations, 1.0)
        off = abs(math.log(tried.guidance_scale / wanted)) + 1
        return off + 0.1 * (tried.spacing != "leading") + 0.1 * (not tried.karras) + 0.1 * (tried.final == "zero")

    best = found("dpm++", planted, emoji())
    assert {count: each.guidance_scale for count, each in best.items()} == {1: 1.0} | scales
    assert {count: each.steps for count, each in best.items()} == {1: 1, 2: 2, 4: 2, 8: 4, 16: 8}
    assert {(each.spacing, each.final != "zero") for each in best.values()} == {("leading", True)}
    # In one or two steps there are no Karras sigmas to speak of.
    assert {count: each.karras for count, each in best.items()} == {n: n > 4 for n in (1, 2, 4, 8, 16)}


def test_settings_that_are_as_near_but_for_rounding_leave_the_first_the_best() -> None:
    rounding = random.Random(0)
    best = found("euler", lambda tried: 100 + rounding.random() / 100 + tried.guidance_scale, emoji())
    assert best == {n: SolverSettings.of("euler", n, 1.0) for n in (1, 2, 4, 8, 16)}


def test_the_scales_are_tried_again_when_an_option_changes_which_is_best() -> None:
    def planted(tried: SolverSettings) -> float:
        wanted = 4.0 if tried.karras else 3.0
        return abs(tried.guidance_scale - wanted) / 10 + (not tried.karras)

    assert found("euler", planted, emoji())[8] == SolverSettings.of("euler", 4, 4.0, karras=True)


def test_an_odd_number_of_evaluations_is_unguided_and_settings_that_draw_nothing_finite_are_not_chosen() -> None:
    trials = list(trials_of("ddim", emoji(solver_evaluations=(3,)), lambda tried: math.inf))
    assert {trial.settings.guidance_scale for trial in trials} == {1.0} and {t.distance for t in trials} == {None}
    best = found("ddim", lambda tried: math.inf if tried.guidance_scale < 5 else tried.guidance_scale, emoji())
    assert best[4].guidance_scale == 5.0
    assert list(trials_of("ddim", emoji(solver_evaluations=(3,), guidance_scales=(2.0,)), lambda tried: 0)) == []


def test_the_choice_keeps_to_its_budget_whatever_it_meets() -> None:
    evaluation = emoji()
    bound = most_evaluations(evaluation)
    assert bound <= BUDGET
    teacher = 2 * evaluation.teacher_steps
    for seed in range(100):
        chance = random.Random(seed)
        trials = [
            trial.settings
            for solver in evaluation.solver_names
            for trial in trials_of(solver, evaluation, lambda _, chance=chance: chance.random())
        ]
        assert max(Counter(trials).values()) == 1  # nothing is tried twice
        drawn = teacher + sum(each.evaluations for each in trials)
        assert drawn * evaluation.choosing_pictures <= bound
    assert most_evaluations(emoji(solvers=tuple(settings().solvers))) == 0  # fixed by hand


SEARCHED = {
    "solvers": ("ddim", "dpm++"), "solver_evaluations": (2, 4), "guidance_scales": (1.0, 4.0), "choosing_pictures": 10,
}  # fmt: skip


def draw(base: bases.LoadedBase, data: Data, pictures: Path, root: Path, **changes: Any) -> Reference:
    """Draws the reference to the folder `reference` below `root`."""
    where = (root / "scratch", root / "reference", root / "timings")
    return draw_reference(base, data, settings(**SEARCHED | changes), pictures, *where)


def test_the_nearest_trial_is_drawn_for_the_report_and_every_trial_is_kept(
    base: bases.LoadedBase, data: Data, pictures: Path, tmp_path: Path
) -> None:
    facts = draw(base, data, pictures, tmp_path)
    search, validation = facts.search, choosing(pictures).prompts
    assert search and (search.split, search.captions, search.pictures) == ("validation", len(validation), 10)
    assert search.seeds == {"teacher": 2000, "compared": 2001} and not set(validation) & set(facts.prompts)
    assert set(facts.baselines) == {"ddim@2", "ddim@4", "dpm++@2", "dpm++@4"} == set(search.trials)
    few = ImageSets(base, Quarters(base.device), validation, 10, 8, 0)
    teacher = few.draw("teacher", SolverSettings.of("ddim", 6, 4.0), 2000).features
    cost = 12 * 10
    for key, trials in search.trials.items():
        cost += sum(trial.settings.evaluations * trial.pictures for trial in trials)
        distances = []
        for trial in trials:
            again = few.draw(key, trial.settings, 2001).features[: trial.pictures]
            distances.append(named("frechet").between_few(teacher[: trial.pictures], again))
        assert [trial.distance for trial in trials] == pytest.approx(distances, rel=1e-6)
        assert facts.baselines[key] == best_trial(trials).settings
        whole = [distance for distance, trial in zip(distances, trials, strict=True) if trial.pictures == 10]
        assert distances[trials.index(best_trial(trials))] == pytest.approx(min(whole), rel=2e-3)
    assert search.network_evaluations == cost
    assert facts.network_evaluations["ddim@4"] == 4 == facts.baselines[Key("ddim@4")].evaluations
    whole = ImageSets(base, Quarters(base.device), facts.prompts, 20, 8, 0)
    drawn = whole.draw("", facts.baselines[Key("ddim@4")], 1001).features
    assert torch.equal(drawn, load_file(tmp_path / "reference" / "features.safetensors")["ddim@4"])
    # Read again as it was written, with every trial.
    assert Reference.read(tmp_path / "reference" / "reference.json").search == search


def test_settings_that_are_far_off_are_given_up_after_a_quarter_of_the_pictures(
    base: bases.LoadedBase, data: Data, pictures: Path, tmp_path: Path
) -> None:
    changes = {
        "solvers": ("ddim",),
        "solver_evaluations": (4,),
        "guidance_scales": (1.0, 4.0, 8.0),
        "batch": 4,
        "teacher_steps": 7,
    }
    plant(base, by=40)
    search = draw(base, data, pictures, tmp_path, **changes, choosing_pictures=16).search
    assert search
    (trials,) = search.trials.values()
    drawn = {trial.settings: trial.pictures for trial in trials}
    assert [drawn[SolverSettings.of("ddim", 2, scale)] for scale in (4.0, 8.0)] == [4, 4]
    assert drawn[best_trial(trials).settings] == 16 and best_trial(trials).settings.guidance_scale == 1
    assert all(trial.distance is not None for trial in trials)
    assert search.network_evaluations == 16 * 14 + sum(trial.pictures * 4 for trial in trials)


def test_of_trials_that_were_given_up_none_is_the_best_while_another_was_not() -> None:
    def trial(scale: float, distance: float | None, drawn: int) -> Trial:
        return Trial(settings=SolverSettings.of("ddim", 2, scale), distance=distance, pictures=drawn)

    given_up, nearer, whole = trial(2.0, 5.0, 32), trial(3.0, 4.0, 32), trial(4.0, 9.0, 128)
    assert best_trial([given_up, nearer, whole]) == whole
    assert best_trial([given_up, trial(5.0, None, 128), nearer]) == nearer
    assert best_trial([trial(5.0, None, 128)]).settings.guidance_scale == 5.0


def test_a_search_that_was_killed_goes_on_and_draws_nothing_twice(
    base: bases.LoadedBase, data: Data, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    rows: list[int] = []
    hook = base.network.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    whole = draw(base, data, pictures, tmp_path / "whole")
    assert whole.search
    needed, searched = sum(rows), whole.search.network_evaluations
    assert needed == searched + 20 * sum(whole.network_evaluations.values())
    rows.clear()

    def killed(_: Any, args: Any) -> None:
        if sum(rows) > searched / 2:
            raise KeyboardInterrupt

    killer = base.network.register_forward_pre_hook(killed)
    with pytest.raises(KeyboardInterrupt):
        draw(base, data, pictures, tmp_path)
    killer.remove()
    assert sum(rows) < searched
    resumed = draw(base, data, pictures, tmp_path)
    hook.remove()
    assert needed <= sum(rows) <= needed + 8 * 4  # only the batch in which it was killed is begun again
    assert resumed.search == whole.search
    one, other = (folder / "reference" / "features.safetensors" for folder in (tmp_path, tmp_path / "whole"))
    assert one.read_bytes() == other.read_bytes()


def test_without_validation_captions_the_choice_is_made_on_the_reports_to_the_solvers_advantage(
    base: bases.LoadedBase, data: Data, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    (few / "test.jsonl").write_bytes((pictures / "test.jsonl").read_bytes())
    (few / "validation.jsonl").write_text("")
    facts = draw(base, data, few, tmp_path, solvers=("ddim",), solver_evaluations=(2,))
    assert facts.search and (facts.search.split, facts.search.captions) == ("test", len(reporting(few).prompts))
    assert "there are no validation captions (data.validation)" in capsys.readouterr().err


def test_other_captions_to_choose_by_leave_the_figures_of_the_same_settings_as_they_are(
    base: bases.LoadedBase, data: Data, pictures: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "test.jsonl").write_bytes((pictures / "test.jsonl").read_bytes())
    lines = (pictures / "validation.jsonl").read_text().splitlines(keepends=True)
    (other / "validation.jsonl").write_text("".join(reversed(lines)))
    one = draw(base, data, pictures, tmp_path / "one", solvers=("ddim",))
    two = draw(base, data, other, tmp_path / "two", solvers=("ddim",))
    assert one == two
    names = [folder / "reference" / "features.safetensors" for folder in (tmp_path / "one", tmp_path / "two")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_solver_fixed_by_hand_is_drawn_as_it_says_at_every_even_number_of_evaluations(
    base: bases.LoadedBase, data: Data, pictures: Path, tmp_path: Path
) -> None:
    fixed = {"solver": "dpm++", "guidance_scale": 3.0, "spacing": "leading", "karras": True, "final": "sigma_min"}
    plain = {"solver": "ddim", "guidance_scale": 1.0}
    facts = draw(base, data, pictures, tmp_path, solvers=(fixed, plain), solver_evaluations=(1, 2))
    assert facts.search is None and set(facts.baselines) == {"dpm++@2", "ddim@1", "ddim@2"}
    assert facts.baselines[Key("dpm++@2")].plain() == fixed | {"steps": 1}
    assert facts.baselines[Key("ddim@2")].steps == 2


def plant(base: bases.LoadedBase, by: float = 1) -> None:
    """Makes guidance harmful in two steps: at t = 499, their last, the unconditional noise is wrong.

    The teacher's seven steps and four unguided ones do not meet that.
    """
    alone = sampling.unconditional(base)["encoder_hidden_states"]

    def wrong(_: Any, args: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor]) -> tuple[Tensor]:
        met = (args[2] == alone).flatten(1).all(dim=1) & (args[1] == 499)
        return (output[0] + by * met[:, None, None, None],)

    base.network.register_forward_hook(wrong)


def test_the_gate_meets_a_solver_that_is_better_at_another_guidance_scale(
    base: bases.LoadedBase, base_folder: Path, data: Data, pictures: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(base_folder, tmp_path / "adapter", strength=0.3)
    plant(base)
    asked = Gate(steps=4, min_retrieval=0, min_diversity=0, beyond_chance=False)
    found: dict[str, Metrics] = {}
    for name, solver in (("fixed", FIXED), ("searched", "ddim")):
        root = tmp_path / name
        changes = {"teacher_steps": 7, "solvers": (solver,), "solver_evaluations": (4,), "student_steps": (4,)}
        draw(base, data, pictures, root, **changes)
        (root / "evaluating").mkdir()
        where = (root / "evaluating", root / "evaluation", root / "metrics.json", root / "steps.csv", root / "timings")
        used = settings(**SEARCHED | changes)
        found[name] = evaluate_student(base, adapter, data, used, pictures, root / "reference", *where)
    student, solver = Key("student@4"), Key("ddim@4")
    fixed, searched = found["fixed"], found["searched"]
    assert fixed.excess[student] == searched.excess[student] < fixed.excess[solver] - 0.1
    assert gate_failures(fixed, asked) == []
    assert searched.baselines[solver] == SolverSettings.of("ddim", 4, 1.0)
    (line,) = gate_failures(searched, asked)
    assert "is not below ddim@4 (4 steps, unguided)'s" in line
    assert searched.advantage[student].rival == solver and searched.advantage[student].difference > 0
    assert searched.label(solver) == "DDIM, 4 evaluations (4 steps, unguided)"
    written = json.loads((tmp_path / "searched" / "metrics.json").read_text())
    assert written["baselines"]["ddim@4"]["steps"] == 4 and Metrics.parse(written, "metrics") == searched


def test_few_pictures_rank_sets_by_a_distance_that_more_pictures_agree_with() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, near, far = (torch.randn(64, 12, generator=generator) + shift for shift in (0.0, 0.3, 1.0))
    few = named("frechet")
    assert few.between_few(teacher[:8], near[:8]) < few.between_few(teacher[:8], far[:8])
    assert few.between_few(teacher, near) == distance(teacher, near, "frechet")
    with pytest.raises(ValueError, match="more pictures than dimensions: 8 pictures, 12"):
        distance(teacher[:8], near[:8], "frechet")
