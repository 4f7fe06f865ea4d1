"""What the hub says about a base: its newest commit, the variant of its files and its license."""

from __future__ import annotations

import re

from lcmlora.errors import Unavailable, UserError
from lcmlora.io.parsing import JsonObject
from lcmlora.io.terminal import joined, note

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HALF = "fp16"  # the variant that most repositories with several have


def is_id(text: str) -> bool:
    """Returns whether the text could be a hub id, OWNER/NAME."""
    return _ID.fullmatch(text) is not None


def facts(hub_id: str, revision: str | None) -> JsonObject:
    """Returns the keys of an entry of `bases` that the hub knows: source, revision, and variant and license if any.

    Args:
        revision: a commit or branch; None for the newest commit. What is no commit becomes the commit that it is now.

    Raises:
        UserError: there is no such repository or revision, or this user may not read it.
        Unavailable: the hub does not answer, and there is no revision to go on with.
    """
    from httpx2 import HTTPError  # the hub's client raises these as they are
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        found = HfApi().model_info(hub_id, revision=revision, timeout=30)
    except (RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError) as error:
        raise UserError(f"--base: {hub_id}: {joined(error)}") from error
    except (HTTPError, OSError) as error:
        if revision is None:
            raise Unavailable(
                f"--base: the hub does not answer, and a base needs its commit: {joined(error)}; give it as "
                f"{hub_id}@COMMIT"
            ) from error
        note(f"the hub does not answer, so {hub_id}'s variant and license are not known: {joined(error)}", "warning: ")
        return {"source": hub_id, "revision": revision}
    keys = {"source": hub_id, "revision": found.sha or revision}
    if any(file.rfilename.endswith(f".{_HALF}.safetensors") for file in found.siblings or ()):
        keys["variant"] = _HALF
    if found.card_data is not None and found.card_data.get("license"):
        keys["license"] = found.card_data["license"]
    return keys
