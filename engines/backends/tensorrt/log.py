"""TensorRT's log, which is where it explains its refusals."""

from __future__ import annotations

import logging
from collections import deque
from functools import cache
from typing import Any

from engines.errors import EngineError

_logger = logging.getLogger(__name__)


@cache  # one per process: TensorRT keeps the first logger that it is given, and ignores others
def logger_for(trt: Any) -> Any:
    """The logger of the module `trt`: warnings and errors go to Python's logging, the last errors to `take()`."""

    class TensorRtLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._errors: deque[str] = deque(maxlen=3)

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._errors.append(msg)
                _logger.error("%s", msg)
            elif severity == trt.ILogger.WARNING:
                _logger.warning("%s", msg)

        def take(self) -> str:
            """The last errors, which are then forgotten."""
            errors = " ".join(self._errors)
            self._errors.clear()
            return errors

    return TensorRtLogger()


def require(succeeded: bool, action: str, log: Any) -> None:
    """Raise EngineError unless TensorRT `succeeded` in its `action`, with what it logged since the last success."""
    errors = log.take()
    if not succeeded:
        raise EngineError(f"TensorRT failed to {action}. {errors}".rstrip())
