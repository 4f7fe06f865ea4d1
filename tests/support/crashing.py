"""A folder of pictures, two of which make the process crash that decodes them."""

from __future__ import annotations

import os
import signal

from lcmlora.data.sources.folder import Folder


class Crashing(Folder):
    def read(self, place: str) -> bytes:
        if place in ("03.png", "07.png"):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().read(place)
