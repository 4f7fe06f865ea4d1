"""params.yaml in all states: taken, or refused in lines that name the file; no traceback, no hang, not much memory."""

import os
import tempfile
from pathlib import Path

import pytest

from lcmlora import config
from lcmlora.errors import UserError
from tests.support import fuzzing

ROOT = Path(__file__).parents[1]
WORDS = (
    *(
        b"&a ",
        b"*a",
        b"<<: *a\n",
        b"!!python/object:os.system ",
        b"!!binary aGk=",
        b"!!set {a}",
        b"!!timestamp ",
        b"? ",
    ),
    *(b"- ", b"| ", b">-\n", b"---\n", b"...\n", b"%YAML 1.2\n", b"2021-01-01", b"0x" + b"f" * 9000, b"0o17", b"017"),
    *(b"yes", b"no", b"~", b".inf", b".nan", b"1:30:00", b"1_000", b"=", b"\xe4", b'"\\ud800"', b'"\\0"', b"  ", b"{}"),
    *(b"&a [*a]", b"{a: 1, a: 2}", b"[]", b"{[1]: 2}", b"1e999", b"1.0e+400", b"-5", b"0", b"steps", b"distill:\n"),
)


def read(content: bytes) -> None:
    path = Path(tempfile.gettempdir(), f"params-{os.getpid()}.yaml")
    path.write_bytes(content)
    try:
        config.load(path)
    except UserError as error:
        # Of several keys that do not fit each has its line.
        lines = str(error).splitlines()
        assert lines and all(line.startswith(f"{path}: ") and len(line) < 2000 for line in lines), lines
        raise UserError(lines[0]) from None
    finally:
        path.unlink()


def check(count: int, seed: int) -> None:
    examples = [(ROOT / "params.yaml").read_bytes()]
    counts = fuzzing.check(read, fuzzing.mutated(examples, count, seed, WORDS))
    assert counts.total() == count and counts["refused"] > count / 4


def test_mutated_settings_are_taken_or_refused():
    check(fuzzing.QUICK, 21)


@pytest.mark.slow
def test_six_thousand_mutated_settings_are_taken_or_refused():
    check(fuzzing.FULL, 22)
