"""The time of a step with one thing changed: python -m benchmarks.variants [MODEL] [--only NAME ...]

Each variant changes one thing in lcmlora's step. Both take turns on the same samples in the same process. The figure is
the variant's time relative to that of the unchanged step, the median over the turns with the range. Above 1 the variant
is slower: what it leaves out saves that much. Below 1 it is worth adopting, or is an option already. --gradients also
prints how far each variant's gradient is from that of the step in fp32, relative to its norm.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import tables
from benchmarks.compare import Case, make_case
from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.bases.families import Conditioning
from lcmlora.cli.shell.reporting import reporting_errors
from lcmlora.data.latents.cache import LatentCache
from lcmlora.diffusion.teacher import Teacher
from lcmlora.diffusion.teacher_cache import TeacherCache
from lcmlora.distillation.loss import Distillation, sample_stream
from lcmlora.io.files import write_json
from lcmlora.patches import lora_forwards
from lcmlora.patches.attention import DirectAttention, WideAttention
from lcmlora.patches.lora_forwards import LoraForwards
from lcmlora.training import execution
from lcmlora.training.batches import Batches
from lcmlora.training.optimization import Optimization


@dataclass
class Step:
    """A step with a base of its own; calling it with a number takes that step."""

    distillation: Distillation
    parameters: list[nn.Parameter]
    optimization: Any
    batches: Batches
    around: Callable[[], AbstractContextManager[object]]
    wait: bool

    def __call__(self, number: int) -> None:
        with self.around():
            losses = self.distillation.losses(self.batches.draw(number))
        self.optimization.backward(losses.mean())
        self.optimization.step(number)
        if self.wait:
            losses.mean().item()

    def gradient(self) -> Tensor:
        """Returns the adapter's gradient of a weighted sum of the student's outputs on the first step's samples, flat.

        A and B are moved away from their initial values: B is zero there, and so is A's gradient.
        """
        random, batch = torch.Generator().manual_seed(0), self.batches.draw(0)
        kept = [parameter.detach().clone() for parameter in self.parameters]
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=random).to(parameter.device))
        x, t = self.distillation.noisy(batch, batch.index), self.distillation.teacher.t[batch.index]
        with self.around():
            output = self.distillation.base.predict(x, t, batch.conditioning)
        (output.float() * torch.randn(output.shape, generator=random).to(output.device)).sum().backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        with torch.no_grad():
            for parameter, before in zip(self.parameters, kept, strict=True):
                parameter.copy_(before)
                parameter.grad = None
        return torch.cat([gradient.flatten() for gradient in found])


@dataclass
class Build:
    """Builds steps, as lcmlora takes them or with something changed."""

    case: Case
    device: torch.device
    dtype: torch.dtype
    cache: LatentCache
    compiled: bool

    def step(
        self,
        *,
        forwards: str = "direct",
        teacher: type[Teacher] | None = None,
        teacher_cache: TeacherCache | None = None,
        optimization: Callable[..., Any] = Optimization,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        dtype: torch.dtype | None = None,
        prepare: Callable[[nn.Module], object] = lambda unet: None,
        wait: bool = False,
    ) -> Step:
        settings = self.case.distill
        base = bases.load(
            self.case.model,
            self.case.base,
            self.case.folder,
            device=self.device,
            dtype=dtype or self.dtype,
            parts=("network",),
        )
        parameters = lora.inject(base.network, settings.rank, settings.alpha, settings.seed)
        if forwards != "peft":
            LoraForwards({"direct": None, "merged": True, "beside": False}[forwards]).install(base.network)
        execution.recompute(base.network, settings.checkpointing)
        prepare(base.network)
        if self.compiled:
            execution.compile_network(base.network)
        optimizing = optimization(parameters, settings)
        distillation = Distillation(base, self.cache.unconditional(), settings, teacher_cache)
        if teacher is not None:
            distillation.teacher = teacher(base, self.cache.unconditional(), settings.grid)
        batches = sample_stream(self.cache, torch.arange(len(self.cache)), settings, self.device)
        return Step(distillation, list(parameters.values()), optimizing, batches, around, wait)


class _TwoPasses(Teacher):
    """Guidance by two forwards, one after the other."""

    def outputs(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, samples: range | None = None
    ) -> tuple[Tensor, Tensor]:
        no_text = conditioning | {k: v.expand_as(conditioning[k]) for k, v in self._unconditional.items()}
        with lora.disabled(self._base.network):
            return self._base.predict(x, t, conditioning), self._base.predict(x, t, no_text)


class _Unfused:
    """torch's AdamW with its defaults, over the adapter's tensors one by one."""

    def __init__(self, parameters: dict[str, nn.Parameter], settings: Any) -> None:
        self._parameters, self._settings = list(parameters.values()), settings
        self._optimizer = torch.optim.AdamW(self._parameters, lr=settings.lr, weight_decay=settings.weight_decay)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, step: int) -> None:
        torch.nn.utils.clip_grad_norm_(self._parameters, self._settings.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _OneThread(Step):
    """On one thread."""

    def __call__(self, number: int) -> None:
        with _threads(1):
            super().__call__(number)


def _channels_last(unet: Any) -> None:
    unet.to(memory_format=torch.channels_last)
    unet.register_forward_pre_hook(
        lambda module, inputs: (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
    )


def _weights_not_shared(unet: nn.Module) -> None:
    """Computes W + scale B A in each forward, as if no two forwards could share it."""

    def expire(*_: object) -> None:
        for each in lora_forwards.derived(unet):
            each.expire()

    unet.register_forward_pre_hook(expire)


def _pointwise_convolutions() -> AbstractContextManager[object]:
    return mock.patch.object(lora_forwards, "_pointwise", nn.functional.conv2d)


def _own_attention(unet: Any) -> None:
    """diffusers' own `dtype` and attention, which inspect modules and signatures in each forward."""
    DirectAttention().undo(unet)
    unet.register_forward_pre_hook(lambda *_: unet.dtype and None)


def changed_steps(build: Build, folder: Path) -> dict[str, Callable[[], Step]]:
    """Returns the variants by name; each builds its step when it is called."""
    kind = build.device.type
    size = build.case.distill.batch * 10_000

    def with_teacher_cache() -> Step:
        channels, height, width = build.cache.latent_shape
        kept = TeacherCache(folder / "teacher", (channels, height, width), build.dtype, size, 10**12)
        return build.step(teacher_cache=kept)

    found: dict[str, Callable[[], Step]] = {
        "teacher cached by an earlier run": with_teacher_cache,
        "guidance in two passes": lambda: build.step(teacher=_TwoPasses),
        "PEFT's forward": lambda: build.step(forwards="peft"),
        "adapter beside its layer": lambda: build.step(forwards="beside"),
        "adapter merged into its layer's weight": lambda: build.step(forwards="merged"),
        "the adapter's sums made anew in each pass": lambda: build.step(prepare=_weights_not_shared),
        "convolutions of kernel 1 as convolutions": lambda: build.step(around=_pointwise_convolutions),
        "diffusers' own dtype and attention": lambda: build.step(prepare=_own_attention),
        "AdamW as it comes": lambda: build.step(optimization=_Unfused),
        "the host waits for each loss": lambda: build.step(wait=True),
        "channels_last": lambda: build.step(prepare=_channels_last),
        "activations recomputed, all": lambda: build.step(prepare=lambda unet: execution.recompute(unet, "full")),
        "norms and activation functions recomputed": lambda: build.step(
            prepare=lambda unet: execution.recompute(unet, "selective")
        ),
        "no activations recomputed": lambda: build.step(prepare=lambda unet: execution.recompute(unet, "none")),
        "bf16 by autocast": lambda: build.step(forwards="beside", around=lambda: torch.autocast(kind, torch.bfloat16)),
        "bf16 base": lambda: build.step(dtype=torch.bfloat16),
        "bf16 base, compiled": lambda: build.step(dtype=torch.bfloat16, prepare=execution.compile_network),
        "bf16 base, attention in bf16": lambda: build.step(dtype=torch.bfloat16, prepare=WideAttention().undo),
        "bf16 base, adapter beside its layer": lambda: build.step(dtype=torch.bfloat16, forwards="beside"),
        "fp32 base": lambda: build.step(dtype=torch.float32),
        "compiled": lambda: build.step(prepare=execution.compile_network),
    }
    if kind == "cpu":
        found["one thread"] = lambda: _OneThread(**vars(build.step()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="emoji")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--random", action="store_true", help="random weights instead of the base's own")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], help="that of params.yaml by default")
    parser.add_argument("--compile", action="store_true", help="compile the UNet of the unchanged step")
    parser.add_argument("--gradients", action="store_true", help="print how far each gradient is from fp32's, too")
    parser.add_argument("--only", nargs="*", help="names of variants, or their beginnings")
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lcmlora-variants-") as work:
        case = make_case(
            options.model,
            options.batch,
            Path(work),
            random=options.random,
            compiled=options.compile,
            device="auto",
            precision=options.precision,
        )
        device = bases.pick_device("auto")
        dtype = bases.pick_dtype(case.distill.precision, device)
        build = Build(case, device, dtype, LatentCache(case.data / "latents"), options.compile)
        plain = build.step()
        exact = (
            (plain if dtype == torch.float32 else build.step(dtype=torch.float32)).gradient()
            if options.gradients
            else None
        )
        if exact is not None:
            figures["(the unchanged step)"] = {"gradient": _distance(plain, exact)}
        for name, make in changed_steps(build, Path(work)).items():
            if options.only and not name.startswith(tuple(options.only)):
                continue
            try:
                changed = make()
                figures[name] = {"gradient": _distance(changed, exact)} if exact is not None else {}
                figures[name] |= _measure(plain, changed, options.repeats, options.steps, device)
            except (RuntimeError, torch.OutOfMemoryError) as error:
                figures[name] = {"failed": str(error).splitlines()[0]}
            print(name, figures[name], file=sys.stderr, flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(_table(figures))
    if options.json:
        case_facts = {
            "batch": case.distill.batch,
            "dtype": str(dtype),
            "device": device.type,
            "compiled": options.compile,
        }
        write_json(options.json, {"model": case.model} | case_facts | {"variants": figures})


def _distance(step: Step, exact: Tensor) -> float:
    """Returns how far the step's gradient is from this one, by its norm."""
    return ((step.gradient() - exact).norm() / exact.norm()).item()


def _measure(plain: Step, changed: Step, repeats: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Returns how long `changed` takes relative to `plain`."""
    ratios = []
    for repeat in range(repeats + 1):
        seconds = []
        for step in (plain, changed):
            began = time.perf_counter()
            for number in range(steps):
                step(number)  # the same samples in each turn, so that a cache has them from the first one on
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        if repeat:  # the first one warms up
            ratios.append(seconds[1] / seconds[0])
    return {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


def _table(figures: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, found in figures.items():
        took = (
            "{ratio:.2f} ({least:.2f} to {most:.2f})".format(**found) if "ratio" in found else found.get("failed", "")
        )
        rows.append([name, took, f"{found['gradient']:.1e}" if "gradient" in found else ""])
    return tables.markdown(["with", "time of a step", "gradient differs by"], rows)


if __name__ == "__main__":
    with reporting_errors():
        main()
