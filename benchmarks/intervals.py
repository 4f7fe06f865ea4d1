"""How far bootstrap resamples spread, of how far new captions and seeds move a figure: python -m benchmarks.intervals

Captions have means, pictures of a caption lie around them, both Gaussian: a teacher, a student, and what an evaluation
draws of them, again and again. The figure is the student's excess Frechet distance over the floor. Ways to resample:

* captions: as lcmlora/evaluation/measures/bootstrap.py does, without the widening by Student's t;
* seeds: pictures within their captions, the captions stay;
* captions, then pictures: the pictures of a resampled caption once more;
* captions, distances anew: not to first order in the weights, but the Frechet distance of each resample.

Prints the standard deviation of the resamples as a share of the figure's over new draws; 1 is right.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks import tables
from lcmlora.evaluation.measures.bootstrap import Bootstrap, weights_of, weights_of_seeds
from lcmlora.evaluation.measures.distances import distance, named

Sets = tuple[Tensor, Tensor, Tensor]


class World:
    """A teacher and a student of so many captions, pictures of each and dimensions."""

    def __init__(self, captions: int, pictures: int, dimensions: int, strength: float) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._counts, self._strength = (captions, pictures), strength
        self.captions = [f"{i}" for i in range(captions) for _ in range(pictures)]
        self._scale = torch.logspace(0, -1, dimensions, dtype=torch.float64)
        self._student = 0.9 * torch.eye(dimensions).double() + 0.15 * self._normal(dimensions, dimensions) / 3

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def draw(self) -> Sets:
        """Returns the teacher's set, its second one and the student's, (N, D) fp64, of new captions and seeds."""
        captions, pictures = self._counts
        means = self._strength * self._normal(captions, 1, len(self._scale)) * self._scale
        own, shared = (self._normal(captions, pictures, len(self._scale)) * self._scale for _ in range(2))
        student = means @ self._student + 1.15 * shared
        return (means + own).flatten(0, 1), (means + shared).flatten(0, 1), student.flatten(0, 1)


def excess(sets: Sets) -> float:
    """Returns the student's distance less the floor."""
    teacher, again, student = sets
    return distance(teacher, student, "frechet") - distance(teacher, again, "frechet")


def spreads(world: World, sets: Sets, resamples: int, seed: int) -> dict[str, float]:
    """Returns the standard deviation of the resamples of one draw, by the way they are made."""
    teacher, again, student = sets
    bootstrap = Bootstrap(world.captions, resamples=resamples, seed=seed)
    figure = bootstrap.expand_excess(teacher, again, {"student": student}, "frechet")["student"]
    assert figure.teacher is not None
    generator = torch.Generator().manual_seed(seed)
    names = list(dict.fromkeys(world.captions))
    index = torch.tensor([names.index(caption) for caption in world.captions])
    times = weights_of(len(names), resamples, generator)[:, index]
    both = [times * weights_of_seeds(world.captions, resamples, generator) for _ in range(2)]
    kind = named("frechet")
    anew = [
        (kind.weighted(teacher, row, student, row) - kind.weighted(teacher, row, again, row)).item() for row in times
    ]
    return {
        "captions": (bootstrap.samples(figure) / bootstrap.widening).std().item(),
        "seeds": bootstrap.samples(figure, seeds=True).std().item(),
        "captions, then pictures": (both[0] @ figure.drawn + both[1] @ figure.teacher).std().item(),
        "captions, distances anew": torch.tensor(anew).std().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=300, help="of captions and seeds, for the figure's true spread")
    parser.add_argument("--resamples", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=10, help="draws that are resampled")
    options = parser.parse_args()

    torch.set_num_threads(1)
    rows = []
    for captions, pictures, dimensions, strength in ((32, 4, 80, 1.0), (32, 4, 80, 4.0), (8, 16, 80, 1.0)):
        world = World(captions, pictures, dimensions, strength)
        true = torch.tensor([excess(world.draw()) for _ in range(options.draws)]).std().item()
        found = [spreads(world, world.draw(), options.resamples, seed) for seed in range(options.repeats)]
        ratios = {name: sum(each[name] for each in found) / len(found) / true for name in found[0]}
        described = f"{captions} captions of {pictures}, {dimensions} dimensions, means {strength:g} apart"
        rows.append([described, *(f"{ratio:.2f}" for ratio in ratios.values())])
    print(tables.markdown(["", *ratios], rows))


if __name__ == "__main__":
    main()
