"""`lcmlora prune` and the flow of the same name: deletes versions, releases and files that nothing needs any more."""

from __future__ import annotations

if __name__ == "__main__":  # before Prefect is imported, which takes seconds
    from lcmlora.flows.prune_command import prune
    from lcmlora.flows.verbs import standalone

    standalone("flows.prune", prune)

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prefect import State, flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.states import Completed, Failed

from lcmlora import config, masking
from lcmlora.adapters.metadata import WEIGHTS
from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.flows import name_of
from lcmlora.io.files import sha256_file
from lcmlora.io.terminal import shown
from lcmlora.project import Project
from lcmlora.registry import events
from lcmlora.registry.retention import database, plan, removal
from lcmlora.registry.retention.plan import Plan
from lcmlora.registry.retention.selection import Rules
from lcmlora.releases import bundle
from lcmlora.tasks import cleaning, dvc
from lcmlora.tasks.cleaning import Garbage
from lcmlora.tasks.processes import Processes


@flow(name="prune")
def prune_project(dry_run: bool = True, params: str = "params.yaml") -> State:
    """Deletes what `retention` does not keep. Ends as Pruned, as Listed if it is a dry run, or as NothingToPrune.

    What goes is the artifact `prune`, a table with bytes and reasons. While a run is under way in the worker's folder
    it ends as Postponed, and the next one does its work.

    Args:
        dry_run: list what would be deleted, and delete nothing.
        params: the file with the settings.
    """
    try:
        settings = config.load(Path(params))
        found = find(settings)
    except UserError as error:
        return Failed(message=str(error))
    rows = [
        {"what": shown(r.kind), "which": shown(r.name), "bytes": size(r.bytes), "why": shown(r.why)} for r in found.rows
    ]
    if rows:
        create_table_artifact(rows, key="prune", description=found.total)
    if not rows or dry_run:
        return Completed(name="Listed" if rows else "NothingToPrune", message=found.total)
    try:
        with cleaning.pruning():
            lines = delete(found, settings, events.user())
    except cleaning.Busy as error:
        return Completed(name="Postponed", message=str(error))
    except UserError as error:
        return Failed(message=str(error))
    for line in lines:
        get_run_logger().info("%s", line)
    return Completed(name="Pruned", message=found.total)


@dataclass(frozen=True)
class Found:
    """All that goes."""

    registry: Plan
    garbage: tuple[Garbage, ...]

    @property
    def rows(self) -> list[Garbage]:
        """A row for each thing that goes, releases beside their version."""
        rows = []
        for each in self.registry.versions:
            rows.append(Garbage("version", each.version.reference, each.artifact_bytes, each.why))
            rows += [
                Garbage("release", stored.uri, stored.bytes, f"of {each.version.reference}") for stored in each.releases
            ]
        for name, stone in self.registry.unfinished:
            rows.append(Garbage("version", f"{name}/{stone.version}", None, "its deletion was interrupted"))
        rows += [Garbage("run", run.run_id, run.artifact_bytes, run.why) for run in self.registry.runs]
        return [*rows, *self.garbage]

    @property
    def total(self) -> str:
        """The bytes of all rows by kind, in one line."""
        kinds: dict[str, list[Garbage]] = {}
        for row in self.rows:
            kinds.setdefault(row.kind, []).append(row)
        parts = [f"{kind}: {len(rows)}, {size(_sum(rows))}" for kind, rows in kinds.items()]
        return "; ".join(parts) or "nothing to prune"


def _sum(rows: list[Garbage]) -> int | None:
    known = [row.bytes for row in rows if row.bytes is not None]
    return sum(known) if known or not rows else None


def size(count: int | None) -> str:
    """Returns a number of bytes for a person to read."""
    from rich.filesize import decimal

    return "not known" if count is None else decimal(count)


def find(settings: Config) -> Found:
    """Returns what goes by the settings, of the project in the current folder.

    Raises:
        UserError: a server or store cannot be reached, DVC fails, or it is not known what must be kept.
    """
    rules = Rules(settings.retention, datetime.now(UTC), local=_local(settings))
    found = plan.make_plan(settings.registry, settings.publish, settings.models, rules)
    with Processes() as processes:
        garbage = cleaning.dvc_garbage(settings.retention, processes)
    return Found(found, (*garbage, *cleaning.old_files(Project(), settings.retention)))


def _local(settings: Config) -> frozenset[str]:
    """Returns the SHA-256 of the adapters and releases in this folder, which the next run looks up."""
    found = set()
    for model in settings.models:
        weights, release = Project().adapter(model) / WEIGHTS, Project().release(model) / bundle.WEIGHTS
        found |= {sha256_file(path) for path in (weights, release) if path.is_file()}
    return frozenset(found)


def delete(found: Found, settings: Config, who: str) -> list[str]:
    """Deletes what was found, and returns what there is to say about it, in lines. May be killed and called again.

    Names go first, then what they name (lcmlora.registry.retention.removal). The caller holds `cleaning.pruning`.

    Raises:
        UserError: a server or store cannot be reached, or DVC fails. What is left goes with the next call.
    """
    lines = []
    remover = removal.Remover(settings.registry, settings.publish, who)
    for name, stone in found.registry.unfinished:
        if not remover.finish(name, stone):
            lines.append(f"{name}/{stone.version}: stays, as somebody has given it an alias")
    for version in found.registry.versions:
        if not remover.remove_version(version):
            lines.append(f"{version.version.reference}: stays, as an alias or a channel names it since just now")
    for run in found.registry.runs:
        remover.remove_run(run)
    lines += _free_rows(found.registry, settings)
    for each in found.garbage:
        if each.kind in ("scratch", "logs") and not cleaning.delete_old_file(each):
            lines.append(f"{each.name}: stays, as a process works there")
    if any(each.kind.startswith("DVC") for each in found.garbage):
        with Processes() as processes:
            cleaning.delete_dvc_garbage(settings.retention, processes)
    return lines


def _free_rows(found: Plan, settings: Config) -> list[str]:
    """Deletes the rows of what is gone from MLflow's database, and writes an sqlite file anew if that frees much."""
    address = database.database_of(settings.registry)
    if address is None:
        runs = len(found.runs) + len(found.versions)
        server = masking.address(settings.registry.tracking_uri)
        advice = f"`mlflow gc` beside it, or `lcmlora prune` with {database.VARIABLE}"
        return (
            [f"the rows of {runs} runs stay in the database of {server} until somebody runs {advice}"] if runs else []
        )
    direct = settings.registry.model_copy(update={"tracking_uri": address})
    database.delete_rows(direct, [name_of(model) for model in settings.models], {run.run_id for run in found.runs})
    before, after = database.compact(direct), database.space(direct)
    if before and after:
        return [f"MLflow's database: {size(before.total)} before, {size(after.total)} now"]
    return []


def notes(settings: Config) -> list[str]:
    """Returns what `prune` leaves alone, for a person to know."""
    if settings.retention.dvc == "everything":
        return []
    if dvc.is_cache_shared():
        return ["DVC's cache lies outside this folder and is left alone, as other projects may use it"]
    remote = dvc.default_remote()
    if remote is None:
        return []
    if settings.retention.dvc_remote:
        return [
            f"DVC's remote {shown(remote)} is pruned, too (retention.dvc_remote): what other projects or clones have "
            "there, and this one does not name, is deleted"
        ]
    return [f"DVC's remote {shown(remote)} is left alone, as others may use it (retention.dvc_remote)"]
