import torch

from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.loss import sample_stream
from lcmlora.parallel.ranks import Ranks
from lcmlora.training.batches import Batch, Batches, split_rows
from tests.support.distillation import CPU, SETTINGS

NAMES = ("z", "noise", "index", "w", "u")


def _batches(cache: LatentCache, ranks: Ranks | None = None, **changes: object) -> Batches:
    return sample_stream(cache, torch.arange(len(cache)), SETTINGS.model_copy(update=changes), CPU, ranks)


def _at(batches: Batches, cache: LatentCache, count: int, first: int = 0) -> Batch:
    """Returns samples with these sample indices, more than there are pictures."""
    sample_indices = range(first, first + count)
    return batches.at(sample_indices, torch.tensor(sample_indices) % len(cache))


def test_every_picture_is_seen_once_in_an_epoch(cache: LatentCache):
    batches = _batches(cache, batch=len(cache))
    orders = [batches.rows(batches.sample_indices(step, 0)).tolist() for step in range(3)]
    assert all(sorted(order) == list(range(len(cache))) for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_a_sample_depends_on_the_seed_and_its_index_alone(cache: LatentCache):
    forward = _batches(cache)
    for step in range(5):
        forward.draw(step)
    one, two, other = forward.draw(5), _batches(cache).draw(5), _batches(cache, seed=4).draw(5)
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in NAMES)
    assert not any(torch.equal(getattr(one, name), getattr(other, name)) for name in NAMES)


def test_one_samples_noise_timestep_and_guidance_are_the_same_on_any_number_of_processes(cache: LatentCache):
    """The reference scripts give every process the same noise, timesteps and guidance."""
    alone = _batches(cache, batch=8)
    for accumulate, size in ((1, 2), (2, 2), (1, 4), (4, 2), (8, 1)):
        parts = [
            _batches(cache, Ranks(rank, size), batch=8, accumulate=accumulate).draw(3, part)
            for rank in range(size)
            for part in range(accumulate)
        ]
        for name in NAMES:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(alone.draw(3), name))
        for name, value in alone.draw(3).conditioning.items():
            assert torch.equal(torch.cat([part.conditioning[name] for part in parts]), value)


def test_no_two_samples_share_noise(cache: LatentCache):
    batches = _batches(cache, batch=8)
    noise = torch.cat([batches.draw(step).noise for step in range(4)]).flatten(1)
    assert len(noise.unique(dim=0)) == 32
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.4  # 256 numbers each


def test_timesteps_are_uniform_even_within_a_step_and_guidance_stays_in_its_range(cache: LatentCache):
    batches = _batches(cache)
    batch = _at(batches, cache, 100)
    counts = torch.bincount(batch.index, minlength=50)
    assert counts.min() >= 1 and counts.max() <= 3  # two would be even
    assert batch.w.min() >= 3.0 and batch.w.max() <= 7.5
    many = _at(batches, cache, 2000, first=100).index
    assert torch.bincount(many, minlength=50).sub(40).abs().max() <= 3


def test_the_share_of_empty_prompts_gets_the_unconditional_embedding(cache: LatentCache):
    unconditional = cache.unconditional()["encoder_hidden_states"]
    batch = _at(_batches(cache, empty_prompts=0.25), cache, 400)
    empty = (batch.conditioning["encoder_hidden_states"] == unconditional).flatten(1).all(1)
    assert 75 <= empty.sum() <= 125
    plain = _at(_batches(cache), cache, 400)
    assert torch.equal(plain.noise, batch.noise)
    kept = batch.conditioning["encoder_hidden_states"][~empty]
    assert torch.equal(kept, plain.conditioning["encoder_hidden_states"][~empty])


def test_validation_takes_whole_captions_and_the_rest_is_trained_on(cache: LatentCache):
    rows, validation_rows = split_rows(cache, SETTINGS)
    assert sorted([*rows.tolist(), *validation_rows.tolist()]) == list(range(len(cache)))
    captions = cache.captions()
    assert not set(captions[rows].tolist()) & set(captions[validation_rows].tolist())
    assert len(validation_rows) == 1
    assert not torch.equal(split_rows(cache, SETTINGS.model_copy(update={"seed": 5}))[1], validation_rows)


def test_at_most_a_tenth_is_kept_and_pictures_of_one_caption_can_be_told_apart(cache: LatentCache):
    many = SETTINGS.model_copy(update={"validation_pictures": 1000})
    assert len(split_rows(cache, many)[1]) == 1  # of nine
    same = LatentCache.__new__(LatentCache)
    vars(same).update(vars(cache))
    same._rows = cache._rows | {"text_row": torch.zeros(len(cache), dtype=torch.int32)}
    rows, validation_rows = split_rows(same, SETTINGS)
    assert (len(rows), len(validation_rows)) == (len(cache) - 1, 1)


def test_student_rollouts_stop_on_the_way_to_the_timestep_and_are_the_same_on_any_number_of_processes(
    cache: LatentCache,
):
    alone = _batches(cache, batch=8, rollout=1.0)
    for step in range(6):
        batch = alone.draw(step)
        assert batch.stops is not None and batch.fresh is not None
        assert batch.stops.shape == (1 + step % 2, 8) and batch.fresh.shape == (1 + step % 2, *batch.z.shape)
        assert torch.equal(batch.stops[-1], batch.index)
        assert (batch.stops[0] >= batch.index).all() and batch.stops.max() <= 49
        assert step % 2 == 0 or (batch.stops[0] > batch.index)[batch.index < 49].all()
        parts = [_batches(cache, Ranks(rank, 2), batch=8, rollout=1.0).draw(step) for rank in range(2)]
        assert torch.equal(torch.cat([p.stops for p in parts], dim=1), batch.stops)
        assert torch.equal(torch.cat([p.fresh for p in parts], dim=1), batch.fresh)


def test_student_rollouts_have_their_share_of_the_steps_and_leave_the_others_as_they_are(
    cache: LatentCache,
):
    mixed, plain = _batches(cache, rollout=0.3), _batches(cache)
    rollout = [mixed.draw(step).stops is not None for step in range(100)]
    assert 28 <= sum(rollout) <= 32
    for step in (rollout.index(False), rollout.index(True)):
        assert all(torch.equal(getattr(mixed.draw(step), n), getattr(plain.draw(step), n)) for n in NAMES)
