"""Downloading an adapter from a repository of the hub, at one commit."""

from __future__ import annotations

import re
import shutil
from pathlib import Path, PurePosixPath

from lcmlora.adapters.metadata import FACTS, SCHEDULER, WEIGHTS
from lcmlora.bases import fetching
from lcmlora.errors import Unavailable, UserError
from lcmlora.io.files import make_once
from lcmlora.io.terminal import note, shown
from lcmlora.releases import bundle

_FACTS = (SCHEDULER, FACTS, bundle.PROVENANCE, bundle.CHECKSUMS)
_PEFT = ("adapter_model.safetensors", "adapter_config.json")


def download(repository: str, revision: str | None, cache: Path) -> Path:
    """Returns the folder with a repository's adapter, which is downloaded once for each commit.

    Only the weights and the facts about them are downloaded, of files in the repository's top folder.

    Args:
        revision: a commit, branch or tag; the newest commit of the main branch by default, which is then noted.
        cache: the folder that keeps downloads.

    Raises:
        UserError: there is no such repository or revision, this user may not read it, or it has no one adapter.
        Unavailable: the hub does not answer.
    """
    from httpx2 import HTTPError  # the hub's client raises these as they are
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def folder_of(commit: str) -> Path:
        return cache / f"hub-{repository.replace('/', '--')}@{commit[:12]}"

    if revision and re.fullmatch("[0-9a-f]{40}", revision) and folder_of(revision).is_dir():
        return folder_of(revision)  # without asking the hub: a commit never changes
    named = f"{repository}@{revision}" if revision else repository
    try:
        info = HfApi().model_info(repository, revision=revision, timeout=30)
        commit = str(info.sha)
        names = _chosen([each.rfilename for each in info.siblings or ()], named)
        folder = folder_of(commit)
        make_once(folder, folder.is_dir, lambda part: _fill(repository, commit, names, part))
    except (HfHubHTTPError, LocalEntryNotFoundError, HTTPError, ConnectionError, TimeoutError) as error:
        kind = Unavailable if fetching.is_temporary(error) else UserError
        raise kind(f"{named}: cannot be downloaded from the hub: {' '.join(str(error).split())}") from error
    if revision is None:
        note(f"note: {repository} is at commit {commit}; {repository}@{commit} names this state of it")
    return folder


def _fill(repository: str, commit: str, names: list[str], folder: Path) -> None:
    from huggingface_hub import snapshot_download

    snapshot_download(repository, revision=commit, local_dir=folder, allow_patterns=names)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub's own records of the download


def _chosen(files: list[str], named: str) -> list[str]:
    """Returns the files to download. Raises UserError where it is not clear which of them is the adapter."""
    top = [name for name in files if len(PurePosixPath(name).parts) == 1]
    weights = [name for name in top if name.endswith(".safetensors")]
    if "model_index.json" in top:
        raise UserError(f"{named}: is a base (it has model_index.json), not an adapter")
    own = next((name for name in (WEIGHTS, _PEFT[0]) if name in weights), None)
    if own is None and len(weights) != 1:
        listed = ", ".join(map(shown, weights[:5])) or "none"
        raise UserError(f"{named}: expected {WEIGHTS} or one other .safetensors file in its top folder, got {listed}")
    return [own or weights[0], *(name for name in (*_FACTS, _PEFT[1]) if name in top)]
