"""Verbs for adapters of any origin: convert, combine, generate, remeasure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lcmlora import extras
from lcmlora.cli.context import context_of
from lcmlora.cli.shell import completion
from lcmlora.errors import UserError
from lcmlora.io.files import locked
from lcmlora.io.terminal import note, say

if TYPE_CHECKING:
    from lcmlora.inference.source_picture import SourcePicture

_FORMS = (  # lcmlora/registry/references.py explains them
    "a folder, a .safetensors file, MODEL, MODEL@ALIAS, MODEL/VERSION, models:/..., a SHA-256, s3://... or a hub id"
)

Adapter = Annotated[
    str, typer.Option(help=f"The adapter: {_FORMS}.", show_default=False, autocompletion=completion.adapters)
]
UnetOnly = Annotated[bool, typer.Option("--unet-only", help="Leave out the text encoders' tensors.")]
AnyBase = Annotated[
    str | None,
    typer.Option("--base", help="A base in params.yaml or a diffusers folder; the adapter's own base by default."),
]
OtherBase = Annotated[
    bool,
    typer.Option(
        "--other-base", help="Accept an adapter of another base, such as one that this base is a fine-tune of."
    ),
]

Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="The number of sampling steps; by default the fewest that are within the release's gate, or 4 where the "
        "adapter does not say.",
        show_default=False,
    ),
]


def convert(
    call: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="IN", help=f"The adapter: {_FORMS}.", show_default=False, autocompletion=completion.adapters
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.", show_default=False)],
    style: Annotated[
        str, typer.Option("--format", help="The format to write: diffusers, or kohya for ComfyUI and A1111.")
    ],
    base: AnyBase = None,
    unet_only: UnetOnly = False,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; that of IN by default.")] = None,
) -> None:
    """Convert an adapter between the formats of diffusers and of kohya (ComfyUI, A1111).

    The written file is read again and compared with IN. Its header keeps IN's title, author, prediction type and the
    like. Adapters of SD-V1.5, SD 2, SDXL and SSD-1B are recognised by their layers; for other bases, name the base with
    --base.

    Example: lcmlora convert release/emoji emoji.safetensors --format kohya
    """
    context = context_of(call)
    from lcmlora.adapters import formats
    from lcmlora.adapters.tensorfile import PRECISIONS
    from lcmlora.cli.adapters import base_references
    from lcmlora.registry.references import open_adapter

    if style not in (formats.DIFFUSERS, formats.KOHYA):
        raise UserError(f"--format: expected diffusers or kohya, got {style!r}")
    if precision not in (None, *PRECISIONS):
        raise UserError(f"--precision: expected {', '.join(PRECISIONS)}, got {precision!r}")
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: expected a file that ends in .safetensors")
    config = context.settings_if_any()
    adapter = open_adapter(source, context.places(config))
    found = base_references.find_base(base, adapter, config, context.project)
    made = formats.convert(
        adapter.weights,
        out,
        style,
        found.architecture() if found else None,
        unet_only=unet_only,
        dtype=PRECISIONS[precision] if precision else None,
    )
    say(
        f"{out}: {made.layers} layers in {made.tensors} tensors, rank {made.rank}, alpha of {source} "
        f"{', '.join(f'{alpha:g}' for alpha in made.alpha)}; largest difference of an effective weight {made.error:.1e}"
    )
    if made.left_out:
        print(f"left out: {made.left_out} tensors of text encoders or trained tokens")


def combine(
    call: typer.Context,
    style: Annotated[str, typer.Option(help=f"The style LoRA: {_FORMS}.", show_default=False)],
    lcm: Annotated[
        str,
        typer.Option(
            help=f"The acceleration adapter: {_FORMS}.", show_default=False, autocompletion=completion.adapters
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder or .safetensors file to write.", show_default=False)],
    weights: Annotated[
        tuple[float, float], typer.Option(help="The weights of the style and of the acceleration adapter.")
    ] = (
        0.8,
        1.0,
    ),
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Reduce the sum to this rank, and print the loss. By default, the ranks add up."),
    ] = None,
    base: AnyBase = None,
    other_base: OtherBase = False,
    unet_only: UnetOnly = False,
) -> None:
    """Add a style LoRA and an acceleration adapter up into one adapter (equation 3 of arXiv 2311.05556).

    Example: lcmlora combine --style style.safetensors --lcm emoji --weights 0.8 1.0 --out adapters/styled
    """
    context = context_of(call)
    config = context.settings_if_any()
    from lcmlora.cli.adapters import base_references
    from lcmlora.cli.adapters.combining import write_combined
    from lcmlora.registry.references import open_adapter

    styles, acceleration = (open_adapter(name, context.places(config)) for name in (style, lcm))
    found = base_references.find_base(base, acceleration, config, context.project)
    made = write_combined(
        styles,
        acceleration,
        weights,
        out,
        found.architecture() if found else None,
        rank,
        other_base=other_base,
        unet_only=unet_only,
    )
    if made.left_out:
        print(f"left out: {made.left_out} tensors of text encoders or trained tokens")
    facts = made.facts
    say(f"{out}: {facts.layers} layers, rank {facts.rank}, rounding of an effective weight {made.error:.1e}")
    if lost := facts.truncation:
        say(
            f"lost by rank {rank} (relative Frobenius norm of effective weights): {lost.overall:.2e} overall, at "
            f"worst {lost.worst:.2e} in {lost.worst_layer}"
        )


def generate(
    call: typer.Context,
    adapter: Adapter,
    prompt: Annotated[list[str], typer.Option(help="The text to draw a picture of. Repeatable.", show_default=False)],
    out: Annotated[
        Path, typer.Option(help="The picture to write. Further ones get -1, -2 before the ending.", show_default=False)
    ],
    style: Annotated[str | None, typer.Option(help="A style LoRA, in the same forms as --adapter.")] = None,
    style_weight: Annotated[float, typer.Option(help="The weight of the style LoRA.")] = 0.8,
    steps: Steps = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture to draw anew for each prompt; its centre is cropped and scaled.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Of the noise that --image is given, more than 0 and at most 1; 0.8 by default. All --steps are drawn."
        ),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="A picture of the size of --image, white where it is drawn anew.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed draws the same pictures.")] = 0,
    guidance: Annotated[
        float, typer.Option(help="The guidance scale. 1 is no guidance; above 2, colours saturate.")
    ] = 1.0,
    base: AnyBase = None,
    other_base: OtherBase = False,
    unet_only: UnetOnly = False,
    batch: Annotated[int, typer.Option(min=1, help="The number of pictures that are drawn at once.")] = 4,
    grid: Annotated[bool, typer.Option("--grid", help="Write one contact sheet of all pictures.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Draw pictures of prompts with an adapter, by the sampler that it was distilled for.

    A registered or published adapter is downloaded once, and so is its base, if that is one of the hub. Another base
    must be in the project or be named with --base.

    Examples:

      lcmlora generate --adapter emoji@champion --prompt owl --prompt fox --out animals.png

      lcmlora generate --adapter emoji --prompt "red owl" --image owl.png --strength 0.6 --out red.png
    """
    context = context_of(call)
    config = context.settings_if_any()
    from lcmlora.adapters.metadata import LATENT_CONSISTENCY
    from lcmlora.cli.adapters import base_references, drawing
    from lcmlora.registry.references import open_adapter

    drawing.check_ending(out)
    source = _source(image, strength, mask)
    chosen = open_adapter(adapter, context.places(config))
    styles = open_adapter(style, context.places(config)) if style else None
    found = base_references.find_base(base, chosen, config, context.project, fetch=True)
    if found is None:
        raise UserError(f"{adapter}: does not say where its base is; name the base with --base")
    if chosen.sampler is None:
        note(f"note: {adapter} has no sampler settings; it is drawn with as an LCM-LoRA")
    request = drawing.Request(prompt, steps or chosen.usual_steps, seed, guidance, batch, source)
    sampler = chosen.sampler or LATENT_CONSISTENCY
    drawing.check(sampler, request)
    loaded = drawing.load(
        found, chosen, styles, style_weight, device=device, other_base=other_base, unet_only=unet_only
    )
    for path in drawing.save(drawing.draw(loaded, sampler, request), out, grid=grid):
        say(path)


def comfyui(
    call: typer.Context,
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF", help=f"The adapter: {_FORMS}.", show_default=False, autocompletion=completion.adapters
        ),
    ],
    out: Annotated[Path, typer.Option(help="The .json file to write.", show_default=False)],
    steps: Steps = None,
    prompt: Annotated[str, typer.Option(help="The text to draw a picture of.")] = "an owl",
    seed: Annotated[int, typer.Option(min=0, help="The seed.")] = 0,
    checkpoint: Annotated[
        str | None, typer.Option(help="The base's file in ComfyUI/models/checkpoints; guessed by default.")
    ] = None,
    side: Annotated[
        int | None, typer.Option(min=8, help="Of the square picture, in pixels; the adapter's resolution by default.")
    ] = None,
) -> None:
    """Write ComfyUI's workflow for an adapter: its sampler, its nodes, guidance 1, by number of steps.

    Drag the file into ComfyUI, choose your checkpoint, and put the adapter's file in ComfyUI/models/loras. For its API,
    the same graph is in `extra.prompt`.

    Example: lcmlora comfyui emoji@champion --out emoji.json
    """
    context = context_of(call)
    if out.suffix != ".json":
        raise UserError(f"--out: {out}: expected a file that ends in .json")
    from lcmlora.adapters.metadata import LATENT_CONSISTENCY
    from lcmlora.io.files import write_json
    from lcmlora.registry.references import open_adapter
    from lcmlora.releases import bundle
    from lcmlora.releases.clients import Student
    from lcmlora.releases.comfyui import checkpoint_name, file_content, workflow

    adapter = open_adapter(reference, context.places(context.settings_if_any()))
    folder = adapter.weights.parent
    if adapter.sampler is None:
        note(f"note: {reference} has no sampler settings; the workflow is that of an LCM-LoRA")
    student = Student.of_release(folder, adapter.sampler or LATENT_CONSISTENCY, steps or adapter.usual_steps)
    side = side or adapter.resolution
    if side is None:
        raise UserError(f"{reference}: does not say its resolution; name it with --side")
    made = workflow(
        student,
        weights=bundle.read_facts(folder).kohya or adapter.weights.name,
        checkpoint=checkpoint or checkpoint_name((adapter.base or {}).get("source")),
        prompt=prompt,
        side=side,
        seed=seed,
    )
    write_json(out, file_content(made))
    say(out)


def _source(image: Path | None, strength: float | None, mask: Path | None) -> SourcePicture | None:
    """Returns the picture that drawing starts from, None if there is none. Raises UserError if it is missing."""
    if image is None:
        for option, value in (("--strength", strength), ("--mask", mask)):
            if value is not None:
                raise UserError(f"{option}: expected --image, the picture that it is for")
        return None
    from lcmlora.inference.source_picture import STRENGTH, read_source

    return read_source(image, STRENGTH if strength is None else strength, mask)


def remeasure(
    call: typer.Context,
    model: Annotated[str, typer.Argument(help="A name under `bases` in params.yaml, e.g. emoji.", show_default=False)],
    adapter: Adapter,
    out: Annotated[Path, typer.Option(help="The JSON file to write.", show_default=False)],
) -> None:
    """Evaluate an older adapter against the model's present reference, at the gate's number of steps.

    When new data has changed the reference, the flow does this with the champion, so that the gate can compare the two.

    Example: lcmlora remeasure emoji --adapter models:/lcm-lora-emoji@champion --out scratch/champion.json
    """
    context = context_of(call)
    settings, project = context.settings(), context.project
    base, evaluation = settings.base(model), project.located_evaluation(settings.evaluation_for(model))
    extras.require(extra="train", needed_by="lcmlora remeasure")
    from lcmlora import bases
    from lcmlora.adapters.metadata import LATENT_CONSISTENCY
    from lcmlora.evaluation.figures import STUDENT, Key
    from lcmlora.evaluation.remeasure import measure_again
    from lcmlora.registry.references import open_adapter

    chosen = open_adapter(adapter, context.places(settings))
    device = bases.pick_device(evaluation.device)
    loaded = bases.load(model, base, project.base(model), device=device, dtype=bases.pick_dtype("auto", device))
    with locked(project.scratch("remeasure", model)) as scratch:
        figures = measure_again(
            loaded,
            base,
            chosen.shown,
            chosen.weights,
            chosen.base,
            chosen.sampler or LATENT_CONSISTENCY,
            evaluation,
            settings.gate.steps,
            project.pictures_of(model, settings),
            project.reference(model),
            scratch,
        )
    figures.write(out)
    student = Key.of(STUDENT, settings.gate.steps)
    say(f"{adapter}: {student} excess {figures.excess[student]:.1f}, retrieval {figures.retrieval[student]:.3f}")
