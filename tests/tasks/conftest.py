"""Tasks without a server, whatever other tests of this process have started, and on a device of their own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import prefect.context
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings


@pytest.fixture(autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Where the lock of the device is: what trains on this machine must not keep tests waiting.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("locks")))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        # Threads do not know temporary settings: theirs are those of the flows' test server, once that has started.
        monkeypatch.setattr(prefect.context, "GLOBAL_SETTINGS_CONTEXT", prefect.context.get_settings_context())
        yield
