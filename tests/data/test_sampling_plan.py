import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcmlora.data.latents.sampling_plan import SamplingPlan, Shard, permuted

TABLES = st.lists(st.builds(Shard, st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=12)


@st.composite
def plans(draw: st.DrawFn) -> tuple[SamplingPlan, list[Shard], int, int]:
    """A plan that is possible, with its table, batch and lanes."""
    shards, lanes = draw(TABLES), draw(st.sampled_from([1, 2, 3, 4]))
    batch = lanes * draw(st.integers(1, 6))
    shards.append(Shard(draw(st.integers(0, 2)), batch))
    window = draw(st.integers(batch, 80))
    return SamplingPlan(draw(st.integers(0, 5)), shards, batch, lanes=lanes, window=window), shards, batch, lanes


def _epoch(plan: SamplingPlan, epoch: int) -> list[tuple[int, list[tuple[int, int]]]]:
    """Returns bucket and (shard, row) of every batch."""
    made = [plan.batch(step) for step in range(epoch * plan.steps, (epoch + 1) * plan.steps)]
    return [(each.bucket, list(zip(each.shards.tolist(), each.rows.tolist(), strict=True))) for each in made]


@settings(max_examples=100, deadline=None)
@given(plans(), st.integers(0, 3))
def test_no_row_comes_twice_in_an_epoch_and_less_than_a_batch_of_a_bucket_is_left_out(made, epoch: int):
    plan, shards, batch, lanes = made
    seen = [row for _, rows in _epoch(plan, epoch) for row in rows]
    assert len(set(seen)) == len(seen)
    assert all(0 <= row < shards[shard].rows for shard, row in seen)
    come = Counter(shards[shard].bucket for shard, _ in seen)
    for bucket in {shard.bucket for shard in shards}:
        assert 0 <= sum(s.rows for s in shards if s.bucket == bucket) - come[bucket] < batch + lanes


@settings(max_examples=50, deadline=None)
@given(plans(), st.integers(0, 100))
def test_a_batch_is_whole_of_one_bucket_and_of_the_shards_that_were_announced(made, step: int):
    plan, shards, batch, _ = made
    got = plan.batch(step)
    assert len(got.shards) == len(got.rows) == batch
    assert {shards[shard].bucket for shard in got.shards.tolist()} == {got.bucket}
    assert set(got.shards.tolist()) <= set(plan.shards(step).tolist())


@settings(max_examples=50, deadline=None)
@given(plans(), st.integers(0, 40))
def test_a_lane_gives_its_part_of_every_batch_and_reads_no_others_rows(made, step: int):
    plan, _, batch, lanes = made
    got = plan.batch(step)
    for lane, part in enumerate(np.split(got.shards, lanes)):
        assert set(part.tolist()) <= set(plan.shards(step, range(lane, lane + 1)).tolist())
    assert batch % lanes == 0


def test_a_plan_goes_on_from_any_step_as_if_it_had_never_stopped():
    shards = [Shard(number % 3, 40 + number) for number in range(9)]
    one, other = SamplingPlan(1, shards, 8, window=64), SamplingPlan(1, shards, 8, window=64)
    straight = [one.batch(step) for step in range(3 * one.steps)]
    for step in (2 * one.steps + 1, 5, one.steps - 1, 0):
        assert all(np.array_equal(a, b) for a, b in zip(other.batch(step), straight[step], strict=True))


def test_epochs_and_seeds_have_orders_of_their_own_and_buckets_alternate():
    shards = [Shard(number % 2, 100) for number in range(6)]
    plan, other = SamplingPlan(1, shards, 10), SamplingPlan(2, shards, 10)
    first, second, third = _epoch(plan, 0), _epoch(plan, 1), _epoch(other, 0)
    assert first != second != third != first
    buckets = [bucket for bucket, _ in first]
    assert sorted(buckets) == [0] * 30 + [1] * 30
    assert 15 < sum(a != b for a, b in itertools.pairwise(buckets)) < 45  # 30 on average


def test_a_window_reads_few_shards_at_a_time_and_each_once():
    plan = SamplingPlan(0, [Shard(0, 100)] * 50, 20, window=500)
    live = [set(plan.shards(step).tolist()) for step in range(plan.steps)]
    assert max(map(len, live)) <= 6
    opened = [shard for before, now in zip([set(), *live], live, strict=False) for shard in now - before]
    assert sorted(opened) == list(range(50))


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
def test_a_permutation_takes_each_index_to_another_one(size: int):
    assert sorted(permuted(np.arange(size), size, 3, 4)) == list(range(size))


def test_all_orders_are_as_likely():
    """A chi-square statistic of 24 orders has 23 degrees of freedom: 50 in one of a thousand cases."""
    counts = Counter(tuple(permuted(np.arange(4), 4, key).tolist()) for key in range(4800))
    assert len(counts) == 24
    assert sum((count - 200) ** 2 / 200 for count in counts.values()) < 50


def test_the_order_is_the_same_on_every_machine():
    assert permuted(np.arange(10), 10, 0, 1).tolist() == [7, 5, 1, 2, 0, 8, 4, 9, 3, 6]
    assert permuted(np.array([0, 10**12]), 10**12 + 1, 0).tolist() == [179692232866, 163260653877]


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        (6, {"lanes": 4}, "4 lanes do not divide a batch of 6"),
        (6, {"window": 5}, "a window of 5 rows is less than a batch of 6"),
        (6, {}, "no bucket has the 6 rows of a batch; the largest has 5"),
    ],
)
def test_what_makes_no_plan_is_told(batch: int, options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        SamplingPlan(0, [Shard(0, 5), Shard(1, 4)], batch, **options)


def test_an_index_out_of_the_range_is_refused():
    with pytest.raises(ValueError, match=r"indices from 0 to 10 are not all in range\(10\)"):
        permuted(np.array([0, 10]), 10, 0)
