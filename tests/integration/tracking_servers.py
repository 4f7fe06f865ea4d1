"""PostgreSQL, MLflow and Prefect servers on loopback, which can be killed and come back with what they had stored."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import psutil

from lcmlora.flows import services
from lcmlora.flows.credentials import Login
from lcmlora.flows.services import S3, free_ports
from tests.integration.seaweed import SeaweedFS

PASSWORD = "MARKED-PG-SECRET"
MLFLOW = Login("team", "MARKED-MLFLOW-SECRET")
PREFECT = Login("team", "MARKED-PREFECT-SECRET")
_USER = "lcmlora"
_SECONDS = 120.0  # that a server may take; on an idle core PostgreSQL takes 1, MLflow 13 and Prefect 14


class Server(ABC):
    """One server with its children, the same port and folder each time it starts.

    Args:
        root: holds its log and its data.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.port = free_ports(1)[0]
        self.seconds = 0.0  # that the last start took
        self._began = 0.0
        self._user: str | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.root / "log").read_text(errors="replace")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it answers. Raises RuntimeError with the log's end where it does not."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Starts the process without waiting for it, so that several can come up at once."""
        assert self._process is None
        self._began = time.monotonic()
        with (self.root / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.root,
                env=_environment() | self._settings(),
                user=self._user,
                umask=0o077,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Returns when it answers; at once where it was waited for before."""
        assert self._process is not None
        until = time.monotonic() + _SECONDS  # from now: it may have been launched long ago
        while self._process.poll() is None and time.monotonic() < until:
            if self._answers():
                self.seconds = self.seconds or time.monotonic() - self._began
                return
            time.sleep(0.1)
        self.kill()
        raise RuntimeError(f"{type(self).__name__} did not start: {self.log[-2000:]}")

    def kill(self) -> None:
        """Ends it and its children at once (SIGKILL)."""
        if self._process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                leader = psutil.Process(self._process.pid)
                family = [leader, *leader.children(recursive=True)]
                for each in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        each.kill()
                while any(map(_is_alive, family[1:])):  # a new PostgreSQL waits for none of the former one's
                    time.sleep(0.01)
            self._process.wait()
            self._process, self.seconds = None, 0.0

    def restart(self) -> None:
        """Starts it again where it was."""
        self.kill()
        self.start()

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _answers(self) -> bool: ...

    def _settings(self) -> dict[str, str]:
        """Returns its environment variables; what is secret goes there and not on the command line."""
        return {}


class PostgreSQL(Server):
    """A cluster in a folder of its own below /tmp, which its system user can reach; `remove` deletes it.

    It refuses to run as root, and then runs as `postgres` or `nobody`.
    """

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="lcmlora-postgresql-")))
        self._binaries = _postgresql_binaries() or Path()
        self._user = _unprivileged()
        if self._user:
            shutil.chown(self.root, self._user)

    @staticmethod
    def missing() -> str | None:
        """Returns why there can be none here."""
        if _postgresql_binaries() is None:
            return "no PostgreSQL (`postgres` and `initdb` in /usr/lib/postgresql/*/bin or on PATH) on this machine"
        if importlib.util.find_spec("psycopg2") is None:
            return "no psycopg2 (PyPI: psycopg2-binary) in this environment"
        if os.geteuid() == 0 and _unprivileged() is None:
            return "PostgreSQL does not run as root, and there is no user `postgres` or `nobody`"
        return None

    def uri(self, database: str, password: str = PASSWORD) -> str:
        # The driver is named: SQLAlchemy 2.1 takes psycopg 3 where it is not.
        return f"postgresql+psycopg2://{_USER}:{password}@127.0.0.1:{self.port}/{database}"

    def create(self, database: str) -> None:
        with contextlib.closing(self._connect()) as connection:
            connection.autocommit = True
            connection.cursor().execute(f'CREATE DATABASE "{database}"')

    def rows(self, database: str) -> list[str]:
        """Returns every row of every table as text."""
        found: list[str] = []
        with contextlib.closing(self._connect(database)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
            for (name,) in cursor.fetchall():
                cursor.execute(f'SELECT t::text FROM "{name}" t')
                found += [text for (text,) in cursor.fetchall()]
        return found

    def launch(self) -> None:
        if not (self.root / "data").exists():
            self._initialise()
        super().launch()

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self.root)

    def _initialise(self) -> None:
        password = self.root / "password"
        password.write_text(PASSWORD)
        options = ["--auth=scram-sha-256", f"--username={_USER}", f"--pwfile={password}"]
        options += ["--no-sync", "--no-locale", "--encoding=UTF8", f"--pgdata={self.root / 'data'}"]
        made = subprocess.run(
            [str(self._binaries / "initdb"), *options], cwd=self.root, user=self._user, capture_output=True, text=True
        )
        password.unlink()
        if made.returncode != 0:
            raise RuntimeError(f"initdb ended with status {made.returncode}: {made.stderr[-2000:]}")

    def _command(self) -> list[str]:
        options = ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "unix_socket_directories="]
        options += ["listen_addresses=127.0.0.1", f"port={self.port}"]
        flags = [word for option in options for word in ("-c", option)]
        return [str(self._binaries / "postgres"), "-D", str(self.root / "data"), *flags]

    def _answers(self) -> bool:
        import psycopg2

        try:
            self._connect().close()
        except psycopg2.OperationalError:
            return False
        return True

    def _connect(self, database: str = "postgres") -> Any:
        import psycopg2

        return psycopg2.connect(
            host="127.0.0.1", port=self.port, user=_USER, password=PASSWORD, dbname=database, connect_timeout=5
        )


class MLflow(Server):
    """`mlflow server` with one worker: runs and models in PostgreSQL, artifacts in a bucket that only it reaches.

    It asks for the password of MLFLOW.
    """

    def __init__(self, root: Path, database: str, s3: SeaweedFS, bucket: str) -> None:
        super().__init__(root)
        self.bucket = bucket
        self.uri = f"http://127.0.0.1:{self.port}"
        access = S3(s3.endpoint, *s3.keys["writer"]).environment
        artifacts = f"s3://{bucket}/artifacts"
        self._service = services.mlflow(self.port, database, artifacts, access, MLFLOW, root / "keys")

    def _command(self) -> list[str]:
        return self._service.command

    def _settings(self) -> dict[str, str]:
        return self._service.environment

    def _answers(self) -> bool:
        return self._service.answers()


class PrefectServer(Server):
    """Prefect's server with its sqlite database, without its pages. It asks for the password of PREFECT."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.api = f"http://127.0.0.1:{self.port}/api"
        self._service = services.prefect(self.port, root / "prefect", PREFECT, pages=False)

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which a client finds it."""
        return {"PREFECT_API_URL": self.api, "PREFECT_API_AUTH_STRING": PREFECT.pair}

    def _command(self) -> list[str]:
        return self._service.command

    def _settings(self) -> dict[str, str]:
        return self._service.environment

    def _answers(self) -> bool:
        return self._service.answers()


def _environment() -> dict[str, str]:
    """Returns this process's environment without what would lead a server, or a client, elsewhere."""
    foreign = ("AWS_", "MLFLOW_", "PREFECT_", "PG")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | services.NO_TELEMETRY | {"AWS_EC2_METADATA_DISABLED": "true"}


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _postgresql_binaries() -> Path | None:
    """Returns the folder of the newest installed version's programs."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name.zfill(3))
    on_path = shutil.which("postgres")
    folders = [*reversed(installed), *([Path(on_path).resolve().parent] if on_path else [])]
    return next((folder for folder in folders if (folder / "postgres").exists() and (folder / "initdb").exists()), None)


def _unprivileged() -> str | None:
    """Returns whom a server runs as that does not run as root; None where this process is not root itself."""
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in known), None) if os.geteuid() == 0 else None
