"""What another package adds by name works like what is here: a source, features with a distance, a score, a store."""

from __future__ import annotations

import io
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
import yaml

from lcmlora import config, plugins
from lcmlora.config import Publish
from lcmlora.data.prepare import prepare
from lcmlora.data.sources.source import open_picture, read_records
from lcmlora.errors import UserError
from lcmlora.evaluation.measures import features, scores
from lcmlora.evaluation.measures.bootstrap import Bootstrap
from lcmlora.evaluation.measures.distances import distance, named, title_of
from lcmlora.plugins import DISTANCES, FEATURES, SCORES, SOURCES, STORES, Table
from lcmlora.releases.catalog import find, links, pull, releases, verify
from lcmlora.releases.publish import point, publish
from tests.data.conftest import data_in, picture
from tests.support import additions
from tests.support.releases import write_sealed

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
TABLES = [table for table in vars(plugins).values() if isinstance(table, Table)]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.key)
def test_each_name_of_each_table_has_its_class(table: Table) -> None:
    assert [table.get(name) for name in table.names]


def test_a_source_is_added(tmp_path: Path) -> None:
    SOURCES.register("zip", additions.Zip)
    with ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for number in range(8):
            file = io.BytesIO()
            picture(number).save(file, "PNG")
            archive.writestr(f"subject {number}.png", file.getvalue())
        archive.writestr("broken.png", b"nothing of a picture")
    data = data_in(tmp_path / "pictures.zip", source="zip")
    report = prepare(data, 1, tmp_path / "out")
    assert (report["source"], report["read"], report["kept"]) == ("zip", 9, 8)
    records = [r for part in ("train", "validation") for r in read_records(tmp_path / "out" / f"{part}.jsonl")]
    assert {record.caption for record in records} == {f"subject {number}" for number in range(8)}
    for record in records:
        number = int(record.caption.removeprefix("subject "))
        assert open_picture(data, record).tobytes() == picture(number).tobytes()


def test_features_a_distance_and_a_score_are_added() -> None:
    DISTANCES.register("mean-shift", additions.MeanShift)
    FEATURES.register("mean-colour", additions.MeanColour)
    SCORES.register("brightness", additions.Brightness)
    colours = features.load("mean-colour", CPU)
    dark, light = torch.full((6, 3, 8, 8), 0.25), torch.full((6, 3, 8, 8), 0.75)
    sets = colours(dark), colours(light)
    assert distance(*sets, colours.distance) == pytest.approx(3 * 0.5**2)
    assert named(colours.distance).pictures_needed(colours.dimensions) == 2
    samples = Bootstrap(["a", "b"] * 3, resamples=5).excess(sets[0], sets[0], {"light": sets[1]}, colours.distance)
    assert samples["light"].tolist() == pytest.approx([3 * 0.5**2] * 5)
    assert (title_of("mean-shift"), title_of("of a package that is not here")) == (
        "mean shift",
        "of a package that is not here",
    )
    assert scores.load("brightness", CPU)(light, ["a"] * 6).tolist() == pytest.approx([0.75] * 6)


def test_a_store_is_added(tmp_path: Path) -> None:
    STORES.register("memory", additions.Memory)
    settings, bundle = Publish(to="memory://shelf/models"), write_sealed(tmp_path / "bundle")
    uri = publish(bundle, "mini", settings)
    assert publish(bundle, "mini", settings) == uri and uri.startswith("memory://shelf/models/mini/sha256-")
    _, sha256 = find(uri, settings)
    assert point("mini", sha256, settings) == "memory://shelf/models/mini/channels/champion.json"
    assert [(found.uri, found.channels) for found in releases(settings)] == [(uri, ("champion",))]
    assert verify("mini@champion", settings).sha256 == sha256
    pull("mini@champion", settings, tmp_path / "pulled", everything=True)
    for path in bundle.iterdir():
        assert (tmp_path / "pulled" / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(UserError, match=r"memory://prefix gives no links; they need a release at s3://bucket/prefix"):
        links(uri, settings, 60)
    with pytest.raises(
        UserError, match=r"expected a directory or s3://bucket/prefix or memory://prefix, got 'ftp://x'"
    ):
        releases(Publish(to="ftp://x"))


def test_an_unknown_name_is_an_error_when_the_settings_are_read_and_says_which_there_are(tmp_path: Path) -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["data"]["source"] = "tape"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    known = "expected one of emoji, folder, parquet, webdataset, prompts"
    with pytest.raises(UserError, match=rf"data\.source: got 'tape': {known}"):
        config.load(tmp_path / "params.yaml")


def test_the_entry_point_of_an_installed_package_is_a_name_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = tmp_path / "tapes-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tapes\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[lcmlora.sources]\ntape = tests.support.additions:Zip\nreel = tests.support.additions:Reel\n"
    )
    assert "tape" not in SOURCES.names
    monkeypatch.syspath_prepend(tmp_path)
    assert data_in(tmp_path, source="tape").source == "tape"
    assert SOURCES.get("tape") is additions.Zip
    with pytest.raises(UserError, match=r"data\.source: reel: tapes declares tests\.support\.additions:Reel, and"):
        SOURCES.get("reel")


def test_a_name_that_is_taken_is_not_given_to_another_class() -> None:
    with pytest.raises(ValueError, match=r"data\.source: there is a folder already"):
        SOURCES.register("folder", additions.Zip)
