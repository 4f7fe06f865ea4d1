"""The time of the sampling plan: python -m benchmarks.planning [--samples N] [--shards N] [--buckets N]

The first batch of a plan (its shards' order, its batches' order) and the mean of those after it, for a table of shards
of uneven sizes; figures are medians over repeats.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from benchmarks import tables
from lcmlora.data.latents.sampling_plan import SamplingPlan, Shard

_STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=500)
    parser.add_argument("--buckets", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    sizes = draw.multinomial(options.samples, draw.dirichlet(np.full(options.shards, 20.0)))
    shards = [Shard(int(b), int(n)) for b, n in zip(draw.integers(0, options.buckets, len(sizes)), sizes, strict=True)]
    rows = []
    for batch, lanes in ((16, 1), (512, 1), (512, 8)):
        first, later = [], []
        for repeat in range(options.repeats):
            began = time.perf_counter()
            plan = SamplingPlan(repeat, shards, batch, lanes=lanes)
            plan.batch(0)
            planned = time.perf_counter()
            for step in range(1, 1 + _STEPS):
                plan.batch(step)
            first.append(1e3 * (planned - began))
            later.append(1e3 * (time.perf_counter() - planned) / _STEPS)
        used = plan.steps * batch / options.samples
        figures = [f"{statistics.median(first):.1f} ms", f"{statistics.median(later):.2f} ms", f"{used:.2%}"]
        rows.append([str(batch), str(lanes), *figures])
    print(f"{options.samples} samples in {options.shards} shards of {options.buckets} buckets\n")
    print(tables.markdown(["batch", "lanes", "plan and first batch", "a batch", "seen in an epoch"], rows))


if __name__ == "__main__":
    main()
