"""The log of prompts, for operators who ask for it. Nothing else logs them."""

from __future__ import annotations

import json
import logging

from server.requests.request import Request

LOGGER = "latentd.prompts"
_log = logging.getLogger(LOGGER)


def log_prompts(request: Request) -> None:
    """A line with the prompts of an accepted request, as JSON strings: a prompt cannot write lines of its own."""
    params, context = request.params, request.context
    prompt, negative = params.prompt.text, params.negative_prompt.text
    said = f"{json.dumps(prompt)} without {json.dumps(negative)}" if negative else json.dumps(prompt)
    fields = {
        "request_id": request.id,
        "caller": request.caller,
        "api": context.api,
        "prompt": prompt,
        "negative_prompt": negative,
    }
    _log.info("request %s of %s: %s", request.id, request.caller or "-", said, extra={"fields": fields})
