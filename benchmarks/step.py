"""What a distillation step costs, phase by phase, as shares of one run: python -m benchmarks.step [MODEL] [--batch B].

Phases are timed in turn within each repeat, so a machine that slows down slows them all; figures are medians. The base
is read from bases/MODEL; latents and text are random, since no phase's cost depends on their values. Operations are
what torch is told to do, without views: on a GPU each is a kernel or a few, and its host has to launch them.
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


def _conditioning(base: bases.LoadedBase, rows: int) -> bases.Conditioning:
    captions = base.encode_text(["red apple"])
    wide = {name: value.expand(rows, *value.shape[1:]).contiguous() for name, value in captions.items()}
    return wide | base.micro_conditioning(rows=rows)


class _Operations(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.count += not op.is_view
        return op(*arguments, **options or {})


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

    settings = config.load(Path("params.yaml"))
    distill = settings.distill_for(options.model)
    batch = options.batch or distill.batch
    device = bases.pick_device(distill.device)
    base = bases.load(
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
    optimization = Optimization(parameters, distill)
    distillation = Distillation(base, base.unconditional(), distill)
    conditioning = _conditioning(base, batch)
    z = torch.randn(batch, *base.latent_shape, device=device)
    index = torch.arange(batch, device=device) % distill.grid
    w = torch.full((batch,), distill.w_min, device=device)
    sample = Batch(range(batch), z, torch.randn_like(z), index, w, torch.rand(batch, 2, device=device), conditioning)
    teacher = distillation.teacher
    t, t_prev = teacher.t[index], teacher.t_prev[index]

    def plain() -> None:
        with torch.no_grad(), lora.disabled(base.network):
            base.predict(z, t, conditioning)

    def adapted() -> None:
        with torch.no_grad():
            base.predict(z, t, conditioning)

    def whole() -> None:
        optimization.backward(distillation.losses(sample).mean())
        optimization.step(0)

    def student() -> None:
        distillation.student(z, t, conditioning).x0.square().mean().backward()

    phases: dict[str, Callable[[], object]] = {
        "base forward (F0)": plain,
        "adapted forward": adapted,
        "teacher step, guided": lambda: teacher.step(z, t, t_prev, w, conditioning),
        "student forward + backward": student,
        "whole step": whole,
    }
    times: dict[str, list[float]] = {name: [] for name in phases}
    for repeat in range(options.repeats + 1):
        for name, run in phases.items():
            began = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat:  # the first one warms up
                times[name].append(time.perf_counter() - began)
    with _Operations() as operations:
        whole()
    threads = torch.get_num_threads()
    print(f"{options.model}: batch {batch}, {base.dtype}, {device}, {threads} threads, median of {options.repeats}")
    _show(times, batch)
    print(f"  operations of a whole step: {operations.count}")


def _show(times: dict[str, list[float]], batch: int) -> None:
    unit = statistics.median(times["base forward (F0)"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        print(f"  {name:28s} {1e3 * middle:9.1f} ms  {middle / unit:6.2f} F0  {batch / middle:8.1f} pictures/s")


if __name__ == "__main__":
    main()
