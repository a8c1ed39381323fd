"""What a request needs, read from its path and body without parsing them: bodies may be megabytes.

It may be wrong for odd bodies. Then the request goes to a replica that has to load something first, and no more.
"""

from __future__ import annotations

import re

from starlette.types import Scope

from latentd_serve.forwarding import Wanted

_PATH = re.compile(r"/v2/models/(?P<model>[^/]{1,200})")
_JSON = re.compile(rb'"model"\s*:\s*"(?P<model>[^"\\]{1,200})"')  # in a string the first quote would follow a backslash
_FORM = re.compile(rb'name="?model"?\r\n(?:[^\r\n]+\r\n)*\r\n(?P<model>[^\r\n]{1,200})\r\n')
_LORAS = re.compile(rb'"loras"\s*:\s*\[(?P<list>[^\]]{1,4000})\]')
_NAME = re.compile(rb'"name"\s*:\s*"(?P<name>[^"\\]{1,300})"')
_TAG = re.compile(rb"<(?:lora|lyco):(?P<name>[^<>:]{1,300})", re.IGNORECASE)
_MOST_LORAS = 16


def wanted_by(scope: Scope, body: bytes) -> Wanted:
    """The model and the LoRAs that a request seems to name."""
    in_path = _PATH.search(scope["path"])
    found = None if in_path else _JSON.search(body) or _FORM.search(body)
    model = in_path["model"] if in_path else _text(found["model"]) if found else ""
    return Wanted(model, _loras(body))


def _loras(body: bytes) -> tuple[str, ...]:
    listed = _LORAS.search(body)
    names = [one["name"] for one in _NAME.finditer(listed["list"])] if listed else []
    names += [one["name"] for one in _TAG.finditer(body)]
    return tuple(_text(name).rpartition("/")[2] for name in names[:_MOST_LORAS])


def _text(content: bytes) -> str:
    return content.decode(errors="replace")
