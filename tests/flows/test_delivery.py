"""Delivering messages to receivers that run here: webhooks, Slack, Teams, mail; good ones and bad ones."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lcmlora.config import Config
from lcmlora.errors import UserError
from lcmlora.flows.memory import LARGEST
from lcmlora.flows.notices import delivery, outbox
from lcmlora.flows.notices.delivery import Refused, deliver, hidden
from lcmlora.flows.notices.event import Event
from lcmlora.flows.notices.message import Message
from lcmlora.settings.operation.notify import Notify, Target
from tests.support.receivers import Receiver, mail_server, receiver

EVENT = Event(
    "failed",
    "distill@sdxl: the loss is not finite\nat step 7",
    model="sdxl",
    figures={"excess at 4 steps": 4.5, "gate": "passed"},
    links={"Prefect run": "http://127.0.0.1:4200/runs/flow-run/7"},
    run="7",
    version="lcm-lora-sdxl/3",
)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(delivery, "_PAUSE", 0.01)
    with receiver() as found:
        monkeypatch.setenv("HOOK", f"{found.address}/lcmlora/hook?key=SECRETKEY")
        yield found


def target(kind: str = "webhook", **values: Any) -> Target:
    return Target.model_validate({"kind": kind, "address": "env:HOOK", **values})


def soon() -> float:
    return time.monotonic() + 30


def test_a_webhook_gets_the_document_with_a_signature_that_standard_webhooks_checks(
    web: Receiver, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("KEY", "whsec_" + base64.b64encode(b"0123456789").decode())
    message = Message.of(EVENT, times=3, since="2026-11-29T02:00:00Z")
    deliver(message, target(signing_secret="env:KEY"), soon())
    ((path, headers, content),) = web.requests
    assert path == "/lcmlora/hook?key=SECRETKEY" and headers["Content-Type"] == "application/json"
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + content
    expected = base64.b64encode(hmac.new(b"0123456789", signed, hashlib.sha256).digest()).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    (document,) = web.documents
    assert document.pop("time") and document.pop("host") and document.pop("project")
    assert document.pop("id") == message.id == headers["webhook-id"]
    assert document == {
        "schema": 1,
        "kind": "failed",
        "model": "sdxl",
        "version": "lcm-lora-sdxl/3",
        "reason": "distill@sdxl: the loss is not finite\nat step 7",
        "figures": {"excess at 4 steps": 4.5, "gate": "passed"},
        "links": {"Prefect run": "http://127.0.0.1:4200/runs/flow-run/7"},
        "run": "7",
        "times": 3,
        "since": "2026-11-29T02:00:00Z",
    }


@pytest.mark.parametrize(
    ("answers", "tries", "fault"),
    [
        ([(500, {}), (503, {}), (204, {})], 3, None),
        ([(429, {"Retry-After": "0"}), (200, {})], 2, None),
        ([(429, {"Retry-After": "86400"})], 1, "answers 429"),
        ([(404, {})], 1, "answers 404"),
        ([(302, {"Location": "http://127.0.0.1:9/elsewhere"})], 1, "answers 302, a redirect, which is not followed"),
    ],
)
def test_what_may_pass_is_tried_again_and_what_does_not_is_not(
    web: Receiver, answers: list[tuple[int, dict[str, str]]], tries: int, fault: str | None
):
    web.answers += answers
    if fault is None:
        deliver(Message.of(EVENT), target(), soon())
    else:
        with pytest.raises(Refused, match=fault):
            deliver(Message.of(EVENT), target(), soon())
    assert len(web.requests) == tries
    assert len({document["id"] for document in web.documents}) == 1


def test_receivers_that_are_down_slow_or_unknown_keep_nobody_waiting_and_nothing_secret_is_told(
    web: Receiver, monkeypatch: pytest.MonkeyPatch
):
    web.released.clear()  # it takes the request and does not answer before the end of this test
    monkeypatch.setenv("DOWN", "http://127.0.0.1:9/SECRETPATH?token=SECRETKEY")
    monkeypatch.setenv("NONSENSE", "hppt:/SECRETPATH")
    names = {"slow": "env:HOOK", "down": "env:DOWN", "nonsense": "env:NONSENSE", "unset": "env:NOT_SET"}
    targets = {name: {"kind": "webhook", "address": place} for name, place in names.items()}
    targets["chat"] = {"kind": "slack", "address": "env:NONSENSE"}
    settings = Config.model_construct(notify=Notify.model_validate({"targets": targets, "seconds": 0.5}))
    lines: list[str] = []
    assert outbox.send(Message.of(EVENT), list(targets), settings, lines.append) == []
    assert not web.released.is_set()
    assert not any("SECRET" in line for line in lines)
    told = {line.split(":")[0].rpartition(".")[2]: line for line in lines}
    assert "Connection refused" in told["down"] and "`watch` tries again for 3 days" in told["down"]
    assert "the environment variable NOT_SET is not set" in told["unset"]
    assert "the address is not one of" in told["nonsense"] and "the address is not one of slack" in told["chat"]


def test_no_part_of_an_address_that_may_be_a_token_is_shown():
    address = "https://hooks.slack.com/services/T0AAAAAAA/B0BBBBBBB/cccccccccccc"
    text = hidden(f"{address}: 403, token cccccccccccc of T0AAAAAAA", address)
    assert "cccc" not in text and "AAAA" not in text and text.endswith("403, token *** of ***")
    mail = "mailtos://ada:pass%2Fword@smtp.example.org?to=b@team.example"
    assert hidden("login of ada with pass/word at example.org", mail) == "login of ada with *** at example.org"


def test_messages_have_no_secret_of_the_environment_and_fit_into_a_variable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "veryverysecret")
    links = {f"page {n}": "https://user:veryverysecret@example.org/" + "\u732b" * 900 for n in range(40)}
    event = Event("failed", "veryverysecret " + "\u732b\x1b[31m" * 5_000 + " the end", links=links)
    message = Message.of(event)
    assert b"veryverysecret" not in message.content and b"\x1b" not in message.content
    assert len(json.dumps(message.document, ensure_ascii=False).encode()) <= LARGEST
    assert message.document["links"] and message.text.splitlines()[0].endswith("the end")


@pytest.mark.slow
def test_a_mail_has_subject_text_and_picture(web: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    picture = tmp_path / "grid.png"
    picture.write_bytes(base64.b64decode(PIXEL))
    event = Event("approval_needed", "lcm-lora-sdxl/3 waits", model="sdxl", pictures=(picture, tmp_path / "gone.png"))
    with mail_server() as box:
        monkeypatch.setenv("MAIL", f"mailto://{box.address}?from=lcmlora@example.org&to=team@example.org")
        to_mail = Target(kind="email", address="env:MAIL")
        deliver(Message.of(event), to_mail, soon())
        (mail,) = box.mails
        assert mail["Subject"] == "lcmlora: sdxl waits for your approval" and "team@example.org" in mail["To"]
        body = mail.get_body()
        assert body is not None and "lcm-lora-sdxl/3 waits" in body.get_content()
        (attached,) = mail.iter_attachments()
        assert attached.get_filename() == "grid.png" and attached.get_content() == picture.read_bytes()
        box.refuses = True
        with pytest.raises(Refused, match="Sending email to"):
            deliver(Message.of(event), to_mail, time.monotonic() + 1)


def test_slack_gets_the_text_and_a_word_in_it_calls_nobody(web: Receiver, monkeypatch: pytest.MonkeyPatch):
    from apprise.plugins.slack import NotifySlack

    monkeypatch.setattr(NotifySlack, "webhook_url", f"{web.address}/services")
    monkeypatch.setenv("HOOK", "https://hooks.slack.com/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7")
    deliver(Message.of(Event("failed", "<!channel> @here & <b>", model="sdxl")), target("slack"), soon())
    ((path, _, content),) = web.requests
    assert path == "/services/T1JJ3T3L2/A1BRTD4JD/TIiajkdnlazkcOXrIdevi7"
    assert b"lcmlora: sdxl failed" in content and b"&amp; &lt;b&gt;" in content
    assert b"<!channel" not in content and b"@here" not in content
    web.answers += [(403, {})] * 200
    with pytest.raises(Refused, match=r"Slack.*403") as refused:
        deliver(Message.of(EVENT), target("slack"), time.monotonic() + 0.5)
    assert "TIiajkdnlazkcOXrIdevi7" not in str(refused.value)
    with pytest.raises(UserError, match="the address is not one of teams, but of Slack"):
        deliver(Message.of(EVENT), target("teams"), soon())


def test_teams_gets_a_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [str(tmp_path / name) for name in ("key.pem", "cert.pem")]
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    made += ["-subj", "/CN=127.0.0.1", "-days", "1", "-keyout", files[0], "-out", files[1]]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files[1], files[0])
    with receiver(context) as web:
        address = web.address.removeprefix("https://")
        monkeypatch.setenv("HOOK", f"workflows://{address}/643e69f83c8944/signature?verify=no")
        deliver(Message.of(EVENT), target("teams"), soon())
        ((path, _, content),) = web.requests
        assert path.startswith("/workflows/643e69f83c8944/") and b"AdaptiveCard" in content
        assert b"the loss is not finite" in content
        web.answers += [(500, {})] * 9
        with pytest.raises(Refused, match=r"Workflows.*500"):
            deliver(Message.of(EVENT), target("teams"), time.monotonic() + 0.5)


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
