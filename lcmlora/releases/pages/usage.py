"""How to draw with a release, program by program: one text for the model card, the report page and docs/clients.md.

What to set in each program comes from lcmlora/releases/clients.py. The card and the page on programs write the parts in
Markdown, by `markdown`; the report page writes them in HTML, by its template.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lcmlora.config import Base, Merged
from lcmlora.evaluation.figures import Metrics
from lcmlora.releases.bundle import SamplerCheck
from lcmlora.releases.clients import (
    Instructions,
    Note,
    Student,
    drawing_arguments,
    instructions,
    is_on_hub,
    loading_arguments,
    notes,
)

_FOLDER = "path/to/this/folder"


class Code(NamedTuple):
    """Lines to copy."""

    language: str
    text: str


class Points(NamedTuple):
    """A list, numbered where the order counts."""

    texts: tuple[str, ...]
    numbered: bool = False


class Rows(NamedTuple):
    """A table whose cells are text."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


_WEIGHTS = (0.8, 1.0)  # of a style and of the adapter, where no style was measured: the paper's

Block = str | Code | Points | Rows  # a text is a paragraph; in texts, `code` is marked as in Markdown


@dataclass(frozen=True)
class Part:
    """One way to draw with an adapter."""

    title: str
    blocks: tuple[Block, ...] = ()
    parts: tuple[Part, ...] = ()


def usage(
    model: str,
    base: Base,
    student: Student,
    file: str,
    *,
    weights: tuple[float, float] = _WEIGHTS,
    check: SamplerCheck | None = None,
) -> list[Part]:
    """Returns how to draw with a release: by diffusers first, then by MLflow, lcmlora and other programs.

    Args:
        student: in the recommended number of steps.
        file: the name of the release's weights for other programs.
        weights: of a style's LoRA and of the adapter, where both are used.
        check: how near plain diffusers comes to the adapter's own sampler, if that was measured.
    """
    load, call = loading_arguments(model, base), drawing_arguments(student, check.side if check else None)
    return [
        _by_diffusers(base, student, load, call, weights, check),
        *([] if base.style else [_by_mlflow(model, base, student, call)]),
        Part(
            "lcmlora",
            (
                Code(
                    "sh",
                    f'lcmlora generate --adapter {_FOLDER} --prompt "a caption" --steps {student.steps} --seed 0 '
                    "--out picture.png",
                ),
            ),
        ),
        _by_programs(base, student, file),
        Part("Steps and strength", parts=tuple(_of_note(note) for note in notes(student.steps))),
    ]


def style_weights(figures: Metrics) -> tuple[float, float]:
    """Returns the weights of style and adapter that styles were measured with."""
    for variation in figures.variations.values():
        style, adapter = variation.weights
        if style is not None and adapter is not None:
            return style, adapter
    return _WEIGHTS


def _by_diffusers(
    base: Base,
    student: Student,
    load: str,
    call: str,
    weights: tuple[float, float],
    check: SamplerCheck | None,
) -> Part:
    tested = [] if check is None else [_tested(student, check)]
    if base.style:
        text = "It goes with the style's LoRA, with which it was distilled:"
        code = _code(student, load, call, base.style, adapter=1.0)
        return Part("diffusers", (text, code), tuple(tested))
    style, adapter = weights
    both = _code(student, load, call, Merged(source="path/to/a/style", weight=style), adapter)
    with_style = Part("With a style's LoRA", ("Load a style's LoRA of the same base beside it:", both))
    return Part("diffusers", (_code(student, load, call),), (with_style, *tested))


def _code(student: Student, load: str, call: str, style: Merged | None = None, adapter: float | None = None) -> Code:
    scheduler = student.sampler.scheduler
    lines = [
        f"from diffusers import DiffusionPipeline, {scheduler}",
        f"pipe = DiffusionPipeline.from_pretrained({load})",
    ]
    if style is None:
        lines += [f'pipe.load_lora_weights("{_FOLDER}")']
    else:
        lines += [
            f'pipe.load_lora_weights("{_FOLDER}", adapter_name="lcm")',
            f'pipe.load_lora_weights("{style.source}", adapter_name="style")',
            f'pipe.set_adapters(["lcm", "style"], [{adapter}, {style.weight:g}])',
        ]
    lines += [
        f'pipe.scheduler = {scheduler}.from_pretrained("{_FOLDER}")',
        f'pipe("a caption", {call}).images[0].save("picture.png")',
    ]
    return Code("python", "\n".join(lines))


def _tested(student: Student, check: SamplerCheck) -> Part:
    eta = f", `eta={student.sampler.gamma:g}`" if student.sampler.gamma else ""
    said = (
        "The first lines above were run for this release at every number of steps below. They differ from the "
        f"adapter's own sampler by at most {max(check.error.values()):.0e} of the largest value, which is rounding. "
        f"They take `guidance_scale=1.0`{eta}, and evaluate the network at these timesteps:"
    )
    rows = tuple((str(steps), ", ".join(map(str, timesteps))) for steps, timesteps in check.timesteps.items())
    return Part("Timesteps", (said, Rows(("steps", "timesteps"), rows)))


def _by_mlflow(model: str, base: Base, student: Student, call: str) -> Part:
    scheduler, file = student.sampler.scheduler, base.source.endswith(".safetensors")
    arguments = [f'base_model="{f"bases/{model}" if file else base.source}"'] if file or not is_on_hub(base) else []
    arguments += [f'variant="{base.variant}"'] if base.variant and not file else []
    lines = (
        "import mlflow",
        f"from diffusers import {scheduler}",
        f'adapter = mlflow.diffusers.load_model("models:/lcm-lora-{model}@champion")',
        f"pipe = adapter.load_pipeline({', '.join(arguments)})",
        f"pipe.scheduler = {scheduler}.from_pretrained(adapter.adapter_path)",
        f'pipe("a caption", {call}).images[0].save("picture.png")',
    )
    said = (
        "If this release is registered in MLflow, its own loader of adapters gives you the base with the adapter; the "
        "scheduler is one more line:"
    )
    return Part("MLflow", (said, Code("python", "\n".join(lines))))


def _by_programs(base: Base, student: Student, file: str) -> Part:
    published = (
        ()
        if is_on_hub(base)
        else (
            "The other programs load checkpoints of the published Stable Diffusion 1, 2 and XL structures; if your "
            "base has another one, use diffusers.",
        )
    )
    tried = (
        '"Tried" means that the program\'s own code took adapters of this kind; for this release, only diffusers was '
        f"run: it loads `{file}` with the effect of the trained adapter (`kohya` in provenance.json)."
    )
    return Part(
        "Other programs",
        (
            f"`{file}` and `pytorch_lora_weights.safetensors` have the same bytes: every program reads all layers of "
            "either. `comfyui.json` is ComfyUI's workflow for this adapter, and `sample.png` has it inside: drag one "
            "of them into ComfyUI and choose your checkpoint. For ComfyUI's API, the same graph is in `extra.prompt`.",
            *published,
        ),
        (*(in_program(each, file) for each in instructions(student, file)), Part("What was tried", (tried,))),
    )


def in_program(found: Instructions, file: str) -> Part:
    """Returns how to draw in one program."""
    place = f"`{file}` goes to `{found.folder}`." if found.folder else f"Import `{file}`."
    near = f"Near, not exact: {found.deviation}." if found.deviation else "The steps are exactly the adapter's own."
    return Part(found.client, (f"{place} Tried with {found.tried}.", Points(found.settings, numbered=True), near))


def _of_note(note: Note) -> Part:
    return Part(note.title, (Points(note.texts),))


def markdown(part: Part, level: int) -> str:
    """Returns a part in Markdown, its heading and those of its parts from this level on; blocks are a line apart."""
    pieces = [f"{'#' * level} {part.title}", *map(_markdown_block, part.blocks)]
    return "\n\n".join(pieces + [markdown(each, level + 1) for each in part.parts])


def _markdown_block(block: Block) -> str:
    match block:
        case Code(language, text):
            return f"```{language}\n{text}\n```"
        case Points(texts, numbered):
            return "\n".join(f"{f'{i}.' if numbered else '*'} {text}" for i, text in enumerate(texts, start=1))
        case Rows(head, rows):
            return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *rows))
        case _:
            return block
