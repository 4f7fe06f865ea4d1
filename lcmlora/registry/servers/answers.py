"""What answers at the address of MLflow: its version, and answers that are not MLflow's."""

from __future__ import annotations

import functools
import re

from lcmlora import masking
from lcmlora.errors import UserError

OLDEST = 3  # major version of a server; older ones lack what the client of MLflow 3 asks for
_NEEDED = f"lcmlora needs an MLflow server of version {OLDEST}.0 or later"

_PAGE = re.compile(r"<!doctype\s+html|<html[\s>]", re.IGNORECASE)
_NO_JSON = re.compile(r"not in a valid JSON format|Response body: '(?!\{)|Failed to parse .*(response|JSON)")
_STATUS = re.compile(r"error code (\d{3})")


@functools.cache
def check_version(uri: str) -> None:
    """Raises UserError where the server at this address is too old, or is something else. Asked once a process.

    Servers of others that speak MLflow's protocol need not tell a version.
    """
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    answer = http_request(get_default_host_creds(uri), "/version", "GET", raise_on_status=False)
    if answer.status_code != 200:  # what is wrong is told by the request that follows
        return
    text = answer.text.strip()
    place = f"MLflow at {masking.address(uri)}"
    if _PAGE.search(text):
        raise UserError(f"{place}: {_OF_PAGE}")
    version = re.fullmatch(r"(\d+)\.\d[\w.+-]*", text)
    if version and int(version[1]) < OLDEST:
        raise UserError(
            f"{place}: is version {text}, and {_NEEDED}: upgrade it (pip install 'mlflow>=3', then mlflow db upgrade "
            "with its database), or name another one in MLFLOW_TRACKING_URI"
        )


_OF_PAGE = f"answers with a web page: is the address right, or is a login page or a proxy before MLflow? {_NEEDED}"


def fault(error: BaseException) -> tuple[str, int | None] | None:
    """Returns why an answer is not MLflow's, in one line, and its HTTP status; None for other errors."""
    seen: BaseException | None = error
    while seen is not None:
        text = str(seen)
        status = int(match[1]) if (match := _STATUS.search(text)) else None
        if _PAGE.search(text):
            return _OF_PAGE if status in (None, 200) else f"answers with a web page and status {status}", status
        if type(seen).__name__ in ("JSONDecodeError", "ParseError") or _NO_JSON.search(text):
            return f"answers with what is not MLflow's JSON; {_NEEDED}", status
        seen = seen.__cause__ or seen.__context__
    return None
