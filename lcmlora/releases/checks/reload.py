"""Reloading the released weights in plain diffusers, which must then predict as the trained student did."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcmlora.adapters.metadata import SCHEDULER, WEIGHTS
from lcmlora.config import Base
from lcmlora.errors import UserError
from lcmlora.io import faults
from lcmlora.releases.bundle import Proof

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Largest allowed difference between reloaded and trained student, as a share of the student's largest output. In fp32
# both run the same kernels; a half-precision base may be reloaded on another device than it was trained on.
_TOLERANCE = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 5e-2}


class ReloadCheck:
    """Loads adapters into a plain diffusers pipeline, as any user would, and compares them with the trained student.

    Args:
        release: a folder with the weights and scheduler_config.json.
        probe: outputs of the student and of the base on fixed inputs, which distillation wrote.
        precision: `auto`, `fp32` or `bf16`, as the base was loaded for distillation.

    Raises:
        UserError: diffusers cannot load the base or the scheduler, or these do not go together.
    """

    def __init__(self, release: Path, base: Base, base_folder: Path, probe: Path, precision: str) -> None:
        import torch
        from safetensors.torch import load_file

        from lcmlora.bases import diffusers_pipeline, pick_device, pick_dtype

        # The precision of the probe: adapters of half-precision bases are saved in fp16, all others in fp32.
        stored = _precision(load_file(release / WEIGHTS))
        self._base_folder = base_folder
        self._device = pick_device("auto")
        dtype = torch.float32 if stored == torch.float32 else pick_dtype(precision, self._device)
        self._pipeline = diffusers_pipeline.assemble_pipeline(base_folder, release / SCHEDULER, base.variant, dtype).to(
            self._device
        )
        self._probe = {name: tensor.to(self._device) for name, tensor in load_file(probe).items()}

    def run(self, weights: Path) -> Proof:
        """Loads an adapter file of either format and compares one forward with the trained student's.

        Raises:
            UserError: with the figure that is outside its limit.
        """
        import torch
        from safetensors.torch import load_file

        from lcmlora.bases import diffusers_pipeline

        written = load_file(weights)
        self._load(weights)
        family, network = diffusers_pipeline.family_of(self._pipeline), diffusers_pipeline.network_of(self._pipeline)
        expected = sum(not name.endswith(".alpha") for name in written)
        loaded = sum(".lora_A." in name or ".lora_B." in name for name, _ in network.named_parameters())
        if loaded != expected:
            raise UserError(
                f"{weights}: holds {expected} LoRA tensors and plain diffusers loaded {loaded}; not released"
            )
        inputs = dict(self._probe)
        student, bare = inputs.pop("student"), inputs.pop("base")
        with torch.no_grad():
            output = family.forward(network, inputs.pop("latents"), inputs.pop("timesteps"), inputs)
        scale = student.abs().max()
        error, effect = (((output - student).abs().max() / scale).item(), ((student - bare).abs().max() / scale).item())
        tolerance = _TOLERANCE[str(_precision(written)).removeprefix("torch.")]
        if not effect > 0:
            raise UserError(
                f"{weights}: the adapter has no effect (student and base differ by {effect:g}); not released"
            )
        if not error < tolerance:
            raise UserError(
                f"{weights}: reloaded by plain diffusers, its output is {error:.1e} of the largest value away from the "
                f"trained student's, expected less than {tolerance:g}; not released, distil again"
            )
        # With an effect smaller than the tolerance, an adapter that was not loaded would pass the check above.
        if not error < effect / 2:
            raise UserError(
                f"{weights}: reloaded, it differs by {error:.1e}, and its effect is only {effect:.1e}; not released"
            )
        return Proof(error=error, effect=effect, tensors=loaded)

    def _load(self, weights: Path) -> None:
        self._pipeline.unload_lora_weights()
        load_weights(self._pipeline, weights, self._base_folder)


def load_weights(pipeline: Any, weights: Path, base_folder: Path) -> None:
    """Loads an adapter's file into a pipeline of diffusers. Raises UserError where diffusers cannot load it."""
    from lcmlora.adapters import tensorfile

    tensorfile.check_harmless(weights)
    try:
        pipeline.load_lora_weights(weights.parent, weight_name=weights.name)
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{weights}: plain diffusers cannot load it on {base_folder}: {faults.chain(error)}") from error


def _precision(tensors: dict[str, Tensor]) -> torch.dtype:
    """Returns the precision of an adapter's factors; alphas are always in fp32."""
    return next(tensor.dtype for name, tensor in tensors.items() if not name.endswith(".alpha"))
