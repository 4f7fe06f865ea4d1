"""The captions at which the student is worst: there its pictures are farthest from the teacher's of that caption."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lcmlora.evaluation.figures import AGAIN, CaptionFigures, Key, Metrics, WorstCaptions
from lcmlora.evaluation.image_sets import ImageSets, Settings, draw, save_thumbnails, thumbnails_path
from lcmlora.evaluation.measures.metrics import retrieval_hits
from lcmlora.io.files import write_json

WORST_PICTURES = "@worst"  # a folder of pictures, and no name of a style


def worst_captions(
    metrics: Metrics,
    sets: dict[Key, Tensor],
    shown: Sequence[str],
    gallery_captions: Sequence[str],
    student: Key,
    count: int,
) -> WorstCaptions | None:
    """Returns the captions at which the student is farthest from the teacher, the worst first.

    The distance at a caption is that of the mean features of the pictures drawn for it to those of all pictures that
    the teacher drew for it, in both of its sets. It says whether the student draws something else; how its pictures
    vary is another question. The teacher's own is the distance between the means of its two sets, divided by two as if
    one of them were compared with both: what chance alone leaves.

    Args:
        metrics: of these sets; names the student's rival.
        sets: features (N, D) of the student, the rival, both sets of the teacher, and the `gallery`.
        shown: the captions of the N pictures.
        student: whose captions; None is returned if it was not drawn.
        count: how many captions; None is returned for 0.
    """
    if student not in sets or not count:
        return None
    teacher, again = metrics.teacher, Key(metrics.teacher + AGAIN)
    won = metrics.advantage.get(student)
    rival = won.rival if won else None
    groups: dict[str, list[int]] = defaultdict(list)
    for i, caption in enumerate(shown):
        groups[caption].append(i)
    means = {key: _means(sets[key], groups) for key in (student, rival, teacher, again) if key}
    centre = (means[teacher] + means[again]) / 2
    distances = {key: (mean - centre).norm(dim=1).tolist() for key, mean in means.items()}
    hits = {
        key: _means(retrieval_hits(sets[key], shown, sets[Key("gallery")], gallery_captions)[:, None], groups)[:, 0]
        for key in (student, teacher)
    }
    captions = list(groups)
    order = sorted(range(len(captions)), key=lambda n: -distances[student][n])[:count]
    return WorstCaptions(
        student=student,
        rival=rival,
        of=len(captions),
        captions=[
            CaptionFigures(
                caption=captions[n],
                pictures=len(groups[captions[n]]),
                student=distances[student][n],
                rival=distances[rival][n] if rival else None,
                teacher=distances[again][n],
                retrieval=hits[student][n].item(),
                teacher_retrieval=hits[teacher][n].item(),
            )
            for n in order
        ],
    )


def draw_worst(
    image_sets: ImageSets, worst: WorstCaptions, settings: Mapping[Key, Settings], seed: int
) -> dict[Key, Tensor]:
    """Returns the first picture of each of the captions, (captions, 3, H, W) uint8 for each of these settings.

    They start from the same noise as in the image sets, so that they are pictures that were measured.

    Args:
        image_sets: which the captions are of; draws with what is active in the network.
    """
    base, batch = image_sets.base, image_sets.batch
    captions = [each.caption for each in worst.captions]
    indices = [image_sets.shown.index(caption) for caption in captions]
    drawn = {}
    for key, each in settings.items():
        parts = []
        for start in range(0, len(captions), batch):
            part = slice(start, start + batch)
            parts.append(draw(base, captions[part], each, seed, indices[part])[0].cpu())
        drawn[key] = torch.cat(parts)
    return drawn


def keep_worst(worst: WorstCaptions, drawn: Mapping[Key, Tensor], folder: Path) -> None:
    """Writes the pictures of `draw_worst`, and their captions, to pictures/@worst of the folder."""
    for key, pictures in drawn.items():
        save_thumbnails(pictures, thumbnails_path(folder, key, WORST_PICTURES))
    captions = [each.caption for each in worst.captions]
    write_json(folder / "pictures" / WORST_PICTURES / "prompts.json", {"prompts": captions})


def _means(values: Tensor, groups: dict[str, list[int]]) -> Tensor:
    """Returns the mean of the rows of each group, (groups, D) fp64."""
    return torch.stack([values[indices].double().mean(dim=0) for indices in groups.values()])
