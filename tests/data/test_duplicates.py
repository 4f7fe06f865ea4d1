"""Pictures that look the same."""

import io
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from lcmlora.data.duplicates import NearDuplicates, perceptual_hash
from lcmlora.data.prepare import NEAR_DUPLICATE, PARTS, prepare_pictures
from lcmlora.data.sources.source import read_records
from tests.data.conftest import add, data_in


def scene(seed: int, side: int = 96) -> Image.Image:
    """Soft blobs, as pictures have them."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def _distance(a: Image.Image, b: Image.Image) -> int:
    return (perceptual_hash(a) ^ perceptual_hash(b)).bit_count()


def test_what_was_resized_compressed_or_lightened_is_close_and_other_pictures_are_not() -> None:
    for seed in range(20):
        picture, content = scene(seed), io.BytesIO()
        picture.save(content, "JPEG", quality=40)
        changed = (
            picture.resize((60, 60), Image.Resampling.LANCZOS),
            Image.open(content),
            ImageEnhance.Brightness(picture).enhance(1.1),
        )
        assert max(_distance(picture, other) for other in changed) <= 8
        assert _distance(picture, scene(seed + 100)) > 12


def test_no_close_pair_is_missed_and_no_other_one_is_taken_for_one() -> None:
    numbers = random.Random(0)
    for bits in (0, 3, 8):
        hashes = NearDuplicates(bits)
        earlier: list[int] = []
        for _ in range(300):
            picture_hash = numbers.getrandbits(64)
            if earlier and numbers.random() < 0.5:
                picture_hash = numbers.choice(earlier)
                for bit in numbers.sample(range(64), numbers.randrange(2 * bits + 2)):
                    picture_hash ^= 1 << bit
            close = any((picture_hash ^ other).bit_count() <= bits for other in earlier)
            assert hashes.has_or_add(picture_hash) == close
            if not close:
                earlier.append(picture_hash)


def test_of_pictures_that_look_the_same_the_first_is_kept_if_that_is_asked_for(tmp_path: Path) -> None:
    for number in range(6):
        add(tmp_path / "in", f"{number}.png", f"subject {number}", scene(number))
        add(tmp_path / "in", f"{number}-again.jpg", f"subject {number} again", scene(number), quality=60)
    assert prepare_pictures(data_in(tmp_path / "in"), 2, tmp_path / "all")["kept"] == 12
    report = prepare_pictures(data_in(tmp_path / "in", near_duplicates=6), 2, tmp_path / "out")
    assert report["dropped"] == {NEAR_DUPLICATE: {"count": 6, "first": [f"{number}.png" for number in range(6)]}}
    kept = [r for part in PARTS for r in read_records(tmp_path / f"out/{part}.jsonl")]
    assert {r.key for r in kept} == {f"{number}-again.jpg" for number in range(6)}
    assert all(r.look is not None and len(r.look) == 16 for r in kept)
