import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner, Result

from lcmlora import bases
from lcmlora import config as settings
from lcmlora.adapters import formats
from lcmlora.adapters.metadata import Sampler
from lcmlora.bases import architecture, fetching, folders
from lcmlora.cli.adapters import drawing
from lcmlora.cli.main import app
from lcmlora.config import Base
from lcmlora.diffusion import sampling
from lcmlora.errors import UserError
from lcmlora.project import Project
from lcmlora.registry.promotion import promote_passed
from lcmlora.registry.registration import register_release
from lcmlora.releases import bundle, package
from tests.support import adapters, releases, served
from tests.support.miniature import RESOLUTION
from tests.support.registries import fresh

PROMPTS = ("red apple", "green tree", "tree")


@pytest.fixture(scope="module")
def made(miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of the sd15 miniature with its adapter, and the release of it."""
    root, folder = tmp_path_factory.mktemp("made"), miniatures("sd15")
    (root / "params.yaml").write_text(yaml.safe_dump(releases.settings(folder)))
    config = settings.load(root / "params.yaml")
    releases.write_stages(adapters.load(folder, "network", "vae", "text"), root)
    facts = root / "adapters/mini/config.json"
    identity = folders.identity(config.base("mini"), folder)
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"base": identity}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        fetching.fetch("mini", config.base("mini"), Path("bases"))
        package.package_release("mini", config, Project(), Path("bases/mini"))
    return root


@pytest.fixture
def root(
    made: Path,
    miniatures: Callable[[str], Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A copy of that project, with a registry of its own."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made, tmp_path, symlinks=True, dirs_exist_ok=True)
    registry = fresh(tmp_path, tmp_path_factory).model_dump()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(releases.settings(miniatures("sd15"), registry=registry)))
    return tmp_path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], catch_exceptions=False)


def draw(out: str, *arguments: Any) -> list[Path]:
    """Draws the prompt and returns the files that the command names."""
    result = run("--prompt", PROMPTS[0], "--out", out, *arguments)
    assert result.exit_code == 0
    return [Path(line) for line in result.stdout.splitlines()]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_a_folder_a_release_its_files_and_its_alias_draw_the_same_picture(root: Path):
    registry = settings.load(root / "params.yaml").registry
    promote_passed(register_release("mini", registry, root / "release/mini"), registry, reason="first")
    names = (
        "adapters/mini",
        "release/mini",
        "release/mini/lcm-lora-mini.safetensors",
        "models:/lcm-lora-mini@champion",
    )
    drawn = [draw(f"{number}.png", "--adapter", name) for number, name in enumerate(names)]
    assert [path.name for (path,) in drawn] == ["0.png", "1.png", "2.png", "3.png"]
    assert Image.open("0.png").size == (RESOLUTION, RESOLUTION)
    assert len({path.read_bytes() for (path,) in drawn}) == 1
    (bare,) = draw("bare.png", "--adapter", "release/mini", "--seed", 1)
    assert bare.read_bytes() != Path("0.png").read_bytes()


def test_without_steps_it_draws_in_as_many_as_the_release_recommends(root: Path):
    served.copy(root / "release/mini", root / "two", recommended_steps=2)
    (told,) = draw("told.png", "--adapter", "two", "--steps", 2)
    (default,) = draw("default.png", "--adapter", "two")
    assert default.read_bytes() == told.read_bytes()
    (of_adapter,) = draw("adapter.png", "--adapter", "adapters/mini")  # which does not say
    (four,) = draw("four.png", "--adapter", "adapters/mini", "--steps", 4)
    assert of_adapter.read_bytes() == four.read_bytes() != default.read_bytes()


@pytest.mark.parametrize("style_weight", [0.8, pytest.param(None, marks=pytest.mark.slow)])
def test_the_picture_is_the_one_that_plain_diffusers_draws(
    root: Path, miniatures: Callable[[str], Path], style_weight: float | None
):
    """In one step, which adds no noise of its own."""
    pipeline = adapters.pipeline(miniatures("sd15"))
    pipeline.load_lora_weights(root / "release/mini", adapter_name="lcm")
    options: list[Any] = []
    if style_weight:
        other = adapters.load(miniatures("sd15"))
        adapters.train(other, rank=2, alpha=1, seed=5)
        style = adapters.adapter_of(other, targets="attn")
        formats.write(style, root / "style.safetensors", formats.KOHYA, architecture.of_folder(miniatures("sd15")))
        pipeline.load_lora_weights(root / "style.safetensors", adapter_name="style")
        pipeline.set_adapters(["style", "lcm"], [style_weight, 1.0])
        options = ["--style", "style.safetensors", "--style-weight", style_weight]
    from diffusers import LCMScheduler

    pipeline.scheduler = LCMScheduler.from_pretrained(root / "release/mini")
    pipeline.set_progress_bar_config(disable=True)
    noise = sampling.initial_noise((4, 8, 8), 7, [0])
    size = {"height": RESOLUTION, "width": RESOLUTION}
    theirs = pipeline(PROMPTS[0], num_inference_steps=1, guidance_scale=1.0, latents=noise, **size).images[0]
    (path,) = draw("a.png", "--adapter", "release/mini", "--steps", 1, "--seed", 7, *options)
    assert np.abs(pixels(path) - np.asarray(theirs).astype(int)).max() <= 1
    (without,) = draw("b.png", "--adapter", "release/mini", "--steps", 1, "--seed", 7)
    assert (np.abs(pixels(path) - pixels(without)).max() > 1) == bool(style_weight)


def test_several_prompts_are_several_files_or_one_grid_and_do_not_depend_on_the_batch(root: Path):
    prompts = ["--prompt", PROMPTS[1], "--prompt", PROMPTS[2]]
    first = draw("a.png", "--adapter", "release/mini", *prompts, "--batch", 1)
    assert [path.name for path in first] == ["a.png", "a-1.png", "a-2.png"]
    second = draw("b.jpg", "--adapter", "release/mini", *prompts, "--batch", 2)
    assert [path.name for path in second] == ["b.jpg", "b-1.jpg", "b-2.jpg"]
    (sheet,) = draw("c.png", "--adapter", "release/mini", *prompts, "--batch", 3, "--grid")
    grid = pixels(sheet)
    assert grid.shape == (2 * RESOLUTION, 2 * RESOLUTION, 3)
    for number, path in enumerate(first):
        top, left = number // 2 * RESOLUTION, number % 2 * RESOLUTION
        cell = grid[top : top + RESOLUTION, left : left + RESOLUTION]
        assert np.abs(cell - pixels(path)).max() <= 1
    assert (grid[RESOLUTION:, RESOLUTION:] == 255).all()


def test_gamma_comes_from_the_release(root: Path):
    (before,) = draw("a.png", "--adapter", "adapters/mini")
    facts = Path("adapters/mini/config.json")
    sampler = {"scheduler": "TCDScheduler", "gamma": 0.3, "grid": 50}
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"sampler": sampler}))
    (after,) = draw("b.png", "--adapter", "adapters/mini")
    base = Base(source="bases/mini", resolution=RESOLUTION, license="mit")
    loaded = bases.load("mini", base, Path("bases/mini"), device=torch.device("cpu"))
    from lcmlora.adapters import lora

    lora.load(loaded.network, Path("adapters/mini") / lora.WEIGHTS)
    conditioning = sampling.text_conditioning(loaded, [PROMPTS[0]])
    noise = sampling.initial_noise(loaded.latent_shape, 0, [0])
    tcd = Sampler("TCDScheduler", 0.3)
    latents = sampling.sample_student(loaded, conditioning, noise, steps=4, indices=[0], sampler=tcd)
    expected = loaded.decode(latents)[0].mul(255).round().permute(1, 2, 0).numpy()
    assert np.abs(pixels(after) - expected).max() <= 1 < np.abs(pixels(before) - expected).max()


def test_an_adapter_of_another_base_is_refused_by_name_and_digest(root: Path, miniatures: Callable[[str], Path]):
    release_of = json.loads(Path("release/mini/provenance.json").read_text())["base"]
    other = Path("other")
    other.mkdir()
    for part in miniatures("sd15").iterdir():
        if part.name != "unet":
            (other / part.name).symlink_to(part)
    tuned = adapters.load(miniatures("sd15")).network
    tuned.conv_in.weight.data += 0.01
    tuned.save_pretrained(other / "unet")
    message = rf"release/mini: was made for .*\(digest {release_of['digest'][:12]}\.\.\.\), and this base is other"
    with pytest.raises(UserError, match=message):
        draw("a.png", "--adapter", "release/mini", "--base", "other")
    assert draw("a.png", "--adapter", "release/mini", "--base", "other", "--other-base")
    with pytest.raises(
        UserError, match=r"this base takes .*it was made for another base|which this base does not have"
    ):
        draw("a.png", "--adapter", "release/mini", "--base", miniatures("sd2"), "--other-base")


def test_a_style_of_another_base_is_refused_too(root: Path):
    style = Path("style")
    style.mkdir()
    facts = {"base": {"source": "bases/theirs", "revision": None, "digest": "c" * 64}}
    (style / "config.json").write_text(json.dumps(facts))
    (style / bundle.WEIGHTS).write_bytes(Path("release/mini", bundle.WEIGHTS).read_bytes())
    with pytest.raises(UserError, match=r"style: was made for bases/theirs \(digest c{12}\.\.\.\), and this base is"):
        draw("a.png", "--adapter", "release/mini", "--style", "style")
    assert draw("a.png", "--adapter", "release/mini", "--style", "style", "--other-base")


def test_a_file_without_facts_needs_a_base_and_is_drawn_with_as_lcm_loras_are(root: Path):
    (expected,) = draw("a.png", "--adapter", "release/mini")
    Path("loras").mkdir()
    Path("release/mini/lcm-lora-mini.safetensors").rename("loras/found.safetensors")
    with pytest.raises(
        UserError, match=r"found\.safetensors: does not say where its base is; name the base with --base"
    ):
        draw("b.png", "--adapter", "loras/found.safetensors")
    for base in ("mini", "bases/mini"):
        result = run(
            *("--adapter", "loras/found.safetensors", "--base", base, "--prompt", PROMPTS[0], "--out", "b.png")
        )
        assert "note: loras/found.safetensors has no sampler settings" in result.stderr
        assert Path("b.png").read_bytes() == expected.read_bytes()


def test_strong_guidance_is_warned_of_and_impossible_requests_are_refused_first(root: Path):
    common = ("--adapter", "release/mini", "--prompt", PROMPTS[0])
    assert "warning: guidance 3: " in run(*common, "--out", "a.png", "--guidance", 3).stderr
    assert "warning" not in run(*common, "--out", "b.png", "--guidance", 2).stderr
    (plain,) = draw("c.png", "--adapter", "release/mini")
    assert Path("b.png").read_bytes() != plain.read_bytes()
    for options, message in (
        (("--out", "a.txt"), r"--out: a\.txt: expected a file that ends in \.png, \.jpg or \.webp"),
        (("--out", "a.png", "--steps", 51), "--steps: expected 1 to 50, the timesteps of this adapter, got 51"),
        (("--out", "a.png", "--guidance", 0.5), "--guidance: expected 1 .none. or more, got 0.5"),
        (("--out", "a.png", "--base", "sd99"), "--base: sd99: no such folder and no such base"),
    ):
        with pytest.raises(UserError, match=message):
            run(*common, *options)
    Path("bases/mini").unlink()
    with pytest.raises(UserError, match="bases/mini: no such base folder; run `lcmlora fetch mini`"):
        run(*common, "--out", "a.png")


def test_a_picture_is_drawn_anew_whole_or_in_part(root: Path):
    common = ("--adapter", "release/mini", "--image", "owl.png", "--steps", 2)
    (owl,) = draw("owl.png", "--adapter", "release/mini", "--seed", 3)
    (faint,) = draw("faint.png", *common, "--strength", 0.1)
    (strong,) = draw("strong.png", *common)
    (again,) = draw("again.png", *common, "--strength", 0.8)
    assert again.read_bytes() == strong.read_bytes() != faint.read_bytes()
    Image.new("L", (RESOLUTION, RESOLUTION), 0).save("black.png")
    (kept,) = draw("kept.png", *common, "--mask", "black.png")
    (kept_too,) = draw("kept-too.png", *common, "--mask", "black.png", "--seed", 8, "--strength", 0.3)
    assert np.abs(pixels(kept) - pixels(kept_too)).max() <= 1 < np.abs(pixels(kept) - pixels(owl)).max()
    Image.new("L", (4, 4)).save("small.png")
    for options, message in (
        (("--strength", 0.5), "--strength: expected --image, the picture that it is for"),
        (("--mask", "black.png"), "--mask: expected --image, the picture that it is for"),
        ((*common[2:4], "--mask", "small.png"), "mask: expected 16 x 16 pixels, the size of the picture, got 4 x 4"),
        ((*common[2:4], "--strength", 0.01), "--strength: 0.01 is below all 50 timesteps of this adapter"),
        ((*common[2:4], "--strength", 0.1, "--steps", 8), "--steps: expected 1 to 5, .* at strength 0.1, got 8"),
        (("--image", "params.yaml"), "params.yaml: "),
    ):
        with pytest.raises(UserError, match=message):
            run("--adapter", "release/mini", "--prompt", PROMPTS[0], "--out", "b.png", *options)


def test_comfyui_writes_the_releases_workflow_with_other_steps_and_prompts(root: Path):
    def written(*arguments: Any) -> dict[str, Any]:
        command = ["comfyui", *map(str, arguments), "--out", "w.json"]
        assert CliRunner().invoke(app, command, catch_exceptions=False).stdout == "w.json\n"
        return json.loads(Path("w.json").read_text())

    released = json.loads(Path("release/mini/comfyui.json").read_text())
    assert written("release/mini", "--prompt", "owl") == released  # METRICS recommends 4 steps, the verb's default
    for name in ("release/mini", "adapters/mini"):
        inputs = {
            node["class_type"]: node["inputs"]
            for node in written(name, "--steps", 2, "--checkpoint", "c.safetensors", "--side", 64)["extra"][
                "prompt"
            ].values()
        }
        assert (inputs["KSampler"]["steps"], inputs["EmptyLatentImage"]["width"]) == (2, 64)
        assert inputs["CheckpointLoaderSimple"]["ckpt_name"] == "c.safetensors"
    for arguments, message in (
        (("release/mini", "--out", "w.txt"), r"--out: w\.txt: expected a file that ends in \.json"),
        (("release/mini", "--steps", "51", "--out", "w.json"), "steps: expected 1 to 50, the timesteps of this"),
        (("adapters/mini", "--out", "w.json"), "adapters/mini: does not say its resolution; name it with --side"),
    ):
        with pytest.raises(UserError, match=message):
            CliRunner().invoke(app, ["comfyui", *arguments], catch_exceptions=False)


def test_without_params_yaml_a_folder_is_base_enough(root: Path):
    (expected,) = draw("a.png", "--adapter", "release/mini")
    Path("params.yaml").unlink()
    (path,) = draw("b.png", "--adapter", "release/mini")
    assert path.read_bytes() == expected.read_bytes()


def test_pictures_make_a_grid_that_is_nearly_square():
    sizes = {n: drawing.tile([Image.new("RGB", (4, 2))] * n).size for n in (1, 2, 3, 5, 9)}
    assert sizes == {1: (4, 2), 2: (8, 2), 3: (8, 4), 5: (12, 4), 9: (12, 6)}


def test_convert_and_combine_say_what_became_of_a_file(root: Path):
    def invoke(*arguments: str) -> str:
        return CliRunner().invoke(app, arguments, catch_exceptions=False).stdout

    facts = json.loads(Path("adapters/mini/config.json").read_text())
    layers, alpha = facts["adapted_layers"], facts["distill"]["alpha"]
    said = invoke("convert", "release/mini", "k.safetensors", "--format", "kohya")
    assert said == (
        f"k.safetensors: {layers} layers in {3 * layers} tensors, rank 4, alpha of release/mini {alpha:g}; largest "
        "difference of an effective weight 0.0e+00\n"
    )
    said = invoke("convert", "k.safetensors", "d.safetensors", "--format", "diffusers", "--base", "mini")
    assert f"{layers} layers in {2 * layers} tensors" in said
    said = invoke(
        "convert", "k.safetensors", "h.safetensors", "--format", "kohya", "--base", "mini", "--precision", "fp16"
    )
    assert formats.read(Path("h.safetensors"), architecture.of_folder(Path("bases/mini"))).dtype == torch.float16
    said = invoke(
        "combine", "--style", "k.safetensors", "--lcm", "release/mini", "--weights", "0.8", "1.0", "--out", "c"
    )
    assert said == f"c: {layers} layers, rank 8, rounding of an effective weight 0.0e+00\n"
    said = invoke(
        "combine", "--style", "k.safetensors", "--lcm", "release/mini", "--rank", "2", "--out", "c.safetensors"
    )
    assert "lost by rank 2 (relative Frobenius norm of effective weights): " in said
    assert draw("a.png", "--adapter", "c")
    for arguments, message in (
        (("k.safetensors", "a.safetensors", "--format", "ckpt"), "--format: expected diffusers or kohya, got 'ckpt'"),
        (("k.safetensors", "a.ckpt", "--format", "kohya"), r"a\.ckpt: expected a file that ends in \.safetensors"),
        (("k.safetensors", "a.safetensors", "--format", "kohya", "--precision", "fp8"), "--precision: expected fp32"),
    ):
        with pytest.raises(UserError, match=message):
            invoke("convert", *arguments)
