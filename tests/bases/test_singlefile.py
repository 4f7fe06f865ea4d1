import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lcmlora import bases
from lcmlora.bases import fetching
from lcmlora.config import Base
from lcmlora.errors import UserError
from tests.support.miniature import ARCHITECTURES, RESOLUTION, save_base
from tests.support.original import save_original

ROOT = Path(__file__).parents[2]
Miniatures = Callable[[str], Path]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of the fetched bases."""
    return tmp_path / "bases"


def _settings(source: Path, config: Path | None, **changes: object) -> Base:
    settings = {"source": str(source), "config": config and str(config), "resolution": RESOLUTION, "license": "mit"}
    return Base.model_validate(settings | changes)


def _load(folder: Path) -> bases.LoadedBase:
    settings = Base(source=str(folder), resolution=RESOLUTION, license="mit")
    return bases.load("mine", settings, folder, device=torch.device("cpu"))


def _made(root: Path) -> list[Path]:
    """Returns all files that a fetch left, with locks."""
    return [*root.rglob("*")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_converted_file_computes_exactly_what_the_base_does(
    miniatures: Miniatures, tmp_path: Path, root: Path, architecture: str
):
    original = miniatures(architecture)
    file = save_original(original, tmp_path / "mine.safetensors")
    folder = fetching.fetch("mine", _settings(file, original), root)
    assert folder == root / "mine" and not list(root.rglob("*.bin"))
    ours, theirs = _load(folder), _load(original)
    captions, pictures = ["red apple", "tree"], torch.rand(2, 3, RESOLUTION, RESOLUTION) * 2 - 1
    embedded, expected = ours.encode_text(captions), theirs.encode_text(captions)
    assert embedded.keys() == expected.keys()
    assert all(torch.equal(embedded[name], expected[name]) for name in expected)
    expected |= theirs.micro_conditioning(rows=2)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    with torch.no_grad():
        assert torch.equal(ours.predict(x, t, expected), theirs.predict(x, t, expected))
    for one, other in zip(ours.encode_pictures(pictures), theirs.encode_pictures(pictures), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(ours.decode(x), theirs.decode(x))
    assert ours.scheduler_config == theirs.scheduler_config


def test_a_second_fetch_does_nothing_and_a_changed_file_is_converted_anew(
    miniatures: Miniatures, tmp_path: Path, root: Path
):
    settings = _settings(save_original(miniatures("sd15"), tmp_path / "mine.safetensors"), miniatures("sd15"))
    weights = fetching.fetch("mine", settings, root) / "unet" / "diffusion_pytorch_model.safetensors"
    first = weights.stat()
    fetching.fetch("mine", settings, root)
    assert (weights.stat().st_ino, weights.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)
    tensors = load_file(tmp_path / "mine.safetensors")
    bias = "model.diffusion_model.out.2.bias"
    save_file(tensors | {bias: tensors[bias] + 1}, tmp_path / "mine.safetensors")
    fetching.fetch("mine", settings, root)
    assert torch.equal(load_file(weights)["conv_out.bias"], tensors[bias] + 1)


def test_the_files_precision_is_kept_and_mixed_precision_becomes_fp32(
    miniatures: Miniatures, tmp_path: Path, root: Path
):
    tensors = load_file(save_original(miniatures("sd15"), tmp_path / "mine.safetensors"))
    for name, half in {"all": tensors, "mixed": [n for n in tensors if n.startswith("model.")]}.items():
        weights = {n: t.half() if n in half else t for n, t in tensors.items()}
        save_file(weights | {"alphas_cumprod": torch.ones(1000)}, tmp_path / f"{name}.safetensors")
        fetching.fetch(name, _settings(tmp_path / f"{name}.safetensors", miniatures("sd15")), root)

    def dtypes(name: str) -> set[torch.dtype]:
        return {t.dtype for path in (root / name).rglob("*.safetensors") for t in load_file(path).values()}

    assert dtypes("all") == {torch.float16}
    assert dtypes("mixed") == {torch.float32}


def test_an_interrupted_conversion_leaves_nothing_and_the_next_is_whole(
    miniatures: Miniatures, tmp_path: Path, root: Path
):
    settings = _settings(save_original(miniatures("sd15"), tmp_path / "mine.safetensors"), miniatures("sd15"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # a full disk in the middle of the UNet
    try:
        with pytest.raises((OSError, SafetensorError, UserError)):
            fetching.fetch("mine", settings, root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(root.iterdir()) == []
    (root / ".mine.part" / "unet").mkdir(parents=True)  # what a kill would have left
    assert _load(fetching.fetch("mine", settings, root)).latent_shape == (4, 8, 8)
    assert [path.name for path in root.iterdir() if not path.name.startswith(".")] == ["mine"]


def test_a_linked_base_gives_way_to_a_file_and_a_folder_does_not(miniatures: Miniatures, tmp_path: Path, root: Path):
    original = miniatures("sd15")
    settings = _settings(save_original(original, tmp_path / "mine.safetensors"), original)
    fetching.fetch("mine", _settings(original, None), root)
    assert (root / "mine").is_symlink()
    assert not fetching.fetch("mine", settings, root).is_symlink()
    assert (original / "unet" / "config.json").is_file()
    (root / "other").mkdir()
    with pytest.raises(UserError, match="other is in the way of the conversion"):
        fetching.fetch("other", settings, root)


Change = Callable[[dict[str, torch.Tensor]], object]


def _first(tensors: dict[str, torch.Tensor], prefix: str, value: float) -> None:
    tensors[min(name for name in tensors if name.startswith(prefix))].view(-1)[0] = value


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        # Diffusers takes random numbers for what a text encoder lacks.
        (
            "sd15",
            lambda t: t.pop("cond_stage_model.transformer.text_model.final_layer_norm.bias"),
            r"text_encoder lacks 1 tensors: final_layer_norm\.bias|it lacks weights",
        ),
        (
            "sd2",
            lambda t: t.pop("cond_stage_model.model.ln_final.bias"),
            "text_encoder lacks 1 tensors|it lacks weights",
        ),
        (
            "sdxl",
            lambda t: t.pop("conditioner.embedders.1.model.text_projection"),
            "text_encoder_2 lacks 1 tensors: text_projection|it lacks weights",
        ),
        (
            "sdxl",
            lambda t: t.pop("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"),
            "text_encoder_2 lacks 1 tensors: transformer.resblocks.1.attn.in_proj_bias|it lacks weights",
        ),
        (
            "sdxl",
            lambda t: t.pop("conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.weight"),
            "text_encoder lacks 1 tensors: encoder.layers.1.mlp.fc1.weight|it lacks weights",
        ),
        ("sd15", lambda t: t.pop("first_stage_model.quant_conv.bias"), "it lacks weights of this architecture"),
        ("sd15", lambda t: t.pop("model.diffusion_model.out.2.bias"), "it lacks weights|tensors in the file"),
        ("sd15", lambda t: _first(t, "first_stage_model.", float("nan")), r"first_stage_model\..* not finite"),
        ("sd15", lambda t: _first(t, "model.diffusion_model.", float("inf")), r"model\.diffusion_model\..* not finite"),
        (
            "sd15",
            lambda t: t.update({n: v.to(torch.float8_e5m2) for n, v in t.items() if n.startswith("model.")}),
            "is F8_E5M2: fp8 weights are not distilled",
        ),
        (
            "sd15",
            lambda t: t.update({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3)}),
            "its UNet has 9 input channels and takes a masked picture, for inpainting",
        ),
        (
            "sd15",
            lambda t: t.update({"conditioner.embedders.0.model.ln_final.bias": torch.zeros(1)}),
            "is SDXL's refiner, which has one text encoder",
        ),
    ],
)
def test_a_file_with_a_fault_is_refused_by_the_tensor(
    miniatures: Miniatures, tmp_path: Path, root: Path, architecture: str, change: Change, message: str
):
    tensors = load_file(save_original(miniatures(architecture), tmp_path / "mine.safetensors"))
    change(tensors)
    save_file(tensors, tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match=rf"mine\.safetensors.*({message})") as caught:
        fetching.fetch("mine", _settings(tmp_path / "mine.safetensors", miniatures(architecture)), root)
    assert "\n" not in str(caught.value) and not _made(root)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.diffusion_model.double_blocks.0.img_attn.qkv.weight", "is a checkpoint of Flux"),
        ("double_blocks.0.img_mod.lin.weight", "is a checkpoint of Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "is a checkpoint of Stable Diffusion 3"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight", "is a LoRA and no checkpoint"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "is a LoRA and no checkpoint"),
        ("control_model.input_blocks.0.0.weight", "is a ControlNet"),
        ("down_blocks.0.resnets.0.conv1.weight", "is the UNet of a diffusers folder alone"),
        ("encoder.conv_in.weight", "is a VAE alone"),
        ("text_model.final_layer_norm.weight", "is a text encoder alone"),
        ("blocks.0.cross_attn.k.weight", "is a checkpoint of a diffusion transformer"),
        ("something.else", r"has no UNet \(no tensor begins with model\.diffusion_model\.\)"),
    ],
)
def test_the_error_about_another_kind_of_file_says_what_it_is(tmp_path: Path, root: Path, name: str, message: str):
    save_file({name: torch.zeros(1)}, tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match=f"mine.safetensors: {message}"):
        fetching.fetch("mine", _settings(tmp_path / "mine.safetensors", None), root)


def test_a_corrected_configuration_converts_the_file_again(miniatures: Miniatures, tmp_path: Path, root: Path):
    config = shutil.copytree(miniatures("sd15"), tmp_path / "config")
    settings = _settings(save_original(config, tmp_path / "mine.safetensors"), config)
    tokenizer = config / "tokenizer" / "tokenizer.json"
    content = tokenizer.read_bytes()
    tokenizer.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        fetching.fetch("mine", settings, root)
    tokenizer.write_bytes(content)
    _load(fetching.fetch("mine", settings, root))


def test_pickles_and_missing_files_are_refused(tmp_path: Path, root: Path):
    for ending in ("ckpt", "pt", "bin"):
        with pytest.raises(UserError, match=rf"bases.mine.source: .*\.{ending} is a pickle.*expected .safetensors"):
            fetching.fetch("mine", _settings(tmp_path / f"mine.{ending}", None), root)
    with pytest.raises(UserError, match=r"mine.safetensors: no such file"):
        fetching.fetch("mine", _settings(tmp_path / "mine.safetensors", None), root)
    (tmp_path / "mine.safetensors").write_text("not weights")
    with pytest.raises(UserError, match=r"mine.safetensors: is not a readable safetensors file"):
        fetching.fetch("mine", _settings(tmp_path / "mine.safetensors", None), root)
    assert not _made(root)


def test_a_file_that_is_not_a_whole_checkpoint_is_refused_by_the_missing_part(
    miniatures: Miniatures, tmp_path: Path, root: Path
):
    tensors = load_file(save_original(miniatures("sd15"), tmp_path / "mine.safetensors"))
    settings = _settings(tmp_path / "mine.safetensors", miniatures("sd15"))
    parts = {"model.diffusion_model.": "UNet", "first_stage_model.": "VAE", "cond_stage_model.": "text encoder"}
    for prefix, part in parts.items():
        save_file({n: t for n, t in tensors.items() if not n.startswith(prefix)}, tmp_path / "mine.safetensors")
        with pytest.raises(UserError, match=f"mine.safetensors: has no {part} .no tensor begins with {prefix}"):
            fetching.fetch("mine", settings, root)


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("sdxl", "ssd1b", "the UNet has 720 tensors in the file and 624 by its configuration"),
        ("ssd1b", "sdxl", "it lacks weights of this architecture"),
        ("sd15", "sdxl", "it lacks weights of this architecture"),
        ("sd15", "sd2", r"Cannot load because .* but got torch.Size\(\[8, 8, 1, 1\]\)$"),
    ],
)
def test_a_configuration_of_another_architecture_is_refused(
    miniatures: Miniatures, tmp_path: Path, root: Path, architecture: str, config: str, message: str
):
    file = save_original(miniatures(architecture), tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match=f"bases.mine.config: .* does not fit .*: {message}"):
        fetching.fetch("mine", _settings(file, miniatures(config)), root)
    with pytest.raises(UserError, match="nowhere: no such base folder"):
        fetching.fetch("mine", _settings(file, tmp_path / "nowhere"), root)
    with pytest.raises(UserError, match=r"bases.mine.variant: a single file has one precision; remove the key"):
        fetching.fetch("mine", _settings(file, miniatures(architecture), variant="fp16"), root)
    assert not _made(root)


def test_a_file_marked_as_predicting_v_needs_such_a_scheduler(miniatures: Miniatures, tmp_path: Path, root: Path):
    file = save_original(miniatures("sdxl"), tmp_path / "mine.safetensors", marks=("v_pred", "ztsnr"))
    with pytest.raises(UserError, match=r"marked v_pred, and its scheduler's prediction_type is epsilon"):
        fetching.fetch("mine", _settings(file, miniatures("sdxl")), root)
    v = save_base(tmp_path / "v", "sdxl", prediction_type="v_prediction")
    with pytest.raises(UserError, match=r"marked ztsnr, and its scheduler's rescale_betas_zero_snr is False"):
        fetching.fetch("mine", _settings(file, v), root)
    zero = save_base(tmp_path / "zero", "sdxl", prediction_type="v_prediction", zero_snr=True)
    base = _load(fetching.fetch("mine", _settings(file, zero), root))
    assert (base.schedule.prediction_type, base.schedule.alpha[-1].item()) == ("v_prediction", 0)


@pytest.mark.slow
def test_without_the_hub_the_error_names_the_key_to_set(miniatures: Miniatures, tmp_path: Path):
    file = save_original(miniatures("sd15"), tmp_path / "mine.safetensors")
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["bases"]["mine"] = {"source": str(file), "resolution": RESOLUTION, "license": "mit"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    offline = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command = [sys.executable, "-m", "lcmlora", "fetch", "mine"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=offline)
    assert ended.returncode == 2
    line = next(line for line in ended.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: bases.mine.config: the hub cannot give the configuration")
    assert line.endswith("set the key to a local diffusers folder of the same architecture")
    assert not (tmp_path / "bases" / "mine").exists()
