"""The results of a study as the tables of docs/universal.md: python -m benchmarks.universal [emoji]

Reads study/MODEL/study.json, which `dvc repro study@MODEL` writes where params.yaml has the model under `study.models`.
Writes docs/universal.json and the tables in docs/universal.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import origins, tables
from lcmlora.evaluation.figures import Study
from lcmlora.evaluation.study import STUDY
from lcmlora.io.files import write_json
from lcmlora.project import Project


def at_equal_cost(variations: dict[str, Any]) -> str:
    """Returns distance and retrieval at the number of evaluations that the claims are about."""
    rows = []
    for name, facts in variations.items():
        first = facts["claims"][0]
        steps, solver = first["evaluations"], first["other_key"]
        best = f"{_cell(facts, solver)} ({solver.removeprefix('alone/')})"
        holds = "no" if not all(claim["holds"] for claim in facts["claims"]) else "yes"
        if holds == "yes" and any(claim["interval"][1] >= 0 for claim in facts["claims"]):
            holds = "within chance"
        own, without = (_cell(facts, f"{part}@{steps}") for part in ("accelerated", "adapter"))
        rows.append([name, facts["kind"], own, best, without, holds])
    head = ["", "kind", "accelerated", "alone, best solver", "adapter without the style", "accelerated is closest"]
    return tables.markdown(head, rows, words=6)


def _cell(facts: dict[str, Any], key: str) -> str:
    if key not in facts["distance_real"]:
        return ""
    low, high = facts["intervals"][key]
    return f"{facts['distance_real'][key]:.0f} ({low:.0f} to {high:.0f}), {facts['retrieval'][key]:.3f}"


def by_cost(variations: dict[str, Any]) -> str:
    """Returns the distances at every number of evaluations: the paper's Figure 3 as numbers."""
    costs = sorted({cost for facts in variations.values() for cost in facts["network_evaluations"].values()})
    rows = []
    for name, facts in variations.items():
        for part in ("accelerated", "alone"):
            cells = []
            for cost in costs:
                keys = [k for k, c in facts["network_evaluations"].items() if c == cost and k.startswith(part)]
                cells.append(f"{min(facts['distance_real'][key] for key in keys):.0f}" if keys else "")
            rows.append([name, part, *cells])
    return tables.markdown(["", "", *map(str, costs)], rows, words=2)


def by_weights(weights: dict[str, Any]) -> str:
    """Returns the distances for each pair of weights."""
    rows = [
        [f"{style:g}", *(f"{value:.0f}" for value in values)]
        for style, values in zip(weights["style_weights"], weights["distance_real"], strict=True)
    ]
    return tables.markdown(["style \\ adapter", *(f"{weight:g}" for weight in weights["adapter_weights"])], rows)


def by_guidance(guidance: dict[str, Any]) -> str:
    """Returns what guidance on top of the adapter costs and does."""
    columns = (guidance[name] for name in ("scales", "network_evaluations", "excess", "retrieval", "diversity"))
    forms = ("{:g}", "{}", "{:.0f}", "{:.3f}", "{:.3f}")
    rows = [[form.format(value) for form, value in zip(forms, row, strict=True)] for row in zip(*columns, strict=True)]
    return tables.markdown(["guidance scale", "evaluations", "excess", "retrieval", "diversity"], rows)


def text(found: dict[str, Any]) -> str:
    """Returns all tables of a study."""
    variations = found["variations"]
    count, real = ({facts[key] for facts in variations.values()} for key in ("pictures", "real_pictures"))
    weights, guidance = found["weights"], found["guidance"]
    own = "Frechet distance to the style's own pictures"
    titled = {
        f"At equal network evaluations: {own} with its 95 % interval, and caption retrieval@1. {max(count)} pictures "
        f"each, {min(real)} to {max(real)} real ones.": at_equal_cost(variations),
        f"By network evaluations, the best solver of each: {own}.": by_cost(variations),
        f"By the weights of style and adapter, {weights['style']} at {weights['steps']} steps, {weights['pictures']} "
        f"pictures each: {own}.": by_weights(weights),
        f"Guidance on top of the adapter, without a style, at {guidance['steps']} steps: excess distance to the "
        "teacher.": by_guidance(guidance),
    }
    return "\n".join(f"{title}\n\n{table}" for title, table in titled.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=origins.MODEL)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()

    project = Project()
    study = Study.read(project.study(options.model) / STUDY)
    captions = max(facts.prompts or 0 for facts in study.variations.values())
    changes = {"adapter": study.adapter, "captions": captions, "recipe": None}
    measured = origins.present(project).model_copy(update=changes)
    found = study.plain() | {"origin": measured.plain()}
    print(text(found))
    write_json(options.docs / "universal.json", found)
    tables.write(options.docs / "universal.md", text(found))
    origins.write(project, options.docs, ["universal"])


if __name__ == "__main__":
    main()
