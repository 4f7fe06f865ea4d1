"""The figures of an evaluation: metrics/MODEL.json, metrics.json of a release, and study.json as typed documents.

An image set is named by a `Key` such as `student@4`. metrics.json of a release has, besides what every machine gets,
the seconds of the one that evaluated, and what a study found.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.errors import UserError
from lcmlora.io.documents import Document, Interval, Number

STUDENT, TEACHER, REAL = "student", "teacher", "real"
SHOWN = (2, 4, 8)  # network evaluations at which pictures are shown side by side
AGAIN = "/again"  # ends the key of the teacher's second set

NAMES = {"teacher": "teacher", "ddim": "DDIM", "dpm++": "DPM-Solver++", "unipc": "UniPC", "euler": "Euler"}
PARTS = {"alone": "alone, best solver", "accelerated": "accelerated", "adapter": "adapter without the style"}


class Key(str):
    """The name of an image set: `student@4`, `dpm++@4`, `teacher@50`, `real`, or within a study `alone/dpm++@2`.

    It is the text itself, so that files, tables and plots have it as it is. The number of a student and of a teacher is
    its steps. The number of a solver that the student is compared with is its network evaluations for one picture;
    `Metrics.baselines` has its steps and all other settings. In a study, and in figures without `baselines` (before
    2026-12), the number of a solver is its steps. `Metrics.label` knows which.
    """

    __slots__ = ()

    @classmethod
    def of(cls, method: str, number: int) -> Key:
        """Returns the name of what a method drew, by its number of steps or network evaluations."""
        return cls(f"{method}@{number}")

    @classmethod
    def of_solver(cls, settings: SolverSettings) -> Key:
        """Returns the name of what a solver drew, by its network evaluations."""
        return cls(f"{settings.solver}@{settings.evaluations}")

    @property
    def part(self) -> str:
        """`alone` in `alone/dpm++@2`; empty where there is none."""
        return self.rpartition("/")[0]

    @property
    def method(self) -> str:
        """`student`, `teacher`, `real` or a solver."""
        return self.rpartition("/")[2].partition("@")[0]

    @property
    def number(self) -> int:
        """The number in the name, steps or network evaluations; 0 for what has none, like `real`."""
        return int(self.rpartition("/")[2].partition("@")[2] or 0)

    @property
    def steps(self) -> int:
        """The steps of a student or a teacher. Of a solver ask `Metrics.steps`: its number may count evaluations."""
        return self.number

    @property
    def evaluations(self) -> int:
        """The network evaluations of a student, or of a solver in `Metrics.baselines`."""
        return self.number

    @property
    def name(self) -> str:
        """How a reader calls the method."""
        return NAMES.get(self.method) or PARTS.get(self.method, self.method)

    @property
    def label(self) -> str:
        """How a reader calls a set whose number counts steps: `student, 2 steps`."""
        return f"{self.name}, {_counted(self.number, 'step')}" if self.number else self.name

    @property
    def is_solver(self) -> bool:
        """Whether the bare base drew it with an ordinary solver, to be compared with the student."""
        return self.method not in (STUDENT, TEACHER, REAL)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(_key, core_schema.str_schema())


def _counted(count: int, unit: str) -> str:
    return f"{count} {unit}{'' if count == 1 else 's'}"


def _key(text: str) -> Key:
    key = Key(text)
    if not key.rpartition("/")[2].partition("@")[2].isascii():
        raise ValueError("expected METHOD@STEPS")
    try:
        _ = key.number
    except ValueError:
        raise ValueError("expected METHOD@STEPS") from None
    return key


Agreement = Literal["agree", "disagree", "undecided"]


class FeatureSet(Document):
    """Whose features the figures were computed with."""

    name: str
    dimensions: int = 0
    distance: str = "frechet"  # before 2026-11 there was no other


class Advantage(Document):
    """A student's excess less that of the best solver at as many network evaluations, or in as many steps."""

    rival: Key
    network_evaluations: int  # of the rival
    difference: Number
    interval: Interval | None = None


class Saving(Document):
    """How many times fewer network evaluations the student takes than the best solvers for the same distance.

    Read off the curve of the smallest distance of any solver at each number of evaluations (comparisons/costs.py).
    relation: `equal`, or a bound: `more than` where the solvers do not come as near with the most evaluations that they
        were drawn with, `at most` where they are nearer with the fewest.
    interval: of the factor; a high end of None is beyond the most evaluations.
    """

    evaluations: int  # of the student
    factor: Number  # evaluations of the solvers / evaluations of the student
    relation: Literal["equal", "more than", "at most"]
    interval: tuple[Number, Number | None] | None = Field(default=None, strict=False)

    @property
    def text(self) -> str:
        """The factor as a reader sees it: `2.1 (1.9 to 2.4)`, `more than 8`."""
        bound = "" if self.relation == "equal" else f"{self.relation} "
        if self.interval is None:
            return f"{bound}{self.factor:.2g}"
        low, high = self.interval
        return f"{bound}{self.factor:.2g} ({low:.2g} to {'more' if high is None else f'{high:.2g}'})"


class Trial(Document):
    """Settings that the search for the best ones tried."""

    settings: SolverSettings
    distance: Number | None  # to the teacher, of few pictures: for ranks only; None: pictures that were not finite
    pictures: int  # fewer than those of the search where the first were so far off that the rest were not drawn


class Search(Document):
    """How the solvers' settings were chosen: on seeds that no figure is reported on, nor are validation captions."""

    split: str  # of the captions: validation, or test if there are no others
    captions: int
    pictures: int  # of a trial that was not given up
    seeds: dict[str, int]  # of the teacher and of the solvers
    network_evaluations: int  # of single pictures, in all
    trials: dict[Key, list[Trial]]  # in their order


class Check(Document):
    """The same image sets by second features: whether the student's rank hangs on the features."""

    features: FeatureSet
    floor: Number
    excess: dict[Key, Number]
    distance_real: dict[Key, Number] | None = None
    advantage: dict[Key, Advantage]  # against the best solver by these features


class SeedIntervals(Document):
    """Bootstrap intervals of the figures that other seeds would give for the same captions."""

    excess: dict[Key, Interval]
    retrieval: dict[Key, Interval]


class CaptionFigures(Document):
    """A caption's distances to the teacher's pictures of it, by the means of features; comparisons/worst.py."""

    caption: str
    pictures: int  # of each set
    student: Number
    rival: Number | None = None
    teacher: Number  # of one of its sets to both
    retrieval: Number
    teacher_retrieval: Number


class WorstCaptions(Document):
    """The captions at which a student is farthest from the teacher, the worst first."""

    student: Key
    rival: Key | None = None  # the best solver at as many network evaluations
    of: int  # captions in all
    captions: list[CaptionFigures]


class Intervals(Document):
    """Bootstrap intervals of the figures that other captions and other seeds would give."""

    level: Number  # share of the resamples within
    resamples: int
    captions: int | None = None  # that were resampled; 1: seeds alone; None: seeds alone, as before 2026-12
    excess: dict[Key, Interval]
    retrieval: dict[Key, Interval]
    distance_real: dict[Key, Interval] = Field(default_factory=dict)
    seeds: SeedIntervals | None = None

    @property
    def resampled(self) -> str:
        """What was resampled: `captions and seeds`."""
        if self.captions is None:
            return "seeds alone"
        return "captions and seeds" if self.captions > 1 else "seeds alone, since there is one caption"


class Quantiles(Document):
    """Of seconds."""

    p50: Number
    p95: Number


class Latency(Document):
    """How long one picture takes alone, from its caption to its pixels."""

    seconds: dict[Key, Quantiles]
    repeats: int
    batch: int
    device: str
    threads: int | None = None


class Guidance(Document):
    """What classifier-free guidance on top of the adapter does; lists by scale."""

    steps: int
    scales: list[Number]
    network_evaluations: list[int]
    excess: list[Number]
    retrieval: list[Number]
    diversity: list[Number | None]


class Claim(Document):
    """What the paper says of an accelerated style or checkpoint, and whether it holds here."""

    claim: str
    evaluations: int
    accelerated: Number
    other: Number
    other_key: Key
    difference: Number
    interval: Interval | None = None
    holds: bool


class Variation(Document):
    """A style or a fine-tuned checkpoint, alone and with the adapter."""

    kind: str  # style or finetune
    pictures: int
    real_pictures: int
    prompts: int | None = None
    seed: int
    weights: list[Number | None]  # of the style and of the adapter
    distance_real: dict[Key, Number]
    intervals: dict[Key, Interval] = Field(default_factory=dict)
    retrieval: dict[Key, Number]
    network_evaluations: dict[Key, int]
    claims: list[Claim]


class WeightsGrid(Document):
    """Distance and retrieval for each pair of weights; rows by style weight."""

    style: str
    steps: int
    pictures: int
    prompt: str | None = None
    style_weights: list[Number]
    adapter_weights: list[Number]
    distance_real: list[list[Number]]
    retrieval: list[list[Number]]


class Study(Document):
    """study.json: is the acceleration universal?"""

    adapter: str  # SHA-256 of its weights
    guidance: Guidance | None = None
    weights: WeightsGrid | None = None
    variations: dict[str, Variation] = Field(default_factory=dict)


class Metrics(Document):
    """The figures of one adapter."""

    features: FeatureSet
    pictures: int  # of each set
    real_pictures: int | None = None
    prompts: int | None = None
    seed: int
    floor: Number  # the teacher's distance to itself with other seeds
    distance_teacher: dict[Key, Number] = Field(default_factory=dict)
    excess: dict[Key, Number]  # distance to the teacher less the floor
    distance_real: dict[Key, Number] | None = None
    distance_real_missing: str | None = None
    retrieval: dict[Key, Number]  # share of pictures that find their caption
    diversity: dict[Key, Number] = Field(default_factory=dict)
    scores: dict[str, dict[Key, Number]] = Field(default_factory=dict)  # by scorer
    network_evaluations: dict[Key, int]  # of one picture
    baselines: dict[Key, SolverSettings] = Field(default_factory=dict)  # the settings that each solver was drawn with
    solvers_chosen_on: str | None = None  # captions that these were searched on: validation, or test; None: fixed
    advantage: dict[Key, Advantage] = Field(default_factory=dict)  # at equal network evaluations
    advantage_at_steps: dict[Key, Advantage] = Field(default_factory=dict)  # at equal steps
    savings: dict[Key, Saving] = Field(default_factory=dict)  # at equal distance, by the student's key
    intervals: Intervals | None = None
    check: Check | None = None
    check_missing: str | None = None  # why there is no check
    worst: WorstCaptions | None = None
    own_prompts: Metrics | None = None  # the figures of evaluation.prompts
    reference_digest: str | None = None  # SHA-256 of the reference's features
    adapter: str | None = None  # SHA-256 of its weights
    seconds_per_picture: dict[Key, Number] = Field(default_factory=dict)
    latency: Latency | None = None
    guidance: Guidance | None = None
    weights: WeightsGrid | None = None
    variations: dict[str, Variation] = Field(default_factory=dict)

    @property
    def teacher(self) -> Key:
        """The teacher's name, such as teacher@50.

        Raises:
            UserError: its retrieval was not measured.
        """
        found = next((key for key in self.retrieval if key.method == TEACHER), None)
        if found is None:
            raise UserError("retrieval: has no teacher@STEPS, so there is nothing to compare with; evaluate again")
        return found

    @property
    def drawn(self) -> str:
        """What each set is made of: `512 pictures of 32 captions`. Old figures have no number of captions."""
        captions = "" if self.prompts is None else f" of {self.prompts} caption{'' if self.prompts == 1 else 's'}"
        return f"{self.pictures} pictures{captions}"

    @property
    def students(self) -> list[Key]:
        """The student's names, the fewest steps first."""
        return sorted((key for key in self.excess if key.method == STUDENT), key=lambda key: key.steps)

    def solvers_at(self, evaluations: int) -> list[Key]:
        """Returns the solvers that take so many network evaluations."""
        return [key for key in self.excess if key.is_solver and self.network_evaluations.get(key) == evaluations]

    def best_solver(self, evaluations: int) -> Key | None:
        """Returns the solver that is nearest to the teacher at so many network evaluations; None if there is none."""
        return min(self.solvers_at(evaluations), key=self.excess.__getitem__, default=None)

    @property
    def pairs(self) -> list[tuple[Key | None, Key]]:
        """The best solver and the student at equal network evaluations, for pictures side by side.

        At 2, 4 and 8 evaluations, as far as the student was drawn at these and a solver too; else at all of the
        student's, with None where no solver was drawn.
        """
        found = [(self.best_solver(self.network_evaluations[key]), key) for key in self.students]
        return [(rival, key) for rival, key in found if rival and self.network_evaluations[key] in SHOWN] or found

    def steps(self, key: Key) -> int:
        """Returns in how many steps a set was drawn; 0 for what has none, like `real`."""
        return self.baselines[key].steps if key in self.baselines else key.number

    def label(self, key: Key) -> str:
        """Returns how a reader calls a set: `DPM-Solver++, 4 evaluations (4 steps, unguided)`, `student, 4 steps`."""
        if key not in self.baselines:
            return key.label
        return f"{key.name}, {self.count_label(key)} ({self.baselines[key].text})"

    def named(self, key: Key) -> str:
        """Returns the key, and for a solver its settings: `dpm++@4 (4 steps, unguided)`."""
        return f"{key} ({self.baselines[key].text})" if key in self.baselines else key

    def count_label(self, key: Key) -> str:
        """Returns what the number of a key counts: `4 evaluations`, `4 steps`; nothing for what has none."""
        if key in self.baselines:
            return _counted(key.evaluations, "evaluation")
        return _counted(key.number, "step") if key.number else ""

    def agreement(self, student: Key) -> Agreement | None:
        """Returns whether the second features rank the student against the best solver as the first do.

        `undecided` where one of the two intervals includes zero; None where one of the two was not measured.
        """
        found = self.advantage.get(student), self.check.advantage.get(student) if self.check else None
        if found[0] is None or found[1] is None:
            return None
        ranks = [_rank(each) for each in found if each]
        return "undecided" if 0 in ranks else "agree" if ranks[0] == ranks[1] else "disagree"

    def interval(self, figure: str, key: Key) -> Interval | None:
        """Returns the interval of an excess, a retrieval or a distance_real; None where there is none."""
        if self.intervals is None or figure not in ("excess", "retrieval", "distance_real"):
            return None
        found: dict[Key, Interval] = getattr(self.intervals, figure)
        return found.get(key)

    def interval_of_seeds(self, figure: str, key: Key) -> Interval | None:
        """Returns the interval of an excess or a retrieval over the seeds alone; None where there is none."""
        if self.intervals is None or (self.intervals.seeds is None and self.intervals.captions is not None):
            return None
        found: dict[Key, Interval] = getattr(self.intervals.seeds or self.intervals, figure)
        return found.get(key)

    def joined(self, *others: Document) -> Metrics:
        """Returns these figures with all that the others say."""
        return Metrics.model_validate(self.plain() | {k: v for each in others for k, v in each.plain().items()})


def _rank(found: Advantage) -> int:
    """Returns -1 where the student is nearer than its rival, 1 where it is farther, 0 where chance may be all."""
    low, high = found.interval or (found.difference, found.difference)
    return -1 if high < 0 else 1 if low > 0 else 0
