"""Adapters of many programs, and damaged ones: read, or refused in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcmlora.adapters import formats, layer_names, lora, peft_settings, spellings, tensorfile
from lcmlora.adapters.formats import DIFFUSERS, KOHYA
from lcmlora.adapters.layer_names import Architecture
from lcmlora.bases import architecture
from lcmlora.cli.adapters.combining import write_combined
from lcmlora.errors import UserError
from lcmlora.registry.references import AdapterReference

Miniatures = Callable[[str], Path]
Factors = dict[str, tuple[Tensor, Tensor]]
QUERY = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
ENDLESS = "(a|a|b|[a-z._0-9]+)+X"  # exponential in a layer's name where it is run


@pytest.fixture(scope="session")
def sdxl(miniatures: Miniatures) -> Architecture:
    return architecture.of_folder(miniatures("sdxl"))


@pytest.fixture(scope="session")
def sd15(miniatures: Miniatures) -> Architecture:
    return architecture.of_folder(miniatures("sd15"))


def _factors(base: Architecture, only: str, rank: int = 4) -> Factors:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, (outputs, *inputs) in sorted(base.shapes.items()):
        if only in name:
            up = torch.randn(outputs, rank, *(1 for _ in inputs[1:]), generator=generator)
            made[name] = torch.randn(rank, *inputs, generator=generator), up
    return made


def _kohya(factors: Factors, stem: Callable[[str], str], alpha: float = 2) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in factors.items():
        tensors |= {f"{stem(name)}.lora_down.weight": down, f"{stem(name)}.lora_up.weight": up}
        tensors[f"{stem(name)}.alpha"] = torch.tensor(float(alpha))
    return tensors


def _flat(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def _one(**parts: Tensor) -> dict[str, Tensor]:
    """Returns a kohya file of one layer of sd15's, with these parts changed."""
    down, up = torch.ones(4, 16), torch.ones(16, 4)
    chosen = {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(4.0)} | parts
    return {f"{_flat(QUERY)}.{part}": tensor for part, tensor in chosen.items()}


def _refused(path: Path, tensors: dict[str, Tensor], base: Architecture | None, **header: str) -> str:
    """Returns the one line with which convert refuses a file."""
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata=header or None)
    out = path.with_name("out.safetensors")
    with pytest.raises(UserError) as caught:
        formats.convert(path, out, DIFFUSERS, base)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and not out.exists()
    return line


@pytest.mark.parametrize(
    ("stem", "original"),
    [
        ("lora_unet_{flat}", True),  # kohya
        ("lora_unet_{flat}", False),
        ("unet.{dotted}", True),  # OneTrainer
        ("unet.{dotted}", False),
        ("lora_unet.{dotted}", False),
        ("lora_unet.{dotted}", True),
        ("diffusion_model.{dotted}", True),  # ComfyUI
        ("model.diffusion_model.{dotted}", True),
        ("lycoris_{flat}", False),  # SimpleTuner
        ("unet.base_model.model.{dotted}", False),
        ("base_model.model.unet.{dotted}", False),
        ("{dotted}", False),
    ],
)
@pytest.mark.parametrize("suffixes", [("lora_down", "lora_up"), ("lora_A", "lora_B"), ("lora.down", "lora.up")])
def test_dotted_and_flat_spellings_of_either_names_are_the_same_adapter(
    sdxl: Architecture, tmp_path: Path, stem: str, original: bool, suffixes: tuple[str, str]
):
    factors = _factors(sdxl, "attn1.to_out") | _factors(sdxl, "resnets.1.conv1")
    names = layer_names._original(sdxl.shapes) if original else {name: name for name in factors}
    tensors = {}
    for name, (down, up) in factors.items():
        spelled = stem.format(dotted=names[name], flat=names[name].replace(".", "_"))
        tensors |= {f"{spelled}.{suffixes[0]}.weight": down, f"{spelled}.{suffixes[1]}.weight": up}
        tensors[f"{spelled}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "a.safetensors")
    for style in (DIFFUSERS, KOHYA):
        made = formats.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", style, sdxl)
        assert (made.alpha, made.rank, made.layers, made.error) == ((2.0,), 4, len(factors), 0)
        found = formats.read(tmp_path / "b.safetensors", sdxl)
        assert found.layers.keys() == factors.keys()
        for name, (down, up) in factors.items():
            assert torch.equal(found.layers[name].delta, 0.5 * up.flatten(1) @ down.flatten(1))


@pytest.mark.parametrize(
    "name",
    [
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1",
        "lora_te2_text_projection",
        "lora_te1.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1",
        "base_model.model.text_model.encoder.layers.0.mlp.fc1",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
        "clip_l.text_model.encoder.layers.0.mlp.fc1",
    ],
)
def test_text_encoders_are_recognised_in_every_spelling_and_left_out_on_demand(
    sd15: Architecture, tmp_path: Path, name: str
):
    text = {f"{name}.lora_down.weight": torch.zeros(4, 8), f"{name}.lora_up.weight": torch.zeros(8, 4)}
    line = _refused(tmp_path / "a.safetensors", _one() | text, sd15)
    assert f"2 of 5 tensors are for a text encoder, the first is {name}" in line and "--unet-only" in line
    made = formats.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", DIFFUSERS, sd15, unet_only=True)
    assert (made.left_out, made.layers) == (2, 1)


def test_trained_tokens_are_named_and_left_out_on_demand(sd15: Architecture, tmp_path: Path):
    token = {"bundle_emb.ohwx.clip_l": torch.zeros(2, 16)}
    line = _refused(tmp_path / "a.safetensors", _one() | token, sd15)
    assert "1 of 4 tensors are embeddings of trained tokens, the first is bundle_emb.ohwx.clip_l" in line
    made = formats.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", KOHYA, sd15, unet_only=True)
    assert made.left_out == 1
    line = _refused(tmp_path / "c.safetensors", {"emb_params": torch.zeros(2)}, sd15)
    assert "1 of 1 tensors are embeddings of trained tokens" in line


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("hada_w1_a", "LoHa"),
        ("lokr_w2_b", "LoKr"),
        ("lora_mid.weight", "lora_mid"),
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector.weight", "DoRA"),
        ("on_input", "(IA)3"),
        ("diff", "weight differences"),
        ("diff_b", "weight differences"),
        ("w_norm", "normalisation"),
        ("oft_blocks", "OFT"),
        ("a1.weight", "GLoRA"),
        ("vera_lambda_b", "VeRA"),
        ("lora_E", "AdaLoRA"),
        ("lora_up.bias", "biases"),
        ("lora_B.default.bias", "biases"),
        ("scalar", "scalar"),
    ],
)
def test_other_kinds_of_adapters_are_named_after_what_they_are(
    sd15: Architecture, tmp_path: Path, part: str, kind: str
):
    line = _refused(tmp_path / "a.safetensors", _one(**{part: torch.ones(4, 4)}), sd15)
    assert f"{_flat(QUERY)}.{part} is not a tensor of a plain LoRA" in line
    assert kind in line.partition("is not a tensor")[2]
    others = {"LoHa", "LoKr", "DoRA"} - {kind}
    assert not any(other in line for other in others)


FAMILIES = {
    "transformer.single_transformer_blocks.0.attn.to_k": "Flux",
    "lora_unet_double_blocks_0_img_attn_proj": "Flux",
    "lora_unet_single_blocks_7_linear1": "Flux",
    "lora_transformer_single_transformer_blocks_0_attn_to_k": "Flux",
    "transformer.base_model.model.single_transformer_blocks.0.attn.to_k": "Flux",
    "diffusion_model.double_blocks.3.img_attn.qkv": "Flux",
    "diffusion_model.distilled_guidance_layer.layers.0.in_layer": "Chroma",
    "transformer.transformer_blocks.0.attn.to_q": "Stable Diffusion 3 or Flux",
    "transformer.transformer_blocks.0.attn.add_q_proj": "Stable Diffusion 3",
    "lora_unet_joint_blocks_0_x_block_attn_qkv": "Stable Diffusion 3",
    "diffusion_model.joint_blocks.0.context_block.attn.proj": "Stable Diffusion 3",
    "transformer.transformer_blocks.0.img_mlp.net.0.proj": "Qwen-Image",
    "diffusion_model.blocks.12.self_attn.k": "Wan",
    "lora_unet_blocks_12_cross_attn_v": "Wan",
    "transformer.blocks.0.attn1.to_q": "Wan",
    "diffusion_model.blocks.0.ffn.0": "Wan",
    "lora_unet_blocks_0_attn1_Wqkv": "Hunyuan-DiT",
    "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_q": "HunyuanVideo",
    "transformer.transformer_blocks.0.attn1.to_q": "PixArt",
    "base_model.model.transformer_blocks.0.attn2.to_q": "PixArt",
    "transformer.joint_transformer_blocks.0.attn.to_q": "AuraFlow",
    "transformer.double_stream_blocks.0.block.attn1.to_q": "HiDream",
    "lora_prior_unet_down_blocks_0_2_attention_attn_to_q": "Stable Cascade",
    "unet.down_blocks.0.2.attention.attn.to_q": "Stable Cascade",
    "diffusion_model.layers.0.attention.to_q": "Lumina or Z-Image",
    "transformer.noise_refiner.0.attention.to_q": "Lumina or Z-Image",
    "base_model.model.model.layers.0.self_attn.q_proj": "a language model",
    "unet.down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attn1.to_q": "AnimateDiff",
    "unet.down_blocks.0.attentions.0.temporal_transformer_blocks.0.attn1.to_q": "Stable Video Diffusion",
    "unet.down_blocks.0.attentions.0.to_q": "Kandinsky or DeepFloyd IF",
    "unet.down_blocks.0.attentions.0.add_k_proj": "Kandinsky or DeepFloyd IF",
    "lora_controlnet_down_blocks_0_attentions_0_proj_in": "a ControlNet",
}


@pytest.mark.parametrize(("stem", "model"), FAMILIES.items())
def test_a_lora_of_another_model_is_refused_by_its_name_with_and_without_a_base(
    sd15: Architecture, tmp_path: Path, stem: str, model: str
):
    for down, up in (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")):
        tensors = {f"{stem}.{down}.weight": torch.ones(4, 64), f"{stem}.{up}.weight": torch.ones(64, 4)}
        assert model in _refused(tmp_path / "a.safetensors", tensors, None)
        assert model in _refused(tmp_path / "a.safetensors", tensors, sd15)


def test_another_model_is_named_though_the_file_has_text_encoders_and_other_kinds_too(
    sd15: Architecture, tmp_path: Path
):
    tensors = {
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 8),
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(4, 64),
        "lora_unet_double_blocks_0_img_attn_proj.dora_scale": torch.ones(64),
    }
    for base in (None, sd15):
        assert "its layers are those of Flux" in _refused(tmp_path / "a.safetensors", tensors, base)
    processor = {"double_blocks.0.processor.qkv_lora1.down.weight": torch.ones(4, 64)}
    assert "its layers are those of Flux" in _refused(tmp_path / "a.safetensors", processor, None)


def test_layers_of_no_known_architecture_are_refused_without_a_base(sd15: Architecture, tmp_path: Path):
    down, up = torch.ones(4, 16), torch.ones(16, 4)
    path = tmp_path / "a.safetensors"
    for stem in ("something.else", "unet.down_blocks.0.foo.0.to_q", "lora_unet_nothing_0_to_q"):
        line = _refused(path, {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, None)
        assert "none of stable-diffusion-v1-5/" in line and "--base" in line
    # The names are SD-V1.5's, the sizes are those of no published base.
    save_file(_one(), path)
    with pytest.raises(UserError, match="its layers are those of none of"):
        formats.convert(path, tmp_path / "b.safetensors", DIFFUSERS)
    diffusers = {f"unet.{QUERY}.lora_A.weight": down, f"unet.{QUERY}.lora_B.weight": up}
    assert "none of stable-diffusion-v1-5/" in _refused(path, diffusers, None)
    assert formats.convert(path, tmp_path / "b.safetensors", DIFFUSERS, sd15).layers == 1


def test_two_loras_of_another_model_are_not_combined(tmp_path: Path):
    stem = "transformer.single_transformer_blocks.0.attn.to_k"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 64), f"{stem}.lora_B.weight": torch.ones(64, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    part = AdapterReference("a", tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="its layers are those of Flux"):
        write_combined(part, part, (0.8, 1.0), tmp_path / "b.safetensors")


def test_whole_weights_are_not_taken_for_an_adapter(sd15: Architecture, tmp_path: Path):
    for name in ("model.diffusion_model.input_blocks.0.0.weight", "down_blocks.0.resnets.0.conv1.weight"):
        line = _refused(tmp_path / "a.safetensors", {name: torch.ones(4)}, sd15)
        assert "the file has a model's whole weights, and is no adapter" in line


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"lora_down.weight": torch.full((4, 16), torch.nan)}, "lora_down.weight has NaN in 64 of 64 values"),
        ({"lora_up.weight": torch.full((16, 4), torch.inf)}, "lora_up.weight has Inf in 64 of 64 values"),
        ({"alpha": torch.tensor(torch.nan)}, "alpha is nan, expected a finite number above 0"),
        ({"alpha": torch.tensor(torch.inf)}, "alpha is inf, expected a finite number above 0"),
        ({"alpha": torch.tensor(1e300, dtype=torch.float64)}, "expected a finite number above 0"),
        ({"alpha": torch.tensor(0.0)}, "alpha is 0, expected a finite number above 0"),
        ({"alpha": torch.tensor(-4)}, "alpha is -4, expected a finite number above 0"),
        ({"alpha": torch.full((4,), 4.0)}, "alpha has 4 values, expected one number"),
        ({"alpha": torch.zeros(0)}, "alpha has 0 values, expected one number"),
        ({"alpha": torch.tensor(1 + 1j)}, "expected a finite number above 0"),
        ({"lora_down.weight": torch.ones(0, 16), "lora_up.weight": torch.ones(16, 0)}, "expected a rank of 1 or more"),
        ({"lora_down.weight": torch.ones(8, 16)}, "do not fit each other: (8, 16) and (16, 4)"),
        ({"lora_down.weight": torch.ones(4, 16, 3, 3)}, "do not fit each other"),
        ({"lora_up.weight": torch.ones(16, 4, 3, 3), "lora_down.weight": torch.ones(4, 16, 1, 1)}, "do not fit"),
        ({"lora_down.weight": torch.ones(4)}, "expected a matrix or a convolution"),
        ({"lora_down.weight": torch.ones(4, 16, 3)}, "expected a matrix or a convolution"),
        ({"lora_down.weight": torch.ones(4, 16, dtype=torch.int8)}, "has weights in torch.int8, expected float32"),
        ({"lora_up.weight": torch.ones(16, 4).to(torch.float8_e5m2)}, "has weights in torch.float8_e5m2"),
        ({"lora_up.weight": torch.ones(16, 4, dtype=torch.complex64)}, "has weights in torch.complex64"),
        ({"lora_up.weight": torch.ones(16, 4, dtype=torch.bool)}, "has weights in torch.bool"),
        ({"lora_down.weight": torch.ones(4, 24)}, "it was made for another base"),
    ],
)
def test_factors_of_no_product_are_refused_by_the_tensors_name(
    sd15: Architecture, tmp_path: Path, parts: dict[str, Tensor], words: str
):
    line = _refused(tmp_path / "a.safetensors", _one(**parts), sd15)
    assert words in line and (_flat(QUERY) in line or QUERY in line or _flat(QUERY).removeprefix("lora_unet_") in line)


def test_numbers_that_half_precision_cannot_hold_are_refused_before_writing(sd15: Architecture, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    save_file({n: t.half() for n, t in _one(**{"lora_up.weight": torch.full((16, 4), 6e4)}).items()}, path)
    tensors = load_file(path)
    save_file(tensors | {f"{_flat(QUERY)}.alpha": torch.tensor(64.0)}, path)
    with pytest.raises(UserError, match=r"lora_B\.weight is too large for torch\.float16, .* 9.6e\+05; write it"):
        formats.convert(path, tmp_path / "b.safetensors", DIFFUSERS, sd15)
    assert formats.convert(path, tmp_path / "b.safetensors", DIFFUSERS, sd15, dtype=torch.float32).error == 0


def test_a_rank_that_would_fill_the_memory_in_kohyas_format_is_refused(sdxl: Architecture, tmp_path: Path):
    factors = _factors(sdxl, "attn", rank=1)
    name = next(iter(factors))
    down, up = factors[name]
    factors[name] = down.expand(200_000, -1).contiguous(), up.expand(-1, 200_000).contiguous()
    save_file(_kohya(factors, _flat), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"its largest rank is 200000, and in kohya's format, .* would become [3-9]"):
        formats.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", KOHYA, sdxl)


def test_weights_of_a_combination_are_finite(sd15: Architecture, tmp_path: Path):
    save_file(_one(), tmp_path / "a.safetensors")
    part = AdapterReference("a", tmp_path / "a.safetensors")
    for weight in (torch.nan, torch.inf):
        with pytest.raises(UserError, match=r"--weights: expected finite numbers, got (nan|inf)"):
            write_combined(part, part, (weight, 1.0), tmp_path / "b.safetensors", sd15)


def test_combine_leaves_text_encoders_out_on_demand(sd15: Architecture, tmp_path: Path):
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 8)}
    save_file(_one(), tmp_path / "lcm.safetensors")
    save_file(_one() | text, tmp_path / "style.safetensors")
    style, lcm = (AdapterReference(name, tmp_path / f"{name}.safetensors") for name in ("style", "lcm"))
    with pytest.raises(UserError, match=r"1 of 4 tensors are for a text encoder.*--unet-only"):
        write_combined(style, lcm, (0.8, 1.0), tmp_path / "b.safetensors", sd15)
    made = write_combined(style, lcm, (0.8, 1.0), tmp_path / "b.safetensors", sd15, unet_only=True)
    assert (made.facts.layers, made.left_out) == (1, 1)


def _peft(prefix: str = "unet.") -> dict[str, Tensor]:
    return {f"{prefix}{QUERY}.lora_A.weight": torch.ones(4, 16), f"{prefix}{QUERY}.lora_B.weight": torch.ones(16, 4)}


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ENDLESS, "lora_alpha": 8}, 8.0),
        ({"exclude_modules": ENDLESS, "layers_pattern": ENDLESS, "rank_pattern": {ENDLESS: 4}}, 4.0),
        ({"alpha_pattern": {f"^{QUERY}": 2, "to_q": 3}}, 2.0),
        ({"alpha_pattern": {"to_q": 3, f"^{QUERY}$": 2}}, 3.0),
        ({"alpha_pattern": {r"attn1\.to_q": 5}, "lora_alpha": 8}, 5.0),
        ({"alpha_pattern": {"q": 5, "o_q": 5, "^to_q": 5}, "lora_alpha": 8}, 8.0),
        ({"alpha_pattern": None, "lora_alpha": None}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 16.0),
        ({"alpha_pattern": {ENDLESS: 2}}, "is a regular expression, and those of files are not run"),
        ({"alpha_pattern": {".*": 2}}, "is a regular expression"),
        ({"alpha_pattern": {"a" * 4000: 2}}, "is a regular expression"),
        ({"alpha_pattern": [2]}, "alpha_pattern: expected an object"),
        ({"alpha_pattern": {"to_q": "2"}}, "to_q: expected a number, got '2'"),
        ({"alpha_pattern": {"to_q": 0}}, "to_q: expected a number above 0"),
        ({"lora_alpha": True}, "lora_alpha: expected a number, got True"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a number above 0"),
        ({"lora_alpha": 1e300}, "lora_alpha: expected a number above 0"),
        ({"lora_alpha": [8]}, "lora_alpha: expected a number"),
        ({"use_dora": True}, "DoRA is not supported"),
        ({"use_qalora": True}, "QALoRA is not supported"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', and only LORA is supported"),
        ({"peft_type": ["LORA"]}, "and only LORA is supported"),
        ([1, 2], "expected an object"),
        ("{", "not JSON"),
        ("[" * 5000, "nested too deeply"),
        ('{"unet.lora_alpha": NaN, "lora_alpha": NaN}', "NaN is no number"),
    ],
)
def test_settings_beside_the_tensors_are_read_without_running_anything(
    tmp_path: Path, beside: bool, settings: object, expected: float | str
):
    path = tmp_path / (peft_settings.WEIGHTS if beside else "a.safetensors")
    if isinstance(settings, dict) and not beside:
        settings = {f"unet.{key}": value for key, value in settings.items()}
    text = settings if isinstance(settings, str) else json.dumps(settings)
    save_file(_peft(), path, metadata=None if beside else {peft_settings.METADATA: text})
    if beside:
        (tmp_path / peft_settings.CONFIG).write_text(text)
    if isinstance(expected, str):
        with pytest.raises(UserError) as caught:
            formats.read(path)
        assert expected in str(caught.value) and "\n" not in str(caught.value)
        assert (peft_settings.CONFIG if beside else peft_settings.METADATA) in str(caught.value)
    else:
        assert formats.read(path).layers[QUERY].alpha == expected


@pytest.mark.parametrize(
    "settings",
    [
        {"unet.target_modules": ENDLESS},
        {"unet.target_modules": [ENDLESS]},
        {"unet.exclude_modules": "to_q"},
        {"unet.layers_pattern": ENDLESS, "unet.layers_to_transform": [0]},
        {"unet.rank_pattern": {ENDLESS: 4}},
        {"unet.alpha_pattern": {ENDLESS: 4}},
        {"unet.rank_pattern": {"to_q": "4"}},
        {"unet.megatron_core": "os"},
        {"unet.megatron_config": {"a": 1}},
        {"text_encoder.target_modules": ENDLESS},
    ],
)
def test_diffusers_gets_no_file_whose_settings_it_might_run(tmp_path: Path, settings: dict[str, object]):
    path = tmp_path / lora.WEIGHTS
    save_file(_peft(), path, metadata={peft_settings.METADATA: json.dumps(settings)})
    with pytest.raises(UserError) as caught:
        tensorfile.check_harmless(path)
    assert peft_settings.METADATA in str(caught.value) and "\n" not in str(caught.value)
    save_file({f"unet.{ENDLESS}.lora_A.weight": torch.ones(1)}, path)
    with pytest.raises(UserError, match="is no name of a layer's tensor; not given to diffusers"):
        tensorfile.check_harmless(path)


def test_diffusers_gets_the_files_that_lcmlora_writes(sd15: Architecture, tmp_path: Path):
    mixed = _factors(sd15, "attn1") | _factors(sd15, "attn2", rank=2)
    layers = {name: formats.Layer(down, up, 2.0) for name, (down, up) in mixed.items()}
    adapter = formats.Adapter("a", layers, torch.float32)
    for style in (DIFFUSERS, KOHYA):
        formats.write(adapter, tmp_path / "a.safetensors", style, sd15)
        tensorfile.check_harmless(tmp_path / "a.safetensors")
    save_file(_peft(), tmp_path / "b.safetensors", metadata=lora.adapter_metadata(4))
    tensorfile.check_harmless(tmp_path / "b.safetensors")


def test_a_name_of_many_letters_or_with_escapes_does_not_reach_the_terminal(sd15: Architecture, tmp_path: Path):
    line = _refused(tmp_path / "a.safetensors", {"a" * 100_000 + ".lora_A.weight": torch.ones(2, 2)}, sd15)
    assert len(line) < 1000 and "aaa... 99,7" in line
    line = _refused(tmp_path / "a.safetensors", {"\x1b[2Jevil\n.lora_A.weight": torch.ones(2, 2)}, sd15)
    assert "\x1b" not in line and r"\x1b[2Jevil\n" in line


def test_every_layer_of_the_published_bases_is_named_as_diffusers_names_it():
    for base in layer_names.published().values():
        for name in base.shapes:
            assert spellings.Name(name, "down").is_diffusers, name
        stems = [*base.shapes, *layer_names._original(base.shapes).values()]
        assert (
            spellings.foreign_model(
                [f"{prefix}{stem}" for stem in stems for prefix in ("", "unet.", "diffusion_model.")]
            )
            is None
        )
        assert spellings.foreign_model([_flat(stem) for stem in stems]) is None
