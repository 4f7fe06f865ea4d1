"""The script that MLflow runs to make the model of a release: prompts in, PNGs out. `serving.write_model` copies it.

MLflow also runs it when the model is written, without the release's files, so this module imports nothing heavy.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext

if TYPE_CHECKING:
    from PIL.Image import Image

    from lcmlora.inference.request_guard import Request


class Drawer(PythonModel):
    """Draws with the release among its artifacts.

    Environment variables: LCMLORA_BASE, the folder of the base (default: see pipelines.load); LCMLORA_DEVICE, auto, cpu
    or cuda; LCMLORA_FUSE=1, faster steps (see pipelines.load); LCMLORA_MAX_..., the limits of a request (see Limits);
    LCMLORA_SERVED, the adapter's name in metrics; LCMLORA_KEEP_PROMPTS and the like (see kept_prompts.Keeping).
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Loads the release. Raises UserError where its base is missing or another one."""
        from lcmlora.inference import pipelines, request_guard
        from lcmlora.inference.limits import Limits
        from lcmlora.inference.production.kept_prompts import Keeping, PromptKeeper
        from lcmlora.inference.production.metrics import ServingMetrics

        self._limits = Limits.read()
        keeping = Keeping.read()
        self._queue = threading.BoundedSemaphore(1 + self._limits.queue)
        self._keeping = threading.Lock()
        base = os.environ.get("LCMLORA_BASE")
        # MLflow's server answers each request in another thread. On a CPU, torch starts a team of workers for every
        # thread that calls it; with more workers than cores, drawing takes twice as long.
        self._worker = ThreadPoolExecutor(1, "drawer")
        self._pipeline = self._worker.submit(
            pipelines.load,
            Path(context.artifacts["release"]),
            Path(base) if base else None,
            os.environ.get("LCMLORA_DEVICE") or "auto",
            fuse=os.environ.get("LCMLORA_FUSE") == "1",
        ).result()
        self._metrics = ServingMetrics(
            self._pipeline.provenance, queue_limit=self._limits.queue, device=self._pipeline.pipeline.device
        )
        keeps = keeping.mode != "off"
        self._keeper = PromptKeeper(keeping, self._pipeline.provenance.model) if keeps else None
        request_guard.guard_mlflow_server(self._limits, self._metrics)

    def predict(
        self,
        context: PythonModelContext,
        model_input: pandas.DataFrame,
        params: dict[str, int | float | None] | None = None,
    ) -> pandas.DataFrame:
        """Returns the column `png`, the bytes of a picture for each `prompt`.

        Args:
            params: steps, guidance, seed, width, height, as for pipelines.Pipeline; width and height 0 are the
                release's resolution.

        Raises:
            MlflowException: a parameter is out of its range (400), too many requests wait (429), the time is over
                (504), or drawing failed (500).
        """
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import DEADLINE_EXCEEDED, INTERNAL_ERROR, RESOURCE_EXHAUSTED

        from lcmlora.errors import UserError
        from lcmlora.inference import request_guard
        from lcmlora.inference.pipelines import Abandoned
        from lcmlora.io import faults

        # Without the guard in front of MLflow's server, the model sets the deadline itself.
        request = request_guard.current.get() or request_guard.Request(time.monotonic() + self._limits.seconds)
        request.reached_model = True
        try:
            draw = self._drawing(model_input, params or {}, request)
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        if not self._queue.acquire(blocking=False):
            raise MlflowException("too many requests wait already; ask again later", RESOURCE_EXHAUSTED)
        try:
            pictures = self._worker.submit(draw).result()
        except Abandoned:
            late = f"the pictures were not drawn within {self._limits.seconds} seconds (LCMLORA_MAX_SECONDS)"
            raise MlflowException(late, DEADLINE_EXCEEDED) from None
        except Exception as error:
            logging.getLogger(__name__).exception("drawing failed")
            reason = f"{type(error).__name__}: {faults.chain(error)}"
            raise MlflowException(f"drawing failed: {reason}", INTERNAL_ERROR) from None
        finally:
            self._queue.release()
        self._keep(list(model_input["prompt"]))
        return pandas.DataFrame({"png": [_png(picture) for picture in pictures]})

    def _keep(self, prompts: list[str]) -> None:
        """Keeps prompts that were drawn, if this is asked for. A full disk takes no picture from whoever waits."""
        if self._keeper is None:
            return
        with self._keeping:
            try:
                self._metrics.kept(len(prompts), self._keeper.keep(prompts))
            except OSError as error:
                self._metrics.lost(len(prompts))
                logging.getLogger(__name__).error("%d prompts could not be kept: %s", len(prompts), error)

    def _drawing(
        self, model_input: pandas.DataFrame, params: dict[str, int | float | None], request: Request
    ) -> Callable[[], list[Image]]:
        """Returns the function that draws the pictures of a request. Raises UserError where it is over a limit."""
        from lcmlora.errors import UserError
        from lcmlora.inference.serving import DEFAULTS

        own = {"steps": self._pipeline.usual_steps}
        values = DEFAULTS | own | {name: value for name, value in params.items() if value is not None}
        resolution = self._pipeline.resolution
        if "prompt" not in model_input:
            raise UserError("prompt: expected a column of this name")
        prompts = list(model_input["prompt"])
        self._limits.check(prompts, {name: _plain(value) for name, value in values.items()}, resolution)
        steps, guidance, seed = int(values["steps"]), float(values["guidance"]), int(values["seed"])
        width, height = (int(values[name]) or resolution for name in ("width", "height"))
        self._pipeline.check(prompts, steps=steps, guidance=guidance, width=width, height=height)
        request.steps = steps
        draw = partial(
            self._pipeline,
            prompts,
            steps=steps,
            guidance=guidance,
            seed=seed,
            width=width,
            height=height,
            abandoned=request.abandoned,
        )
        return partial(self._timed, draw, steps)

    def _timed(self, draw: Callable[[], list[Image]], steps: int) -> list[Image]:
        """Draws, and counts the pictures and their seconds."""
        began = time.monotonic()
        pictures = draw()
        self._metrics.drawn(len(pictures), seconds=time.monotonic() - began, steps=steps)
        return pictures


def _plain(value: Any) -> Any:
    """Returns a Python number for a numpy scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _png(picture: Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


set_model(Drawer())
