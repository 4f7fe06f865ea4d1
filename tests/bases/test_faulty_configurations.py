"""Bases whose configurations, schedules or tokenizers have faults: each is refused in one line."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lcmlora.bases.examination import structure
from lcmlora.bases.examination.examine import examine_base
from lcmlora.bases.examination.library_config import LibraryConfig
from lcmlora.errors import UserError
from tests.support.base_changes import (
    INDEX,
    LFS_POINTER,
    TEXT_2,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Change,
    change_tensors,
    change_tokenizer,
    cut,
    remove,
    set_keys,
    set_last_number,
    split_vocabulary_without,
    write,
)

Miniatures = Callable[[str], Path]


FAULTS: dict[str, tuple[Change, str]] = {
    # model_index.json
    "no index": (remove(INDEX), "needs model_index.json, and there is none"),
    "index is a list": (write(INDEX, b"[]"), "model_index.json: expected an object"),
    "index is cut": (cut(INDEX, 40), "model_index.json: not JSON"),
    "flux": (set_keys(INDEX, _class_name="FluxPipeline"), "_class_name is 'FluxPipeline'; expected StableDiffusionPip"),
    "sd3": (
        set_keys(INDEX, _class_name="StableDiffusion3Pipeline"),
        "_class_name is 'StableDiffusion3Pipeline'; expected",
    ),
    "no class": (set_keys(INDEX, _class_name=None), "_class_name is 'None'; expected StableDiffusionPipeline or"),
    "inpainting": (
        set_keys(INDEX, _class_name="StableDiffusionInpaintPipeline"),
        "'.*'; .*; this one is for inpainting",
    ),
    "lcm": (set_keys(INDEX, _class_name="LatentConsistencyModelPipeline"), "this one is distilled already"),
    "refiner": (set_keys(INDEX, requires_aesthetics_score=True), "this is SDXL's refiner"),
    "unknown part": (
        set_keys(INDEX, transformer=["diffusers", "DiT"]),
        r"names the part transformer \(DiT\), which Stable",
    ),
    "unet null": (set_keys(INDEX, unet=[None, None]), "unet is null, and StableDiffusionPipeline draws with it"),
    "vae unnamed": (set_keys(INDEX, vae=None), "vae is null, and StableDiffusionPipeline draws with it"),
    "tiny vae": (
        set_keys(INDEX, vae=["diffusers", "AutoencoderTiny"]),
        "vae is 'AutoencoderTiny'; expected AutoencoderKL",
    ),
    "t5": (
        set_keys(INDEX, text_encoder=["transformers", "T5EncoderModel"]),
        "text_encoder is 'T5Enc.*'; expected CLIPText",
    ),
    "t5 words": (
        set_keys(INDEX, tokenizer=["transformers", "T5Tokenizer"]),
        "tokenizer is 'T5Tokenizer'; expected CLIPTok",
    ),
    "a number": (set_keys(INDEX, unet=7), "unet is 7, and Stable"),
    # configurations
    "other unet": (
        set_keys("unet/config.json", _class_name="UNetMotionModel"),
        "_class_name is 'UNetMotionModel'; expected",
    ),
    "other vae": (
        set_keys("vae/config.json", _class_name="AutoencoderTiny"),
        "_class_name is 'AutoencoderTiny'; expected",
    ),
    "guided lcm": (
        set_keys("unet/config.json", time_cond_proj_dim=256),
        "time_cond_proj_dim is 256.*distilled already",
    ),
    "inpainting unet": (set_keys("unet/config.json", in_channels=9), "in_channels is 9 and the VAE's latents have 4"),
    "learned sigma": (set_keys("unet/config.json", out_channels=8), "out_channels is 8 and the VAE's latents have 4"),
    "upscaler": (set_keys("unet/config.json", num_class_embeds=1000), "num_class_embeds is 1000: .* class labels"),
    "kandinsky": (
        set_keys("unet/config.json", addition_embed_type="text"),
        "addition_embed_type is 'text'; expected null",
    ),
    "sdxl unet": (
        set_keys("unet/config.json", addition_embed_type="text_time"),
        "'text_time', and the base has 1 text enc",
    ),
    "other text": (
        set_keys("unet/config.json", cross_attention_dim=20),
        "cross_attention_dim is 20, and the text encoders g",
    ),
    "wider": (
        set_keys("unet/config.json", block_out_channels=[8, 24]),
        r"has shape \(\d.*\), and by its config.json \(\d",
    ),
    "deeper": (
        set_keys("unet/config.json", layers_per_block=2),
        r"unet: lacks \d+ tensors of its configuration: down_blo",
    ),
    "shallower": (
        set_keys("vae/config.json", layers_per_block=0),
        r"vae: has \d+ tensors that its config.json has no place",
    ),
    "endless": (
        set_keys("unet/config.json", layers_per_block=10**7),
        "layers_per_block and transformer_layers_per_block mak",
    ),
    "endless text": (
        set_keys("text_encoder/config.json", num_hidden_layers=10**7),
        "num_hidden_layers is 10000000; expected",
    ),
    "huge": (
        set_keys("unet/config.json", block_out_channels=[10**12, 8]),
        "block_out_channels is 1000000000000; expected at",
    ),
    "no blocks": (set_keys("unet/config.json", block_out_channels=[]), "block_out_channels: expected a list"),
    "unknown block": (
        set_keys("unet/config.json", mid_block_type="Mine"),
        "no UNet2DConditionModel can be built from it: Va",
    ),
    "quantised": (
        set_keys("unet/config.json", quantization_config={"bits": 4}),
        "quantization_config is set: quantised weig",
    ),
    "flow vae": (set_keys("vae/config.json", shift_factor=0.1), "shift_factor is set"),
    "no scale": (set_keys("vae/config.json", scaling_factor=0), "scaling_factor is 0; expected a positive number"),
    "bert": (
        set_keys("text_encoder/config.json", model_type="bert"),
        "model_type is 'bert'; expected a text encoder of CL",
    ),
    "activation": (
        set_keys("text_encoder/config.json", hidden_act="mine"),
        "no CLIPTextModel can be built from it: KeyErr",
    ),
    # schedule
    "flow": (
        write("scheduler/scheduler_config.json", b'{"shift": 3.0}'),
        "has no beta_schedule; expected a diffusion",
    ),
    "no schedule": (remove("scheduler/scheduler_config.json"), "scheduler_config.json: No such file"),
    "odd betas": (
        set_keys("scheduler/scheduler_config.json", beta_schedule="mine"),
        "cannot make a schedule of it: NotImpl",
    ),
    "negative": (set_keys("scheduler/scheduler_config.json", beta_end=-1), "cannot make a schedule of it"),
    "rising": (set_keys("scheduler/scheduler_config.json", trained_betas=[-1e-3] * 1000), "its betas are no schedule"),
    "endless t": (
        set_keys("scheduler/scheduler_config.json", num_train_timesteps=10**9),
        "num_train_timesteps is 1000000000",
    ),
    "odd target": (
        set_keys("scheduler/scheduler_config.json", prediction_type="flow"),
        "prediction_type is 'flow'; expecte",
    ),
    # tokenizers
    "no vocabulary": (remove(TOKENIZER), "tokenizer: has no vocab.json and merges.txt, and no .*the same tokens"),
    "empty tokenizer": (
        remove(TOKENIZER, TOKENIZER_CONFIG),
        "tokenizer: has no vocab.json and merges.txt, and no tok",
    ),
    "no merges": (
        split_vocabulary_without("merges.txt"),
        "tokenizer: has no merges.txt, and no tokenizer.json that would hold them; ge",
    ),
    "merges alone": (split_vocabulary_without("vocab.json"), "tokenizer: has no vocab.json, and no tokenizer.json"),
    "no length": (remove(TOKENIZER_CONFIG), "tokenizer: has no tokenizer_config.json, which tells how many tokens"),
    "length unset": (
        set_keys(TOKENIZER_CONFIG, model_max_length=None),
        "model_max_length is None; expected the 24 tokens",
    ),
    "too long": (set_keys(TOKENIZER_CONFIG, model_max_length=77), "model_max_length is 77; expected the 24 tokens"),
    "huge length": (
        set_keys(TOKENIZER_CONFIG, model_max_length=10**30),
        "model_max_length is 1000.*; expected the 24 tokens",
    ),
    "t5 class": (
        set_keys(TOKENIZER_CONFIG, tokenizer_class="T5Tokenizer"),
        "tokenizer_class is 'T5Tokenizer'; expected CLI",
    ),
    "empty merges": (change_tokenizer(lambda m: m.update(merges=[])), "has an empty vocabulary or no merges"),
    "cut vocabulary": (
        change_tokenizer(lambda m: m.update(vocab=dict(list(m["vocab"].items())[:300]))),
        "merges name '.*', which the vocabulary does not have",
    ),
    "small vocabulary": (
        change_tokenizer(lambda m: m.update(vocab=dict(list(m["vocab"].items())[:256]), merges=[["a", "b</w>"]])),
        "merges name|has a vocabulary of|cannot read it",
    ),
    "larger vocabulary": (
        set_keys("text_encoder/config.json", vocab_size=400),
        r"goes up to token 528, and the text encoder's embedding has 400 rows",
    ),
    "other vocabulary": (
        set_keys("text_encoder/config.json", vocab_size=49408),
        r"has a vocabulary of 529 tokens, and the text encoder's embedding 49408 rows",
    ),
    "word pieces": (change_tokenizer(lambda m: m.update(type="WordPiece")), r"expected the byte-pair encoding"),
    "tokenizer lfs": (
        write(TOKENIZER, LFS_POINTER),
        "tokenizer.json: is a Git LFS pointer and not the file; run `git lfs pu",
    ),
    "tokenizer html": (write(TOKENIZER, b"<html>404</html>"), "tokenizer.json: not JSON"),
}


SDXL_FAULTS: dict[str, tuple[Change, str]] = {
    "no tokenizer_2": (remove("tokenizer_2"), "names tokenizer_2, and there is no tokenizer_2/"),
    "no text_encoder_2": (remove("text_encoder_2"), "names text_encoder_2, and there is no text_encoder_2/"),
    "text_encoder_2 null": (
        set_keys(INDEX, text_encoder_2=[None, None]),
        "text_encoder_2 is null, and StableDiffusionXL",
    ),
    "tokenizer_2 unnamed": (set_keys(INDEX, tokenizer_2=None), "tokenizer_2 is null, and StableDiffusionXL"),
    "text_encoder null": (set_keys(INDEX, text_encoder=[None, None]), "text_encoder is null, and StableDiffusionXL"),
    "second without projection": (
        set_keys(INDEX, text_encoder_2=["transformers", "CLIPTextModel"]),
        "text_encoder_2 is 'CLIPTextModel'; expected CLIPTextModelWithProjection",
    ),
    "no projection": (
        change_tensors(TEXT_2, lambda held: held.pop("text_projection.weight")),
        "text_encoder_2: lacks a ten",
    ),
    "no vocabulary": (remove("tokenizer_2/tokenizer.json"), "tokenizer_2: has no vocab.json and merges.txt"),
    "first as second": (
        lambda f: (shutil.rmtree(f / "text_encoder_2"), shutil.copytree(f / "text_encoder", f / "text_encoder_2")),
        "cross_attention_dim is 40, and the text encoders give 32",
    ),
    "no end of text": (
        set_keys("text_encoder_2/config.json", eos_token_id=7),
        "ends a text with token 528, and the text",
    ),
    "refiner": (set_keys("unet/config.json", addition_time_embed_dim=200), "projection_class_embeddings_input_dim is"),
    "plain unet": (
        set_keys("unet/config.json", addition_embed_type=None),
        "addition_embed_type is None, and the base has 2",
    ),
    "nan": (change_tensors(TEXT_2, set_last_number(float("nan"))), "text_encoder_2/.* has numbers that are not finite"),
    "named as sd": (set_keys(INDEX, _class_name="StableDiffusionPipeline"), "names the part text_encoder_2"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_that_names_the_file(mini: Path, fault: str):
    change, message = FAULTS[fault]
    change(mini)
    with pytest.raises(UserError, match=message) as caught:
        examine_base("mine", mini)
    assert "\n" not in str(caught.value) and str(mini) in str(caught.value)
    assert not Path("unpickled").exists()


@pytest.mark.parametrize("fault", SDXL_FAULTS)
def test_a_fault_of_sdxls_own_parts_is_one_line(sdxl: Path, fault: str):
    change, message = SDXL_FAULTS[fault]
    change(sdxl)
    with pytest.raises(UserError, match=message) as caught:
        examine_base("mine", sdxl)
    assert "\n" not in str(caught.value)


def test_a_configuration_of_millions_of_layers_is_not_built():
    for changes in ({"layers_per_block": [2, 10**6]}, {"transformer_layers_per_block": [[1, 10**6], 2]}):
        with pytest.raises(UserError, match="make over 1024 layers"):
            structure.check_unet(LibraryConfig({"block_out_channels": [8, 8]} | changes, "config.json"))
