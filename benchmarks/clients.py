"""What each program makes of an adapter's sampler, in 1, 2, 4 and 8 steps: python -m benchmarks.clients

Writes the tables in docs/clients.md, from lcmlora/releases/clients.py, which the model card reads, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import diffusers

from benchmarks import tables
from lcmlora.adapters.metadata import LATENT_CONSISTENCY, Sampler
from lcmlora.bases.schedule import Schedule
from lcmlora.releases.clients import Instructions, Student, diffusers_steps, instructions, notes

PAGE = Path("docs/clients.md")
STEPS = (1, 2, 4, 8)
_STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_SHOWN = 4  # steps of the settings that stand below a table
_FILE = "lcm-lora-emoji.safetensors"
# The title, the sampler and the base's prediction type of each kind of adapter.
KINDS = {
    "Latent consistency: `objective: lcm`": (LATENT_CONSISTENCY, "epsilon"),
    "Strategic stochastic sampling, gamma 0.3: `tcd` and `tdd`": (Sampler("TCDScheduler", 0.3), "epsilon"),
    "Strategic stochastic sampling without noise: `pcm`": (Sampler("TCDScheduler", 0.0), "epsilon"),
    "Latent consistency on a base that predicts v": (LATENT_CONSISTENCY, "v_prediction"),
}


def text() -> str:
    """Returns what stands between the comments of docs/clients.md, for Stable Diffusion's noise schedule."""
    parts = []
    for title, (sampler, prediction_type) in KINDS.items():
        # The published Stable Diffusion 1, 2 and XL bases have one schedule, which is the default of LCMScheduler.
        schedule = Schedule.variance_preserving(diffusers.LCMScheduler().alphas_cumprod, prediction_type)
        students = {n: Student.of(sampler, schedule, n) for n in STEPS}
        by_steps = {n: instructions(student, _FILE) for n, student in students.items()}
        shown = by_steps[_SHOWN]
        rows = [
            [each.client, each.tried, *(_cell(by_steps[n][row], students[n]) for n in STEPS)]
            for row, each in enumerate(shown)
        ]
        rows.append(["the adapter's own timesteps", "", *(_listed(each.timesteps) for each in students.values())])
        head = ["program", "tried with", *(f"{n} step{'' if n == 1 else 's'}" for n in STEPS)]
        parts.append(f"### {title}\n\n{tables.markdown(head, rows, words=len(head))}\n")
        parts += [_settings(each) for each in shown]
    for note in notes(_SHOWN):
        parts.append(f"### {note.title}\n\n" + "".join(f"* {each}\n" for each in note.texts) + "\n")
    head = ["strength", *(f"{n} evaluation{'' if n == 1 else 's'}" for n in STEPS)]
    rows = [[f"{s:g}", *(_asked(n, s) for n in STEPS)] for s in _STRENGTHS]
    parts.append("### `num_inference_steps` for img2img in diffusers\n\n" + tables.markdown(head, rows))
    return "".join(parts)


def _asked(evaluations: int, strength: float) -> str:
    steps = diffusers_steps(evaluations, strength)
    return str(steps) if steps <= LATENT_CONSISTENCY.grid else f"none: {steps} are over {LATENT_CONSISTENCY.grid}"


def _cell(found: Instructions, student: Student) -> str:
    if found.deviation is None:
        return "exact"
    differ = found.timesteps is not None and found.timesteps != student.timesteps
    return f"near: {_listed(found.timesteps or [])}" if differ else "near"


def _listed(timesteps: list[int]) -> str:
    return ", ".join(map(str, timesteps))


def _settings(found: Instructions) -> str:
    near = f"Near, not exact: {found.deviation}.\n\n" if found.deviation else ""
    steps = "".join(f"{number}. {each}\n" for number, each in enumerate(found.settings, start=1))
    return f"**{found.client}**{f', file in `{found.folder}`' if found.folder else ''}\n\n{steps}\n{near}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, default=PAGE)
    tables.write(parser.parse_args().page, text())


if __name__ == "__main__":
    main()
