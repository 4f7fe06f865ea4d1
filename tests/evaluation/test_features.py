from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from lcmlora.errors import UserError
from lcmlora.evaluation import features

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def efficientnet() -> features.Features:
    return features.load("efficientnet-lite0", CPU)


def test_efficientnet_features_are_what_its_head_reads(efficientnet: features.Features) -> None:
    pictures = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    model = efficientnet._model  # type: ignore[attr-defined]
    hook = model._conv_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model((pictures * 255 - 127) / 128)
    hook.remove()
    vectors = efficientnet(pictures)
    assert vectors.shape == (2, efficientnet.dimensions) == (2, 320)
    torch.testing.assert_close(vectors, seen[0].mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)


def test_features_do_not_depend_on_batch_and_hardly_on_resolution(efficientnet: features.Features) -> None:
    smooth = torch.nn.functional.interpolate(
        torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)), size=256, mode="bicubic"
    ).clamp(0, 1)
    vectors = efficientnet(smooth)
    torch.testing.assert_close(vectors[1:2], efficientnet(smooth[1:2]), rtol=1e-3, atol=1e-3)
    small = efficientnet(torch.nn.functional.avg_pool2d(smooth, 2))
    apart = (vectors[0] - vectors[1]).norm()
    assert (vectors - small).norm(dim=1).max() < 0.1 * apart


def test_a_missing_package_is_named_with_the_extra_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"lcmlora\[emoji\]"):
        features.load("efficientnet-lite0", CPU)


def test_unknown_features_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="no features 'dino'; there are efficientnet-lite0"):
        features.load("dino", CPU)
