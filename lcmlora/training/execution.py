"""How the UNet's passes are executed: compiled, recomputed; and the check that the adapter still does its part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lcmlora.adapters import lora
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.families.family import Conditioning
from lcmlora.errors import UserError
from lcmlora.io.private import cache_folder
from lcmlora.patches.compilation import Compilation
from lcmlora.patches.recompute import FullRecompute, SelectiveRecompute
from lcmlora.patches.torch_internals import allow_graphs, foreach_norm, foreach_sub, has_cpp_compiler
from lcmlora.patches.upsampling import ExpandingUpsampling

# Of the largest output. In half precision a fused kernel rounds at other places than the ones it replaces.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# Of the norm of the adapter's gradient. Rounding at other places makes up to 0.1 of it in bf16, whose own distance from
# fp32 is that large; where a compiler is wrong it is a third and more (see patches/upsampling.py).
_GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}
# Student, teacher and target are three graphs, validation brings more; the default of 8 then falls back to eager.
_GRAPHS = 64


def pick_checkpointing(how: str, device: torch.device) -> str:
    """Returns what `auto` stands for on this device, or `how` where it says so itself."""
    if how != "auto":
        return how
    return "none" if device.type == "cpu" else "selective"


def recompute(network: Any, how: str) -> None:
    """Has the backward pass recompute activations instead of keeping them. The last call counts.

    Args:
        how: `none`, `selective` or `full` (see patches/recompute.py), or `auto`.
    """
    how = pick_checkpointing(how, next(network.parameters()).device)
    for patch in (SelectiveRecompute(), FullRecompute()):
        patch.undo(network)
    if how == "selective":
        SelectiveRecompute().install(network)
    elif how == "full":
        FullRecompute().install(network)


def compiled(network: Any) -> None:
    """Has the network compiled when it is first called, in place.

    Raises:
        UserError: it is on a CPU, and there is no C++ compiler; or this user has no folder for what is compiled.
    """
    if next(network.parameters()).device.type == "cpu" and not has_cpp_compiler():
        raise UserError(
            "compile: true needs a C++ compiler on a CPU, and there is none on the PATH; install g++ or set compile: "
            "false"
        )
    # Torch's own choice is a name in the shared temporary folder: what another user puts there first would be executed.
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("inductor"))
    allow_graphs(_GRAPHS)
    ExpandingUpsampling().install(network)
    Compilation().install(network)


def eager() -> AbstractContextManager[object]:
    """Within the block a compiled UNet runs as it was written."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _stirred(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the block none of them is zero: where B is, A has no gradient."""
    zero = [parameter for parameter in parameters if not parameter.any()]
    with torch.no_grad():
        for parameter in zero:
            parameter.fill_(1e-2)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter in zero:
                parameter.zero_()


class AdapterCheck:
    """Compares the UNet, before it gets its adapter, with what it does later (toggling adapters under torch.compile
    was silently wrong in older stacks)."""

    def __init__(self, base: LoadedBase, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> None:
        """Args:
        base: bare.
        latents, timesteps, conditioning: any fixed input of a forward.
        """
        self._base, self._latents, self._timesteps, self._conditioning = base, latents, timesteps, conditioning
        self._differs = False
        with torch.no_grad():
            self._alone = self._eager()

    def teacher(self) -> None:
        """Raises UserError unless the base with its adapter off is the bare base, to the bit."""
        with torch.no_grad(), lora.disabled(self._base.network):
            if not torch.equal(self._eager(), self._alone):
                raise UserError(f"{self._base.name}: with its adapter off the base does not draw as it did without one")

    def compiled(self, rows: int, teacher_rows: int | None = None) -> None:
        """Raises UserError unless the compiled student says what the eager one does and has its gradient, and the
        compiled teacher says what the bare base does.

        Args:
            rows: of a step's forward, so that what is compiled here is what the steps need; the teacher's likewise,
                where there is one.
        """
        with torch.no_grad():
            if teacher_rows is not None:
                with lora.disabled(self._base.network):
                    self._compare("the compiled teacher", self._compiled(teacher_rows), self._alone)
            self._compare("the compiled student", self._compiled(rows), self._eager())
        trained = [parameter for parameter in self._base.network.parameters() if parameter.requires_grad]
        with _stirred(trained):
            found = _gradient(trained, self._compiled(rows).square().sum())
            times = torch.bincount(self._repeated(rows), minlength=len(self._latents))
            expected = _gradient(trained, (self._eager().square().flatten(1).sum(1) * times).sum())
        norm = torch.stack(foreach_norm(expected)).norm()
        error = (torch.stack(foreach_norm(foreach_sub(found, expected))).norm() / norm).item()
        if not error < _GRADIENT_TOLERANCE[self._base.dtype]:
            raise UserError(
                f"the compiled student's gradient is {error:.1e} of its norm away from the eager one's, expected less "
                f"than {_GRADIENT_TOLERANCE[self._base.dtype]:g}; set compile: false"
            )

    @torch.no_grad()
    def student(self) -> None:
        """Raises UserError where training has not changed the student. Looks once."""
        if not self._differs and torch.equal(self._eager(), self._alone):
            raise UserError(f"{self._base.name}: the adapter was trained and changes nothing; nothing is saved")
        self._differs = True

    def _repeated(self, rows: int) -> Tensor:
        """Returns which rows of the input make one of so many."""
        return torch.arange(rows, device=self._latents.device) % len(self._latents)

    def _compiled(self, rows: int) -> Tensor:
        """Returns the output for the input, repeated."""
        index = self._repeated(rows)
        conditioning = {name: value[index] for name, value in self._conditioning.items()}
        return self._base.predict(self._latents[index], self._timesteps[index], conditioning)

    def _eager(self) -> Tensor:
        with eager():
            return self._base.predict(self._latents, self._timesteps, self._conditioning)

    def _compare(self, what: str, ours: Tensor, expected: Tensor) -> None:
        """Of outputs of as many rows as both have."""
        error = ((ours[: len(expected)] - expected[: len(ours)]).abs().max() / expected.abs().max()).item()
        tolerance = _TOLERANCE[self._base.dtype]
        if not error < tolerance:
            raise UserError(
                f"{what} is {error:.1e} of the largest value away from the eager one, expected less than {tolerance:g}"
                "; set compile: false"
            )


def _gradient(trained: list[nn.Parameter], loss: Tensor) -> list[Tensor]:
    """Returns that of a loss; the parameters have none afterwards."""
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    for parameter in trained:
        parameter.grad = None
    return gradients
