"""What is served, in the lists that clients of the web UI read. What latentd does not have is an empty list."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from engines.manifest import Manifest
from server.api import openapi
from server.api.context import caller_of
from server.api.loras import loras_of
from server.api.sdapi.choices import Choices
from server.api.sdapi.translation.checkpoint import checkpoint_of
from server.api.sdapi.translation.samplers import Sampler, SchedulerItem, samplers, schedulers
from server.api.service import Service
from server.requests.schemas import LoraDescription
from server.runtime.models import Model

_EMPTY = {
    "hypernetworks": "Hypernetworks: there are none",
    "sd-vae": "VAEs to choose from: the one of the bundle is used",
    "sd-modules": "Modules to choose from: there are none",
    "upscalers": "Upscalers: there are none",
    "latent-upscale-modes": "Latent upscalers: there are none",
    "face-restorers": "Face restorers: there are none",
    "realesrgan-models": "Models of Real-ESRGAN: there are none",
    "prompt-styles": "Styles: there are none",
    "script-info": "Scripts: there are none",
    "extensions": "Extensions: there are none",
}
_UNKNOWN_MEMORY = {"error": "not measured: see GET /metrics"}


class SDModel(BaseModel, protected_namespaces=()):
    """A checkpoint."""

    title: str
    model_name: str
    hash: str | None
    sha256: str | None
    filename: str
    config: str | None = None


class SDLora(BaseModel):
    """A LoRA that prompts may name."""

    name: str
    alias: str
    path: str
    metadata: dict[str, str]


class Embedding(BaseModel):
    """A textual inversion."""

    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    shape: int
    vectors: int


class Embeddings(BaseModel):
    """Textual inversions, by their tokens."""

    loaded: dict[str, Embedding]
    skipped: dict[str, Embedding]


class Scripts(BaseModel):
    """Names of scripts."""

    txt2img: list[str]
    img2img: list[str]


class Memory(BaseModel):
    """Memory, which is not measured here."""

    ram: dict[str, Any]
    cuda: dict[str, Any]


def routes(service: Service, choices: Choices) -> APIRouter:
    router = APIRouter(tags=[openapi.SDAPI])

    @router.get("/samplers", operation_id="sdapi_samplers", summary="The samplers")
    async def _samplers(http: HttpRequest) -> list[Sampler]:
        return samplers(choices.of(caller_of(http)).manifest)

    @router.get("/schedulers", operation_id="sdapi_schedulers", summary="The noise schedules")
    async def _schedulers() -> list[SchedulerItem]:
        return schedulers()

    @router.get("/sd-models", operation_id="sdapi_sd_models", summary="The checkpoints")
    async def _sd_models() -> list[SDModel]:
        return [_sd_model(model) for model in service.models]

    @router.get("/loras", operation_id="sdapi_loras", summary="The LoRAs that prompts may name")
    async def _loras(http: HttpRequest) -> list[SDLora]:
        loras = await run_in_threadpool(loras_of, choices.of(caller_of(http)))
        return [_sd_lora(lora) for lora in loras if lora.usable]

    @router.post("/refresh-loras", operation_id="sdapi_refresh_loras", summary="Read the folder of LoRAs again")
    async def _refresh_loras(http: HttpRequest) -> None:
        await run_in_threadpool(loras_of, choices.of(caller_of(http)))

    @router.get("/embeddings", operation_id="sdapi_embeddings", summary="The textual inversions of the bundle")
    async def _embeddings(http: HttpRequest) -> Embeddings:
        return _embeddings_of(choices.of(caller_of(http)).manifest)

    @router.get("/scripts", operation_id="sdapi_scripts", summary="Scripts: there are none")
    async def _scripts() -> Scripts:
        return Scripts(txt2img=[], img2img=[])

    @router.get("/memory", operation_id="sdapi_memory", summary="Memory, which is not measured")
    async def _memory() -> Memory:
        return Memory(ram=_UNKNOWN_MEMORY, cuda=_UNKNOWN_MEMORY)

    for name, summary in _EMPTY.items():
        identifier = f"sdapi_{name.replace('-', '_')}"
        router.get(f"/{name}", operation_id=identifier, summary=summary)(_nothing)
    return router


async def _nothing() -> list[dict[str, Any]]:
    return []


def _sd_model(model: Model) -> SDModel:
    checkpoint = checkpoint_of(model)
    return SDModel(
        title=checkpoint.title,
        model_name=checkpoint.name,
        hash=checkpoint.short_hash,
        sha256=checkpoint.sha256,
        filename=checkpoint.name,  # the paths of the server are its own
    )


def _sd_lora(lora: LoraDescription) -> SDLora:
    known = {
        "ss_output_name": lora.title,
        "ss_base_model_version": lora.base_model,
        "modelspec.trigger_phrase": lora.trigger_words,
    }
    metadata = {name: value for name, value in known.items() if value}
    return SDLora(name=lora.name, alias=lora.name, path=f"{lora.name}.safetensors", metadata=metadata)


def _embeddings_of(manifest: Manifest) -> Embeddings:
    loaded = {
        token: Embedding(shape=manifest.context.width, vectors=vectors)
        for token, vectors in manifest.tokenizer.embeddings.items()
    }
    return Embeddings(loaded=loaded, skipped={})
