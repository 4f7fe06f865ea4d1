from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmlora.errors import UserError
from lcmlora.evaluation.measures import scores
from lcmlora.extras import MissingExtra
from lcmlora.io.files import sha256_file
from tests.evaluation.clips import save_clip

CPU = torch.device("cpu")


def pictures(count: int, side: int = 32) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_the_clip_score_is_transformers_own_logit_where_it_is_positive(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    model = save_clip(tmp_path)
    scorer = scores.load("clip-score", CPU, str(tmp_path))
    prompts = ["a red apple", "dog", "cat", "sun", "a tree", "x"]
    values = scorer(pictures(6, model.config.vision_config.image_size), prompts)
    pixels = pictures(6, model.config.vision_config.image_size)
    mean, deviation = (
        torch.tensor(v)[:, None, None]
        for v in ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    )
    tokens = CLIPTokenizer.from_pretrained(tmp_path)(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens, pixel_values=(pixels - mean) / deviation).logits_per_image / model.logit_scale.exp()
    expected = 100 * logits.diagonal()
    assert expected.min() > 1
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-4)


def test_a_clip_score_is_not_negative(tmp_path: Path) -> None:
    model = save_clip(tmp_path)
    before = scores.load("clip-score", CPU, str(tmp_path))(pictures(2), ["apple", "dog"])
    model.visual_projection.weight.data.neg_()
    model.save_pretrained(tmp_path)
    after = scores.load("clip-score", CPU, str(tmp_path))(pictures(2), ["apple", "dog"])
    assert before.min() > 0
    assert torch.equal(after, torch.zeros(2))


def test_a_clip_score_is_named_after_its_weights_and_takes_long_prompts(tmp_path: Path) -> None:
    save_clip(tmp_path)
    scorer = scores.load("clip-score", CPU, str(tmp_path))
    assert scorer.name == f"clip-score/ViT-24x2-8-16@{sha256_file(tmp_path / 'model.safetensors')[:12]}"
    assert scorer(pictures(1), ["word " * 100]).shape == (1,)


def test_a_clip_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    save_clip(tmp_path)
    for file in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer\.json or vocab\.json and merges\.txt\)"):
        scores.load("clip-score", CPU, str(tmp_path))(pictures(1), ["apple"])


def test_a_prompt_for_each_picture_is_asked_for(tmp_path: Path) -> None:
    save_clip(tmp_path)
    with pytest.raises(ValueError, match="2 pictures with 1"):
        scores.load("clip-score", CPU, str(tmp_path))(pictures(2), ["apple"])


def test_image_reward_reads_the_makers_layers_by_their_names(tmp_path: Path) -> None:
    state = save_image_reward(tmp_path)
    scorer = scores.load("image-reward", CPU, str(tmp_path))
    prompts = ["a red apple", "apple"]
    rewards = scorer(pictures(2), prompts)
    assert rewards.shape == (2,)
    assert rewards.dtype == torch.float32
    assert rewards[0] != rewards[1]
    torch.testing.assert_close(scorer(pictures(2)[1:], prompts[1:]), rewards[1:])
    assert scorer.name == f"image-reward/v1.0@{sha256_file(tmp_path / 'ImageReward.pt')[:12]}"
    # The head ends in a linear layer, then the makers' mean and deviation are taken off.
    state["mlp.layers.3.bias"] += 1
    torch.save(state, tmp_path / "ImageReward.pt")
    more = scores.load("image-reward", CPU, str(tmp_path))(pictures(2), prompts)
    torch.testing.assert_close(more - rewards, torch.full((2,), 1 / 1.0333394966054072))


def test_image_reward_weights_that_lack_a_layer_are_refused(tmp_path: Path) -> None:
    state = save_image_reward(tmp_path)
    del state["blip.visual_encoder.norm.weight"]
    torch.save(state, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"ImageReward\.pt: these are not ImageReward's weights"):
        scores.load("image-reward", CPU, str(tmp_path))
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(UserError, match=r"needs a folder with vocab\.txt"):
        scores.load("image-reward", CPU, str(tmp_path))


def test_hps_is_a_hundred_times_the_cosine_of_open_clips_embeddings(tmp_path: Path) -> None:
    open_clip = open_clip_or_skip()
    model = save_open_clip(open_clip, tmp_path)
    scorer = scores.load("hps", CPU, str(tmp_path))
    prompts = ["a red apple", "a dog"]
    values = scorer(pictures(2, 32), prompts)
    mean, deviation = (
        torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    with torch.no_grad():
        seen, read, _ = model((pictures(2, 32) - mean) / deviation, open_clip.tokenize(prompts))
    torch.testing.assert_close(values, 100 * (seen * read).sum(dim=1), atol=1e-3, rtol=1e-3)
    assert scorer.name == f"hps/{tmp_path.name}@{sha256_file(tmp_path / 'open_clip_model.safetensors')[:12]}"


def test_hps_without_open_clip_names_the_extra_and_with_it_the_missing_file(monkeypatch: pytest.MonkeyPatch) -> None:
    line = r"hps needs open_clip, which is not installed: pip install 'lcmlora\[scores\]'"
    with monkeypatch.context() as patch, pytest.raises(MissingExtra, match=line):
        patch.setitem(sys.modules, "open_clip", None)
        scores.load("hps", CPU)
    open_clip_or_skip()
    with pytest.raises(UserError, match="hps needs a file of HPSv2's weights, and nowhere is missing"):
        scores.load("hps", CPU, "nowhere")


def test_unknown_scores_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="scores: got 'taste': expected one of clip-score, image-reward, hps"):
        scores.load("taste", CPU)


def save_image_reward(folder: Path) -> dict[str, Tensor]:
    """Writes ImageReward in miniature as its makers name the layers, and returns its weights."""
    width, words = 64, ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple"]
    (folder / "vocab.txt").write_text("\n".join(words))
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def layer(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = 0.2 * torch.randn(shape, generator=generator)
        state[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=generator)

    seen = "blip.visual_encoder"
    state[f"{seen}.cls_token"] = torch.randn(1, 1, width, generator=generator)
    state[f"{seen}.pos_embed"] = torch.randn(1, 1 + (224 // 32) ** 2, width, generator=generator)
    layer(f"{seen}.patch_embed.proj", width, 3, 32, 32)
    layer(f"{seen}.norm", width)
    for name, shape in {"norm1": [1], "attn.qkv": [3, 1], "attn.proj": [1, 1], "norm2": [1]}.items():
        layer(f"{seen}.blocks.0.{name}", *(width * n for n in shape))
    layer(f"{seen}.blocks.0.mlp.fc1", 2 * width, width)
    layer(f"{seen}.blocks.0.mlp.fc2", width, 2 * width)
    read = "blip.text_encoder"
    state[f"{read}.embeddings.position_ids"] = torch.arange(512)[None]
    state[f"{read}.embeddings.word_embeddings.weight"] = torch.randn(len(words), width, generator=generator)
    state[f"{read}.embeddings.position_embeddings.weight"] = torch.randn(512, width, generator=generator)
    layer(f"{read}.embeddings.LayerNorm", width)
    for attention in ("attention", "crossattention"):
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            layer(f"{read}.encoder.layer.0.{attention}.{name}", width, width)
        layer(f"{read}.encoder.layer.0.{attention}.output.LayerNorm", width)
    layer(f"{read}.encoder.layer.0.intermediate.dense", 2 * width, width)
    layer(f"{read}.encoder.layer.0.output.dense", width, 2 * width)
    layer(f"{read}.encoder.layer.0.output.LayerNorm", width)
    layer("blip.vision_proj", 8, width)  # of pretraining, which no score reads
    layer("mlp.layers.0", 16, width)
    layer("mlp.layers.3", 1, 16)
    torch.save(state, folder / "ImageReward.pt")
    return state


def open_clip_or_skip() -> Any:
    try:
        import open_clip
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"the extra `scores` is not installed, or not for this torch: {error}")
    return open_clip


def save_open_clip(open_clip: Any, folder: Path) -> torch.nn.Module:
    """Writes a small model in open_clip's layout and returns it."""
    import json

    from safetensors.torch import save_file

    shape = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**shape).eval()
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return model
