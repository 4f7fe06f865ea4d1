"""What stages use of devices, what that costs, and what a budget stops."""

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from lcmlora.config import Config
from lcmlora.registry.costs.spent import Use, add_up, figures, of_tags
from lcmlora.settings.services import Costs
from lcmlora.tasks import costs, energy
from lcmlora.tasks.energy import Gpu
from tests.support.releases import load_settings

H100 = Costs(per_hour={"cpu": 0.36, "NVIDIA": 1.8, "NVIDIA H100": 3.6}, budget=1.0)


@pytest.fixture
def settings(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(energy, "gpus", list)
    return load_settings(base_folder, models=("a", "a-b")).model_copy(update={"costs": H100})


def test_the_price_is_that_of_the_longest_name_that_fits_and_energy_of_all_or_none():
    spent = add_up([Use("NVIDIA H100 80GB HBM3", 1000, 3.6e6), Use("NVIDIA A10", 1000, 1.8e6)], H100)
    assert (spent.seconds, spent.kwh, spent.price) == (2000, 1.5, 1.5)
    assert add_up([Use("NVIDIA A10", 10, 1.0), Use("cpu", 10)], H100).kwh is None
    assert add_up([Use("NVIDIA A10", 10), Use("AMD", 10)], H100).price is None
    assert add_up([Use("cpu", 10)], Costs()).price is None


def test_tags_of_a_version_are_read_again_and_say_what_was_not_measured():
    tags = add_up([Use("cpu", 100.0)], H100).tags()
    assert tags == {"device_seconds": "100.0", "devices": "cpu: 100.0 s", "price": "0.01 EUR"}
    assert of_tags(tags) == [("device time", "100 s (cpu: 100.0 s)"), ("energy", "not measured"), ("price", "0.01 EUR")]
    assert figures(tags) == {"device_seconds": 100.0, "energy_kwh": None, "price": "0.01 EUR"}
    assert of_tags({"device_seconds": "many"}) == of_tags({}) == []


def test_a_stage_counts_for_its_model_however_it_ends_and_an_unused_one_does_not(settings: Config):
    with pytest.raises(ValueError), costs.metering("distill@a", settings):
        raise ValueError
    with costs.metering("style@a-b-ink", settings) as metered:
        assert metered.used
    with costs.metering("evaluate@a", settings) as metered:
        metered.used = False
    with costs.metering("prepare", settings):
        pass
    assert [(entry.model, entry.stage) for entry in costs.entries()] == [("a", "distill@a"), ("a-b", "style@a-b-ink")]
    assert [entry.device for entry in costs.entries()] == ["cpu", "cpu"]


def test_a_killed_stage_counts_up_to_its_last_note(settings: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(costs, "_EVERY", 0.01)
    killed = costs.metering("distill@a", settings)
    killed.__enter__()
    note = costs._running("distill@a")
    while not note.exists():
        time.sleep(0.01)
    assert [entry.stage for entry in costs.uncounted("a")] == ["distill@a"]
    kept = note.read_text()
    killed.__exit__(None, None, None)
    costs._ledger().unlink()
    note.write_text(kept)  # as a kill leaves it
    with costs.metering("distill@a", settings):
        pass
    assert [entry.stage for entry in costs.entries()] == ["distill@a", "distill@a"]
    assert not note.exists()


def test_what_was_counted_for_a_version_is_not_counted_for_the_next(settings: Config):
    for model in ("a", "a-b"):
        costs._append(costs.Entry(costs._now(), model, f"distill@{model}", "cpu", 50.0, None))
    costs._append(costs.Entry("2020-01-01T00:00:00+00:00", "a", "distill@a", "cpu", 7.0, None))
    with costs._ledger().open("a") as file:
        file.write('{"time": "2026-')  # cut off
    assert costs.uncounted_sum("a", settings).seconds == 57
    costs.count_for("a", "lcm-lora-a/1")
    assert costs.uncounted("a") == []
    assert [entry.seconds for entry in costs.entries()] == [50.0, 50.0]  # that of 2020 is forgotten
    assert costs.uncounted_sum("a-b", settings).seconds == 50


def test_a_budget_counts_this_month_only(settings: Config):
    month = datetime.now(UTC).replace(day=1, hour=0, minute=0, second=0)
    before = (month - timedelta(seconds=1)).isoformat(timespec="seconds")
    costs._append(costs.Entry(before, "a", "distill@a", "cpu", 36000.0, None))
    costs._append(costs.Entry(costs._now(), "a", "distill@a", "cpu", 5000.0, None))
    assert not costs.budget_of("a", settings).is_spent
    costs._append(costs.Entry(costs._now(), "a", "reference@a", "NVIDIA H100 PCIe", 600.0, None))
    budget = costs.budget_of("a", settings)
    assert budget.is_spent and budget.line.startswith("1.10 of 1.00 EUR are spent in 20")
    assert [costs.is_first_notice("a"), costs.is_first_notice("a"), costs.is_first_notice("a-b")] == [True, False, True]
    assert costs.budget_of("a", settings.model_copy(update={"costs": Costs()})) is None


def test_gpus_are_those_that_cuda_shows():
    gpus = [Gpu(0, "GPU-aa", "H100"), Gpu(1, "GPU-ab", "H100"), Gpu(2, "GPU-c", "H100")]
    assert [gpu.index for gpu in energy._visible(gpus, "2,0")] == [2, 0]
    assert [gpu.index for gpu in energy._visible(gpus, "GPU-c,1")] == [2, 1]
    assert energy._visible(gpus, "") == energy._visible(gpus, "-1") == energy._visible(gpus, "GPU-a") == []


def test_two_devices_for_a_second_are_two_device_seconds(settings: Config, monkeypatch: pytest.MonkeyPatch):
    gpus, meter = [Gpu(0, "GPU-a", "NVIDIA H100"), Gpu(1, "GPU-b", "NVIDIA H100")], iter([100.0, 500.0])
    monkeypatch.setattr(energy, "gpus", lambda: gpus)
    monkeypatch.setattr(energy, "joules", lambda used: next(meter))
    two = settings.model_copy(update={"launch": {"processes": 2}})
    with costs.metering("distill@a", two):
        time.sleep(0.1)
    (entry,) = costs.entries()
    assert entry.device == "NVIDIA H100" and entry.joules == 400.0 and entry.seconds >= 0.2
