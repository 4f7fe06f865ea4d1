"""The patch that compiles a network: its calls run what torch.compile made of its forward."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from lcmlora.patches.patch import Patch, Swap, swap
from lcmlora.patches.torch_internals import COMPILED_CALL


class Compilation(Patch):
    name = "compilation"
    replaces = "torch Module.__call__"
    reason = "Fused kernels, compiled for fixed shapes at the first call. Within `execution.eager` they do not run."

    def _apply(self, network: nn.Module) -> Iterable[Swap]:
        network.compile(dynamic=False)
        compiled = vars(network).pop(COMPILED_CALL)
        yield swap(network, COMPILED_CALL, compiled)
