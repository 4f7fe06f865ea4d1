"""Settings of `notify`: whom the flows tell of what has happened. No stage's result depends on them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from lcmlora.settings.fields import Name, Strict
from lcmlora.settings.layers import SECRET

EventKind = Literal["failed", "rejected", "promoted", "approval_needed", "stuck", "disk", "budget"]
EVENT_KINDS: tuple[EventKind, ...] = get_args(EventKind)


def _from_elsewhere(text: Any) -> Any:
    """Returns the text. Raises an error, which does not quote it, if it is no place of a secret: it may be one."""
    if not isinstance(text, str) or not re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*|secret:[a-z0-9-]+", text):
        raise PydanticCustomError(
            SECRET,
            "expected env:NAME, the name of an environment variable, or secret:NAME, that of a Secret block of "
            "Prefect; addresses have tokens in them, which do not belong in a file",
        )
    return text


SecretName = Annotated[str, BeforeValidator(_from_elsewhere)]


class Target(Strict):
    """Somebody who is told: a channel, a mailbox or a program."""

    kind: Literal["webhook", "slack", "teams", "email", "apprise"]
    """How. `webhook`: a POST of JSON, whose schema is in docs/notifications.md. `apprise`: any other service that the
    library of this name knows."""
    address: SecretName
    """Where the address is, env:NAME or secret:NAME: a webhook's, Slack's or Teams' URL; of `email`
    mailtos://user:password@smtp.example.org?from=a@example.org&to=b@example.org; of `apprise` a URL of its own."""
    signing_secret: SecretName | None = None
    """Where the key is with which the JSON of a `webhook` is signed (HMAC-SHA256), env:NAME or secret:NAME."""
    events: Annotated[tuple[EventKind, ...], Field(min_length=1)] = EVENT_KINDS
    """What is told."""
    models: tuple[Name, ...] = ()
    """The models of which it is told. None: all of them."""

    @model_validator(mode="before")
    @classmethod
    def _is_no_address(cls, raw: Any) -> Any:
        if isinstance(raw, str):
            raise PydanticCustomError(SECRET, "expected a mapping with kind and address")
        return raw

    @model_validator(mode="after")
    def _signed(self) -> Self:
        if self.signing_secret is not None and self.kind != "webhook":
            raise ValueError(f"signing_secret goes with kind webhook, and kind is {self.kind}")
        return self


class Notify(Strict):
    """Whom the flows tell of what has happened, and of what."""

    targets: dict[Name, Target] = {}
    """Who is told, by names of your own."""
    repeat_days: Annotated[float, Field(ge=0)] = 7.0
    """Days after which the same trouble is told again, with the number of times that it has happened. Before, it is
    told once, however often it happens. 0: each time."""
    seconds: Annotated[float, Field(gt=0, le=120)] = 15.0
    """Seconds that telling may take, with all its retries. What was not delivered by then is tried again by the `watch`
    flow, for three days."""
    disk_gb: Annotated[float, Field(ge=0)] = 10.0
    """Free disk, in gigabytes, below which `disk` is told. 0: never."""
    late_minutes: Annotated[float, Field(gt=0)] = 60.0
    """Minutes that a run may be late, or wait for its process or for a slot, before `stuck` is told."""
    silent_minutes: Annotated[float, Field(gt=0)] = 240.0
    """Minutes without a line in the log of a run that is running, before `stuck` is told."""
