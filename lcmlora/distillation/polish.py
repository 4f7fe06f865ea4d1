"""Polish of a distilled LoRA: distribution matching from the adapter that the distillation made, to one like it.

The result is a plain LoRA of the same layers and rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lcmlora.adapters import lora
from lcmlora.adapters.metadata import FACTS, Distilled, DistillSettings, Polished, Sampler
from lcmlora.bases.base import LoadedBase
from lcmlora.bases.folders import Identity
from lcmlora.config import Distill, Training
from lcmlora.data.latents.cache import LatentCache
from lcmlora.distillation.distill import training_rows
from lcmlora.distillation.loss import Distillation, add_adapter, sample_stream
from lcmlora.distillation.matching import DistributionMatching
from lcmlora.distillation.outcome import file_dtype, probe_inputs, write_adapter
from lcmlora.errors import UserError
from lcmlora.io.files import sha256_file
from lcmlora.parallel.ranks import Ranks
from lcmlora.settings.training import Polish
from lcmlora.training.execution import AdapterCheck
from lcmlora.training.loop import Logger, train

# Draws with the network as it is, and returns figures of the pictures, among them `distance@N` to the teacher's
# pictures for each number N of steps.
Judge = Callable[[Sampler], Mapping[str, float]]


def polish_adapter(
    base: LoadedBase,
    cache: LatentCache,
    settings: Distill,
    adapter: Path,
    scratch: Path,
    out: Path,
    *,
    identity: Identity,
    logger: Logger,
    judge: Judge | None,
    ranks: Ranks | None = None,
) -> Distilled | None:
    """Trains on from the adapter in the folder `adapter`, writes the folder `out` and returns its config.json.

    All processes of a run call this with the same arguments. The first one validates, logs and writes; the others
    return None. The weights with the smallest distances to the teacher's pictures are written, the start's among them.

    Args:
        base: with its network, without an adapter; afterwards it has the adapter, switched on.
        settings: of the distillation that made the adapter, with those of the polish.
        scratch: a locked folder of this configuration alone; a checkpoint in it is continued.
        identity: of the base, for config.json.
        judge: of the first process.

    Raises:
        UserError: as `distill_adapter`, or the adapter has other layers or another rank than the settings say.
    """
    ranks, polish = ranks or Ranks(), settings.polish
    assert polish is not None
    training = settings.model_copy(update={"steps": polish.steps, "lr": polish.lr, "rollout": 0.0, "trajectory": 0.0})
    rows, _ = training_rows(base, cache, settings)
    batches = sample_stream(cache, rows, training, base.device, ranks)
    probe = probe_inputs(base, batches.at(range(-2, 0), rows[:1].expand(2)))
    check = AdapterCheck(base, *probe)
    start = adapter / lora.WEIGHTS
    student, digest = add_adapter(base, training, ranks, start), sha256_file(start)
    fake = student.second(_fake_settings(training, polish))
    distillation = Distillation(base, cache.unconditional(), training)
    if settings.compile:
        check.compiled(batches.size, 2 * batches.size)
    else:
        check.teacher()
    matching = DistributionMatching(distillation, student, fake, batches, polish, settings.seed)
    state = train(
        "polish",
        matching,
        student,
        batches,
        lambda: _ByDistance(judge, distillation.objective.sampler),
        training,
        scratch,
        check=check.student,
        agree={"base": identity, "latent_cache": cache.digest, "adapter": digest},
        logger=logger,
        ranks=ranks,
        companion=matching,
        validate_start=True,
    )
    made = None
    if ranks.first:
        assert state.best is not None
        student.load_weights(state.best["weights"], file_dtype(base))
        polished = Polished(
            of=digest,
            steps=polish.steps,
            final_loss=state.loss,
            distances=state.history,
            best_step=state.best["step"],
        )
        distilled = DistillSettings.model_validate(settings.model_dump(mode="json"))
        made = Distilled.read(adapter / FACTS).model_copy(update={"polish": polished, "distill": distilled})
        write_adapter(distillation, settings, out, made, probe)
    ranks.wait()
    return made


def _fake_settings(training: Training, polish: Polish) -> Training:
    """Returns the settings of the fake score's optimization: a constant rate, since it follows a moving student."""
    return training.model_copy(update={"lr": polish.fake_lr, "warmup": 0, "cooldown": 0.0})


class _ByDistance:
    """Validates by what the student draws: its distance to the teacher's pictures, as the geometric mean over its
    numbers of steps."""

    def __init__(self, judge: Judge | None, sampler: Sampler) -> None:
        assert judge is not None  # the first process has one
        self._judge, self._sampler = judge, sampler

    @torch.no_grad()
    def validate(self, step: int, logger: Logger) -> float:
        figures = self._judge(self._sampler)
        logger.log({f"validation_{name}": value for name, value in figures.items()}, step)
        distances = [value for name, value in figures.items() if name.startswith("distance@")]
        if not all(map(math.isfinite, distances)):
            raise UserError("the validation pictures are not finite; lower distill.polish.lr")
        return math.exp(sum(map(math.log, distances)) / len(distances))
