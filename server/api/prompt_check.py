"""The operator's check of prompts: a Python function that may refuse them."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from server.requests.errors import FieldError, InternalError, PromptRefused

_log = logging.getLogger(__name__)
_THREADS = 4  # checks at once; further prompts wait

Check = Callable[[str, str], str | None]  # the reason to refuse a prompt and its negative prompt


class PromptCheck:
    """Calls a check in threads of its own, so that a slow one delays only those who wait for it."""

    def __init__(self, check: Check, name: str) -> None:
        """`name` is the check's in the log."""
        self._check = check
        self._name = name
        self._threads = ThreadPoolExecutor(_THREADS, "prompt-check")

    async def __call__(self, prompt: str, negative_prompt: str) -> None:
        """Raise PromptRefused with the check's reason, InternalError where the check itself fails."""
        loop = asyncio.get_running_loop()
        reason = await loop.run_in_executor(self._threads, self._reason, prompt, negative_prompt)
        if reason is not None:
            raise PromptRefused(reason, fields=(FieldError("prompt", reason),))

    def _reason(self, prompt: str, negative_prompt: str) -> str | None:
        try:
            reason: Any = self._check(prompt, negative_prompt)
        except Exception as error:  # whatever it is: a check that fails must not let prompts through
            # Without the message, which may quote the prompt.
            where = "".join(traceback.format_tb(error.__traceback__))
            _log.error("the prompt check %s raised %s:\n%s", self._name, type(error).__name__, where)
            raise InternalError("The prompt could not be checked; see the server log.") from None
        if reason is None or isinstance(reason, str):
            return reason
        _log.error("the prompt check %s returned %s: return None, or the reason to refuse", self._name, type(reason))
        raise InternalError("The prompt could not be checked; see the server log.")
