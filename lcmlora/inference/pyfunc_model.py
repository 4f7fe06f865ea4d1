"""The script that MLflow runs to have the model around a release: prompts in, PNGs out. Written by serving.write_model.

MLflow also runs it when the model is written, where nothing of the release is there, so nothing heavy is imported here.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class Drawer(PythonModel):
    """Draws with the release among its artifacts.

    Environment: LCMLORA_BASE, the folder of the base (default: see pipelines.load); LCMLORA_DEVICE, auto, cpu or cuda;
    LCMLORA_FUSE=1, faster steps (see pipelines.load); LCMLORA_MAX_..., what a request may ask for (see limits.Limits).
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Raises UserError where the base is not to be had or is not the one of the release."""
        from lcmlora.inference import pipelines, request_guard
        from lcmlora.inference.limits import Limits

        self._limits = Limits.read()
        self._places = threading.BoundedSemaphore(1 + self._limits.queue)
        base = os.environ.get("LCMLORA_BASE")
        # MLflow's server answers each request in another thread. On a CPU every thread that calls torch brings its own
        # team of workers, and with more workers than cores all sleep between two operators: half the speed.
        self._worker = ThreadPoolExecutor(1, "drawer")
        self._pipeline = self._worker.submit(
            pipelines.load,
            Path(context.artifacts["release"]),
            Path(base) if base else None,
            os.environ.get("LCMLORA_DEVICE") or "auto",
            fuse=os.environ.get("LCMLORA_FUSE") == "1",
        ).result()
        request_guard.stand_before_mlflow(self._limits)

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """Returns the column `png`, the bytes of a picture for each `prompt`.

        Args:
            params: steps, guidance, seed, width, height, as pipelines.Pipeline takes them; width and height 0 are the
                release's resolution.

        Raises:
            MlflowException: a parameter out of its range (400), too many requests (429), the time is over (504), or
                the drawing failed (500).
        """
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import DEADLINE_EXCEEDED, INTERNAL_ERROR, RESOURCE_EXHAUSTED

        from lcmlora.errors import UserError
        from lcmlora.inference import request_guard
        from lcmlora.inference.pipelines import Abandoned
        from lcmlora.inference.serving import DEFAULTS

        # Other servers than MLflow's have no door of ours.
        request = request_guard.current.get() or request_guard.Request(time.monotonic() + self._limits.seconds)
        request.reached = True
        asked = DEFAULTS | {name: value for name, value in (params or {}).items() if value is not None}
        resolution = self._pipeline.resolution
        try:
            if "prompt" not in model_input:
                raise UserError("prompt: expected a column of this name")
            prompts = list(model_input["prompt"])
            self._limits.check(prompts, {name: _plain(value) for name, value in asked.items()}, resolution)
            arguments: dict[str, Any] = {name: int(asked[name]) for name in ("steps", "width", "height")}
            arguments |= {name: arguments[name] or resolution for name in ("width", "height")}
            arguments["guidance"] = float(asked["guidance"])
            self._pipeline.check(prompts, **arguments)
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        if not self._places.acquire(blocking=False):
            raise MlflowException("too many requests wait already; ask again later", RESOURCE_EXHAUSTED)
        try:
            pictures = self._worker.submit(
                self._pipeline, prompts, seed=int(asked["seed"]), abandoned=request.abandoned, **arguments
            ).result()
        except Abandoned:
            over = f"the pictures were not drawn within {self._limits.seconds} seconds (LCMLORA_MAX_SECONDS)"
            raise MlflowException(over, DEADLINE_EXCEEDED) from None
        except Exception as error:
            logging.getLogger(__name__).exception("drawing failed")
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise MlflowException(f"drawing failed: {reason}", INTERNAL_ERROR) from None
        finally:
            self._places.release()
        return pandas.DataFrame({"png": [_png(picture) for picture in pictures]})


def _plain(value: Any) -> Any:
    """Returns Python's own number for one of numpy's."""
    return value.item() if hasattr(value, "item") else value


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


set_model(Drawer())
