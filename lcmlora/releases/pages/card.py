"""The model card of a release: the hub's front matter with the figures as results, and what a user needs to know.

The front matter follows the hub's specification, modelcard.md of huggingface/hub-docs, and is written by its client.
Everything comes from the files at hand; diffusers' own helper for cards asks the network first.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from lcmlora.adapters.metadata import Distilled
from lcmlora.config import Base
from lcmlora.diffusion import objectives
from lcmlora.evaluation.comparisons.compatibility import Compatibility
from lcmlora.evaluation.figures import STUDENT, Advantage, Key, Metrics
from lcmlora.evaluation.gate import unmeasured_diversity, unmeasured_retrieval
from lcmlora.evaluation.measures.distances import title_of
from lcmlora.releases.bundle import Decision, SamplerCheck
from lcmlora.releases.clients import Student, is_on_hub
from lcmlora.releases.pages.step_counts import step_counts
from lcmlora.releases.pages.usage import markdown, style_weights, usage
from lcmlora.templates.loading import load_template

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


# The identifiers that the hub knows (docs/hub/repositories-licenses.md of huggingface/hub-docs); any other is `other`
# with a `license_name`.
_LICENSES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0
    etalab-2.0 eupl-1.1 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community
    h-research intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
    lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openrail openrail++ osl-3.0 other pddl
    postgresql unknown unlicense wtfpl zlib
"""


def render_card(
    model: str,
    base: Base,
    made: Distilled,
    figures: Metrics,
    gate: Decision,
    kohya: str,
    student: Student,
    check: SamplerCheck | None = None,
    compatibility: Compatibility | None = None,
) -> str:
    """Returns the model card, README.md of the release.

    Args:
        made: the adapter's config.json.
        figures: metrics/MODEL.json; what it does not have is left out.
        gate: its decision, of all numbers of steps.
        kohya: the name of the release's file for ComfyUI and A1111.
        student: in the recommended number of steps, see `recommended_steps`.
        check: how near plain diffusers comes to the adapter's own sampler, if that was measured.
        compatibility: the figures with additions to the base, if they were measured.
    """
    enough = student.steps
    drawing = usage(model, base, student, kohya, weights=style_weights(figures), check=check)
    return load_template("card.md.j2").render(
        front=_front_matter(model, base, made, figures),
        model=model,
        base=base,
        on_hub=is_on_hub(base),
        listed=base.license in _LICENSES.split(),
        made=made,
        method=objectives.described(made.distill.objective),
        figures=figures,
        distance=_distance(figures),
        number=_number(figures),
        advantages=figures.advantage or _advantages(figures),
        steps=[key.steps for key in figures.students],
        enough=enough,
        teacher=figures.teacher,
        unmeasured=unmeasured_retrieval(figures),
        no_diversity=unmeasured_diversity(figures, Key.of(STUDENT, enough)),
        table=_table(figures),
        failures=gate.failures,
        step_counts=step_counts(figures, gate),
        compatibility=compatibility,
        usage="\n\n".join(markdown(part, 3) for part in drawing),
    )


def _front_matter(model: str, base: Base, made: Distilled, figures: Metrics) -> str:
    from huggingface_hub import ModelCardData

    name = None if base.license in _LICENSES.split() else re.sub(r"[^a-z0-9.]+", "-", base.license.lower()).strip("-")
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        # "The value must be the ID of a model on the Hub" (huggingface_hub.ModelCardData).
        base_model=base.source if is_on_hub(base) else None,
        base_model_relation="adapter" if is_on_hub(base) else None,
        license="other" if name else base.license,
        license_name=name,
        tags=["lora", "lcm", "latent-consistency", "text-to-image", "diffusers", made.distill.objective],
        inference=False,
        model_name=f"lcm-lora-{model}",
        eval_results=_results(made, figures),
    ).to_yaml()


def _results(made: Distilled, figures: Metrics) -> list[EvalResult]:
    """Returns the student's figures at each number of steps as the hub's results."""
    from huggingface_hub import EvalResult

    data = {"data_digest": made.data_digest, "seed": figures.seed, "pictures": figures.pictures}
    measured_on = {"prompts": figures.prompts, "reference_digest": figures.reference_digest}
    data |= {key: value for key, value in measured_on.items() if value is not None}
    network = figures.features.name
    excess = (f"excess-{figures.features.distance}", f"Excess {_distance(figures)} to the teacher")
    # The hub's name and title of the metric, the features' network, our name of the metric, its values.
    measures = [
        (*excess, network, "excess", figures.excess),
        ("caption-retrieval", "Caption retrieval@1", network, "retrieval", figures.retrieval),
    ]
    for score, values in figures.scores.items():
        metric, _, network = score.partition("/")
        measures.append((metric, metric, network or metric, score, values))
    results = []
    for metric, title, network, name, values in measures:
        for key in (key for key in figures.students if key in values):
            steps = key.steps
            arguments: dict[str, object] = {"steps": steps, "network_evaluations": figures.network_evaluations[key]}
            if figures.intervals and (interval := figures.interval(name, key)):
                arguments |= {"interval": list(interval), "level": figures.intervals.level}
            if name == "excess":
                arguments["floor"] = figures.floor
            results.append(
                EvalResult(
                    task_type="text-to-image",
                    dataset_type="captions-kept-from-training",
                    dataset_name="Captions kept from training",
                    dataset_split="test",
                    dataset_args=data,
                    metric_type=metric,
                    metric_name=f"{title}, {steps} step{'s' * (steps > 1)} ({network})",
                    metric_value=values[key],
                    metric_config=f"steps={steps},features={network}",
                    metric_args=arguments,
                )
            )
    return results


def _table(figures: Metrics) -> tuple[list[str], list[list[str]]]:
    """Returns the column titles and the rows of the table, the cheapest first; unmeasured cells are empty."""
    latency = {key: value.p50 for key, value in figures.latency.seconds.items()} if figures.latency else {}
    measures = [
        ("excess distance", "excess", figures.excess, _number(figures)),
        ("distance to real pictures", "distance_real", figures.distance_real or {}, _number(figures)),
        ("retrieval@1", "retrieval", figures.retrieval, "{:.3f}".format),
        ("diversity", "diversity", figures.diversity, "{:.3f}".format),
        *((score, score, values, "{:.2f}".format) for score, values in figures.scores.items()),
        ("seconds per picture", "seconds_per_picture", figures.seconds_per_picture, "{:.4f}".format),
        ("one alone, median", "latency", latency, "{:.4f}".format),
    ]
    measures = [measure for measure in measures if measure[2]]
    cost, rows, baselines = figures.network_evaluations, [], figures.baselines
    for key in sorted(cost, key=lambda key: (cost[key], key)):
        settings = [baselines[key].text if key in baselines else figures.count_label(key)] if baselines else []
        row = [key, *settings, str(cost[key])]
        for _, name, values, show in measures:
            bounds = figures.interval(name, key)
            brackets = f" ({show(bounds[0])} to {show(bounds[1])})" if bounds else ""
            row.append(show(values[key]) + brackets if key in values else "")
        rows.append(row)
    return [*(["settings"] if baselines else []), "network evaluations", *(measure[0] for measure in measures)], rows


def _advantages(figures: Metrics) -> dict[Key, Advantage]:
    """Returns `advantage` of figures that were written before there were intervals."""
    excess, cost = figures.excess, figures.network_evaluations
    found = {}
    for student in figures.students:
        if rivals := figures.solvers_at(cost[student]):
            rival = min(rivals, key=excess.__getitem__)
            difference = excess[student] - excess[rival]
            found[student] = Advantage(rival=rival, network_evaluations=cost[student], difference=difference)
    return found


def _distance(figures: Metrics) -> str:
    return title_of(figures.features.distance)


def _number(figures: Metrics) -> Callable[[float], str]:
    # Distances are hundreds with some features and thousandths with others.
    return ("{:.2f}" if max(map(abs, figures.excess.values())) >= 10 else "{:.4f}").format
