"""The settings that solvers are compared with: for each number of network evaluations the best that a search finds.

A solver's best guidance scale depends on the number of its steps: with few evaluations an unguided solver in twice the
steps comes nearer to the teacher than one with the teacher's guidance. A comparison with solvers at one scale would
flatter the student. The search is a coordinate search by the distance to the teacher's pictures, on validation captions
and on seeds of its own, so that no reported figure has the luck of the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from lcmlora.config import Evaluation, FixedSolver
from lcmlora.diffusion.solver_settings import SPACINGS, SolverSettings, finals
from lcmlora.evaluation.figures import Key, Search, Trial
from lcmlora.evaluation.image_sets import ImageSets, NotFinite
from lcmlora.evaluation.measures.distances import named
from lcmlora.evaluation.sets.captions import Captions, Seeds, choosing_seeds
from lcmlora.io.terminal import note
from lcmlora.progress import track
from lcmlora.settings.evaluation import KARRAS

Measure = Callable[[SolverSettings, SolverSettings | None], Trial]  # tries settings; the other are the best so far

# A trial costs its evaluations, and the more steps there are, the less the settings matter. So the search is thorough
# up to these numbers of evaluations, and beyond the last it only looks for a higher scale than was best at fewer.
_ALL_SCALES_UP_TO = 8  # every guidance scale is tried; beyond, those beside the best at fewer evaluations
_OPTIONS_UP_TO = 16  # spacing, Karras sigmas and last step are tried; beyond, those of fewer evaluations stay
_FEW_SCALES, _FEWER_SCALES = 3, 2  # scales tried at most beyond _ALL_SCALES_UP_TO, and beyond _OPTIONS_UP_TO
# Neighbouring scales tried at most after an option has changed, up to _ALL_SCALES_UP_TO and beyond.
_NEIGHBOURS, _FEWER_NEIGHBOURS = 2, 1
_KARRAS_FROM = 3  # steps; in one or two, Karras sigmas are the highest noise level and the lowest

# A trial whose first pictures, this part of all, are so many times as far from the teacher as the same pictures of the
# best settings is given up. All start from the same noise, so a quarter tells settings that are far apart.
_FIRST, _HOPELESS = 0.25, 1.25

# Two distances that differ by less may do so by rounding, which is another on every machine: the first stays the best.
_ROUNDING = 1e-3


def choose_baselines(
    image_sets: ImageSets, settings: Evaluation, validation: Captions, test: Captions
) -> tuple[dict[Key, SolverSettings], Search | None]:
    """Returns the settings of every solver by key, and the search that found them; None if all are fixed by hand.

    The pictures of trials are kept in the scratch folder of `image_sets` like all others: no trial is drawn twice.

    Args:
        image_sets: draws with the bare base; its prompts, number of pictures, thumbnails and scores are not used.
        validation: by whose captions the settings are chosen.
        test: used instead if there are no validation captions. The settings are then the best for the very captions of
            the report, which is to the solvers' advantage.
    """
    baselines = _fixed(settings)
    searched = [entry for entry in settings.solvers if not isinstance(entry, FixedSolver)]
    if not searched:
        return baselines, None
    split, prompts = ("validation", validation.prompts) if validation.prompts else ("test", test.prompts)
    if split == "test":
        note(
            "there are no validation captions (data.validation), so the solvers' settings are chosen on test captions, "
            "with other seeds than the report's: to the solvers' advantage"
        )
    seeds = choosing_seeds(settings.seed)
    tried_by = _Trials(replace(image_sets, prompts=prompts, rows=0, scorers=(), check=None), settings, seeds)
    trials: dict[Key, list[Trial]] = {}
    search = (trial for solver in searched for trial in search_settings(solver, settings, tried_by))
    for trial in track(search, "solver settings (at most)", total=most_trials(settings)):
        trials.setdefault(Key.of_solver(trial.settings), []).append(trial)
    baselines |= {key: best_trial(tried).settings for key, tried in trials.items()}
    return baselines, Search(
        split=split,
        captions=len(prompts),
        pictures=settings.choosing_pictures,
        seeds={"teacher": seeds.teacher, "compared": seeds.compared},
        network_evaluations=tried_by.teacher.evaluations * settings.choosing_pictures
        + sum(trial.settings.evaluations * trial.pictures for each in trials.values() for trial in each),
        trials=trials,
    )


class _Trials:
    """Draws settings that are tried, and measures how far their pictures are from the teacher's.

    Args:
        image_sets: draws the trials; its number of pictures is not used.
    """

    def __init__(self, image_sets: ImageSets, settings: Evaluation, seeds: Seeds) -> None:
        first = math.ceil(_FIRST * settings.choosing_pictures / image_sets.batch) * image_sets.batch
        counts = sorted({min(first, settings.choosing_pictures), settings.choosing_pictures})
        self._sets = [replace(image_sets, pictures=count) for count in counts]
        self._seeds = seeds
        self._distance = named(image_sets.features.distance)
        self._known: dict[tuple[int, SolverSettings], float] = {}
        self.teacher = SolverSettings.of("ddim", settings.teacher_steps, settings.guidance_scale)
        label = "teacher, to choose solver settings by"
        self._teachers = self._sets[-1].draw(label, self.teacher, seeds.teacher).features

    def __call__(self, tried: SolverSettings, best: SolverSettings | None) -> Trial:
        for few in self._sets:
            distance = self._between(few, tried)
            if few is self._sets[-1] or not math.isfinite(distance):
                break
            if best and distance > _HOPELESS * self._between(few, best):
                break
        return Trial(settings=tried, distance=distance if math.isfinite(distance) else None, pictures=few.pictures)

    def _between(self, few: ImageSets, tried: SolverSettings) -> float:
        """Returns the distance to the teacher; infinite for pictures that are not finite."""
        known = few.pictures, tried
        if known not in self._known:
            try:
                drawn = few.draw(f"{Key.of_solver(tried)}, {tried.text}", tried, self._seeds.compared, quiet=True)
                self._known[known] = self._distance.between_few(self._teachers[: few.pictures], drawn.features)
            except NotFinite:  # the trial is kept, without a distance
                self._known[known] = math.inf
        return self._known[known]


def search_settings(solver: str, settings: Evaluation, measure: Measure) -> Iterator[Trial]:
    """Yields every trial of a solver, the fewest evaluations first; the nearest of a number of evaluations is its best.

    At a number of evaluations: first the guidance scale; then spacing, Karras sigmas and the last step, one after the
    other at the best settings so far; then the neighbouring scales again if an option has changed.
    """
    before: list[Trial] = []
    for evaluations in sorted(settings.solver_evaluations):
        found = []
        for trial in _Search(solver, evaluations, settings.guidance_scales, measure).run(before):
            found.append(trial)
            yield trial
        before = found or before


def most_evaluations(settings: Evaluation) -> int:
    """Returns how many network evaluations of single pictures the choice of all settings takes at most."""
    searched = [entry for entry in settings.solvers if not isinstance(entry, FixedSolver)]
    trials = sum(n * _most(s, n, settings) for s in searched for n in settings.solver_evaluations)
    teacher = SolverSettings.of("ddim", settings.teacher_steps, settings.guidance_scale).evaluations
    return settings.choosing_pictures * (trials + teacher) if searched else 0


def most_trials(settings: Evaluation) -> int:
    """Returns how many settings the search tries at most."""
    searched = [entry for entry in settings.solvers if not isinstance(entry, FixedSolver)]
    return sum(
        _most(solver, evaluations, settings) for solver in searched for evaluations in settings.solver_evaluations
    )


class _Search:
    """The search at one number of evaluations of a solver. No settings are tried twice."""

    def __init__(self, solver: str, evaluations: int, scales: Sequence[float], measure: Measure) -> None:
        self._solver, self._evaluations, self._measure = solver, evaluations, measure
        self._scales = _possible(evaluations, scales)
        self._tried: dict[SolverSettings, Trial] = {}

    def run(self, before: list[Trial]) -> Iterator[Trial]:
        """Yields the trials.

        Args:
            before: those at fewer evaluations; empty if there are none.
        """
        if not self._scales:
            return
        every = not before or self._evaluations <= _ALL_SCALES_UP_TO
        if every:
            plain = SolverSettings.of(self._solver, 1, 1.0)
            for scale in self._scales:
                yield from self._try(self._scaled(plain, scale))
        else:
            for start in self._starts(before):
                yield from self._try(start)
            few = _FEW_SCALES if self._evaluations <= _OPTIONS_UP_TO else _FEWER_SCALES
            yield from self._climb(few - len(self._tried))
        if self._evaluations > _OPTIONS_UP_TO:
            return
        scaled = self._best
        for option in self._options():
            yield from self._try(option)
        if self._best != scaled:
            yield from self._climb(_NEIGHBOURS if every else _FEWER_NEIGHBOURS)

    @property
    def _best(self) -> SolverSettings:
        return best_trial(list(self._tried.values())).settings

    def _scaled(self, settings: SolverSettings, scale: float) -> SolverSettings:
        """Returns the settings at a guidance scale, with the steps that it leaves, and a last step that there is."""
        steps = self._evaluations if scale == 1 else self._evaluations // 2
        final = settings.final if settings.final in finals(self._solver, steps) else "sigma_min"
        return settings.changed(steps=steps, guidance_scale=scale, final=final)

    def _starts(self, before: list[Trial]) -> Iterator[SolverSettings]:
        """Yields the best settings at fewer evaluations, and the best guided ones if these are unguided."""
        best = best_trial(before).settings
        found = [best]
        guided = [trial for trial in before if trial.settings.guidance_scale != 1]
        if best.guidance_scale == 1 and guided:
            found.append(best_trial(guided).settings)
        scales = [min(self._scales, key=lambda scale: abs(scale - each.guidance_scale)) for each in found]
        return (self._scaled(best, scale) for scale in dict.fromkeys(scales))

    def _climb(self, most: int) -> Iterator[Trial]:
        """Tries the scales beside the best, the higher one first, until none is better."""
        for _ in range(most):
            best = self._best
            place = self._scales.index(best.guidance_scale)
            beside = [self._scaled(best, scale) for scale in reversed(self._scales[max(place - 1, 0) : place + 2])]
            untried = [each for each in beside if each not in self._tried]
            if not untried:
                return
            yield from self._try(untried[0])

    def _options(self) -> Iterator[SolverSettings]:
        for spacing in SPACINGS:
            yield self._best.changed(spacing=spacing)
        if self._solver in KARRAS and self._best.steps >= _KARRAS_FROM:
            yield self._best.changed(karras=not self._best.karras)
        for final in finals(self._solver, self._best.steps):
            yield self._best.changed(final=final)

    def _try(self, settings: SolverSettings) -> Iterator[Trial]:
        if settings not in self._tried:
            trial = self._measure(settings, self._best if self._tried else None)
            self._tried[settings] = trial
            yield trial


def best_trial(trials: list[Trial]) -> Trial:
    """Returns the nearest of the trials that were not given up, the first of several as near but for rounding.

    Distances of fewer pictures are greater, so those of other numbers of pictures are not compared.
    """
    finite = [trial for trial in trials if trial.distance is not None]
    most = max((trial.pictures for trial in finite), default=0)
    whole = [(trial.distance, trial) for trial in finite if trial.distance is not None and trial.pictures == most]
    if not whole:
        return trials[0]
    nearest, best = whole[0]
    for distance, trial in whole[1:]:
        if distance < nearest - _ROUNDING * abs(nearest):
            nearest, best = distance, trial
    return best


def _possible(evaluations: int, scales: Sequence[float]) -> list[float]:
    """Returns the guidance scales, ascending, with which whole steps take so many evaluations."""
    return sorted({float(scale) for scale in scales if scale == 1 or evaluations % 2 == 0})


def _fixed(settings: Evaluation) -> dict[Key, SolverSettings]:
    """Returns the settings that are fixed by hand, at every number of evaluations that is one of whole steps."""
    found = {}
    for entry in settings.solvers:
        if not isinstance(entry, FixedSolver):
            continue
        for evaluations in settings.solver_evaluations:
            if _possible(evaluations, [entry.guidance_scale]):
                steps = evaluations if entry.guidance_scale == 1 else evaluations // 2
                fixed = SolverSettings.of(
                    entry.solver,
                    steps,
                    entry.guidance_scale,
                    spacing=entry.spacing,
                    karras=entry.karras,
                    final=entry.final,
                )
                found[Key.of_solver(fixed)] = fixed
    return found


def _most(solver: str, evaluations: int, settings: Evaluation) -> int:
    """Returns how many trials the search of a solver at so many evaluations takes at most."""
    scales = _possible(evaluations, settings.guidance_scales)
    if not scales:
        return 0
    every = evaluations <= _ALL_SCALES_UP_TO or evaluations == min(settings.solver_evaluations)
    few = _FEW_SCALES if evaluations <= _OPTIONS_UP_TO else _FEWER_SCALES
    first = len(scales) if every else min(few, len(scales))
    if evaluations > _OPTIONS_UP_TO:
        return first
    karras = solver in KARRAS and evaluations >= _KARRAS_FROM
    options = len(SPACINGS) - 1 + karras + len(finals(solver, evaluations)) - 1
    return first + options + (0 if len(scales) == 1 else _NEIGHBOURS if every else _FEWER_NEIGHBOURS)
