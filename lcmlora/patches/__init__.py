"""Patches of torch's, diffusers' and PEFT's modules: the forwards that a network really runs.

Each patch is a class that says what it replaces and why, with `install(network)` and `undo(network)`.
`installed(network)` lists the patches of a network. Undocumented parts of these libraries are used through
`torch_internals` and `peft_internals` alone.
"""

from lcmlora.patches.patch import Installed, Patch, installed

__all__ = ["Installed", "Patch", "installed"]
