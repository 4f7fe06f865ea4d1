"""How the network's forwards are executed: compiled, with recomputed activations. Checks of adapter and compiler."""

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

# Relative to the largest output. In half precision a fused kernel rounds elsewhere than the kernels it replaces.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
# Relative to the norm of the adapter's gradient. In bf16 rounding elsewhere changes up to 0.1 of it, and so does bf16
# itself against fp32. An error of the compiler changes a third and more (see patches/upsampling.py).
_GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.15}
# Student, teacher and target are three graphs, and validation adds more. With torch's default of 8 some would not be
# compiled.
_GRAPHS = 64


def pick_checkpointing(mode: str, device: torch.device) -> str:
    """Returns the mode of recomputing activations, with `auto` resolved for this device."""
    if mode != "auto":
        return mode
    return "none" if device.type == "cpu" else "selective"


def recompute(network: Any, mode: str) -> None:
    """Makes the backward pass recompute activations instead of keeping them. Replaces the mode of an earlier call.

    Args:
        mode: `none`, `selective` or `full` (see patches/recompute.py), or `auto`.
    """
    mode = pick_checkpointing(mode, next(network.parameters()).device)
    for patch in (SelectiveRecompute(), FullRecompute()):
        patch.undo(network)
    if mode == "selective":
        SelectiveRecompute().install(network)
    elif mode == "full":
        FullRecompute().install(network)


def compile_network(network: Any) -> None:
    """Patches the network so that its first call compiles it.

    Raises:
        UserError: it is on a CPU, and there is no C++ compiler; or the user has no folder for compiled code.
    """
    if next(network.parameters()).device.type == "cpu" and not has_cpp_compiler():
        raise UserError(
            "compile: true needs a C++ compiler on a CPU, and there is none on the PATH; install g++ or set compile: "
            "false"
        )
    # By default torch takes a folder of a known name in the shared temporary folder. It would execute code that another
    # user has put there.
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder("inductor"))
    allow_graphs(_GRAPHS)
    ExpandingUpsampling().install(network)
    Compilation().install(network)


def eager() -> AbstractContextManager[object]:
    """Runs a compiled network without its compiled code within the block."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def _without_zeros(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Fills parameters that are all zero within the block: A of a LoRA has no gradient while B is zero."""
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
    """Compares the network's output before it gets its adapter with its outputs later.

    Switching adapters off and on under torch.compile gave wrong outputs without an error in older versions.
    """

    def __init__(self, base: LoadedBase, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> None:
        """Args:
        base: without an adapter.
        latents, timesteps, conditioning: the inputs of a forward, the same each time.
        """
        self._base, self._latents, self._timesteps, self._conditioning = base, latents, timesteps, conditioning
        self._differs = False
        with torch.no_grad():
            self._alone = self._eager()

    def teacher(self) -> None:
        """Raises UserError unless the base with its adapter off has the output that it had without one, to the bit."""
        with torch.no_grad(), lora.disabled(self._base.network):
            if not torch.equal(self._eager(), self._alone):
                raise UserError(f"{self._base.name}: with its adapter off the base does not draw as it did without one")

    def compiled(self, rows: int, teacher_rows: int | None = None) -> None:
        """Raises UserError unless the compiled network has the outputs and the gradient of the eager one.

        Args:
            rows: samples in a forward of a step, so that the steps reuse the code that is compiled here.
            teacher_rows: samples in a forward of the teacher, if there is one.
        """
        with torch.no_grad():
            if teacher_rows is not None:
                with lora.disabled(self._base.network):
                    self._compare("the compiled teacher", self._compiled(teacher_rows), self._alone)
            self._compare("the compiled student", self._compiled(rows), self._eager())
        trained = [parameter for parameter in self._base.network.parameters() if parameter.requires_grad]
        with _without_zeros(trained):
            compiled = _gradient(trained, self._compiled(rows).square().sum())
            times = torch.bincount(self._repeated(rows), minlength=len(self._latents))
            expected = _gradient(trained, (self._eager().square().flatten(1).sum(1) * times).sum())
        norm = torch.stack(foreach_norm(expected)).norm()
        error = (torch.stack(foreach_norm(foreach_sub(compiled, expected))).norm() / norm).item()
        if not error < _GRADIENT_TOLERANCE[self._base.dtype]:
            raise UserError(
                f"the compiled student's gradient is {error:.1e} of its norm away from the eager one's, expected less "
                f"than {_GRADIENT_TOLERANCE[self._base.dtype]:g}; set compile: false"
            )

    @torch.no_grad()
    def student(self) -> None:
        """Raises UserError if training has not changed the student. Later calls after a first success do nothing."""
        if not self._differs and torch.equal(self._eager(), self._alone):
            raise UserError(f"{self._base.name}: the adapter was trained and changes nothing; nothing is saved")
        self._differs = True

    def _repeated(self, rows: int) -> Tensor:
        """Returns the indices (rows,) that repeat the input's samples up to this number."""
        return torch.arange(rows, device=self._latents.device) % len(self._latents)

    def _compiled(self, rows: int) -> Tensor:
        """Returns the output (rows, C, h, w) for the input, repeated."""
        index = self._repeated(rows)
        conditioning = {name: value[index] for name, value in self._conditioning.items()}
        return self._base.predict(self._latents[index], self._timesteps[index], conditioning)

    def _eager(self) -> Tensor:
        with eager():
            return self._base.predict(self._latents, self._timesteps, self._conditioning)

    def _compare(self, name: str, output: Tensor, expected: Tensor) -> None:
        """Raises UserError if an output is too far from the expected one, over the rows that both have."""
        error = ((output[: len(expected)] - expected[: len(output)]).abs().max() / expected.abs().max()).item()
        tolerance = _TOLERANCE[self._base.dtype]
        if not error < tolerance:
            raise UserError(
                f"{name} is {error:.1e} of the largest value away from the eager one, expected less than {tolerance:g}"
                "; set compile: false"
            )


def _gradient(trained: list[nn.Parameter], loss: Tensor) -> list[Tensor]:
    """Returns the gradient of a loss for each parameter, and takes it from the parameters."""
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    for parameter in trained:
        parameter.grad = None
    return gradients
