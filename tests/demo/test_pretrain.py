import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from lcmlora.demo import pretrain
from lcmlora.demo.pretrain import _Average, _rate
from lcmlora.settings.pretrain import Recipe, Round

ROOT = Path(__file__).parents[2]
MODULES = ROOT / "node_modules"
TINY = Recipe().model_copy(
    update={
        "groups": ("food-drink",),
        "base_styles": ("noto",),
        "vae_groups": ("activities", "food-drink"),
        "vae_styles": ("noto", "twemoji"),
        "size": 16,
        "copies": 1,
        "vocabulary": 700,
        "vae_channels": (8, 8),
        "vae_batch": 4,
        "text_width": 16,
        "text_layers": 1,
        "unet_channels": (16, 32),
        "batch": 4,
        "rounds": (Round(vae_steps=3, unet_steps=4), Round(vae_steps=1, unet_steps=2)),
        "checkpoint_every": 2,
    }
)

pytestmark = pytest.mark.skipif(not (MODULES / "@iconify-json").is_dir(), reason="the artwork is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    pretrain.pretrain_base(TINY, MODULES, folder / "scratch", folder / "base", torch.device("cpu"))
    return folder


def test_the_base_is_a_folder_that_plain_diffusers_draws_with(trained: Path):
    pipeline = StableDiffusionPipeline.from_pretrained(trained / "base", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("red apple", height=16, width=16, num_inference_steps=2).images[0]
    assert picture.size == (16, 16)
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    saved = trained / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    parameters = sum(p.numel() for p in pipeline.unet.parameters())
    assert saved.stat().st_size == pytest.approx(2 * parameters, rel=0.2)  # fp16 in the file
    for name in ("vocab.json", "merges.txt"):
        assert (trained / "base" / "tokenizer" / name).is_file()


def test_a_killed_training_ends_with_the_same_weights(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Killed(BaseException):
        pass

    calls = 0
    update = _Average.update

    def dying(self: _Average, module: torch.nn.Module, step: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 + 4:  # in the last step of the first round's UNet, after its checkpoint at step 2
            raise Killed
        update(self, module, step)

    monkeypatch.setattr(_Average, "update", dying)
    arguments = (TINY, MODULES, tmp_path / "scratch", tmp_path / "base", torch.device("cpu"))
    with pytest.raises(Killed):
        pretrain.pretrain_base(*arguments)
    assert not (tmp_path / "base").exists()
    pretrain.pretrain_base(*arguments)
    name = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "base" / name).read_bytes() == (trained / "base" / name).read_bytes()


def test_whitened_latents_decode_to_the_same_picture():
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=16, scaling_factor=1.0).eval()
    pictures = (torch.rand(64, 16, 16, 3) * 255).byte().numpy()
    x = pretrain._to_tensor(pictures, torch.device("cpu"))
    with torch.no_grad():
        before = vae.decode(vae.encode(x).latent_dist.mean).sample
        spread = vae.encode(x).latent_dist
        pretrain._whiten(vae, pictures, 0)
        after = vae.encode(x).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.mean.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(after.mean.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-4, rtol=0)
    # The posterior's width is scaled with its mean.
    torch.testing.assert_close(
        (after.std / spread.std).mean(dim=(0, 2, 3)), 1 / spread.mean.std(dim=(0, 2, 3)), atol=1e-4, rtol=1e-3
    )


def test_the_rate_warms_up_holds_and_cools_over_the_last_quarter():
    rates = [_rate(step, steps=400, warmup=100) for step in (0, 99, 250, 300, 350, 399)]
    assert rates == pytest.approx([0.01, 1, 1, 1, 0.5, 0.01])


def test_the_same_captions_give_the_same_tokenizer():
    from lcmlora.data.sources import emoji

    subjects = emoji.subjects(MODULES, ("food-drink",))
    vocabularies = {json.dumps(pretrain.train_tokenizer(subjects, 900).get_vocab(), sort_keys=True) for _ in range(4)}
    assert len(vocabularies) == 1  # or a training that was killed would go on with other meanings of its tokens


def test_the_tokenizer_reads_any_text_and_keeps_to_its_size():
    from lcmlora.data.sources import emoji

    tokenizer = pretrain.train_tokenizer(emoji.subjects(MODULES, ("food-drink",)), 700)
    assert len(tokenizer) <= 700
    assert tokenizer.decode(tokenizer("Grüße, red apple!").input_ids, skip_special_tokens=True).startswith("grüße")
    known, unknown = pretrain.tokenize(tokenizer, ["apple", "qwrtzp"])
    assert (known != tokenizer.pad_token_id).sum() < (unknown != tokenizer.pad_token_id).sum()
