"""One of many processes, which do what a test asks: python -m tests.support.rank FOLDER ACT0 ACT1 ..."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from lcmlora.cli.shell.reporting import reporting_errors
from lcmlora.errors import UserError

rank = int(os.environ["RANK"])
folder, act = Path(sys.argv[1]), sys.argv[2:][rank]
Path(folder, f"{rank}.part").write_text(str(os.getpid()))
Path(folder, f"{rank}.part").rename(folder / str(rank))
if act == "wait":
    time.sleep(60)
elif act == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
elif act == "wrong":
    with reporting_errors(f"process {rank}: "):
        raise UserError("distill.batch: is too much")
elif act == "left":
    sys.exit(75)
elif act == "killed":
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
else:
    sys.exit(int(act))
