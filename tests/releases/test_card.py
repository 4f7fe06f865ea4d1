import copy
import html
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.utils import validate_repo_id

from lcmlora.adapters.metadata import Distilled, read_sampler
from lcmlora.config import Base, Merged
from lcmlora.evaluation.comparisons.compatibility import Compatibility
from lcmlora.evaluation.figures import Metrics
from lcmlora.releases.bundle import Decision
from lcmlora.releases.clients import Student, recommended_steps
from lcmlora.releases.pages.card import render_card
from tests.support import client_schedules, reports
from tests.support.releases import ADDITIONS, METRICS
from tests.support.reports import searched

FILE = "lcm-lora-mini.safetensors"
HUB = Base(source="someone/base", revision="c" * 40, resolution=512, license="openrail++")
FOLDER = Base(source="bases/mini", resolution=64, license="apache-2.0")
MADE: dict[str, Any] = {
    "model": "mini",
    "base": {"source": "someone/base", "revision": "c" * 40, "digest": "b" * 64},
    "versions": {"torch": "2.13.0"},
    "data_digest": "d" * 64,
    "pictures": 100,
    "distill": {"objective": "lcm", "batch": 16, "lr": 1e-4, "w_min": 4.0, "w_max": 4.0, "rank": 64},
    "steps": 600,
    "sampler": {"scheduler": "LCMScheduler", "gamma": None, "grid": 50},
    "validation": {"pictures": 24, "loss": {"300": 0.25, "600": 0.2}, "best_step": 600},
    "final_loss": 0.0123,
    "seed": 0,
    "adapted_layers": 278,
    "lora_parameters": 67_252_224,
    "prediction_type": "epsilon",
}
KEYS = list(METRICS["network_evaluations"])
FULL: dict[str, Any] = METRICS | {
    "prompts": 45,
    "real_pictures": 500,
    "reference_digest": "e" * 64,
    "distance_real": dict.fromkeys(KEYS, 321.5),
    "distance_real_missing": None,
    "intervals": {
        "level": 0.95,
        "resamples": 200,
        "excess": {"student@2": [9.0, 11.0], "student@4": [4.0, 5.0]},
        "retrieval": {"student@4": [0.8, 0.9]},
    },
    "advantage": {
        "student@2": {"rival": "ddim@1", "network_evaluations": 2, "difference": -275.0, "interval": [-300.0, -250.0]},
        "student@4": {"rival": "dpm++@2", "network_evaluations": 4, "difference": -88.5, "interval": [-90.0, 1.0]},
    },
    "diversity": {"student@4": 0.25, "teacher@50": 0.375, "real": 0.5},
    "latency": {
        "seconds": {"student@4": {"p50": 0.0625, "p95": 0.125}},
        "repeats": 20,
        "batch": 1,
        "device": "cpu",
        "threads": 2,
    },
    "scores": {"clip-score/ViT-L-14": {"student@4": 21.5, "teacher@50": 23.25}},
    "guidance": {
        "steps": 4,
        "scales": [1, 3],
        "network_evaluations": [4, 8],
        "excess": [4.5, 60.25],
        "retrieval": [0.85, 0.8],
        "diversity": [0.25, 0.2],
    },
    "variations": {
        "ink": {
            "kind": "style",
            "pictures": 512,
            "real_pictures": 500,
            "seed": 1001,
            "distance_real": {"accelerated@4": 512.25, "alone/ddim@2": 830.5},
            "retrieval": {"accelerated@4": 0.5, "alone/ddim@2": 0.25},
            "network_evaluations": {"accelerated@4": 4, "alone/ddim@2": 4},
            "weights": [0.7, 1.0],
            "claims": [
                {
                    "claim": "closer to the style than its best solver",
                    "evaluations": 4,
                    "accelerated": 512.25,
                    "other": 830.5,
                    "other_key": "alone/ddim@2",
                    "difference": -318.25,
                    "interval": [-350.0, -290.0],
                    "holds": True,
                }
            ],
        }
    },
    "weights": None,
}


def render(
    base: Base = HUB,
    figures: dict[str, Any] = METRICS,
    failures: tuple[str, ...] = (),
    compatibility: Compatibility | None = None,
    by_steps: dict[str, list[str]] | None = None,
    **made: Any,
) -> str:
    distilled, metrics = Distilled.parse(MADE | made, "config.json"), Metrics.parse(figures, "metrics.json")
    sampler = read_sampler(distilled.sampler.plain(), "config.json")
    gate = Decision(passed=not failures, failures=list(failures), by_steps=by_steps)
    by_count = {int(count): reasons for count, reasons in (by_steps or {}).items()}
    schedule = client_schedules.schedule(distilled.prediction_type)
    student = Student.of(sampler, schedule, recommended_steps(metrics, by_count))
    return render_card("mini", base, distilled, metrics, gate, FILE, student, compatibility=compatibility)


def drawn_with(objective: str, scheduler: str, gamma: float | None, prediction: str = "epsilon") -> str:
    return render(
        distill=MADE["distill"] | {"objective": objective},
        sampler={"scheduler": scheduler, "gamma": gamma, "grid": 50},
        prediction_type=prediction,
    )


def section(text: str, title: str) -> str:
    return text.split(f"# {title}\n")[1].split("\n#")[0]


def results(text: str) -> dict[tuple[str, int], EvalResult]:
    """Returns the results that the hub's own parser finds, by metric and steps."""
    return {(found.metric_type, found.metric_args["steps"]): found for found in ModelCard(text).data.eval_results}


@pytest.mark.parametrize("figures", [METRICS, FULL], ids=["old figures", "full figures"])
def test_the_hubs_parser_finds_every_figure_of_the_student_without_a_network(figures: dict[str, Any], monkeypatch):
    monkeypatch.setattr("socket.socket", lambda *_, **__: pytest.fail("the card was asking the network"))
    data = ModelCard(render(figures=figures)).data
    assert data.model_name == "lcm-lora-mini"
    found = results(render(figures=figures))
    for steps in (2, 4):
        assert found["excess-frechet", steps].metric_value == figures["excess"][f"student@{steps}"]
        assert found["caption-retrieval", steps].metric_value == figures["retrieval"][f"student@{steps}"]
    assert {name for name, _ in found} == {"excess-frechet", "caption-retrieval"} | (
        {"clip-score"} if figures is FULL else set()
    )
    assert {result.task_type for result in found.values()} == {"text-to-image"}


@pytest.mark.parametrize(
    ("captions", "text"),
    [(None, "seeds alone"), (1, "seeds alone, since there is one caption"), (45, "captions and seeds")],
)
def test_the_card_says_how_many_captions_there_were_and_whether_they_were_resampled(captions: int | None, text: str):
    intervals = FULL["intervals"] | {"captions": captions}
    card = render(figures=FULL | {"prompts": captions, "intervals": intervals})
    drawn = {None: "512 pictures for", 1: "512 pictures of 1 caption for", 45: "512 pictures of 45 captions for"}
    assert f"\n{drawn[captions]} each row; training never saw the captions." in card
    assert f"95 % intervals, from 200 bootstrap resamples of {text}." in card


def test_a_result_says_how_it_was_measured():
    result = results(render(figures=FULL))["excess-frechet", 4]
    assert result.metric_name == "Excess Fréchet distance to the teacher, 4 steps (efficientnet-lite0)"
    assert result.metric_config == "steps=4,features=efficientnet-lite0"
    assert result.metric_args == {
        "steps": 4,
        "network_evaluations": 4,
        "interval": [4.0, 5.0],
        "level": 0.95,
        "floor": 78.0,
    }
    assert (result.dataset_name, result.dataset_split) == ("Captions kept from training", "test")
    assert result.dataset_args["data_digest"] == "d" * 64
    assert result.dataset_args["reference_digest"] == "e" * 64
    score = results(render(figures=FULL))["clip-score", 4]
    assert (score.metric_value, score.metric_config) == (21.5, "steps=4,features=ViT-L-14")


def test_another_distance_is_called_by_its_name_and_small_ones_keep_their_digits():
    figures = copy.deepcopy(METRICS)
    figures["features"]["distance"] = "cmmd"
    figures["excess"] = {key: value / 1000 for key, value in METRICS["excess"].items()}
    text = render(figures=figures)
    assert results(text)["excess-cmmd", 4].metric_value == 0.0045
    assert "| student@4 | 4 | 0.0045 | 0.850 |" in text
    assert "Fréchet" not in text


def test_a_base_on_the_hub_is_the_cards_base_model():
    data = ModelCard(render(HUB)).data
    assert (data.base_model, data.base_model_relation) == ("someone/base", "adapter")
    assert (data.library_name, data.pipeline_tag) == ("diffusers", "text-to-image")
    assert {"lora", "lcm", "latent-consistency", "text-to-image", "diffusers"} <= set(data.tags)


@pytest.mark.parametrize("source", ["bases/mini", "/models/mini", "models/mini.safetensors"])
def test_a_local_base_is_told_in_words_even_where_it_looks_like_a_hub_id(source: str):
    validate_repo_id("bases/mini")  # so that the form alone does not tell
    revision = "c" * 40 if source.endswith(".safetensors") else None  # of its configurations, not of the file
    text = render(Base(source=source, revision=revision, resolution=64, license="mit"))
    facts = ModelCard(text).data.to_dict()
    assert not {"base_model", "base_model_relation"} & set(facts)
    assert f"`{source}`" in text
    assert "takes hub ids only" in text
    loaded = "bases/mini" if revision else source
    assert f'DiffusionPipeline.from_pretrained("{loaded}")\n' in text


@pytest.mark.parametrize(
    ("license", "facts"),
    [
        ("openrail++", {"license": "openrail++"}),
        ("creativeml-openrail-m", {"license": "creativeml-openrail-m"}),
        ("Our Own (v1.0)", {"license": "other", "license_name": "our-own-v1.0"}),
    ],
)
def test_a_licence_is_the_hubs_or_other_with_a_name(license: str, facts: dict[str, str]):
    text = render(HUB.model_copy(update={"license": license}))
    found = ModelCard(text).data.to_dict()
    assert {key: value for key, value in found.items() if key.startswith("license")} == facts
    assert f"That of the base, `{license}`" in text


@pytest.mark.parametrize(
    ("objective", "scheduler", "gamma", "prediction", "programs"),
    [
        ("lcm", "LCMScheduler", None, "epsilon", {
            "ComfyUI": ["`ModelSamplingDiscrete` with sampling `lcm`", "sampler_name `lcm`, scheduler `simple`"],
            "A1111 from 1.10, Forge": ["Sampling method `LCM`, schedule type `Simple`"],
            "A1111 1.9": ["Sampling method `LCM`, schedule type `SGM Uniform`", "Near, not exact"],
            "InvokeAI": ["Scheduler `lcm`"],
        }),
        ("lcm", "LCMScheduler", None, "v_prediction", {
            "ComfyUI": ["sampling `v_prediction`", "sampler_name `lcm`"],
            "A1111 from 1.10, Forge": ["Sampling method `Euler a`"],
        }),
        ("tcd", "TCDScheduler", 0.3, "epsilon", {
            "ComfyUI with JettHu/ComfyUI-TCD": ["eta 0.3", "exactly the adapter's own"],
            "ComfyUI without further nodes": ["`SamplerEulerAncestral` (eta 0.8", "Near, not exact"],
            "A1111 from 1.10, Forge": ["Sampling method `Euler a`, schedule type `Simple`"],
        }),
        ("pcm", "TCDScheduler", 0.0, "epsilon", {"ComfyUI": ["sampler_name `euler`"]}),
    ],
)  # fmt: skip
def test_every_program_has_the_sampler_that_goes_with_the_adapter(
    objective: str, scheduler: str, gamma: float | None, prediction: str, programs: dict[str, list[str]]
):
    text = drawn_with(objective, scheduler, gamma, prediction)
    for program, words in programs.items():
        found = section(text, program)
        assert f"`{FILE}`" in found
        for each in words:
            assert each in found, program
    assert "steps 4" in text and "<lora:lcm-lora-mini:1>" in text
    assert "for this release, only diffusers was run" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"source": "someone/base", "revision": "c" * 40, "variant": "fp16"},
        {"source": "checkpoints/mini.safetensors"},
        {"style": Merged(source="ink.safetensors", weight=0.7)},
    ],
)
def test_report_and_card_have_the_same_text_on_every_way_to_draw(changes: dict[str, Any], tmp_path: Path):
    base, figures = reports.BASE.model_copy(update=changes), reports.minimal()
    page = reports.render(figures, reports.write_pictures(tmp_path), base=base)
    code = re.findall(r"<pre><code>(from diffusers.*?)</code>", page, re.S)
    objective = {"sampler": reports.provenance()["sampler"], "distill": MADE["distill"] | {"objective": "tcd"}}
    card = render(base, figures, **objective)
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    assert [html.unescape(each) for each in code] == [each.rstrip() for each in blocks if each.startswith("from diff")]
    titles = re.findall(r"^#{3,4} (.*)$", card.partition("## Use")[2].partition("## Figures")[0], re.M)
    assert set(titles) <= set(re.findall(r"<(?:summary|h3)>(.*?)</", html.unescape(page).replace("\u2019", "'")))


def test_the_fewest_steps_within_the_gate_are_recommended_and_the_others_say_why_not(tmp_path: Path):
    figures = Metrics.parse(FULL, "metrics.json")
    assert recommended_steps(figures, {2: [], 4: []}) == 2
    assert recommended_steps(figures, {2: ["too far"], 4: []}) == 4
    assert recommended_steps(figures, {2: ["too far"], 4: ["too far"]}) == recommended_steps(figures, {})
    verdicts, title = {"2": ["student@2: a|b", "student@2: c"], "4": []}, "What each number of steps is good for"
    body = section(render(figures=FULL, by_steps=verdicts), title)
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert [row.strip("| ").split(" | ")[0] for row in rows[1:]] == ["2", "4"]
    assert rows[1].endswith("| no: a&#124;b; and 1 more |") and rows[2].endswith("| yes |")
    assert "draw in 4 steps unless told otherwise, the fewest within the gate" in body
    figures_of_report, folder = reports.whole(), reports.write_pictures(tmp_path)
    gate = {"passed": True, "failures": [], "by_steps": verdicts}
    page = html.unescape(reports.render(figures_of_report, folder, gate=gate, recommended_steps=4))
    assert (
        title in page and "no<small>a|b; and 1 more</small>" in page and "draw in 4 steps unless told otherwise" in page
    )
    # Where the gate looked at one number alone.
    assert title not in render() and title not in reports.render(figures_of_report, folder)


def test_steps_and_strength_are_told_for_the_recommended_steps():
    assert "round up: 8 for 4 at 0.5" in section(render(), "img2img and inpainting")


@pytest.mark.parametrize(
    ("base", "arguments"),
    [
        (HUB, ""),
        (HUB.model_copy(update={"variant": "fp16"}), 'variant="fp16"'),
        (FOLDER, 'base_model="bases/mini"'),
    ],
)
def test_mlflow_is_told_the_base_and_the_scheduler(base: Base, arguments: str):
    lines = section(render(base), "MLflow").splitlines()
    assert 'adapter = mlflow.diffusers.load_model("models:/lcm-lora-mini@champion")' in lines
    assert f"pipe = adapter.load_pipeline({arguments})" in lines
    assert "pipe.scheduler = LCMScheduler.from_pretrained(adapter.adapter_path)" in lines


def test_the_table_has_a_column_for_everything_that_was_measured():
    body = section(render(figures=FULL), "Figures")
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert rows[0] == (
        "| | network evaluations | excess distance | distance to real pictures | retrieval@1 | diversity | "
        "clip-score/ViT-L-14 | seconds per picture | one alone, median |"
    )
    student = (
        "| student@4 | 4 | 4.50 (4.00 to 5.00) | 321.50 | 0.850 (0.800 to 0.900) | 0.250 | 21.50 | 0.0200 | 0.0625 |"
    )
    assert student in rows
    assert {line.count("|") for line in rows} == {10}


def test_the_advantage_is_said_with_its_interval_and_doubted_where_that_holds_zero():
    body = section(render(figures=FULL), "Figures")
    assert "* student@2 against ddim@1, 2 evaluations: excess lower by 275.00 (difference -300.00 to -250.00)\n" in body
    assert "excess lower by 88.50 (difference -90.00 to 1.00; it may be none)\n" in body


def test_solvers_stand_with_their_settings_and_all_comparisons_are_told():
    body = section(render(figures=searched()), "Figures")
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert rows[0].startswith("| | settings | network evaluations | excess distance | distance to real pictures |")
    assert "| dpm++@4 | 4 steps, unguided | 4 | 290.00 | 790.00 |" in "\n".join(rows)
    assert "| student@4 | 4 steps | 4 | 81.00 (70.00 to 92.00) | 610.00 (580.00 to 640.00) |" in "\n".join(rows)
    assert len({line.count("|") for line in rows}) == 1
    assert "validation captions and other seeds." in body
    assert "* student@4 against dpm++@4 (4 steps, unguided), 4 evaluations: excess lower by 209.00" in body
    assert "* student@4 against dpm++@4 (4 steps, unguided): excess lower by 200.00" in body
    assert "2.1 (1.9 to 2.4) for student@4. Below 1 the solvers are nearer" in body
    assert "* student@4: ranked against the best solver as by the first features (excess 0.75, best solver 3, " in body
    assert "Of 29 captions, student@4 is farthest from the teacher at wombat; report.html shows them." in body
    assert (
        "(`evaluation.prompts`, 512 pictures of 2 captions), the excess is 66.00 for student@4 (best solver 99.00)."
        in body
    )


def test_the_advantage_of_old_figures_is_that_over_the_best_solver_at_as_many_evaluations():
    figures = copy.deepcopy(METRICS)
    figures["excess"] |= {"unipc@2": 2.5}
    figures["network_evaluations"] |= {"unipc@2": 4}
    body = section(render(figures=figures), "Figures")
    assert "* student@2 against ddim@1, 2 evaluations: excess lower by 275.00\n" in body
    assert "* student@4 against unipc@2, 4 evaluations: excess higher by 2.00\n" in body


@pytest.mark.parametrize(
    ("two", "enough"),
    [
        ([9.0, 11.0], "4 steps, the most that were drawn, were the best"),
        ([4.0, 16.0], "More than 2 are not worth it: the excess is 10.00 there and 4.50 at 4"),
    ],
    ids=["below the interval", "within the interval"],
)
def test_the_steps_that_are_worth_it_follow_from_the_figures(two: list[float], enough: str):
    figures = copy.deepcopy(FULL)
    figures["intervals"]["excess"]["student@2"] = two
    text = render(figures=figures)
    assert enough in section(text, "Limits")
    assert f"num_inference_steps={2 if two[0] < 4.5 else 4}," in text


def test_the_limits_say_what_was_measured_and_what_was_not():
    measured, old = section(render(figures=FULL), "Limits"), section(render(), "Limits")
    assert "Fewer cost quality: 10.00 at 2." in measured
    assert "scale 3 costs 8 evaluations and gives excess 60.25." in measured
    assert "differ by 0.250 at student@4, the teacher's by 0.375, real ones by 0.500" in measured
    assert "it was not measured for this one" in old
    assert "**Diversity** of seeds was not measured: the figures have none." in old
    assert "student@4 finds its caption 94 % as often as teacher@50" in old


def test_styles_have_a_table_of_claims_and_their_measured_weight_in_the_snippet():
    text = render(figures=FULL)
    assert (
        "| ink | style | closer to the style than its best solver | 4 | 512.25 | 830.50 (alone/ddim@2) | "
        "-318.25 (-350.00 to -290.00) | yes |"
    ) in text
    assert 'pipe.set_adapters(["lcm", "style"], [1.0, 0.7])' in text
    doubtful = copy.deepcopy(FULL)
    doubtful["variations"]["ink"]["claims"][0]["interval"] = [-650.0, 10.0]
    assert "(-650.00 to 10.00) | within chance |" in render(figures=doubtful)
    assert "### Styles" not in render()


def test_a_distance_to_real_pictures_is_told_or_why_there_is_none():
    assert "to 500 real pictures is 321.50 for student@4 and 321.50 for teacher@50" in render(figures=FULL)
    assert "no distance to real pictures: 24 real test pictures are too few" in render()


@pytest.mark.parametrize("figures", [METRICS, FULL], ids=["old figures", "full figures"])
@pytest.mark.parametrize("failures", [(), ("too bad",)])
def test_the_card_is_tidy_markdown(figures: dict[str, Any], failures: tuple[str, ...]):
    text = render(FOLDER, figures, failures)
    assert text.startswith("---\n")
    assert text.endswith(".\n")
    assert "\n\n\n" not in text
    assert not [line for line in text.split("---\n", 2)[2].splitlines() if line != line.strip() and line[:3] != "   "]
    assert "[report.html](report.html)" in text
    assert ("* too bad" in text) == bool(failures) == ("The gate was not passed" in text)


def test_additions_are_in_a_table_and_those_that_failed_are_named():
    text = render(compatibility=ADDITIONS)
    rows = section(text, "Together with what people add to the base").splitlines()
    table = [row for row in rows if row.startswith("|")]
    assert table == [
        "| | 2 steps | 4 steps |",
        "|---|---:|---:|",
        "| nothing added | 186.00 (150.00 to 220.00) | 88.00 |",
        "| style LoRA ink, weight 1 | 200.00 | 300.00 (250.00 to 350.00) **failed** |",
        "| VAE in fp16 | **failed** | **failed** |",
    ]
    assert "* style LoRA ink, weight 1, student, 4 steps: excess 300 is more than 2 times the 88." in rows
    assert "* img2img 0.4 was not tried: the data are prompts, without real pictures." in rows
    assert "\n\n\n" not in text
    assert "Together with" not in render()


def test_an_adapter_of_a_styled_base_is_shown_with_its_style():
    text = render(HUB.model_copy(update={"style": Merged(source="loras/ink.safetensors", weight=0.8)}))
    assert "with the style `loras/ink.safetensors` at weight 0.8" in text
    use = section(text, "diffusers")
    assert use.count("```python") == 1
    assert 'pipe.load_lora_weights("loras/ink.safetensors", adapter_name="style")' in use
    assert 'pipe.set_adapters(["lcm", "style"], [1.0, 0.8])' in use


def test_without_real_pictures_retrieval_is_among_the_teachers():
    assert "nearest real picture is one" in render()
    assert "nearest picture of the teacher's, from further seeds, is one" in render(
        figures=METRICS | {"real_pictures": 0}
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"retrieval": METRICS["retrieval"] | {"teacher@50": 0.0}}, "teacher@50 meets none of its captions"),
        ({"retrieval": dict.fromkeys(METRICS["retrieval"], 0.0)}, "teacher@50 meets none of its captions"),
        ({"prompts": 1}, "there is one caption, which every picture has"),
    ],
)
def test_retrieval_that_says_nothing_is_told_as_not_measured(changes: dict[str, Any], reason: str):
    text = render(figures=FULL | changes)
    assert f"How often captions are met was not measured: {reason} (retrieval" in text
    assert "% as often as" not in text and "% as often as" in render(figures=FULL)


@pytest.mark.parametrize("value", [0.0, 1e-12])
def test_figures_that_are_all_alike_make_a_card(value: float):
    alike = {name: dict.fromkeys(FULL[name], value) for name in ("excess", "retrieval", "diversity")}
    alike |= {"floor": value, "seconds_per_picture": dict.fromkeys(FULL["seconds_per_picture"], value)}
    alike["latency"] = FULL["latency"] | {"seconds": {"student@4": {"p50": value, "p95": value}}}
    assert f"| student@4 | 4 | {value:.4f}" in render(figures=FULL | alike)
