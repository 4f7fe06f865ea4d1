"""Of which adapter, recipe and captions a page's figures are: `origin` in its JSON file, and a sentence on the page.

The sentence names whatever differs from metrics/emoji.json and params.yaml, so a page whose experiment takes too long
to be run with every change says that its figures are earlier ones. `python -m benchmarks.figures` writes the sentences,
and tests/benchmarks/test_origins.py holds them against the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import tables
from lcmlora import stages
from lcmlora.evaluation.figures import Metrics
from lcmlora.io.documents import Document
from lcmlora.io.parsing import JsonObject, as_object, read_json
from lcmlora.project import Project

MODEL = "emoji"
PAGES = ("universal", "objectives", "sources", "polish")  # docs/NAME.md and docs/NAME.json
_FIELD = _BLOCK = "origin"


class Origin(Document):
    """What a page's figures were measured with.

    adapter: SHA-256 of the weights; None where the page's own runs distil their adapters.
    recipe: the settings of distillation that all runs share and that decide their results; None for a given adapter.
    captions: that pictures were drawn of.
    reference_digest: of the pictures that they were compared with.
    """

    adapter: str | None = None
    recipe: JsonObject | None = None
    captions: int
    reference_digest: str


def present(project: Project) -> Origin:
    """Returns what figures of today are measured with: that of metrics/emoji.json and params.yaml."""
    metrics = Metrics.read(project.metrics(MODEL))
    decisive = stages.decisive_settings(project.settings(), stages.Run("distill", MODEL))
    return Origin(
        adapter=metrics.adapter,
        recipe=decisive["distill"],
        captions=metrics.prompts or 0,
        reference_digest=metrics.reference_digest or "",
    )


def of_runs(runs: Iterable[dict[str, Any]], project: Project) -> Origin:
    """Returns the origin of figures whose runs distilled adapters by today's recipe but for what they compare.

    Args:
        runs: each with its `settings` of distillation.
    """
    now, settings = present(project), [run["settings"] for run in runs]
    recipe = as_object(now.recipe, "recipe")
    shared = {key: value for key, value in recipe.items() if all(each.get(key) == value for each in settings)}
    return now.model_copy(update={"adapter": None, "recipe": shared})


def read(name: str, docs: Path = Path("docs")) -> Origin:
    """Returns the origin of a page's figures. Raises UserError where its JSON file does not say it."""
    path = docs / f"{name}.json"
    return Origin.parse(as_object(read_json(path), str(path)).get(_FIELD), f"{path}: {_FIELD}")


def differences(found: Origin, now: Origin) -> list[str]:
    """Returns what differs from today, in words; settings that one of both does not have are left out."""
    pairs: list[tuple[str, Any, Any]] = []
    if found.adapter is not None:
        pairs.append(("adapter", _short(found.adapter), _short(now.adapter or "")))
    old, new = found.recipe or {}, now.recipe or {}
    pairs += [(f"`{key}`", f"`{old[key]}`", f"`{new[key]}`") for key in sorted(old.keys() & new.keys())]
    pairs += [
        ("captions", str(found.captions), str(now.captions)),
        ("reference", _short(found.reference_digest), _short(now.reference_digest)),
    ]
    return _differing(pairs)


def _differing(pairs: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{what} {then} (now {today})" for what, then, today in pairs if then != today]


def _short(digest: str) -> str:
    return f"`{digest[:12]}`"


def sentence(name: str, found: Origin, now: Origin) -> str:
    """Returns the sentence of a page."""
    if differ := differences(found, now):
        return earlier(name, differ)
    of = f"the present adapter, {_short(found.adapter)}," if found.adapter else "adapters of the present recipe"
    return f"These figures are of {of} on the present {found.captions} captions.\n"


def earlier(name: str, differ: Sequence[str]) -> str:
    """Returns the sentence of a page whose figures are of an earlier state, which differs from today in this."""
    return (
        f"**These figures are of an earlier state:** {', '.join(differ)}. `python -m benchmarks.documents {name}` "
        "measures again.\n"
    )


def of_adapter(name: str, adapter: str, now: str) -> str:
    """Returns the sentence of a page whose figures are of one adapter; nothing where that is today's."""
    differ = _differing([("adapter", _short(adapter), _short(now))])
    return earlier(name, differ) if differ else ""


def stale(project: Project, docs: Path = Path("docs")) -> list[Path]:
    """Returns the pages that have another sentence."""
    now = present(project)
    pages = {docs / f"{name}.md": sentence(name, read(name, docs), now) for name in PAGES}
    return [path for path, text in pages.items() if tables.read(path, _BLOCK) != text]


def write(project: Project, docs: Path = Path("docs"), names: Sequence[str] = PAGES) -> None:
    """Writes the sentences of these pages."""
    now = present(project)
    for name in names:
        tables.write(docs / f"{name}.md", sentence(name, read(name, docs), now), _BLOCK)
