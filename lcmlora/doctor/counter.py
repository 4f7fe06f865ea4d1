"""Bytes and operations of work on torch's meta device, where tensors have shapes and no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from lcmlora.patches.torch_internals import TorchDispatchMode, flash_attention, storage_key, tensors_of

_ROUNDING = 512  # bytes; torch's allocator on a GPU gives multiples of it


class Counter(TorchDispatchMode):
    """Counts the tensors that are alive, and the operations, within its block.

    Attributes:
        live: bytes of all storages that are alive and that `hold` was given or the block has made.
        peak: the most that `live` was since `restart`.
        operations: multiplications and additions, each counted, of products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.operations = 0.0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made outside the block."""
        for tensor in tensors:
            self._note(tensor)

    def restart(self) -> None:
        """Begins a new peak and a new count of operations."""
        self.peak, self.operations = self.live, 0.0

    def __torch_dispatch__(
        self, op: Any, types: Sequence[Any], arguments: Sequence[Any] = (), options: Mapping[str, Any] | None = None
    ) -> Any:
        options = options or {}
        result = op(*arguments, **options)
        if formula := flop_registry.get(op.overloadpacket):
            self.operations += formula(*arguments, **options, out_val=result)
        self.hold(tensors_of(result))
        return result

    def _note(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key in self._storages:
            return
        size = -(-storage.nbytes() // _ROUNDING) * _ROUNDING
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone(_: object) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)


class _FlashAttention(TorchFunctionMode):
    """Attention as a GPU computes it, without a matrix of all pairs of positions. The meta device would take that."""

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[Any],
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is scaled_dot_product_attention and arguments[0].is_meta:
            return flash_attention(*arguments[:3])
        return function(*arguments, **options or {})


@contextmanager
def counting(held: Iterable[Tensor] = ()) -> Iterator[Counter]:
    """Yields a counter of what happens in the block.

    Args:
        held: tensors from before that are alive during it.
    """
    counter = Counter()
    counter.hold(held)
    counter.restart()
    with counter, _FlashAttention():
        yield counter


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns a tensor of this shape on the meta device."""
    return torch.empty(*shape, dtype=dtype, device="meta")
