"""A sample of the prompts that a server has drawn, kept on disk: a fair one of each day, of bounded size and age.

Each prompt gets a random key in [0, 1), and of a day those with the smallest keys are kept: a uniform sample of the
day's prompts, however many there were (bottom-k sampling; Cohen and Kaplan, "Summarizing data using bottom-k sketches",
PODC 2007). Samples of several servers and days merge into one: of all of them, the smallest keys.

FOLDER/MODEL/2026-11-29.jsonl has a prompt in each line. With `hashes` it has HMACs with a random key of the folder.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lcmlora import names
from lcmlora.errors import UserError
from lcmlora.io.parsing import Malformed, parse_json

MODES = ("off", "hashes", "text")
# Environment of a server:
MODE, FOLDER, A_DAY, DAYS = "LCMLORA_KEEP_PROMPTS", "LCMLORA_PROMPTS", "LCMLORA_PROMPTS_A_DAY", "LCMLORA_PROMPT_DAYS"

_SALT, _LOCK = ".salt", ".lock"
_SALT_BYTES = 32
_LONGEST_LINE = 1 << 21  # bytes; a request has 1 MiB at most by default
_DAY = re.compile(r"(\d{4}-\d{2}-\d{2})\.jsonl")


class Kept(NamedTuple):
    """A prompt that was kept: its text, or its HMAC."""

    key: float
    text: str | None
    digest: str | None


@dataclass(frozen=True)
class Keeping:
    """Whether and how a server keeps prompts.

    mode: off, hashes or text.
    folder: of all models.
    a_day: prompts that are kept of one day.
    days: after which they are deleted.
    """

    mode: str = "off"
    folder: Path = Path("prompts")
    a_day: int = 500
    days: int = 30

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Keeping:
        """Returns what the environment says. Raises UserError where it says something else than this can be."""
        mode = environment.get(MODE) or "off"
        if mode not in MODES:
            raise UserError(f"{MODE}: expected {', '.join(MODES[:-1])} or {MODES[-1]}, got {mode[:100]!r}")
        folder = environment.get(FOLDER)
        if mode != "off" and not folder:
            raise UserError(f"{FOLDER}: is not set; {MODE}={mode} needs the folder that prompts are kept in")
        numbers = {}
        for name, default in ((A_DAY, cls.a_day), (DAYS, cls.days)):
            text = environment.get(name) or str(default)
            if not (text.isascii() and text.isdigit() and 1 <= int(text[:10]) <= 1_000_000):
                raise UserError(f"{name}: expected a whole number from 1 to 1000000, got {text[:100]!r}")
            numbers[name] = int(text)
        return cls(mode, Path(folder or "prompts"), numbers[A_DAY], numbers[DAYS])

    @property
    def environment(self) -> dict[str, str]:
        """The environment that `read` reads this from."""
        return {MODE: self.mode, FOLDER: str(self.folder), A_DAY: str(self.a_day), DAYS: str(self.days)}


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


class PromptKeeper:
    """Keeps prompts of one model. Servers may share the folder, on one machine.

    Raises:
        UserError: others than this user may read the folder, or the model's name is none of a folder.
    """

    def __init__(self, keeping: Keeping, model: str) -> None:
        self._keeping = keeping
        self._folder = keeping.folder / names.check(model, "model")
        for folder in (keeping.folder, self._folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if stat.S_IMODE(folder.stat().st_mode) & 0o077:
                raise UserError(f"{folder}: others may read what people write; run `chmod 700 {folder}`")
        with (
            contextlib.suppress(FileExistsError),
            os.fdopen(os.open(keeping.folder / ".gitignore", _CREATE, 0o600), "w", encoding="utf-8") as file,
        ):
            file.write("*\n")
        self._salt = _salt(self._folder) if keeping.mode == "hashes" else b""
        self._day: datetime.date | None = None
        self._largest = 1.0  # a key that is larger is not among the day's smallest
        self._appended = 0  # since the file was last compacted

    def keep(self, prompts: Sequence[str]) -> int:
        """Adds prompts to the day's sample, and returns how many of them were. Raises OSError where it cannot write."""
        today = _today()
        if today != self._day:
            self._begin(today)
        random = secrets.SystemRandom()
        entries = [(key, prompt) for prompt in prompts if (key := random.random()) < self._largest]
        if not entries:
            return 0
        content = "".join(json.dumps(self._row(key, prompt), ensure_ascii=False) + "\n" for key, prompt in entries)
        with self._locked():
            descriptor = os.open(self._path(today), _APPEND, 0o600)
            with os.fdopen(descriptor, "ab") as file:
                file.write(content.encode())
            self._appended += len(entries)
            if self._appended >= self._keeping.a_day:
                self._compact(today)
        return len(entries)

    def _row(self, key: float, prompt: str) -> dict[str, object]:
        if self._keeping.mode == "text":
            return {"key": key, "prompt": prompt}
        return {"key": key, "hash": digest(self._salt, prompt)}

    def _path(self, day: datetime.date) -> Path:
        return self._folder / f"{day.isoformat()}.jsonl"

    def _begin(self, today: datetime.date) -> None:
        """Begins a day: deletes what is too old, and goes on with what another server has kept today."""
        with self._locked():
            oldest = today - datetime.timedelta(days=self._keeping.days - 1)
            for day, path in _days(self._folder):
                if day < oldest:
                    path.unlink(missing_ok=True)
            self._compact(today)
        self._day = today

    def _compact(self, day: datetime.date) -> None:
        """Keeps the day's smallest keys alone. The caller has the lock."""
        path = self._path(day)
        self._appended, self._largest = 0, 1.0
        if not path.exists():
            return
        smallest = sorted(_read(path), key=_key)[: self._keeping.a_day]
        if len(smallest) == self._keeping.a_day:
            self._largest = smallest[-1].key
        part = path.with_suffix(".part")
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, _CREATE, 0o600), "w", encoding="utf-8") as file:
            for kept in smallest:
                content = {"prompt": kept.text} if kept.text is not None else {"hash": kept.digest}
                file.write(json.dumps({"key": kept.key, **content}, ensure_ascii=False) + "\n")
        part.replace(path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def digest(salt: bytes, prompt: str) -> str:
    """Returns the HMAC by which a prompt is known in a folder of hashes."""
    return hmac.new(salt, prompt.strip().encode(), hashlib.sha256).hexdigest()


def _salt(folder: Path) -> bytes:
    """Returns the folder's key of hashes. It is made if there is none."""
    path = folder / _SALT
    made = secrets.token_bytes(_SALT_BYTES)
    part = folder / f"{_SALT}.{secrets.token_hex(4)}"
    with os.fdopen(os.open(part, _CREATE, 0o600), "wb") as file:
        file.write(made)
    try:
        os.link(part, path)  # the first server makes it, and whole
    except FileExistsError:
        made = path.read_bytes()
    finally:
        part.unlink()
    if len(made) != _SALT_BYTES:
        raise UserError(f"{path}: expected {_SALT_BYTES} bytes, got {len(made)}; delete the folder's hashes and it")
    return made


def days(folder: Path, model: str) -> dict[datetime.date, int]:
    """Returns how many prompts are kept of each day, the first day first, of all servers whose folders are below."""
    found: dict[datetime.date, int] = {}
    for path in _files(folder, model):
        if match := _DAY.fullmatch(path.name):
            day = datetime.date.fromisoformat(match[1])
            found[day] = found.get(day, 0) + len(_read(path))
    return dict(sorted(found.items()))


def sample(
    folder: Path, model: str, count: int, since: datetime.date | None = None, until: datetime.date | None = None
) -> list[Kept]:
    """Returns a uniform sample of the prompts of these days, both included, in random order that is always the same.

    Args:
        count: at most as many as are kept of one day: of more, busy days would have too few.
    """
    found: list[Kept] = []
    for path in _files(folder, model):
        match = _DAY.fullmatch(path.name)
        day = datetime.date.fromisoformat(match[1]) if match else None
        if day and (since is None or day >= since) and (until is None or day <= until):
            found = sorted([*found, *_read(path)], key=_key)[:count]
    return found


def among(folder: Path, model: str, kept: Sequence[Kept], texts: Collection[str]) -> int:
    """Returns how many of the kept prompts are one of these texts, word by word."""
    known = {text.strip() for text in texts}
    hashes: set[str] = set()
    if any(each.digest for each in kept):
        for salt in (folder / names.check(model, "model")).rglob(_SALT):
            hashes |= {digest(salt.read_bytes(), text) for text in known}
    return sum(each.digest in hashes if each.text is None else each.text.strip() in known for each in kept)


def _key(kept: Kept) -> float:
    return kept.key


def _files(folder: Path, model: str) -> list[Path]:
    return sorted(path for path in (folder / names.check(model, "model")).rglob("*.jsonl") if _DAY.fullmatch(path.name))


def _days(folder: Path) -> list[tuple[datetime.date, Path]]:
    found = ((_DAY.fullmatch(path.name), path) for path in folder.iterdir())
    return [(datetime.date.fromisoformat(match[1]), path) for match, path in found if match]


def _read(path: Path) -> list[Kept]:
    """Returns the prompts of a file. A line that a killed server has not finished is left out."""
    found = []
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            try:
                row = parse_json(line)
            except Malformed:
                continue
            key = row.get("key") if isinstance(row, dict) else None
            if not isinstance(key, float):
                continue
            text, hashed = row.get("prompt"), row.get("hash")
            if isinstance(text, str) or isinstance(hashed, str):
                found.append(Kept(key, text if isinstance(text, str) else None, hashed))
    return found
