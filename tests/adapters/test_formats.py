import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lcmlora.adapters import formats, layer_names, lora
from lcmlora.adapters.formats import DIFFUSERS, KOHYA, Adapter, Layer
from lcmlora.bases import architecture
from lcmlora.errors import UserError
from tests.support import adapters
from tests.support.miniature import ARCHITECTURES, HUB_IDS, PUBLISHED

Miniatures = Callable[[str], Path]
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def _same(one: Adapter, other: Adapter) -> None:
    """Asserts that the adapters are equal to the last bit."""
    assert one.layers.keys() == other.layers.keys()
    for name, layer in one.layers.items():
        found = other.layers[name]
        assert torch.equal(layer.down, found.down) and torch.equal(layer.up, found.up) and layer.alpha == found.alpha


@pytest.fixture
def student(miniatures: Miniatures) -> Adapter:
    """An adapter of the sd15 miniature of rank 4 and alpha 8."""
    base = adapters.load(miniatures("sd15"))
    adapters.train(base, rank=4, alpha=8)
    return adapters.adapter_of(base)


@pytest.fixture
def base(miniatures: Miniatures) -> layer_names.Architecture:
    return architecture.of_folder(miniatures("sd15"))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("alpha", [8, 4, 3, 0.5])
def test_diffusers_to_kohya_to_diffusers_gives_the_same_tensors(
    miniatures: Miniatures, tmp_path: Path, name: str, alpha: float
):
    base = adapters.load(miniatures(name))
    adapters.train(base, rank=4, alpha=alpha)
    structure = architecture.of_folder(base.folder)
    first, second, third = (tmp_path / f"{number}.safetensors" for number in range(3))
    assert formats.write(adapters.adapter_of(base), first, DIFFUSERS) == 0
    there = formats.convert(first, second, KOHYA, structure)
    back = formats.convert(second, third, DIFFUSERS, structure)
    assert (there.error, back.error) == (0, 0)
    assert there.tensors == 3 * there.layers == 3 * lora.adapted_layers(base.network)
    one, other = load_file(first), load_file(third)
    assert one.keys() == other.keys()
    assert max((one[n] - other[n]).abs().max().item() for n in one) == 0
    kept = adapters.header(third)
    assert adapters.header(first).items() < kept.items()
    assert kept["modelspec.title"] == "1"  # the kohya file's


@pytest.mark.parametrize(
    "name", ["sd15", *(pytest.param(n, marks=pytest.mark.slow) for n in ARCHITECTURES if n != "sd15")]
)
def test_plain_diffusers_draws_the_same_with_either_file(miniatures: Miniatures, tmp_path: Path, name: str):
    base = adapters.load(miniatures(name))
    bare = adapters.forward(base)
    adapters.train(base, rank=4, alpha=8)
    student = adapters.forward(base)
    adapter = adapters.adapter_of(base)
    pipeline = adapters.pipeline(miniatures(name))
    for style in (DIFFUSERS, KOHYA):
        path = tmp_path / f"{style}.safetensors"
        assert formats.write(adapter, path, style, architecture.of_folder(base.folder), alpha=8) == 0
        pipeline.load_lora_weights(path)
        assert adapters.loaded_layers(pipeline.unet) == lora.adapted_layers(base.network)
        error = (adapters.forward(base, pipeline.unet) - student).abs().max()
        assert error < 1e-5 < 1e-2 < (student - bare).abs().max()
        pipeline.unload_lora_weights()


@pytest.mark.parametrize(
    ("name", "tensors", "numbers"),
    [("sd15", 834, 67_252_224), ("ssd1b", 1269, 104_902_656), ("sdxl", 2364, 196_751_360)],
)
def test_the_kohya_file_of_a_published_base_has_as_many_tensors_as_the_published_adapter(
    name: str, tensors: int, numbers: int
):
    base = layer_names.published()[HUB_IDS[name]]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**PUBLISHED[HUB_IDS[name]])
        lora.inject(unet, rank=64, alpha=8, seed=0)
    layers = {
        layer: Layer(module.lora_A[lora.ADAPTER].weight, module.lora_B[lora.ADAPTER].weight, 8.0)
        for layer, module in lora._layers(unet)
    }
    file, alpha = formats._kohya(Adapter(name, layers, torch.float16), base, None)
    assert (len(file), alpha) == (tensors, 8.0)
    assert sum(tensor.numel() for part, tensor in file.items() if not part.endswith(".alpha")) == numbers
    endings = {"lora_down.weight", "lora_up.weight", "alpha"}
    assert {part.partition(".")[2] for part in file} == endings and len(file) == 3 * len(layers)


def test_the_published_files_spelling_alpha_and_rank_are_read(miniatures: Miniatures, tmp_path: Path):
    """latent-consistency/lcm-lora-sdxl: diffusers' names with underscores though it is SDXL, rank 64, alpha 8."""
    base = adapters.load(miniatures("sdxl"))
    adapters.train(base, rank=64, alpha=8)
    student = adapters.adapter_of(base)
    tensors = {}
    for name, layer in student.layers.items():
        stem = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
        tensors[f"{stem}.alpha"] = torch.tensor(8.0)
    save_file({n: t.half() for n, t in tensors.items()}, tmp_path / "published.safetensors", metadata={"format": "pt"})
    made = formats.convert(
        tmp_path / "published.safetensors", tmp_path / "ours.safetensors", KOHYA, architecture.of_folder(base.folder)
    )
    assert (made.rank, made.alpha, made.error) == (64, (8.0,), 0)
    keys = load_file(tmp_path / "ours.safetensors").keys()
    assert not any("down_blocks" in key for key in keys)
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in keys


def test_a_half_precision_file_is_folded_within_its_rounding(miniatures: Miniatures, tmp_path: Path):
    base = adapters.load(miniatures("sd15"))
    adapters.train(base, rank=4, alpha=3)
    adapter = replace(adapters.adapter_of(base), dtype=torch.float16)
    assert 0 < formats.write(adapter, tmp_path / "half.safetensors", DIFFUSERS) < 2e-3
    assert {t.dtype for t in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize(
    ("alpha", "dtype", "kept"),
    [(8.0, "float32", 8.0), (0.5, "float16", 0.5), (3.0, "float32", 3.0), (3.0, "float16", 4.0)],
)
def test_a_kohya_file_has_the_trainings_alpha_if_no_bit_is_lost(
    student: Adapter, base: layer_names.Architecture, tmp_path: Path, alpha: float, dtype: str, kept: float
):
    trained = replace(student, layers={n: replace(layer, alpha=alpha) for n, layer in student.layers.items()})
    trained = replace(trained, dtype=getattr(torch, dtype))
    formats.write(trained, tmp_path / "diffusers.safetensors", DIFFUSERS)
    folded = formats.read(tmp_path / "diffusers.safetensors")
    path = tmp_path / "kohya.safetensors"
    assert formats.write(folded, path, KOHYA, base, alpha=alpha) == 0
    assert {t.item() for n, t in load_file(path).items() if n.endswith(".alpha")} == {kept}
    assert adapters.header(path)["ss_network_alpha"] == str(kept)
    read = formats.read(path, base)
    assert all(torch.equal(layer.folded.up.float(), folded.layers[n].up.float()) for n, layer in read.layers.items())


def test_kohya_to_kohya_keeps_an_alpha_that_could_not_be_folded(
    student: Adapter, base: layer_names.Architecture, tmp_path: Path
):
    odd = replace(student, layers={n: replace(layer, alpha=3.0) for n, layer in student.layers.items()})
    formats.write(odd, tmp_path / "a.safetensors", KOHYA, base)
    made = formats.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", KOHYA, base)
    assert (made.alpha, made.error) == ((3.0,), 0)
    _same(formats.read(tmp_path / "b.safetensors", base), odd)


def test_layers_of_different_ranks_have_one_rank_and_one_alpha_in_kohyas_file_and_the_same_effect(
    miniatures: Miniatures, tmp_path: Path
):
    base = adapters.load(miniatures("sdxl"))
    adapters.train(base, rank=4, alpha=8)
    student = adapters.adapter_of(base)
    smaller = {n: Layer(layer.down[:2], layer.up[:, :2], 1) for n, layer in student.layers.items() if "attn" in n}
    mixed = replace(student, layers=student.layers | smaller)
    outputs = []
    pipeline = adapters.pipeline(miniatures("sdxl"))
    for style in (DIFFUSERS, KOHYA):
        path = tmp_path / f"{style}.safetensors"
        assert formats.write(mixed, path, style, architecture.of_folder(base.folder)) == 0
        pipeline.load_lora_weights(path)
        outputs.append(adapters.forward(base, pipeline.unet))
        pipeline.unload_lora_weights()
    assert (outputs[0] - outputs[1]).abs().max() < 1e-5
    lora.attach(pipeline.unet, {n: (layer.down, layer.folded.up) for n, layer in mixed.layers.items()}, "mixed")
    assert (adapters.forward(base, pipeline.unet) - outputs[0]).abs().max() < 1e-5
    ranks = {t.shape[0] for n, t in load_file(tmp_path / "kohya.safetensors").items() if "lora_down" in n}
    assert ranks == {4}
    ranks = {t.shape[0] for n, t in load_file(tmp_path / "diffusers.safetensors").items() if "lora_A" in n}
    assert ranks == {2, 4}


def _peft(student: Adapter, prefix: str = "") -> dict[str, torch.Tensor]:
    tensors = {}
    for name, layer in student.layers.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = layer.down
        tensors[f"{prefix}{name}.lora_B.weight"] = layer.up
    return tensors


@pytest.mark.parametrize("prefix", ["", "unet.", "base_model.model.", "base_model.model.unet."])
def test_peft_names_are_read_under_any_prefix_and_without_alpha_their_scale_is_1(
    student: Adapter, tmp_path: Path, prefix: str
):
    save_file(_peft(student, prefix), tmp_path / "a.safetensors")
    read = formats.read(tmp_path / "a.safetensors")
    _same(read, replace(student, layers={n: replace(layer, alpha=4) for n, layer in student.layers.items()}))


def test_alpha_is_read_from_diffusers_header_and_from_pefts_configuration(student: Adapter, tmp_path: Path):
    patterns = {"r": 4, "lora_alpha": 8, "alpha_pattern": {f"^{QUERY}": 2, "attn2.to_k": 16}}
    expected = {n: 16 if n.endswith("attn2.to_k") else 2 if n == QUERY else 8 for n in student.layers}
    header = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in patterns.items()})}
    save_file(_peft(student, "unet."), tmp_path / "a.safetensors", metadata=header)
    read = formats.read(tmp_path / "a.safetensors")
    assert {n: layer.alpha for n, layer in read.layers.items()} == expected
    save_file(_peft(student, "base_model.model."), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(patterns | {"use_rslora": True}))
    read = formats.read(tmp_path / "adapter_model.safetensors")
    assert {n: layer.scale for n, layer in read.layers.items()} == {n: alpha / 2 for n, alpha in expected.items()}


def test_what_diffusers_and_its_converter_to_kohya_write_is_read(
    miniatures: Miniatures, base: layer_names.Architecture, tmp_path: Path
):
    live = adapters.load(miniatures("sd15"))
    adapters.train(live, rank=4, alpha=4)
    layers = get_peft_model_state_dict(live.network, adapter_name=lora.ADAPTER)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    _same(formats.read(tmp_path / lora.WEIGHTS), adapters.adapter_of(live))
    kohya = convert_state_dict_to_kohya({f"unet.{n}": t for n, t in layers.items()})
    save_file({n: t.contiguous() for n, t in kohya.items()}, tmp_path / "kohya.safetensors")
    _same(formats.read(tmp_path / "kohya.safetensors", base), adapters.adapter_of(live))


def test_diffusers_older_names_are_read(student: Adapter, tmp_path: Path):
    tensors = {}
    for name, layer in student.layers.items():
        stem, _, last = name.rpartition(".attn1.")
        old = f"{stem}.attn1.processor.{last.removesuffix('.0')}_lora" if stem else f"{name}.lora"
        tensors |= {f"unet.{old}.down.weight": layer.down, f"unet.{old}.up.weight": layer.up}
    save_file(tensors, tmp_path / "old.safetensors")
    assert any("attn1.processor.to_out_lora.down.weight" in name for name in tensors)
    read = formats.read(tmp_path / "old.safetensors")
    _same(read, replace(student, layers={n: replace(layer, alpha=4) for n, layer in student.layers.items()}))


def test_text_encoders_are_refused_unless_they_are_left_out_knowingly(
    student: Adapter, base: layer_names.Architecture, tmp_path: Path
):
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 16)}
    save_file(_peft(student, "unet.") | text, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"1 of 557 tensors are for a text encoder, the first is text_encoder\.text_mo"):
        formats.read(tmp_path / "a.safetensors")
    made = formats.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", DIFFUSERS, base, unet_only=True)
    assert (made.left_out, made.tensors) == (1, 556)
    save_file({"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0)}, tmp_path / "c.safetensors")
    with pytest.raises(UserError, match=r"holds no tensor of a UNet adapter"):
        formats.read(tmp_path / "c.safetensors", unet_only=True)


def test_pickles_and_other_kinds_of_adapters_are_refused_by_name(student: Adapter, tmp_path: Path):
    for ending in ("bin", "ckpt", "pt", "pth"):
        with pytest.raises(UserError, match=rf"a\.{ending}: is a pickle.*expected \.safetensors"):
            formats.read(tmp_path / f"a.{ending}")
    path = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=r"a\.safetensors: no such file"):
        formats.read(path)
    path.write_text("not weights")
    with pytest.raises(UserError, match=r"a\.safetensors: is not a readable safetensors file"):
        formats.read(path)
    for name in ("lora_unet_a_b.hada_w1_a", "lora_unet_a_b.dora_scale", "unet.conv_in.lora_B.bias", "unet.a.weight"):
        save_file(_peft(student) | {name: torch.zeros(1)}, path)
        with pytest.raises(UserError, match=rf"{name} is not a tensor of a plain LoRA"):
            formats.read(path)
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in _peft(student).items()}, path)
    with pytest.raises(UserError, match=r"has weights in torch\.float8_e4m3fn, expected float32"):
        formats.read(path)


@pytest.fixture
def written(student: Adapter, base: layer_names.Architecture, tmp_path: Path) -> Path:
    formats.write(student, tmp_path / "kohya.safetensors", KOHYA, base, alpha=8)
    return tmp_path / "kohya.safetensors"


def test_a_lost_and_an_extra_tensor_are_errors_by_name(student: Adapter, base: layer_names.Architecture, written: Path):
    tensors = load_file(written)
    stem = f"lora_unet_{QUERY.replace('.', '_')}"
    names = list(tensors)
    assert formats.verify(written, student, names, base) == 0

    save_file({n: t for n, t in tensors.items() if not n.startswith(f"{stem}.")}, written)
    with pytest.raises(UserError, match=rf"3 tensors were lost, the first is {stem}\.alpha"):
        formats.verify(written, student, names, base)
    with pytest.raises(UserError, match=rf"kohya.safetensors: {QUERY} was lost"):
        formats.compare(student, formats.read(written, base))

    save_file(tensors | {"lora_unet_conv_in.alpha": torch.tensor(1.0)}, written)
    with pytest.raises(UserError, match=r"1 tensors are superfluous, the first is lora_unet_conv_in\.alpha"):
        formats.verify(written, student, names, base)

    save_file({n: t for n, t in tensors.items() if n != f"{stem}.lora_up.weight"}, written)
    with pytest.raises(UserError, match=rf"{stem.removeprefix('lora_unet_')} has alpha and down, and up is missing"):
        formats.read(written, base)
    save_file(tensors | _peft(replace(student, layers={QUERY: student.layers[QUERY]})), written)
    with pytest.raises(UserError, match=rf"the layer {QUERY} is there twice, under several spellings"):
        formats.read(written, base)


def test_a_changed_weight_is_an_error_and_the_file_is_not_left_behind(
    student: Adapter, base: layer_names.Architecture, written: Path, monkeypatch: pytest.MonkeyPatch
):
    tensors = load_file(written)
    changed = tensors | {n: 1.01 * t for n, t in tensors.items() if n.endswith("conv_shortcut.lora_up.weight")}
    save_file(changed, written)
    with pytest.raises(UserError, match=r"conv_shortcut differs by 1\.\de-02 of its largest, expected at most 1e-06"):
        formats.verify(written, student, tensors, base)
    out = written.with_name("out.safetensors")
    save_plain = lora.save_file
    monkeypatch.setattr(lora, "save_file", lambda _, path, **options: save_plain(changed, path, **options))
    with pytest.raises(UserError, match=r"out\.safetensors: the effective weight of .* differs"):
        formats.write(student, out, KOHYA, base, alpha=8)
    assert [path.name for path in written.parent.iterdir()] == ["kohya.safetensors"]


def test_an_adapter_of_another_base_is_refused_by_its_first_layer(
    student: Adapter, miniatures: Miniatures, written: Path
):
    with pytest.raises(UserError, match=r"holds down_blocks_0_attentions_0_proj_in, which this base does not have"):
        formats.read(written, architecture.of_folder(miniatures("sdxl")))
    with pytest.raises(UserError, match=r"proj_in is \(4, 8, 1, 1\) .* takes \(4, 8\) .*made for another base"):
        formats.read(written, architecture.of_folder(miniatures("sd2")))
    with pytest.raises(UserError, match=r"its layers are those of none of stable-diffusion-v1-5/.*; name the base"):
        formats.read(written)
    with pytest.raises(UserError, match="which this base does not have: it was made for another base"):
        formats.write(
            replace(student, layers={"nowhere": student.layers[QUERY]}),
            written,
            KOHYA,
            architecture.of_folder(miniatures("sd15")),
        )


def test_a_published_base_is_recognised_by_its_layers(tmp_path: Path):
    for name in ARCHITECTURES:
        base = layer_names.published()[HUB_IDS[name]]
        attention = [n for n in base.shapes if n.endswith("attn2.to_k")]
        layers = {}
        for layer in attention:
            outputs, inputs = base.shapes[layer]
            layers[layer] = Layer(torch.ones(1, inputs), torch.ones(outputs, 1), 1)
        adapter = Adapter(name, layers, torch.float16)
        for style in (DIFFUSERS, KOHYA):
            formats.write(adapter, tmp_path / f"{style}.safetensors", style)
            assert formats.read(tmp_path / f"{style}.safetensors").layers.keys() == layers.keys()
        version = {"sd15": "sd_v1", "sd2": "sd_v2"}.get(name, "sdxl_base_v1-0")
        header = adapters.header(tmp_path / "kohya.safetensors")
        assert header["ss_base_model_version"] == version
        # SDXL has all layers of SSD-1B.
        assert header["modelspec.architecture"] == f"{base.naming.architecture}/lora"


@pytest.mark.parametrize(
    ("name", "model", "version", "implementation"),
    [
        ("sd15", "stable-diffusion-v1/lora", "sd_v1", "diffusers"),
        ("sd2", "stable-diffusion-v2-768-v/lora", "sd_v2_v", "diffusers"),
        (
            "sdxl",
            "stable-diffusion-xl-v1-base/lora",
            "sdxl_base_v1-0",
            "https://github.com/Stability-AI/generative-models",
        ),
        (
            "ssd1b",
            "segmind-stable-diffusion-1b/lora",
            "sdxl_base_v1-0",
            "https://github.com/Stability-AI/generative-models",
        ),
    ],
)
def test_kohyas_header_has_the_keys_that_programs_read(
    miniatures: Miniatures, tmp_path: Path, name: str, model: str, version: str, implementation: str
):
    live = adapters.load(miniatures(name))
    adapters.train(live, rank=4, alpha=8)
    path = tmp_path / "a.safetensors"
    described = {"modelspec.title": "mine", "modelspec.license": "mit"}
    formats.write(
        adapters.adapter_of(live), path, KOHYA, architecture.of_folder(live.folder), header=described, alpha=8
    )
    header = adapters.header(path)
    assert header.pop("modelspec.hash_sha256").startswith("0x")
    assert header == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": model,
        "modelspec.implementation": implementation,
        "modelspec.title": "mine",
        "modelspec.license": "mit",
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "v" if name == "sd2" else "epsilon",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "8.0",
        "ss_network_args": '{"conv_dim": "4", "conv_alpha": "8.0"}',
        "ss_base_model_version": version,
        "ss_v2": str(name == "sd2"),
        "ss_output_name": "mine",
    }


def test_a_conversion_keeps_what_the_sources_header_says_and_completes_it(tmp_path: Path):
    """Of SD 2 neither the layers nor the published architecture say what the network predicts."""
    base = layer_names.published()[HUB_IDS["sd2"]]
    layer = "mid_block.attentions.0.proj_in"
    outputs, inputs = base.shapes[layer]
    adapter = Adapter("sd2", {layer: Layer(torch.ones(1, inputs), torch.ones(outputs, 1), 1)}, torch.float32)
    said = {
        "modelspec.title": "A title",
        "modelspec.author": "its maker",
        "modelspec.date": "2026-11-29",
        "modelspec.prediction_type": "v",
        "modelspec.architecture": "something else",
    }
    first, second, third = (tmp_path / f"{name}.safetensors" for name in ("first", "second", "third"))
    formats.write(adapter, first, KOHYA, header=said)
    for source, out, spelling in ((first, second, DIFFUSERS), (second, third, KOHYA)):
        formats.convert(source, out, spelling)
        kept = adapters.header(out)
        assert {key: kept[key] for key in said} == said | {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}
        assert kept["modelspec.resolution"] == "768x768" and kept["modelspec.sai_model_spec"] == "1.0.1"
    assert kept["ss_base_model_version"] == "sd_v2_v"
    assert first.read_bytes() == third.read_bytes()


def test_the_hash_in_the_header_is_that_of_the_tensors(written: Path):
    data = written.read_bytes()
    content = data[8 + int.from_bytes(data[:8], "little") :]
    assert adapters.header(written)["modelspec.hash_sha256"] == f"0x{hashlib.sha256(content).hexdigest()}"


def test_the_same_adapter_gives_the_same_bytes(student: Adapter, base: layer_names.Architecture, tmp_path: Path):
    for style in (DIFFUSERS, KOHYA):
        files = set()
        for number in range(6):
            formats.write(student, tmp_path / str(number), style, base, header={"modelspec.title": "mine"}, alpha=8)
            files.add((tmp_path / str(number)).read_bytes())
        assert len(files) == 1
