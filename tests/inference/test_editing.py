"""img2img, inpainting and ControlNet: as many network evaluations as steps, and the picture that diffusers draws."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from lcmlora.adapters.metadata import Sampler
from lcmlora.bases import diffusers_pipeline
from lcmlora.cli.adapters import base_references, drawing
from lcmlora.diffusion import noise, solver
from lcmlora.diffusion.editing import check_steps
from lcmlora.errors import UserError
from lcmlora.inference import pipelines
from lcmlora.inference.pipelines import Pipeline
from lcmlora.inference.source_picture import SourcePicture, read_source
from lcmlora.project import Project
from lcmlora.registry.references import Places, open_adapter
from lcmlora.releases.clients import diffusers_steps, notes
from tests.support import served
from tests.support.miniature import RESOLUTION

STRENGTHS = [tenth / 10 for tenth in range(1, 11)]
STEPS = (1, 2, 4, 8)


def picture(width: int = RESOLUTION, height: int = RESOLUTION) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def left_half(width: int = RESOLUTION, height: int = RESOLUTION) -> Image.Image:
    """A mask that is white, to be drawn anew, on its left."""
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (0, 0, width // 2, height))
    return mask


@contextmanager
def evaluations(network: Any) -> Iterator[list[int]]:
    """Yields a list that fills with the timestep of each network evaluation."""
    seen: list[int] = []

    def note(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        timestep = arguments[1] if len(arguments) > 1 else options["timestep"]
        seen.append(int(torch.as_tensor(timestep).flatten()[0]))

    hook = network.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


def difference(one: Image.Image, other: Image.Image) -> int:
    """Returns the largest difference of two pictures, in levels of 255."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


@pytest.fixture(scope="module")
def lcm(miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(miniatures("mini"), tmp_path_factory.mktemp("edited") / "lcm")


@pytest.fixture(scope="module")
def tcd(miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.make(miniatures("mini"), tmp_path_factory.mktemp("edited") / "tcd", gamma=0.3)


def save_controlnet(base: Path, folder: Path) -> Path:
    """Writes a ControlNet with random weights; those that join it to the network are zero when it is new."""
    network = diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    torch.manual_seed(0)
    made = diffusers.ControlNetModel.from_unet(network, conditioning_embedding_out_channels=(4, 8))
    for block in (*made.controlnet_down_blocks, made.controlnet_mid_block, made.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(block.weight, std=3.0)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def controlnet(miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_controlnet(miniatures("mini"), tmp_path_factory.mktemp("controlnet"))


@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_timesteps_of_a_strength_are_those_of_diffusers(strength: float):
    """LCMScheduler's own count by strength, which only diffusers' pipelines for latent consistency models use."""
    scheduler = diffusers.LCMScheduler()
    for steps in (n for n in STEPS if n <= round(50 * strength)):
        scheduler.set_timesteps(steps, strength=strength)
        assert solver.student_timesteps(1000, 50, steps, strength) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_every_number_of_steps_is_as_many_evaluations_at_every_strength(name: str, request: pytest.FixtureRequest):
    pipeline = pipelines.load(request.getfixturevalue(name), warm=False)
    for strength, steps in itertools.product(STRENGTHS, STEPS):
        known = round(50 * strength)
        mask = left_half() if steps == 4 else None
        options: dict[str, Any] = {"image": picture(), "strength": strength, "mask": mask, "steps": steps}
        if steps > known:
            message = rf"^steps: expected 1 to {known}, .* at strength {strength:g}, got {steps}$"
            with pytest.raises(UserError, match=message):
                pipeline("tree", **options)
            continue
        with evaluations(pipeline.pipeline.unet) as seen:
            pipeline("tree", **options)
        assert len(seen) == steps
        assert seen == sorted(seen, reverse=True)
        assert seen[0] == 1000 * known // 50 - 1 < 1000 * strength


@pytest.mark.parametrize("grid", [10, 50])
@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (0.0, "strength: expected more than 0 and at most 1, got 0"),
        (1.1, "strength: expected more than 0 and at most 1, got 1.1"),
        (float("nan"), "strength: expected more than 0 and at most 1, got nan"),
        (0.01, "strength: 0.01 is below all {grid} timesteps of this adapter, which leaves nothing to draw; .*"),
    ],
)
def test_a_strength_that_leaves_nothing_to_draw_is_refused(grid: int, strength: float, message: str):
    with pytest.raises(UserError, match=f"^--{message.format(grid=grid)}$"):
        check_steps(Sampler(grid=grid), 1, strength, option="--")
    check_steps(Sampler(grid=grid), 1, 1 / grid)


@pytest.mark.parametrize(("name", "gamma"), [("sdxl", None), ("sd2", 0.4)])
def test_generate_and_the_pipeline_draw_the_same_from_a_picture(
    name: str, gamma: float | None, miniatures: Callable[[str], Path], tmp_path: Path
):
    folder = served.make(miniatures(name), tmp_path / name, gamma=gamma)
    pipeline = pipelines.load(folder, warm=False)
    adapter = open_adapter(str(folder), Places(folder))
    base = base_references.find_base(None, adapter, None, Project())
    assert base is not None and adapter.sampler is not None
    loaded = drawing.load(base, adapter, device="cpu")
    wide = picture(3 * RESOLUTION, 2 * RESOLUTION)
    for strength, mask in ((0.5, None), (0.5, left_half(*wide.size)), (1.0, left_half(*wide.size))):
        source = SourcePicture(wide, strength, mask)
        request = drawing.Request(["red apple", "tree"], 3, seed=7, source=source)
        expected = drawing.draw(loaded, adapter.sampler, request)
        found = pipeline(["red apple", "tree"], steps=3, seed=7, image=wide, strength=strength, mask=mask)
        assert max(difference(a, b) for a, b in zip(found, expected, strict=True)) <= 1
        assert difference(*found) > 1


@pytest.mark.parametrize("masked", [False, True])
def test_it_draws_what_the_pipelines_of_diffusers_draw_given_the_same_timesteps(
    tcd: Path, masked: bool, tmp_path: Path
):
    """Without noise between the steps, whose keys are our own."""
    calm = served.copy(tcd, tmp_path / "calm", sampler={"scheduler": "TCDScheduler", "gamma": 0.0, "grid": 50})
    pipeline = pipelines.load(calm, warm=False)
    source = SourcePicture(picture(), 0.6, left_half())
    latents = diffusers_pipeline.family_of(pipeline.pipeline).encode_pictures(
        pipeline.pipeline.vae, source.pixels(RESOLUTION, RESOLUTION)
    )[0]
    auto = diffusers.AutoPipelineForInpainting if masked else diffusers.AutoPipelineForImage2Image
    theirs = auto.from_pipe(pipeline.pipeline)
    theirs.set_progress_bar_config(disable=True)
    timesteps = solver.student_timesteps(1000, 50, 3, 0.6)
    options: dict[str, Any] = {"timesteps": timesteps, "strength": 1.0}
    if masked:  # at strength 1 it would start from noise alone, so it gets one more timestep, which it drops
        options = {"timesteps": [999, *timesteps], "strength": 0.9, "mask_image": left_half()}
        options |= {"masked_image_latents": latents, "width": RESOLUTION, "height": RESOLUTION}
    expected = theirs(
        "tree", image=latents, eta=0.0, guidance_scale=1.0, generator=[noise.generator(5, 0, 0)], **options
    ).images[0]
    mask = left_half() if masked else None
    (found,) = pipeline("tree", steps=3, seed=5, image=picture(), strength=0.6, mask=mask)
    assert difference(found, expected) <= 1
    (other,) = pipeline("tree", steps=3, seed=6, image=picture(), strength=0.6, mask=mask)
    assert difference(found, other) > 1


def test_less_strength_stays_nearer_to_the_picture_and_a_black_mask_keeps_it(lcm: Path):
    pipeline = pipelines.load(lcm, warm=False)
    kept = Image.new("L", (RESOLUTION, RESOLUTION), 0)
    (through_vae,) = pipeline("tree", steps=2, image=picture(), strength=0.7, mask=kept)
    errors = []
    for strength in (0.1, 0.5, 1.0):
        (drawn,) = pipeline("tree", steps=2, image=picture(), strength=strength)
        apart = np.asarray(drawn).astype(float) - np.asarray(through_vae)
        errors.append(float((apart**2).mean()))
    assert errors == sorted(set(errors))
    (again,) = pipeline("fruit", steps=4, seed=9, image=picture(), strength=1.0, mask=kept)
    assert difference(through_vae, again) <= 1


def test_a_controlnet_takes_as_many_steps_with_and_without_a_picture_to_start_from(lcm: Path, controlnet: Path):
    plain, pipeline = (pipelines.load(lcm, controlnet=folder, warm=False) for folder in (None, controlnet))
    edges, blank = picture(40, 30), Image.new("RGB", (8, 8))
    kinds: list[dict[str, Any]] = [{}, {"image": picture(), "strength": 0.4}, {"image": picture(), "mask": left_half()}]
    for options in kinds:
        for steps in (1, 4):
            with evaluations(pipeline.pipeline.unet) as seen:
                (drawn,) = pipeline("tree", steps=steps, control=edges, **options)
            assert len(seen) == steps
        assert difference(drawn, pipeline("tree", steps=4, control=blank, **options)[0]) > 1
        (off,) = pipeline("tree", steps=4, control=edges, control_scale=0.0, **options)
        assert difference(off, plain("tree", steps=4, **options)[0]) <= 1


def test_a_controlnet_of_sdxl_is_drawn_with(miniatures: Callable[[str], Path], tmp_path: Path):
    folder = served.make(miniatures("sdxl"), tmp_path / "sdxl")
    controlnet = save_controlnet(miniatures("sdxl"), tmp_path / "controlnet")
    pipeline = pipelines.load(folder, controlnet=controlnet, warm=False)
    with evaluations(pipeline.pipeline.unet) as seen:
        drawn = [
            pipeline("tree", steps=2, image=picture(), strength=0.5, control=control)[0]
            for control in (picture(40, 30), Image.new("RGB", (8, 8)))
        ]
    assert seen == [499, 259, 499, 259]
    assert difference(*drawn) > 1


def test_diffusers_own_pipeline_drops_steps_as_the_notes_say(lcm: Path):
    theirs = diffusers.AutoPipelineForImage2Image.from_pipe(pipelines.load(lcm, warm=False).pipeline)
    theirs.set_progress_bar_config(disable=True)
    (note, _) = notes(4)
    assert any("4 steps at strength 0.2 are none" in text and "8 for 4 at 0.5" in text for text in note.texts)
    options: dict[str, Any] = {"image": picture(), "guidance_scale": 1.0}
    with evaluations(theirs.unet) as seen, pytest.raises(RuntimeError):
        theirs("tree", num_inference_steps=4, strength=0.2, **options)
    assert seen == []
    for strength in (0.3, 0.5):
        with evaluations(theirs.unet) as seen:
            theirs("tree", num_inference_steps=diffusers_steps(4, strength), strength=strength, **options)
        assert len(seen) == 4


def refused(pipeline: Pipeline, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        pipeline("tree", **options)


def test_pictures_that_do_not_go_together_are_refused(
    lcm: Path, controlnet: Path, miniatures: Callable[[str], Path], tmp_path: Path
):
    pipeline = pipelines.load(lcm, warm=False)
    refused(pipeline, "strength: expected `image`, the picture that it is for", strength=0.5)
    refused(pipeline, "mask: expected `image`, the picture that it is for", mask=left_half())
    size = "mask: expected 16 x 16 pixels, the size of the picture, got 8 x 4"
    refused(pipeline, size, image=picture(), mask=left_half(8, 4))
    refused(pipeline, "control: expected a pipeline that was loaded with a ControlNet", control=picture())
    refused(pipelines.load(lcm, controlnet=controlnet, warm=False), "control: expected a picture for the ControlNet")
    with pytest.raises(UserError, match=r"unet: .*cannot load it as a ControlNet|unet: block_out_channels"):
        pipelines.load(lcm, controlnet=miniatures("sdxl") / "unet", warm=False)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.png: "):
        read_source(tmp_path / "text.png", 0.5)
