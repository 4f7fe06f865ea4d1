import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lcmlora.bases.examination.examine import examine_base
from lcmlora.cli.adapters import base_references, drawing
from lcmlora.errors import UserError
from lcmlora.inference import pipelines
from lcmlora.inference.pipelines import Pipeline
from lcmlora.io import private
from lcmlora.io.files import sha256_folder
from lcmlora.project import Project
from lcmlora.registry.references import Places, open_adapter
from lcmlora.releases import bundle
from tests.support import served
from tests.support.miniature import ARCHITECTURES, RESOLUTION

PROMPTS = ("red apple", "green tree", "tree", "apple", "fruit")


@pytest.fixture(scope="session")
def made(miniatures: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of the sd15 miniature for TCDScheduler, which adds noise between its steps."""
    return served.make(miniatures("sd15"), tmp_path_factory.mktemp("served") / "made", gamma=0.4, grid=20)


@pytest.fixture(scope="session")
def draw(made: Path) -> Pipeline:
    return pipelines.load(made)


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(int)


def distance(one: Image.Image, other: Image.Image) -> int:
    """Returns the largest difference of two pictures, in levels of 255."""
    return int(np.abs(pixels(one) - pixels(other)).max())


def generated(folder: Path, **request: Any) -> list[Image.Image]:
    """Returns what `lcmlora generate` draws."""
    adapter = open_adapter(str(folder), Places(folder))
    base = base_references.find_base(None, adapter, None, Project())
    assert base is not None and adapter.sampler is not None
    return drawing.draw(drawing.load(base, adapter, device="cpu"), adapter.sampler, drawing.Request(**request))


@pytest.mark.parametrize(
    "name", ["sdxl", *(pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES if n != "sdxl")]
)
def test_it_draws_what_generate_draws_step_noise_and_guidance_included(
    name: str, miniatures: Callable[[str], Path], tmp_path: Path
):
    folder = served.make(miniatures(name), tmp_path / name, gamma=None if name in ("sd15", "sdxl") else 0.4)
    pipeline = pipelines.load(folder, warm=False)
    for steps, guidance in ((4, 1.0), (2, 1.5)):
        expected = generated(folder, prompts=PROMPTS[:2], steps=steps, guidance=guidance, seed=7)
        found = pipeline(PROMPTS[:2], steps=steps, guidance=guidance, seed=7)
        assert [picture.size for picture in found] == [(RESOLUTION, RESOLUTION)] * 2
        assert max(distance(a, b) for a, b in zip(found, expected, strict=True)) <= 1
        other_seed = pipeline(PROMPTS[:2], steps=steps, guidance=guidance, seed=8)
        assert min(distance(a, b) for a, b in zip(other_seed, expected, strict=True)) > 1
    assert distance(*found) > 1


def test_weights_scheduler_and_provenance_are_enough_and_warming_changes_nothing(made: Path, draw: Pipeline):
    assert {path.name for path in made.iterdir()} == set(served.NEEDED)
    cold = pipelines.load(made, warm=False)
    assert type(cold.pipeline.scheduler).__name__ == "TCDScheduler"
    assert (cold.sampler.gamma, cold.sampler.grid, cold.resolution) == (0.4, 20, RESOLUTION)
    assert cold.pipeline.unet.dtype == torch.float32
    assert cold("tree", seed=3)[0].tobytes() == draw("tree", seed=3)[0].tobytes()


@pytest.mark.slow
def test_of_a_whole_release_the_same_files_are_enough(miniatures: Callable[[str], Path], tmp_path: Path):
    whole = served.package(miniatures("sd15"), tmp_path)
    part = pipelines.load(served.copy(whole, tmp_path / "part"), warm=False)
    (expected,) = generated(whole, prompts=["tree"], seed=4)
    assert type(part.pipeline.scheduler).__name__ == "LCMScheduler"
    assert distance(part("tree", seed=4)[0], expected) <= 1


def test_a_seed_is_a_picture_and_none_is_another_one_each_time(draw: Pipeline):
    first, again = draw("tree", seed=5), draw("tree", seed=5)
    assert first[0].tobytes() == again[0].tobytes()
    assert draw("tree")[0].tobytes() == draw("tree", seed=0)[0].tobytes() != first[0].tobytes()
    assert draw("tree", seed=None)[0].tobytes() != draw("tree", seed=None)[0].tobytes()


def test_the_ith_picture_depends_on_its_prompt_and_number_alone(draw: Pipeline):
    all_five = draw(PROMPTS, seed=2)  # more than go through the network at once
    assert len(all_five) == 5
    assert distance(all_five[0], draw(PROMPTS[0], seed=2)[0]) <= 1
    for count in (2, 3):
        shorter = draw(["fruit"] * (count - 1) + [PROMPTS[count - 1]], seed=2)
        assert distance(shorter[-1], all_five[count - 1]) <= 1
    assert distance(draw([PROMPTS[0]] * 2, seed=2)[1], all_five[0]) > 1
    assert draw([]) == []


def test_threads_wait_for_each_other(draw: Pipeline):
    alone = [draw(prompt, steps=6)[0].tobytes() for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        together = list(threads.map(lambda prompt: draw(prompt, steps=6)[0].tobytes(), PROMPTS))
    assert together == alone


def test_sizes_are_asked_for_in_multiples_of_eight_pixels(draw: Pipeline):
    assert draw.size_unit == 8
    assert draw("tree", width=24, height=32)[0].size == (24, 32)
    assert draw("tree", width=8)[0].size == (8, RESOLUTION)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected 1 to 20, the timesteps of this adapter, got 0"),
        ({"steps": 21}, "steps: expected 1 to 20, the timesteps of this adapter, got 21"),
        ({"guidance": 0.5}, "guidance: expected 1 .none. or more, got 0.5"),
        ({"guidance": float("nan")}, "guidance: expected 1 .none. or more, got nan"),
        ({"width": 20}, "width: expected a positive multiple of 8 pixels, got 20"),
        ({"height": -8}, "height: expected a positive multiple of 8 pixels, got -8"),
        ({"height": 0}, "height: expected a positive multiple of 8 pixels, got 0"),
    ],
)
def test_impossible_requests_are_refused(draw: Pipeline, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"^{message}$"):
        draw("tree", **options)


def test_what_is_no_text_is_refused(draw: Pipeline):
    with pytest.raises(UserError, match=r"^prompt: expected text, got 3$"):
        draw(["tree", 3])  # type: ignore[list-item]


def test_fused_it_draws_the_same_without_extra_layers(made: Path, draw: Pipeline):
    fused = pipelines.load(made, fuse=True, warm=False)
    layers = [sum("lora" in name for name, _ in p.pipeline.unet.named_parameters()) for p in (draw, fused)]
    assert layers[0] > 100 and layers[1] == 0
    assert distance(fused("tree")[0], draw("tree")[0]) <= 1


def test_gamma_and_grid_are_those_of_the_release(made: Path, draw: Pipeline, tmp_path: Path):
    sampler = {"scheduler": "TCDScheduler", "gamma": 0.0, "grid": 20}
    calm = pipelines.load(served.copy(made, tmp_path / "calm", sampler=sampler), warm=False)
    assert distance(calm("tree", steps=1)[0], draw("tree", steps=1)[0]) == 0
    assert distance(calm("tree")[0], draw("tree")[0]) > 1


def test_without_steps_it_draws_in_as_many_as_the_release_recommends(made: Path, draw: Pipeline, tmp_path: Path):
    two = pipelines.load(served.copy(made, tmp_path / "two", recommended_steps=2), warm=False)
    assert distance(two("tree")[0], draw("tree", steps=2)[0]) == 0
    assert distance(draw("tree")[0], draw("tree", steps=4)[0]) == 0  # this release does not say


def test_another_base_is_refused_by_both_digests(made: Path, miniatures: Callable[[str], Path], tmp_path: Path):
    mine, theirs = (examine_base(name, miniatures(name)).digest[:12] for name in ("sd15", "sd2"))
    message = rf"made: was made for .*sd15 \(digest {mine}\.\.\.\), and the base in .*sd2 has digest {theirs}\.\.\.;"
    folder = served.copy(made, tmp_path / "made")
    with pytest.raises(UserError, match=message):
        pipelines.load(folder, miniatures("sd2"))
    with pytest.raises(UserError, match="nowhere: no such base folder"):
        pipelines.load(folder, tmp_path / "nowhere")


def test_a_base_with_another_vae_is_refused_unless_the_release_is_from_before_that_was_told(
    made: Path, miniatures: Callable[[str], Path], tmp_path: Path
):
    other = shutil.copytree(miniatures("sd15"), tmp_path / "other")
    tensors = load_file(other / "vae/diffusion_pytorch_model.safetensors")
    tensors["quant_conv.bias"] += 1
    save_file(tensors, other / "vae/diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"\(digest .*; their UNets are the same, and VAE, text encoders, "):
        pipelines.load(made, other)
    facts = json.loads((made / bundle.PROVENANCE).read_text())["base"]
    before = {key: value for key, value in facts.items() if key != "unet"} | {"digest": facts["unet"]}
    old = served.copy(made, tmp_path / "old", base=before)
    assert pipelines.load(old, other, warm=False).provenance.base["digest"] == sha256_folder(other / "unet")


@pytest.mark.parametrize("day", ["2026-11-23", "2026-11-25", "2026-11-28"])
def test_a_release_of_an_earlier_version_is_drawn_with(made: Path, draw: Pipeline, tmp_path: Path, day: str):
    """Its provenance.json is of that version, but for the adapter's and the base's digests; see test_provenance.py."""
    written = json.loads((Path(__file__).parents[1] / f"releases/files/provenance-{day}.json").read_text())
    facts = json.loads((made / bundle.PROVENANCE).read_text())
    digest = facts["base"]["unet" if day < "2026-11-28" else "digest"]  # what versions before called the base's digest
    written["base"] |= {"source": facts["base"]["source"], "digest": digest}
    if "unet" in written["base"]:
        written["base"]["unet"] = facts["base"]["unet"]
    folder = served.copy(made, tmp_path / day)
    (folder / bundle.PROVENANCE).write_text(json.dumps(written | {"sha256": facts["sha256"], "resolution": RESOLUTION}))
    old = pipelines.load(folder, warm=False)
    assert old.provenance.params.distill.objective == written["params"]["distill"]["objective"]
    assert old.sampler.grid == (written.get("sampler") or {"grid": 20})["grid"]
    assert old("tree")[0].size == (RESOLUTION, RESOLUTION)


def test_changed_weights_are_refused_before_anything_is_loaded(made: Path, tmp_path: Path):
    folder = served.copy(made, tmp_path / "flipped")
    weights = bytearray((folder / bundle.WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (folder / bundle.WEIGHTS).write_bytes(weights)
    with pytest.raises(UserError, match=rf"{bundle.WEIGHTS}: expected sha256 [0-9a-f]{{12}}\.\.\., got [0-9a-f]{{12}}"):
        pipelines.load(folder)
    (folder / bundle.PROVENANCE).unlink()
    with pytest.raises(UserError, match=r"provenance\.json: No such file"):
        pipelines.load(folder)


def test_a_local_base_that_is_not_here_is_named(made: Path, miniatures: Callable[[str], Path], tmp_path: Path):
    found = json.loads((made / bundle.PROVENANCE).read_text())["base"]
    for source in ("bases/mini", "checkpoints/mini.safetensors"):
        folder = served.copy(made, tmp_path / Path(source).stem / Path(source).suffix, base=found | {"source": source})
        with pytest.raises(UserError, match=rf"was made for the local base {source} \(digest .*, which is not here"):
            pipelines.load(folder)
    assert pipelines.load(folder, miniatures("sd15"), warm=False)("tree")[0].size == (RESOLUTION, RESOLUTION)


def test_a_base_of_the_hub_is_taken_from_the_cache_without_a_network(
    made: Path, draw: Pipeline, miniatures: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    identity = {"source": "some/base", "revision": "a" * 40, "digest": sha256_folder(miniatures("sd15") / "unet")}
    folder = served.copy(made, tmp_path / "hub", base=identity)
    monkeypatch.setenv(private.DOWNLOADS, str(tmp_path / "cache"))
    kept = tmp_path / "cache/bases" / f"some--base@{'a' * 40}"
    shutil.copytree(miniatures("sd15"), kept)
    (kept / ".revision").write_text(f"some/base@{'a' * 40} \n")  # as fetching.fetch leaves it
    assert pipelines.load(folder, warm=False)("tree")[0].tobytes() == draw("tree")[0].tobytes()


def test_a_device_that_is_none_is_refused(made: Path):
    with pytest.raises(UserError, match="device: expected auto, cpu or cuda, got 'cuda:1'"):
        pipelines.load(made, device="cuda:1")
