"""Deleting versions with their releases, runs and artifacts. Every step may be killed; the next call goes on.

    1. mark      the version gets the tag `pruned`: no lookup finds it, and no alias is given to it any more
    2. check     aliases and channels are read again; a version that has got one meanwhile loses the mark and stays
    3. bury      the registered model gets a tombstone with the addresses of all that is left
    4. delete    the version, then its releases, then artifacts and run
    5. finish    the tombstone keeps the version's facts alone

So a name is gone before what it names. Whoever gives an alias looks for the mark afterwards (promotion.py), as this
looks for aliases after marking: one of the two sees the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lcmlora.config import Publish, Registry
from lcmlora.io.terminal import note
from lcmlora.registry import events
from lcmlora.registry.lookup import read_aliases, versions_of_release
from lcmlora.registry.retention import tombstones
from lcmlora.registry.retention.plan import PrunedRun, PrunedVersion, local_folder
from lcmlora.registry.retention.tombstones import MARK, Tombstone
from lcmlora.registry.servers import ledger
from lcmlora.registry.tracking import connect, reaching
from lcmlora.releases import removal
from lcmlora.releases.stores.store import open_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

_LEFT = "what is left is deleted by the next `lcmlora prune`"


@dataclass(frozen=True)
class Remover:
    """Deletes what a plan names.

    publish: how stores are reached.
    who: for the history.
    """

    settings: Registry
    publish: Publish
    who: str

    def remove_version(self, going: PrunedVersion) -> bool:
        """Deletes a version with all that it names. Returns False where it has got a name meanwhile and stays.

        Raises:
            UserError: MLflow or a store cannot be reached.
        """
        version = going.version
        with reaching(self.settings, _LEFT):
            client = connect(self.settings)
            client.set_model_version_tag(version.name, str(version.version), MARK, events.now())
            if self._is_named(client, going):
                client.delete_model_version_tag(version.name, str(version.version), MARK)
                return False
            if _has_run(client, version.run_id):
                client.set_tag(version.run_id, MARK, events.now())
            # Otherwise the adapter would count as deleted by a person, and would not be registered again.
            ledger.forget(client, version.name, version.sha256, version.trained, self.settings.experiment)
            past = events.read_events(version.version, version.tags)
            stone = Tombstone(
                version=version.version,
                time=events.now(),
                who=self.who,
                reason=going.why,
                sha256=version.sha256,
                adapter=version.trained,
                promoted=any(event.alias == self.settings.alias for event in past),
                run_id=version.run_id,
                releases=tuple(each.uri for each in going.releases),
            )
            tombstones.write(client, version.name, stone)
            client.delete_model_version(version.name, str(version.version))
            self._finish(client, version.name, stone)
        return True

    def finish(self, name: str, stone: Tombstone) -> bool:
        """Deletes what an interrupted call has left of a version.

        Returns:
            False where the version is still there and a person has given it an alias: it stays.

        Raises:
            UserError: MLflow or a store cannot be reached.
        """
        with reaching(self.settings, _LEFT):
            client = connect(self.settings)
            if _exists(client, name, stone.version):  # it was killed between the tombstone and the deletion
                if stone.version in read_aliases(client, name).values():
                    tombstones.remove(client, name, stone.version)
                    client.delete_model_version_tag(name, str(stone.version), MARK)
                    if _is_active(client, stone.run_id):
                        client.delete_tag(stone.run_id, MARK)
                    return False
                client.delete_model_version(name, str(stone.version))
            self._finish(client, name, stone)
        return True

    def remove_run(self, run: PrunedRun) -> None:
        """Deletes a run without a version, and its artifacts.

        Raises:
            UserError: MLflow cannot be reached.
        """
        with reaching(self.settings, _LEFT):
            client = connect(self.settings)
            if _is_active(client, run.run_id):
                client.set_tag(run.run_id, MARK, events.now())
            self._remove_run(client, run.run_id)

    def _is_named(self, client: MlflowClient, going: PrunedVersion) -> bool:
        version = going.version
        if version.version in read_aliases(client, version.name).values():
            return True
        return any(removal.channels_of(each.store, each.prefix) for each in going.releases)

    def _finish(self, client: MlflowClient, name: str, stone: Tombstone) -> None:
        # Registered again since the deletion was interrupted, the adapter has this release.
        again = any(MARK not in each.tags for each in versions_of_release(client, stone.sha256, name))
        for uri in stone.releases if not again else ():
            place = removal.release_of(uri)
            assert place is not None, uri
            store = open_store(self.publish.to_one(place[0]), consequence=_LEFT)
            if not removal.remove(store, place[1], why=stone.reason):
                note(f"{uri}: stays, as a channel points to it since just now")
        if stone.run_id:
            self._remove_run(client, stone.run_id)
        tombstones.write(client, name, replace(stone, finished=True))

    def _remove_run(self, client: MlflowClient, run_id: str) -> None:
        """Deletes a run and its artifacts, unless a version has it: two releases of one adapter share its run."""
        if not _has_run(client, run_id) or client.search_model_versions(f"run_id = '{run_id}'", max_results=1):
            return
        run = client.get_run(run_id)
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        get_artifact_repository(run.info.artifact_uri, tracking_uri=self.settings.tracking_uri).delete_artifacts()
        folder = local_folder(run)
        if folder is not None and folder.parent.is_dir() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()
        if run.info.lifecycle_stage == "active":
            client.delete_run(run_id)


def _has_run(client: MlflowClient, run_id: str) -> bool:
    """Returns whether there is such a run, deleted or not."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_run(run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return False
    return True


def _is_active(client: MlflowClient, run_id: str) -> bool:
    return _has_run(client, run_id) and client.get_run(run_id).info.lifecycle_stage == "active"


def _exists(client: MlflowClient, name: str, version: int) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        client.get_model_version(name, str(version))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    return True
