"""The settings that a solver draws with: steps, guidance scale, timestep spacing, noise levels and last step.

The options are those of diffusers' schedulers, under the names that diffusers has for them.
"""

from __future__ import annotations

from typing import Self, get_args

from pydantic import Field, model_validator

from lcmlora.io.documents import Document, Number
from lcmlora.settings.evaluation import Final, Solver, Spacing, check_options

SOLVERS: tuple[Solver, ...] = get_args(Solver)
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)

# From so many steps on dpm++ ends with a second-order step, unless it is told otherwise (`lower_order_final`).
_SECOND_ORDER_FROM = 15


class SolverSettings(Document):
    """The sampler settings of a solver.

    final: where the last step of dpm++ ends. `zero` is noise level 0, reached in a first-order step. `sigma_min` is the
        lowest noise level of the base's schedule; from 15 steps on the step is of second order. `euler_at_final` ends
        at the same level in a first-order step. Other solvers have `zero`, which leaves diffusers' default.
    """

    solver: str  # of SOLVERS
    steps: int = Field(ge=1)
    guidance_scale: Number  # the pipelines' convention; 1 is unguided
    spacing: Spacing
    karras: bool  # whether noise levels are spaced as by Karras et al.; then `spacing` only scales the first noise
    final: Final

    @classmethod
    def of(
        cls,
        solver: str,
        steps: int,
        guidance_scale: float,
        *,
        spacing: Spacing = "trailing",
        karras: bool = False,
        final: Final = "zero",
    ) -> Self:
        """Returns the settings. Raises ValueError where this solver has no such option."""
        return cls(
            solver=solver, steps=steps, guidance_scale=guidance_scale, spacing=spacing, karras=karras, final=final
        )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}; there are {', '.join(SOLVERS)}")
        check_options(self.solver, self.karras, self.final)
        return self

    @property
    def evaluations(self) -> int:
        """Network evaluations for one picture: a guided step costs two, whatever the batching."""
        return self.steps * (1 if self.guidance_scale == 1 else 2)

    @property
    def text(self) -> str:
        """How a reader calls the settings: `4 steps, unguided` or `2 steps, guidance 3, leading, Karras sigmas`."""
        guidance = "unguided" if self.guidance_scale == 1 else f"guidance {self.guidance_scale:g}"
        parts = [f"{self.steps} step{'' if self.steps == 1 else 's'}", guidance]
        parts += [self.spacing] if self.spacing != "trailing" else []
        parts += ["Karras sigmas"] if self.karras else []
        parts += {"sigma_min": ["to sigma_min"], "euler_at_final": ["Euler at final"]}.get(self.final, [])
        return ", ".join(parts)

    def changed(self, **changes: object) -> Self:
        """Returns the settings with these fields changed. Raises ValueError where this solver has no such option."""
        return self.model_validate(self.plain() | changes)


def finals(solver: str, steps: int) -> tuple[Final, ...]:
    """Returns the last steps that differ from each other in so many steps of this solver."""
    if solver != "dpm++":
        return ("zero",)
    return ("zero", "sigma_min") if steps < _SECOND_ORDER_FROM else ("zero", "sigma_min", "euler_at_final")
