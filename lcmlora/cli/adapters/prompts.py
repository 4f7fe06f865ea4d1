"""`lcmlora prompts`: what production asks for, as `lcmlora serve` keeps it, and blind comparisons on it.

Heavy imports happen in the verbs.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora.cli.context import Context, context_of
from lcmlora.cli.shell import completion
from lcmlora.errors import UserError
from lcmlora.io.terminal import note, say

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcmlora.config import Config

app = typer.Typer(
    no_args_is_help=True,
    help="""Look at a sample of what production asks for, and compare adapters on it.

    `lcmlora serve` keeps prompts if serving.keep_prompts in params.yaml asks
    for it, in the folder serving.prompts. What people write may be personal
    data.

    Examples:

      lcmlora prompts list emoji

      lcmlora prompts compare emoji@previous emoji@champion --out pairs
    """,
)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A model of params.yaml.", show_default=False, autocompletion=completion.models
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Since = Annotated[str | None, typer.Option(help="The first day, YYYY-MM-DD.", show_default=False)]
Until = Annotated[str | None, typer.Option(help="The last day, YYYY-MM-DD.", show_default=False)]


@app.command("list")
def list_days(call: typer.Context, model: Model, as_json: AsJson = False) -> None:
    """Print how many prompts are kept of each day, and how many of them are training captions word by word.

    Example: lcmlora prompts list emoji
    """
    context = context_of(call)
    config = context.settings()
    folder = _folder(context, config, model)
    from lcmlora.inference.production import kept_prompts

    known = _captions(context, config, model)
    rows = []
    for day, count in kept_prompts.days(folder, model).items():
        found = kept_prompts.sample(folder, model, count, day, day)
        rows.append((day.isoformat(), count, kept_prompts.among(folder, model, found, known)))
    if as_json:
        print(json.dumps([{"day": day, "kept": count, "captions": same} for day, count, same in rows], indent=2))
        return
    from lcmlora.cli.registry import print_table

    print_table(("day", "kept", "training captions"), rows)


@app.command("sample")
def write_sample(
    call: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option(help="The file to write, .jsonl.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 200,
    since: Since = None,
    until: Until = None,
) -> None:
    """Write a sample of the prompts to a file that `evaluation.prompts` reads: each distinct text once.

    Only you can read the file. With it as evaluation.prompts in params.yaml, each evaluation draws and compares them,
    and the report page shows them: to everyone who can read the release.

    Example: lcmlora prompts sample emoji --out asked.jsonl
    """
    context = context_of(call)
    config = context.settings()
    if out.suffix != ".jsonl":
        raise UserError(f"--out {out}: expected a file that ends in .jsonl")
    found = _sampled(context, config, model, count, since, until)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600) if not out.exists() else None
    if descriptor is None:
        raise UserError(f"--out {out}: is there already; name a new file")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in found)
    say(f"{out}: {len(found)} prompts; evaluation.prompts: {out} in params.yaml evaluates them")


@app.command()
def drift(call: typer.Context, model: Model, since: Since = None, until: Until = None, as_json: AsJson = False) -> None:
    """Say whether the prompts are distributed like the training captions, by the base's own text encoders.

    `lcmlora watch` does this by itself. It needs the text of the prompts, and takes a minute or two on a CPU. In JSON,
    `drifted` is null if there are too few prompts or captions to say so.

    Example: lcmlora prompts drift emoji
    """
    context = context_of(call)
    config = context.settings()
    found = _sampled(context, config, model, config.serving.prompts_a_day, since, until)
    captions = _captions(context, config, model)
    import torch

    from lcmlora import bases
    from lcmlora.evaluation.sets import prompt_drift

    base = bases.load(
        model,
        config.base(model),
        context.project.base(model),
        device=torch.device("cpu"),  # whatever trains on the GPU goes on
        parts=("text",),
    )
    try:
        result = prompt_drift.measure(base, sorted(captions), found, config.serving.drift_alarms)
    except prompt_drift.TooFew as error:
        if not as_json:
            raise
        print(json.dumps({"drifted": None, "reason": str(error)}, indent=2))
        return
    if as_json:
        print(json.dumps(asdict(result) | {"drifted": result.drifted}, indent=2))
        return
    like = "have drifted from" if result.drifted else "are like"
    say(
        f"{model}: the prompts {like} the training captions: distance {result.distance:.3g}, threshold "
        f"{result.threshold:.3g}, p = {result.p_value:.3g}; {result.prompts} prompts, {result.captions} captions"
    )


@app.command()
def compare(
    call: typer.Context,
    first: Annotated[
        str, typer.Argument(metavar="REF", help="An adapter, such as emoji@champion.", show_default=False)
    ],
    second: Annotated[
        str, typer.Argument(metavar="CHALLENGER", help="The other one, such as emoji/7.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The folder to write. It must be new or empty.", show_default=False)],
    prompts: Annotated[
        Path | None,
        typer.Option(help="A file of prompts; a sample of those kept by default.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(min=1, max=500, help="How many prompts.")] = 40,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps; the gate's by default.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the noise, which both start from.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Draw prompts with two adapters, and write a page on which people choose the better picture of each pair.

    The page, OUT/pairs.html, does not know which adapter drew which picture; OUT/key.json does. Send the page alone.

    Example: lcmlora prompts compare emoji@champion emoji/7 --out pairs
    """
    context = context_of(call)
    config = context.settings()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: expected a new or empty folder")
    from lcmlora.inference.production import pairs
    from lcmlora.registry.references import open_release
    from lcmlora.releases.bundle import PROVENANCE, Provenance

    places = context.places(config)
    releases = [open_release(reference, places) for reference in (first, second)]
    model, other = (Provenance.read(release / PROVENANCE).model for release in releases)
    if model != other:
        raise UserError(f"{first} is an adapter of {model}, and {second} one of {other}")
    if prompts is not None:
        from lcmlora.evaluation.sets.own_prompts import read_own_prompts

        texts = read_own_prompts(str(prompts))[:count]
    else:
        texts = _sampled(context, config, model, count, None, None)
    steps = steps or config.gate.steps
    drawn = [_draw(release, texts, steps, seed, device, context) for release in releases]
    names = (_exact(first, context, config), _exact(second, context, config))
    page, key = pairs.render(model, texts, drawn[0], drawn[1], steps, names)
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    (out / "pairs.html").write_text(page, encoding="utf-8")
    key.write(out / "key.json")
    say(out / "pairs.html")
    note(f"{len(texts)} pairs; `lcmlora prompts choices FILE --key {out / 'key.json'}` reads what was chosen")


@app.command()
def choices(
    call: typer.Context,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="What the page saved, one file for each person.")
    ],
    key: Annotated[Path, typer.Option(help="key.json of the same page.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Count what people chose on the page, and add it to the history of the challenger's version.

    It decides nothing: `lcmlora registry promote` does. A file that was read before is not added a second time.

    Example: lcmlora prompts choices choices-3f9a.json --key pairs/key.json
    """
    context = context_of(call)
    from lcmlora.inference.production.pairs import Choices, Key, judge
    from lcmlora.registry import preferences
    from lcmlora.registry.references import find_version

    sides = Key.read(key)
    read = [(path, Choices.read(path)) for path in files]
    verdicts = [(given.who, judge(sides, given)) for _, given in read]  # all are checked before one is recorded
    places = context.places(context.settings_if_any())
    version = None
    if sides.second.startswith("models:/") and places.registry is not None:
        version = find_version(sides.second, places)
    for who, verdict in verdicts:
        if version is not None and places.registry is not None:
            against = sides.first.removeprefix("models:/")
            reason = f"{verdict.text}; against {against}, page {sides.page}"
            if not preferences.record(version, reason, places.registry, who=who or None):
                note(f"note: the history of {version.reference} has the choices of {who or 'nobody named'} already")
    if as_json:
        print(json.dumps([{"who": who, **asdict(verdict)} for who, verdict in verdicts], indent=2))
        return
    for who, verdict in verdicts:
        say(f"{who or 'nobody named'}: {sides.second.removeprefix('models:/')} {verdict.text}")
    if version is None:
        note("note: the challenger is no registered version, so nothing was added to a history")


def _folder(context: Context, config: Config, model: str) -> Path:
    """Returns the folder of kept prompts. Raises UserError where there is none for the model."""
    folder = context.project.root / config.serving.prompts
    if not (folder / model).is_dir():
        raise UserError(
            f"{folder / model}: no prompts are kept there; serving.keep_prompts is {config.serving.keep_prompts}, and "
            "`lcmlora serve` keeps them"
        )
    return folder


def _sampled(
    context: Context, config: Config, model: str, count: int, since: str | None, until: str | None
) -> list[str]:
    """Returns the texts of a sample of the kept prompts, each once."""
    from lcmlora.inference.production import kept_prompts

    if count > config.serving.prompts_a_day:
        raise UserError(
            f"{count} prompts: expected {config.serving.prompts_a_day} at most (serving.prompts_a_day), for of more, "
            "busy days would have too few"
        )
    folder = _folder(context, config, model)
    days = [_day(text, option) for text, option in ((since, "--since"), (until, "--until"))]
    found = kept_prompts.sample(folder, model, count, *days)
    texts = list(dict.fromkeys(kept.text for kept in found if kept.text is not None))
    if not texts:
        what = "hashes alone are kept (serving.keep_prompts)" if found else "there are none of these days"
        raise UserError(f"{folder / model}: no text of a prompt: {what}")
    return texts


def _day(text: str | None, option: str) -> datetime.date | None:
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except ValueError:
        raise UserError(f"{option}: expected a day such as 2026-11-29, got {text!r}") from None


def _captions(context: Context, config: Config, model: str) -> set[str]:
    """Returns the captions of the prepared pictures."""
    from lcmlora.data.prepare import PARTS
    from lcmlora.data.sources.source import iter_records

    folder = context.project.pictures_of(model, config)
    return {record.caption for part in PARTS for record in iter_records(folder / f"{part}.jsonl")}


def _draw(
    release: Path, prompts: Sequence[str], steps: int, seed: int, device: str, context: Context
) -> Sequence[Image]:
    from lcmlora.inference import pipelines

    return pipelines.load(release, device=device, warm=False, sources=context.project.root)(
        list(prompts), steps=steps, seed=seed
    )


def _exact(reference: str, context: Context, config: Config) -> str:
    """Returns the exact reference of a registered version, the reference itself for anything else."""
    from lcmlora.errors import NotFound
    from lcmlora.registry.references import find_version

    try:
        return find_version(reference, context.places(config)).exact
    except NotFound:
        return reference
