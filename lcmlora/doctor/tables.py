"""Printing of what a model will take."""

from __future__ import annotations

from collections.abc import Iterator

from lcmlora.doctor.forecast import TOO_LARGE, Forecast, StageForecast
from lcmlora.doctor.gpus import LEAST_SHARE, MOST_SHARE, Gpu
from lcmlora.io.terminal import cell

_ORDER = ("encode", "reference", "distill", "evaluate")


def print_forecast(found: Forecast, why: str) -> None:
    """Prints a forecast as tables.

    Args:
        why: why it is counted and not measured.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    facts = Table(show_header=False, box=box.SIMPLE, title=f"{found.name}, counted from its architecture")
    for key, value in _facts(found, why):
        facts.add_row(key, cell(value))
    stages = Table(box=box.SIMPLE)
    for title in ("stage", "settings", "tensors, GB", "of the GPU, GB", ""):
        stages.add_column(title, justify="left" if title in ("stage", "settings", "") else "right")
    for stage in _ordered(found):
        settings = ", ".join(f"{key}: {value}" for key, value in stage.settings.items())
        least, most = stage.needed
        needed = f"{least / 1e9:.1f} to {most / 1e9:.1f}"
        stages.add_row(stage.stage, settings, f"{stage.tensors / 1e9:.1f}", needed, stage.verdict or "")
    console = Console(width=None if Console().is_terminal else 120)
    console.print(facts)
    console.print(stages)
    if found.gpus:
        hours = Table(box=box.SIMPLE, title=f"hours, at {LEAST_SHARE:.0%} to {MOST_SHARE:.0%} of the GPU's rate")
        for title in ("GPU", "TFLOP/s", *_ORDER, "in all"):
            hours.add_column(title, justify="left" if title == "GPU" else "right")
        for gpu in found.gpus:
            name = gpu.name if gpu.bf16 else f"{gpu.name}, in fp16"
            hours.add_row(name, f"{gpu.teraflops:g}" if gpu.teraflops else "?", *_hours(found, gpu))
        console.print(hours)
    for line in advice(found):
        console.print(line, markup=False, highlight=False)


def _ordered(found: Forecast) -> list[StageForecast]:
    return [found.stage(name) for name in _ORDER]


def _facts(found: Forecast, why: str) -> Iterator[tuple[str, str]]:
    yield "", why
    yield "base", f"{found.source}, {found.resolution} px, {found.parameters / 1e6:,.0f} M parameters"
    yield "adapter", f"rank {found.rank}, {found.lora_parameters / 1e6:,.0f} M parameters"
    if found.memory:
        yield "memory", f"{found.memory:g} GB"
    processes = f", divided among {found.processes} processes" if found.processes > 1 else ""
    yield "training", f"{found.steps} steps of {found.batch} pictures{processes}, {found.precision}"
    assumed = " (assumed; --pictures)" if found.pictures_assumed else ""
    yield "pictures", f"{found.pictures:,}{assumed}"
    for title, parts in (("download", found.download), ("disk", found.disk)):
        yield title, f"{sum(parts.values()) / 1e9:.1f} GB"
        for name, size in parts.items():
            if size >= 5e6:
                yield "", f"{size / 1e9:.2f} GB: {name}"


def hours_text(hours: tuple[float, float] | None) -> str:
    """Returns an interval of hours with two digits each."""
    if hours is None:
        return "?"
    least, most = (f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 10 else f"{value:.0f}" for value in hours)
    return f"{least} to {most}"


def _hours(found: Forecast, gpu: Gpu) -> list[str]:
    parts = [stage.operations / found.processes for stage in _ordered(found)]
    return [hours_text(gpu.hours(part)) for part in [*parts, sum(parts)]]


def advice(found: Forecast) -> Iterator[str]:
    """Yields what to change in params.yaml so that all stages fit, and what cannot fit."""
    for stage in _ordered(found):
        if stage.verdict == TOO_LARGE:
            yield (
                f"{stage.stage}: {stage.needed[0] / 1e9:.1f} GB at least, with the settings that take least memory. "
                "Less take only settings that change the adapter: distill.optimizer: adamw8bit, a smaller distill.rank"
                if stage.stage == "distill"
                else f"{stage.stage}: {stage.needed[0] / 1e9:.1f} GB at least, one picture at a time"
            )
    if changes := found.changes():
        yield "So that it fits, write into params.yaml:"
        yield ""
        yield "bases:"
        yield f"  {found.name}:"
        for section, values in changes.items():
            yield f"    {section}: {{{', '.join(f'{key}: {value}' for key, value in values.items())}}}"
