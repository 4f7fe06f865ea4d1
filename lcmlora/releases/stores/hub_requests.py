"""Requests to the Hugging Face hub by its own client: repeated while it is busy, refused in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lcmlora import extras
from lcmlora.errors import NotFound, Unavailable, UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")

_LONGEST_WAIT = 60.0  # seconds, of those that a busy hub asks for
_LONGEST_REASON = 400  # characters


class Requests:
    """The hub, for one repository.

    Args:
        place: names the repository, for messages.
        consequence: of a hub that cannot be reached, for messages.
    """

    def __init__(self, place: str, consequence: str) -> None:
        extras.require("huggingface_hub", "httpx2", "tenacity", extra="registry", needed_by=place)
        self._place = place
        self._consequence = consequence

    @cached_property
    def api(self) -> HfApi:
        """The client. It takes the hub from HF_ENDPOINT and the token from HF_TOKEN, or from `hf auth login`."""
        from huggingface_hub import HfApi

        return HfApi(library_name="lcmlora")

    def head(self, repository: str, branch: str) -> str | None:
        """Returns the commit of a branch or tag, None where there is none. Raises UserError where the repository is
        missing, too."""
        from huggingface_hub.errors import RevisionNotFoundError

        def found() -> str | None:
            try:
                return str(self.api.repo_info(repository, revision=branch).sha)
            except RevisionNotFoundError:
                return None

        return self.ask(found, {}, branch)

    def ask(self, action: Callable[[], T], answers: Mapping[int, T], about: str) -> T:
        """Runs an action, and repeats it if the connection fails or the hub is busy.

        Args:
            answers: the results for HTTP statuses that are no errors.
            about: the file or branch, for messages.

        Raises:
            Unavailable: the hub does not answer, or is still busy.
            NotFound: there is no such repository, or not for this user.
            UserError: it refuses.
            OSError: a file of this machine cannot be read or written.
        """
        from httpx2 import HTTPError
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
        from tenacity import Retrying, retry_if_exception, stop_after_attempt

        attempts = Retrying(
            retry=retry_if_exception(lambda error: _is_temporary(_origin(error))),
            stop=stop_after_attempt(4),
            wait=_pause,
            reraise=True,
        )
        try:
            return attempts(action)
        except (
            HfHubHTTPError,
            LocalEntryNotFoundError,
            HTTPError,
            ConnectionError,
            TimeoutError,
            ValueError,  # such as a card that the hub does not take
            RuntimeError,
        ) as raised:
            error = _origin(raised)
            status = _status(error)
            if status in answers:
                return answers[status]
            kind = Unavailable if _is_temporary(error) else NotFound if status == 404 else UserError
            said = re.split(r"\n(?:Please make sure|For more information)", str(error))[0]  # the rest is general advice
            reason = " ".join(said.split())[:_LONGEST_REASON]
            hint = "; HF_TOKEN must have the right to do this" if status in (401, 403, 404) else ""
            raise kind(f"{self._place}: {about or 'repository'}: {reason}{hint}; {self._consequence}") from raised


def addition(file: str, content: Path | bytes) -> Any:
    """Returns the operation of a commit that adds a file. Its `upload_info.sha256` is that of the content."""
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(file, content)


def copy(file: str, source: str) -> Any:
    """Returns the operation of a commit that takes a file over from the commit `source`."""
    from huggingface_hub import CommitOperationCopy

    return CommitOperationCopy(file, file, src_revision=source)


def deletion(file: str) -> Any:
    """Returns the operation of a commit that deletes a file."""
    from huggingface_hub import CommitOperationDelete

    return CommitOperationDelete(file)


def _origin(error: BaseException) -> Any:
    """Returns the error of the hub, which the client wraps when an upload fails, or the error itself."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HfHubHTTPError

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, HfHubHTTPError | HTTPError):
            return found
        found = found.__cause__
    return error


def _is_temporary(error: Any) -> bool:
    """Returns whether the same request may succeed later. (bases.fetching has the like, and needs torch.)"""
    from httpx2 import TransportError
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if isinstance(error, HfHubHTTPError):
        return _status(error) == 429 or _status(error) >= 500
    # LocalEntryNotFoundError: there was no connection, and the client has no copy. RuntimeError: Xet's upload failed.
    return isinstance(error, ConnectionError | TimeoutError | TransportError | LocalEntryNotFoundError | RuntimeError)


def _status(error: Any) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _pause(state: Any) -> float:
    """Returns the seconds before the next attempt: what the hub asks for, else 0.5 s and twice as long each time."""
    error = _origin(state.outcome.exception())
    asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
    return min(float(asked), _LONGEST_WAIT) if asked.isdigit() else 0.5 * 2.0 ** (state.attempt_number - 1)
