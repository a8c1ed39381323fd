"""Images from a latentd server, with progress: what the app needs of its API. It knows nothing of Gradio."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from httpx_sse import ServerSentEvent, aconnect_sse

_SILENCE = 60.0  # seconds; the server sends a comment every 15


class Refused(Exception):
    """The server's reason for giving no image, to be shown to the user."""


@dataclass(frozen=True, slots=True)
class Update:
    """What is known so far: `done` of all steps, 0..1, and image files, which are previews while `seeds` is empty."""

    text: str
    done: float = 0.0
    images: tuple[bytes, ...] = ()
    seeds: tuple[int, ...] = ()


def connect(url: str, key: str = "") -> httpx.AsyncClient:
    """A client of the server at `url`, which may have a path, with an API key where it asks for one."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=httpx.Timeout(10.0, read=_SILENCE))


async def describe(client: httpx.AsyncClient) -> dict[str, Any]:
    """The served model: its name, resolutions and defaults. Raises Refused."""
    try:
        answer = await client.get("models")
    except httpx.HTTPError as error:
        raise Refused(f"{client.base_url} does not answer: {error}") from error
    await _check(answer)
    (model,) = answer.json()
    return dict(model)


async def generate(client: httpx.AsyncClient, request: Mapping[str, Any]) -> AsyncGenerator[Update, None]:
    """Updates until the images are complete. Closing the iterator cancels the request. Raises Refused."""
    try:
        async with aconnect_sse(client, "POST", "generate", json=dict(request)) as stream:
            await _check(stream.response)
            async for event in stream.aiter_sse():
                if update := read(event):
                    yield update
    except httpx.HTTPError as error:
        raise Refused(f"The connection to the server was lost: {error}") from error


def read(event: ServerSentEvent) -> Update | None:
    """The update in an event; None if there is nothing to show. Raises Refused for the event `error`."""
    data = json.loads(event.data)
    match event.event:
        case "queued":
            return Update(f"Queued: {data['position']} ahead" if data["position"] else "Starting")
        case "step":
            previews = tuple(_from_data_url(url) for url in data["previews"])
            return Update(f"Step {data['step']} of {data['steps']}", data["step"] / data["steps"], previews)
        case "completed":
            files = tuple(base64.b64decode(image["image"]) for image in data["images"])
            return Update("Done", 1.0, files, tuple(image["seed"] for image in data["images"]))
        case "error":
            raise Refused(data["detail"])
    return None


async def _check(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    await answer.aread()
    try:
        detail = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        detail = f"The server returned status {answer.status_code}."
    raise Refused(detail)


def _from_data_url(url: str) -> bytes:
    return base64.b64decode(url.partition(",")[2])
