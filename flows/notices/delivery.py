"""Delivering a message to one receiver: a webhook, or any service that apprise knows."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import unquote, urlsplit

import httpx

from lcmlora import masking
from lcmlora.errors import UserError
from lcmlora.flows.notices.message import Message
from lcmlora.io.terminal import joined
from lcmlora.settings.operation.notify import Target

_ONE_TRY = 5.0  # seconds, at most
_PAUSE = 1.0  # seconds before the second try, doubled for each further one
_SHORTEST = 6  # characters of a part of an address that may be a token
_LATER = {408, 425, 429}  # HTTP statuses that ask for another try, beside those of 500 and above
_PLUGINS = {"slack": {"NotifySlack"}, "teams": {"NotifyWorkflows", "NotifyMSTeams"}, "email": {"NotifyEmail"}}


class Refused(Exception):
    """A message was not delivered. The reason has no part of the address."""

    def __init__(self, reason: str, temporary: bool, after: float = 0.0) -> None:
        super().__init__(reason)
        self.temporary = temporary
        self.after = after  # seconds after which the receiver wants to be asked again


def deliver(
    message: Message, target: Target, until: float, failed: Callable[[str], None] = lambda reason: None
) -> None:
    """Delivers the message, with retries while time is left.

    Args:
        until: the end of the time, as `time.monotonic` counts it.
        failed: is called with the reason for each try that fails.

    Raises:
        Refused: the receiver has not taken it.
        UserError: the address is not there, or is none of this kind.
    """
    address = secret(target.address)
    key = secret(target.signing_secret) if target.signing_secret else None
    pause = _PAUSE
    while True:
        seconds = min(_ONE_TRY, until - time.monotonic())
        try:
            if target.kind == "webhook":
                _post(message, address, key, seconds)
            else:
                _send_by_apprise(message, address, target.kind, seconds)
            return
        except Refused as refused:
            failed(str(refused))
            wait = max(pause, refused.after)
            if not refused.temporary or time.monotonic() + wait >= until:
                raise
        time.sleep(wait)
        pause *= 2


def secret(place: str) -> str:
    """Returns the secret at env:NAME or secret:NAME.

    Raises:
        UserError: it is not there.
    """
    scheme, _, name = place.partition(":")
    if scheme == "env":
        if not (value := os.environ.get(name, "").strip()):
            raise UserError(f"the environment variable {name} is not set, or not for this process")
        return value
    from prefect.blocks.system import Secret

    try:
        block: Any = Secret.load(name)
        return str(block.get()).strip()
    except ValueError as error:  # Prefect has no such block
        raise UserError(f"Prefect has no Secret block {name!r}") from error


def _post(message: Message, address: str, key: str | None, seconds: float) -> None:
    """Sends the document once. Redirects are not followed: they would send it to whom nobody has named."""
    content = message.content
    headers = {"Content-Type": "application/json", "User-Agent": "lcmlora", "webhook-id": message.id}
    headers["webhook-timestamp"] = str(int(time.time()))
    if key is not None:
        headers["webhook-signature"] = signature(key, message.id, headers["webhook-timestamp"], content)
    try:
        with (
            httpx.Client(timeout=seconds, follow_redirects=False) as client,
            client.stream("POST", address, content=content, headers=headers) as answer,
        ):
            status, wait = answer.status_code, answer.headers.get("Retry-After", "")
    except (httpx.InvalidURL, httpx.UnsupportedProtocol):  # their texts have the address
        raise UserError("the address is not one of http or https") from None
    except httpx.HTTPError as error:
        raise Refused(hidden(str(error) or type(error).__name__, address), temporary=True) from None
    if 200 <= status < 300:
        return
    if 300 <= status < 400:
        raise Refused(f"answers {status}, a redirect, which is not followed: name the new address", temporary=False)
    temporary = status in _LATER or status >= 500
    raise Refused(f"answers {status}", temporary, float(wait) if re.fullmatch(r"\d{1,6}", wait) else 0.0)


def signature(key: str, identity: str, timestamp: str, content: bytes) -> str:
    """Returns the signature of the Standard Webhooks specification, version 1 (www.standardwebhooks.com).

    Args:
        key: any text, or the specification's form, whsec_ and base64.
    """
    secret_bytes = key.encode()
    if key.startswith("whsec_"):
        try:
            secret_bytes = base64.b64decode(key.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise UserError("the signing secret begins with whsec_, and is not base64 after it") from None
    signed = b".".join((identity.encode(), timestamp.encode(), content))
    return f"v1,{base64.b64encode(hmac.new(secret_bytes, signed, hashlib.sha256).digest()).decode()}"


def _send_by_apprise(message: Message, address: str, kind: str, seconds: float) -> None:
    """Sends subject and text once; a mail has the pictures, too."""
    import apprise

    asset = apprise.AppriseAsset(app_id="lcmlora", app_desc="lcmlora", app_url="", image_url_mask="")
    with _Warnings():
        service = apprise.Apprise.instantiate(address, asset=asset, suppress_exceptions=True)
    if service is None:
        raise UserError(f"the address is not one of {kind}")
    name = type(service).__name__
    if name not in _PLUGINS.get(kind, {name}):
        raise UserError(f"the address is not one of {kind}, but of {service.service_name}")
    service.redirects = False
    service.socket_connect_timeout = service.socket_read_timeout = seconds
    text = message.text
    if kind == "slack":  # words such as !channel would call everybody
        text = re.sub(r"([!@#])(?=\w)", "\\1\u200b", text)
    attached = apprise.AppriseAttachment()
    for path in message.pictures if kind == "email" else ():
        attached.add(str(path))
    with _Warnings() as warnings:
        sent = service.notify(body=text, title=message.subject, attach=attached)
    if not sent:
        reason = joined("; ".join(dict.fromkeys(warnings.texts)), 300)
        raise Refused(hidden(reason, address) or "it was not taken", temporary=True)


class _Warnings(logging.Handler):
    """What apprise warns of in this thread, within a `with` block. No other log gets it: it may have the address."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.texts.append(record.getMessage())

    def __enter__(self) -> Self:
        logger = logging.getLogger("apprise")
        logger.propagate = False
        logger.addHandler(self)
        return self

    def __exit__(self, *ended: object) -> None:
        logging.getLogger("apprise").removeHandler(self)


def hidden(text: str, address: str) -> str:
    """Returns the text with secrets masked, and with every part of this address that may be a token."""
    parts = urlsplit(address)
    pieces = {address, *re.split(r"[/?&=:@,+]", f"{parts.netloc.rpartition('@')[0]}/{parts.path}?{parts.query}")}
    pieces |= {unquote(piece) for piece in pieces}
    found = masking.text(text, address)
    for piece in sorted((p for p in pieces if len(p) >= _SHORTEST), key=len, reverse=True):
        found = found.replace(piece, masking.MASK)
    return found
