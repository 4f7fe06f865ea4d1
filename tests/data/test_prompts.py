"""Prompts without pictures, and the latents that the teacher makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lcmlora import bases
from lcmlora.config import Data, Encode, Rollouts
from lcmlora.data.latents.cache import LatentCache
from lcmlora.data.latents.encode import encode_latents
from lcmlora.data.latents.rollouts import RolloutEncoder
from lcmlora.data.prepare import PARTS, prepare_pictures
from lcmlora.data.preview import draw_sheet
from lcmlora.data.sources.source import Record, read_records, survey
from lcmlora.diffusion.noise import generator
from lcmlora.diffusion.sampling import text_conditioning
from lcmlora.diffusion.teacher import Teacher
from lcmlora.distillation.loss import sample_stream
from lcmlora.errors import UserError
from tests.data.conftest import data_in
from tests.support.distillation import CPU, load_parts
from tests.support.distillation import SETTINGS as DISTILL
from tests.support.miniature import RESOLUTION

SETTINGS = Encode(batch=4, rollouts=Rollouts(steps=5, w=3.0, states=True))


def prompts(path: Path, content: bytes | str, **changes: Any) -> Data:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return data_in(path, source="prompts", **changes)


def ten(root: Path, **changes: Any) -> Data:
    return prompts(root / "prompts.txt", "".join(f"subject {n}\n" for n in range(10)), **changes)


def draw(base_folder: Path, data: Data, work: Path, settings: Encode = SETTINGS) -> LatentCache:
    prepare_pictures(data, 1, work / "prompts")
    base = load_parts(base_folder, "network", "text")
    encode_latents(base, data, settings, work / "prompts", work / "scratch", work / "latents")
    return LatentCache(work / "latents")


@pytest.fixture(scope="module")
def cache(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LatentCache:
    root = tmp_path_factory.mktemp("rollouts")
    return draw(base_folder, ten(root), root)


def test_a_text_file_has_a_prompt_in_each_line(tmp_path: Path) -> None:
    lines = b"a red\tapple \r\n\n\xef\xbc\xa1 tree\na red apple\nbroken \xff\n" + b"x" * 70000 + b"\n\x01\nlast"
    found = survey(prompts(tmp_path / "p.txt", lines))
    records, rejections = found.records, found.rejections
    assert [(r.key, r.caption) for r in records] == [
        ("p.txt/000001/0", "a red apple"), ("p.txt/000003/0", "A tree"), ("p.txt/000008/0", "last"),
    ]  # fmt: skip
    assert {r.name: r.reason for r in rejections} == {
        "p.txt/000004": "same prompt as another",
        "p.txt/000005": "file name or caption is not UTF-8",
        "p.txt/000006": "caption of more than 65536 bytes",
        "p.txt/000007": "no caption",
    }


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "one"}\n"two"\n\n{"caption": "three", "seed": 4}\n{"text": "\\ud800"}\n'),
        ("p.csv", 'seed,prompt\n1,one\n2,"two"\n3,three\n4,\xff\n'.encode("latin-1")),
    ],
)
def test_lines_of_json_and_tables_name_their_prompts(tmp_path: Path, name: str, content: bytes | str) -> None:
    found = survey(prompts(tmp_path / name, content))
    records, rejections = found.records, found.rejections
    assert [r.caption for r in records] == ["one", "two", "three"]
    assert [r.reason for r in rejections] == ["file name or caption is not UTF-8"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.md", "one", "no prompts; expected a file that ends in .txt, .jsonl, .csv, .parquet"),
        ("p.txt", "\n\n", "no prompt that can be used"),
        ("p.jsonl", '{"name": "one"}\n', "p.jsonl/000001: row without a text under prompt, caption or text"),
        ("p.jsonl", '[\n"one"\n]\n', "p.jsonl: one JSON document over several lines"),
        ("p.csv", "name\none\n", "p.csv/000001: row without a text under prompt"),
        ("p.csv", "id;prompt\n1;one\n", "p.csv: columns are not separated by commas"),
        ("p.csv", "prompt,prompt\none,two\n", "p.csv: two columns of one name"),
        ("p.txt", "one\n".encode("utf-16"), "p.txt: UTF-16; expected UTF-8"),
        ("p.csv", b"\x1f\x8b\x08\x00", "p.csv: compressed; expected plain text"),
        ("p.parquet", b"PAR1", "p.parquet: not a parquet file"),
    ],
)
def test_a_file_that_is_none_of_prompts_is_refused(
    tmp_path: Path, name: str, content: bytes | str, message: str
) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        survey(prompts(tmp_path / name, content))


def test_copies_of_a_prompt_are_told_apart_and_fall_on_one_side(tmp_path: Path) -> None:
    report = prepare_pictures(ten(tmp_path, copies=3), 4, tmp_path / "out")
    train, validation, test = (read_records(tmp_path / f"out/{part}.jsonl") for part in PARTS)
    everything = train + validation + test
    assert report["kept"] == len(everything) == 30
    assert len({r.sha256 for r in everything}) == len({r.key for r in everything}) == 30
    assert sum(len({r.caption for r in part}) for part in (train, validation, test)) == 10


def test_there_is_nothing_to_preview(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="prompts has no pictures to look at"):
        draw_sheet(ten(tmp_path), 12, tmp_path / "sheet.png")


def test_a_latent_is_the_end_of_the_teachers_guided_run_from_the_prompts_own_noise(base: bases.LoadedBase) -> None:
    records = [Record(f"p/{i}/0", f"subject {i}", f"{i:02d}", 0, 0) for i in range(3)]
    rows = RolloutEncoder(base, SETTINGS.rollouts)(records)
    teacher = Teacher(base, base.unconditional(), 5)
    for i, record in enumerate(records):
        x = noise = torch.randn(1, *base.latent_shape, generator=generator("rollout", record.sha256))
        text = text_conditioning(base, [record.caption])
        for row in (4, 3, 2, 1, 0):
            x = teacher.step(x, teacher.t[row : row + 1], teacher.t_prev[row : row + 1], torch.tensor([3.0]), text)
            torch.testing.assert_close(rows["states"][i, row].float(), x[0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(rows["states"][i, 5].float(), noise[0], atol=2e-3, rtol=1e-3)
    assert torch.equal(rows["latent_mean"], rows["states"][:, 0])
    assert rows["orig_size"].tolist() == [[RESOLUTION] * 2] * 3


def test_the_cache_says_how_it_was_drawn_and_gives_neighbouring_states(cache: LatentCache) -> None:
    assert cache.rollouts == SETTINGS.rollouts
    rows, index = torch.tensor([6, 0, 3]), torch.tensor([0, 4, 2])
    upper, lower = cache.states(rows, index)
    mean, logvar = cache.latents(rows)
    assert torch.equal(lower[0], mean[0]) and (0.5 * logvar).exp().max() < 1e-6
    again = cache.states(rows, index - 1 + (index == 0).long())[0]
    assert torch.equal(again[1:], lower[1:])
    assert upper[1].std() > 0.9 and not torch.equal(upper, lower)


def test_shards_end_early_enough_for_a_killed_run_and_give_the_same_states(
    base_folder: Path, cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcmlora.data.latents.encode.SHARD_ROWS", 3)
    parts = draw(base_folder, ten(tmp_path), tmp_path)
    assert len(parts.manifest.shards) == 3 < len(cache)
    mapped = LatentCache(tmp_path / "latents", ram_bytes=0)
    rows, index = torch.arange(len(cache)), torch.arange(len(cache)) % 5
    for other in (parts, mapped):  # batches of another size round otherwise
        torch.testing.assert_close(other.states(rows, index), cache.states(rows, index), atol=2e-3, rtol=2e-3)


def test_states_come_out_of_a_bucket_before_its_shards_are_here_and_after(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcmlora.data.latents.encode.SHARD_ROWS", 3)
    here = draw(base_folder, ten(tmp_path), tmp_path / "here")
    there = draw(base_folder, ten(tmp_path), tmp_path, SETTINGS.model_copy(update={"shards": str(tmp_path / "bucket")}))
    rows, index = torch.arange(len(here)), torch.arange(len(here)) % 5
    assert torch.equal(there.states(rows, index), here.states(rows, index))
    settings = DISTILL.model_copy(update={"trajectory": 1.0, "grid": 5})
    near, far = (sample_stream(each, rows, settings, CPU) for each in (here, there))
    for step in range(4):
        one, other = near.draw(step).pair, far.draw(step).pair
        assert one is not None and other is not None and torch.equal(one, other)
    assert (tmp_path / ".latents.shards").is_dir()


def test_a_killed_run_goes_on_at_the_next_shard_with_the_same_bytes(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lcmlora.data.latents.encode.SHARD_ROWS", 4)
    whole = draw(base_folder, ten(tmp_path / "whole"), tmp_path / "whole")
    taken: list[int] = []
    real = RolloutEncoder.__call__

    def killed(self: RolloutEncoder, records: list[Record]) -> Any:
        if len(taken) == 1:
            taken.append(0)
            raise KeyboardInterrupt
        taken.append(len(records))
        return real(self, records)

    monkeypatch.setattr(RolloutEncoder, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        draw(base_folder, ten(tmp_path), tmp_path)
    draw(base_folder, ten(tmp_path), tmp_path)
    assert taken == [4, 0, len(whole) - 4]
    for path in (tmp_path / "whole/latents").iterdir():
        assert path.read_bytes() == (tmp_path / "latents" / path.name).read_bytes()


def test_a_teacher_that_is_not_finite_is_told_by_the_prompt(base: bases.LoadedBase) -> None:
    base.network.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="p/0/0: the teacher's latent is not finite"):
        RolloutEncoder(base, SETTINGS.rollouts)([Record("p/0/0", "a", "00", 0, 0)])


def test_pictures_have_no_rollouts(base_folder: Path, tmp_path: Path, folder: Path) -> None:
    prepare_pictures(data_in(folder), 1, tmp_path / "pictures")
    base = load_parts(base_folder, "vae", "text")
    encode_latents(base, data_in(folder), SETTINGS, tmp_path / "pictures", tmp_path / "scratch", tmp_path / "latents")
    assert LatentCache(tmp_path / "latents").rollouts is None
    assert "rollouts" not in json.loads((tmp_path / "latents/manifest.json").read_text())
