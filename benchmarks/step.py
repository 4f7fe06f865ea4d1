"""The time of each phase of a distillation step: python -m benchmarks.step [MODEL] [--batch B]

Phases take turns within each repeat, so a machine that slows down slows them all; figures are medians. The base is read
from bases/MODEL. Latents are random, since no phase's cost depends on their values. Operations are counted without
views: on a GPU each is one kernel or a few, which the host has to launch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lcmlora import bases, config
from lcmlora.adapters import lora
from lcmlora.distillation.loss import Distillation
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.training import execution
from lcmlora.training.batches import Batch
from lcmlora.training.optimization import Optimization

_UNIT = "base forward (F0)"  # the phase that the others are compared with


class _Operations(TorchDispatchMode):
    """Counts the operations that torch carries out, without views."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += not op.is_view
        return op(*arguments, **options or {})


class _Step:
    """A distillation step and its phases.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        settings = config.load(Path("params.yaml"))
        distill = settings.distill_for(options.model)
        self.batch = options.batch or distill.batch
        self.device = device = bases.pick_device(distill.device)
        self.base = base = bases.load(
            options.model,
            settings.base(options.model),
            Path("bases", options.model),
            device=device,
            dtype=bases.pick_dtype(options.precision or distill.precision, device),
            parts=("network", "text"),
        )
        parameters = lora.inject(base.network, distill.rank, distill.alpha, distill.seed)
        if not options.peft:
            LoraForwards(merged=False if options.unmerged else None).install(base.network)
        execution.recompute(base.network, distill.checkpointing)
        self._optimization = Optimization(parameters, distill)
        self._distillation = Distillation(base, base.unconditional(), distill)
        self._samples = self._random_samples(distill)

    def _random_samples(self, distill: config.Distill) -> Batch:
        z = torch.randn(self.batch, *self.base.latent_shape, device=self.device)
        index = torch.arange(self.batch, device=self.device) % distill.grid
        w = torch.full((self.batch,), distill.w_min, device=self.device)
        u = torch.rand(self.batch, 2, device=self.device)
        caption = self.base.encode_text(["red apple"])
        captions = {name: value.expand(self.batch, *value.shape[1:]).contiguous() for name, value in caption.items()}
        conditioning = captions | self.base.micro_conditioning(rows=self.batch)
        return Batch(range(self.batch), z, torch.randn_like(z), index, w, u, conditioning)

    def whole(self) -> None:
        """Takes the step."""
        self._optimization.backward(self._distillation.losses(self._samples).mean())
        self._optimization.step(0)

    def phases(self) -> dict[str, Callable[[], object]]:
        """Returns the phases by name, the forward of the base alone first."""
        base, teacher, samples = self.base, self._distillation.teacher, self._samples
        z, conditioning = samples.z, samples.conditioning
        t, t_prev = teacher.t[samples.index], teacher.t_prev[samples.index]

        def base_forward() -> None:
            with torch.no_grad(), lora.disabled(base.network):
                base.predict(z, t, conditioning)

        def adapted_forward() -> None:
            with torch.no_grad():
                base.predict(z, t, conditioning)

        def student() -> None:
            self._distillation.student(z, t, conditioning).x0.square().mean().backward()

        return {
            _UNIT: base_forward,
            "adapted forward": adapted_forward,
            "teacher step, guided": lambda: teacher.step(z, t, t_prev, samples.w, conditioning),
            "student forward + backward": student,
            "whole step": self.whole,
        }


def _timed(phases: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Returns the seconds of each phase in each repeat, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in phases}
    for repeat in range(repeats + 1):
        for name, run in phases.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:
                times[name].append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="that of params.yaml by default")
    parser.add_argument(
        "--unmerged", action="store_true", help="run the adapter beside its layer, as bf16 on a GPU must"
    )
    parser.add_argument("--peft", action="store_true", help="run the adapter as PEFT does")
    options = parser.parse_args()

    step = _Step(options)
    times = _timed(step.phases(), options.repeats, step.device)
    with _Operations() as operations:
        step.whole()
    print(
        f"{options.model}: batch {step.batch}, {step.base.dtype}, {step.device}, {torch.get_num_threads()} threads, "
        f"median of {options.repeats}"
    )
    _show(times, step.batch)
    print(f"  operations of a whole step: {operations.count}")


def _show(times: dict[str, list[float]], batch: int) -> None:
    unit = statistics.median(times[_UNIT])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"  {name:28s} {1e3 * middle:9.1f} ms  {middle / unit:6.2f} F0  {batch / middle:8.1f} pictures/s")


if __name__ == "__main__":
    main()
