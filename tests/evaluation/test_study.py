"""The adapter added to a style and to a fine-tuned checkpoint of the miniature base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lcmlora import bases
from lcmlora.adapters import lora
from lcmlora.config import Data, Study
from lcmlora.diffusion.solver_settings import SolverSettings
from lcmlora.errors import UserError
from lcmlora.evaluation.image_sets import ImageSets, StudentSettings
from lcmlora.evaluation.measures.distances import Frechet
from lcmlora.evaluation.study import Variation, draw_alone, run_study
from lcmlora.io.files import sha256_file
from tests.evaluation.conftest import CPU, Quarters, made_of, settings, write_adapter
from tests.support.miniature import RESOLUTION

pytestmark = pytest.mark.usefixtures("small_features")

SOLVERS = {"alone/dpm++@1", "alone/dpm++@2", "alone/ddim@2"}
STUDENTS = {"accelerated@1", "accelerated@4"}


def asked(**changes: Any) -> Study:
    values: dict[str, Any] = {
        "models": ("mini",), "styles": ("ink",), "finetunes": ("clay",), "pictures": 24, "weights": (0.8, 1.0),
        "solver_steps": (1, 2), "student_steps": (1, 4), "steps": 4, "guidance_scales": (2.0,),
        "grid_style_weights": (0.0, 0.8), "grid_adapter_weights": (0.5, 1.0),
    }  # fmt: skip
    return Study(**values | changes)


Load = Callable[[Path | None], bases.LoadedBase]


@pytest.fixture(scope="module")
def load(base_folder: Path) -> Load:
    return lambda folder: bases.load("mini", made_of(base_folder), folder or base_folder, device=CPU)


@pytest.fixture(scope="module")
def variations(
    small_features: None, base_folder: Path, data: Data, load: Load, tmp_path_factory: pytest.TempPathFactory
) -> list[Variation]:
    """A style's adapter and a checkpoint whose UNet was changed, each drawn alone."""
    root = tmp_path_factory.mktemp("variations")
    write_adapter(base_folder, root / "styles" / "ink", seed=7)
    shutil.copytree(base_folder, root / "finetunes" / "clay")
    weights = root / "finetunes" / "clay" / "unet" / "diffusion_pytorch_model.safetensors"
    generator = torch.Generator().manual_seed(1)
    changed = {k: v + 0.02 * torch.randn(v.shape, generator=generator) for k, v in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    found = [
        Variation("style", "ink", root / "styles" / "ink", root / "alone" / "ink"),
        Variation("finetune", "clay", root / "finetunes" / "clay", root / "alone" / "clay"),
    ]
    for v in found:
        base = load(v.folder if v.kind == "finetune" else None)
        draw_alone(base, v.kind, v.folder, data, asked(), settings(), root / "scratch", v.alone)
    return found


def run(load: Load, adapter: Path, variations: list[Variation], reference: Path, **changes: Any) -> dict[str, Any]:
    """Studies into the folder in which the adapter lies."""
    root = adapter.parent
    scratch = root / "studying"
    scratch.mkdir(exist_ok=True)
    found = run_study(load, adapter, variations, asked(**changes), settings(), reference, scratch, root / "study")
    return json.loads(json.dumps(found.plain()))  # type: ignore[no-any-return]


def test_a_style_is_drawn_alone_by_every_solver_at_equal_cost_and_beside_its_own_pictures(
    variations: list[Variation], load: Load
) -> None:
    ink = variations[0].alone
    facts = json.loads((ink / "alone.json").read_text())
    sets = load_file(ink / "features.safetensors")
    assert set(sets) == SOLVERS | {"real", "gallery"}
    assert all(sets[key].shape == (24, 12) for key in SOLVERS)
    assert facts["network_evaluations"] == {"alone/dpm++@1": 2, "alone/dpm++@2": 4, "alone/ddim@2": 4}
    base = load(None)
    image_sets = ImageSets(base, Quarters(CPU), facts["prompts"], 24, 8, 3)
    plain = image_sets.draw("plain", SolverSettings.of("ddim", 2, 4.0), facts["seed"]).features
    lora.load(base.network, variations[0].folder / lora.WEIGHTS)
    styled = image_sets.draw("styled", SolverSettings.of("ddim", 2, 4.0), facts["seed"]).features
    torch.testing.assert_close(sets["alone/ddim@2"].float(), styled.float(), atol=0.05, rtol=0)
    assert (plain - styled).abs().max() > 0.1


def test_the_figures_of_a_style_are_those_of_the_sum_of_both_adapters(
    variations: list[Variation], load: Load, adapter: Path, reference: Path
) -> None:
    figures = run(load, adapter, variations, reference)
    ink = figures["variations"]["ink"]
    assert set(ink["distance_real"]) == SOLVERS | STUDENTS | {"adapter@4"} == set(ink["network_evaluations"])
    assert ink["network_evaluations"]["accelerated@4"] == 4 == ink["network_evaluations"]["alone/dpm++@2"]
    assert (ink["kind"], ink["pictures"], ink["weights"]) == ("style", 24, [0.8, 1.0])

    base = load(None)  # PEFT's own way of adding two adapters up
    for name, path in (("lcm", adapter), ("style", variations[0].folder)):
        tensors = {k.removeprefix("unet."): v for k, v in load_file(path / lora.WEIGHTS).items()}
        base.network.load_lora_adapter(tensors, prefix=None, adapter_name=name)
    base.network.set_adapters(["lcm", "style"], [1.0, 0.8])
    facts = json.loads((variations[0].alone / "alone.json").read_text())
    image_sets = ImageSets(base, Quarters(CPU), facts["prompts"], 24, 8, 3)
    drawn = image_sets.draw("both", StudentSettings(4), facts["seed"]).features
    real = load_file(variations[0].alone / "features.safetensors")["real"]
    assert ink["distance_real"]["accelerated@4"] == pytest.approx(Frechet().between(real, drawn), rel=0.02)

    first, second = ink["claims"]
    alone = min(("alone/dpm++@2", "alone/ddim@2"), key=ink["distance_real"].__getitem__)
    assert first["other_key"] == alone and second["other_key"] == "adapter@4"
    for claim in (first, second):
        assert claim["difference"] == ink["distance_real"]["accelerated@4"] - ink["distance_real"][claim["other_key"]]
        assert claim["holds"] == (claim["difference"] < 0)
        assert claim["interval"][0] < claim["difference"] < claim["interval"][1]


def test_a_checkpoint_is_accelerated_by_the_adapter_as_it_is(
    variations: list[Variation], load: Load, adapter: Path, reference: Path
) -> None:
    clay = run(load, adapter, variations, reference)["variations"]["clay"]
    assert set(clay["distance_real"]) == SOLVERS | STUDENTS
    assert clay["weights"] == [None, 1.0] and len(clay["claims"]) == 1
    tuned = load(variations[1].folder)
    lora.load(tuned.network, adapter / lora.WEIGHTS)
    facts = json.loads((variations[1].alone / "alone.json").read_text())
    image_sets = ImageSets(tuned, Quarters(CPU), facts["prompts"], 24, 8, 3)
    drawn = image_sets.draw("tuned", StudentSettings(4), facts["seed"]).features
    real = load_file(variations[1].alone / "features.safetensors")["real"]
    assert clay["distance_real"]["accelerated@4"] == pytest.approx(Frechet().between(real, drawn), rel=0.02)


def test_guidance_and_weights_are_swept_and_pictured(
    variations: list[Variation], load: Load, adapter: Path, reference: Path
) -> None:
    figures = run(load, adapter, variations, reference)
    assert figures["guidance"]["scales"] == [1.0, 2.0] and figures["guidance"]["network_evaluations"] == [4, 8]
    assert len(figures["guidance"]["excess"]) == len(figures["guidance"]["retrieval"]) == 2
    weights = figures["weights"]
    assert (weights["style"], weights["steps"], weights["pictures"]) == ("ink", 4, 20)
    assert [len(row) for row in weights["distance_real"]] == [2, 2]
    values = {value for row in weights["distance_real"] for value in row}
    assert len(values) == 4  # every pair of weights draws other pictures
    folder = adapter.parent / "study"
    assert json.loads((folder / "study.json").read_text()) == figures
    assert figures["adapter"] == sha256_file(adapter / lora.WEIGHTS)
    with Image.open(folder / "pictures" / "weights.png") as sheet:
        assert sheet.size == (2 * RESOLUTION, 2 * RESOLUTION)
    ink = {path.stem for path in (folder / "pictures" / "ink").glob("*.png")}
    assert ink == {key.replace("/", "-") for key in SOLVERS | STUDENTS | {"adapter@4", "real"}}
    assert {p.name for p in (folder / "pictures").glob("guidance@*")} == {"guidance@1.png", "guidance@2.png"}


def test_a_killed_study_goes_on_and_draws_nothing_twice(
    variations: list[Variation], load: Load, adapter: Path, reference: Path, base_folder: Path
) -> None:
    rows: list[int] = []
    limit = [10**9]

    def counting(folder: Path | None) -> bases.LoadedBase:
        loaded = load(folder)

        def count(_: Any, arguments: Any) -> None:
            rows.append(len(arguments[0]))
            if sum(rows) > limit[0]:
                raise KeyboardInterrupt

        loaded.network.register_forward_pre_hook(count)
        return loaded

    expected = run(counting, adapter, variations, reference)
    whole = sum(rows)
    rows.clear()
    limit[0] = whole // 2
    with pytest.raises(KeyboardInterrupt):
        run(counting, adapter, variations, reference)
    assert not (adapter.parent / "studying").exists() or any((adapter.parent / "studying").iterdir())
    limit[0] = 10**9
    assert run(counting, adapter, variations, reference) == expected
    assert whole <= sum(rows) <= whole + 8 * 8  # at most the batch in which it was killed is begun again


def test_after_a_study_the_base_is_bare_again_to_the_bit(
    variations: list[Variation], load: Load, adapter: Path, reference: Path
) -> None:
    base = load(None)
    before = {name: value.clone() for name, value in base.network.state_dict().items()}
    run(lambda folder: load(folder) if folder else base, adapter, variations, reference)
    after = base.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_too_few_real_pictures_and_other_features_are_refused_by_name(
    variations: list[Variation], load: Load, adapter: Path, reference: Path, data: Data,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(Path(data.path).iterdir())[:32]:
        shutil.copy(path, few / path.name)
    scarce = data.model_copy(update={"path": str(few)})
    with pytest.raises(UserError, match=r"real test pictures are too few for 12 dimensions; give it more"):
        draw_alone(
            load(None), "style", variations[0].folder, scarce, asked(), settings(), tmp_path / "s", tmp_path / "o"
        )
    with pytest.raises(UserError, match=r"study.pictures: 12 are too few.*at least 13"):
        few_asked = asked(pictures=12)
        draw_alone(
            load(None), "style", variations[0].folder, data, few_asked, settings(), tmp_path / "s", tmp_path / "o"
        )
    monkeypatch.setattr(Quarters, "name", "halves/6")
    with pytest.raises(UserError, match="was drawn with quarters/12, and this study has halves/6"):
        run(load, adapter, variations, reference, guidance_scales=())
