"""Memory that a stage frees stays with its process."""

import platform
import subprocess
import sys

import pytest

BLOCKS, SIZE = 20, 16 << 20
# Prints how many pages the system gave it while it asked for the same block again and again.
PROGRAM = f"""
import ctypes, resource, sys
from types import SimpleNamespace
from lcmlora.parallel.allocator import keep_freed_memory
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
if sys.argv[1] == "keep":
    keep_freed_memory(SimpleNamespace(type="cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({BLOCKS}):
    block = malloc({SIZE})
    ctypes.memset(block, 1, {SIZE})
    free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options")
def test_a_block_that_is_freed_and_asked_for_again_is_cleared_once():
    pages = {}
    for mode in ("default", "keep"):
        environment = {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1048576"} if mode == "default" else {}
        command = [sys.executable, "-c", PROGRAM, mode]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        pages[mode] = int(done.stdout)
    assert pages["default"] > 0.9 * BLOCKS * (pages["keep"] - 100) > 0
