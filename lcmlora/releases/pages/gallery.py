"""The tables of pictures on a report page: methods side by side, the worst captions, prompts of one's own."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

from lcmlora.evaluation.comparisons.worst import WORST_PICTURES
from lcmlora.evaluation.figures import REAL, STUDENT, TEACHER, CaptionFigures, Key, Metrics, WorstCaptions
from lcmlora.evaluation.sets.own_prompts import OWN_PICTURES
from lcmlora.releases.pages.album import Album, Picture
from lcmlora.releases.pages.numbers import decimals


def ordered(figures: Metrics) -> list[Key]:
    """Returns the keys by method, the student first and the teacher last, each by steps."""

    def place(key: Key) -> tuple[int, str, int]:
        return {STUDENT: 0, TEACHER: 2}.get(key.method, 1), key.method, key.number

    return sorted(figures.network_evaluations, key=place)


class Column(NamedTuple):
    """A column of pictures: its key, and what neighbours of one group have in common."""

    key: Key
    name: str
    details: str = ""
    group: str = ""


@dataclass(frozen=True)
class PictureTable:
    """Pictures by captions and methods."""

    columns: list[Column]
    rows: list[tuple[str, list[Picture]]]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The titles over the columns, each with its number of columns."""
        return [(title, len(list(group))) for title, group in itertools.groupby(each.group for each in self.columns)]


def side_by_side(figures: Metrics, album: Album, group: str = "") -> PictureTable:
    """Returns real pictures, the teacher's, and the best solver's beside the student's at equal network evaluations.

    Args:
        group: the folder of the pictures.

    Raises:
        UserError: a picture is missing.
    """
    columns = _known(figures)
    for rival, student in figures.pairs:
        columns += [_column(figures, key, figures.network_evaluations[student]) for key in (rival, student) if key]
    return _picture_table(figures, columns, album, group)


def _known(figures: Metrics) -> list[Column]:
    real = [Column(Key(REAL), "real")] if figures.real_pictures != 0 else []
    return [*real, Column(figures.teacher, "teacher", figures.count_label(figures.teacher))]


def _column(figures: Metrics, key: Key, evaluations: int) -> Column:
    details = figures.baselines[key].text if key in figures.baselines else figures.count_label(key)
    return Column(key, key.name, details, f"{evaluations} network evaluation{'' if evaluations == 1 else 's'}")


def _picture_table(figures: Metrics, columns: list[Column], album: Album, group: str) -> PictureTable:
    pictures = [album.thumbnails(each.key, figures.label(each.key), group) for each in columns]
    captions = album.prompts_of(group) if group else album.prompts
    return PictureTable(columns, [(captions[i], list(row)) for i, row in enumerate(zip(*pictures, strict=True))])


@dataclass(frozen=True)
class Worst:
    """The captions at which the student is worst, each with its figures and the first of its pictures."""

    facts: WorstCaptions
    places: int
    columns: list[Column]
    rows: list[tuple[CaptionFigures, list[Picture]]]


def worst_of(figures: Metrics, album: Album) -> Worst | None:
    """Returns the worst captions; None where they were not measured. Raises UserError where a picture is missing."""
    facts = figures.worst
    if facts is None:
        return None
    count = figures.network_evaluations[facts.student]
    columns = [*_known(figures), *(_column(figures, key, count) for key in (facts.rival, facts.student) if key)]
    pictures = _picture_table(figures, columns, album, WORST_PICTURES)
    rows = [(each, row) for each, (_, row) in zip(facts.captions, pictures.rows, strict=True)]
    return Worst(facts, decimals([each.student for each in facts.captions]), columns, rows)


@dataclass(frozen=True)
class OwnPrompts:
    """The section on prompts of one's own."""

    figures: Metrics
    places: int
    pictures: PictureTable


def own_prompts_of(figures: Metrics, album: Album) -> OwnPrompts | None:
    """Returns the prompts of one's own; None where there were none. Raises UserError where a picture is missing."""
    own = figures.own_prompts
    return OwnPrompts(own, decimals(own.excess.values()), side_by_side(own, album, OWN_PICTURES)) if own else None


@dataclass(frozen=True)
class Block:
    """The pictures of one prompt: for each method a row, its method, name, and a picture by network evaluations."""

    prompt: str
    real: Picture | None
    teacher: Picture
    rows: list[tuple[str, str, list[Picture | None]]]


@dataclass(frozen=True)
class Everything:
    """The pictures of all prompts, methods by network evaluations."""

    evaluations: list[int]
    teacher_steps: int
    blocks: list[Block]


def everything(figures: Metrics, album: Album) -> Everything:
    """Returns what every method drew for every prompt at every number of network evaluations.

    Raises:
        UserError: a picture is missing.
    """
    cost, teacher, real = figures.network_evaluations, figures.teacher, Key(REAL)
    keys = [key for key in ordered(figures) if key != teacher]
    also = [] if figures.real_pictures == 0 else [real]
    thumbnails = {key: album.thumbnails(key, figures.label(key)) for key in (*also, teacher, *keys)}
    evaluations = sorted({cost[key] for key in keys})
    of_method: dict[str, dict[int, Key]] = {}
    for key in keys:
        of_method.setdefault(key.method, {})[cost[key]] = key
    blocks = []
    for i, prompt in enumerate(album.prompts):
        rows = [
            (method, Key(method).name, [thumbnails[mine[n]][i] if n in mine else None for n in evaluations])
            for method, mine in of_method.items()
        ]
        blocks.append(Block(prompt, thumbnails[real][i] if also else None, thumbnails[teacher][i], rows))
    return Everything(evaluations, teacher.steps, blocks)
