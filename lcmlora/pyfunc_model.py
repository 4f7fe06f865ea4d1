"""The script that MLflow runs to have the model around a release: prompts in, PNGs out. Written by serving.write_model.

MLflow also runs it when the model is written, where nothing of the release is there, so nothing heavy is imported here.
"""

from __future__ import annotations

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas  # type: ignore[import-untyped]
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel, PythonModelContext


class Drawer(PythonModel):
    """Draws with the release among its artifacts.

    Environment: LCMLORA_BASE, the folder of the base (default: see pipelines.load); LCMLORA_DEVICE, auto, cpu or cuda;
    LCMLORA_FUSE=1, faster steps (see pipelines.load).
    """

    def load_context(self, context: PythonModelContext) -> None:
        """Raises UserError where the base is not to be had or is not the one of the release."""
        from lcmlora import pipelines

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

    def predict(
        self, context: PythonModelContext, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """Returns the column `png`, the bytes of a picture for each `prompt`.

        Args:
            params: steps, guidance, seed, width, height, as pipelines.Pipeline takes them; width and height 0 are the
                release's resolution.

        Raises:
            MlflowException: a parameter out of its range; the server answers it as a bad request.
        """
        from mlflow.exceptions import MlflowException

        from lcmlora.errors import UserError
        from lcmlora.serving import DEFAULTS

        asked = DEFAULTS | {name: value for name, value in (params or {}).items() if value is not None}
        try:
            pictures = self._worker.submit(
                self._pipeline,
                list(model_input["prompt"]),
                steps=int(asked["steps"]),
                guidance=float(asked["guidance"]),
                seed=int(asked["seed"]),
                width=int(asked["width"]) or None,
                height=int(asked["height"]) or None,
            ).result()
        except UserError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        return pandas.DataFrame({"png": [_png(picture) for picture in pictures]})


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


set_model(Drawer())
