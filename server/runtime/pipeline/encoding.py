"""What requests need before their first step: LoRAs on the device, embeddings of prompts, latents of init images."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from engines.backends.device import Event
from engines.manifest import Size
from server.requests.params import Lora, WeightedLora
from server.requests.request import Request
from server.requests.tokenizer import Prompt
from server.runtime.monitoring.trace import Trace
from server.runtime.pipeline.admission import Admission, Upload
from server.runtime.pipeline.latent_pool import LatentPool
from server.runtime.pipeline.lora_pool import LoraPool, PlacedLora
from server.runtime.pipeline.noise import NoiseGenerator
from server.runtime.pipeline.prompt_pool import PromptPool
from server.runtime.pipeline.streams import Streams


class Encoding:
    """Brings what a request needs to the device, while others take steps."""

    def __init__(
        self,
        *,
        streams: Streams,
        trace: Trace,
        pools: Mapping[Size, LatentPool],
        prompts: PromptPool,
        loras: LoraPool | None,
    ) -> None:
        """`loras` is None where requests have none."""
        self._streams = streams
        self._trace = trace
        self._pools = pools
        self._prompts = prompts
        self._loras = loras
        self.last_step: Event | None = None  # that was launched; a function that asks the pipeline would keep it alive

    def admit(self, request: Request) -> Upload | Admission:
        """Begin to write the LoRAs of `request`, or if they are there, launch the encoding of its prompts and image.

        Raises:
            EngineError: and nothing is held, as with any other exception.
        """
        with ExitStack() as undo:
            resources = undo.enter_context(ExitStack())
            loras = tuple([self._acquire_lora(weighted, resources) for weighted in request.params.loras])
            stage = self.advance(Upload(request, resources, loras=loras))
            undo.pop_all()
            return stage

    def advance(self, upload: Upload) -> Upload | Admission:
        """Write the next part of the LoRAs. After the last, the result takes over what `upload` holds.

        Raises:
            EngineError: the upload still holds everything, as with any other exception.
        """
        if self._loras and not self._loras.upload([placed.lora for placed in upload.loras]):
            return upload
        with self._trace.device("encode", self._streams.encode, track="encode"):
            return self._encode(upload)

    def wait(self, stage: Upload | Admission) -> None:
        """Block until the device has done what was launched last for it. Raises EngineError."""
        if isinstance(stage, Admission):
            stage.encoded.wait()
        elif self._loras:
            self._loras.wait([placed.lora for placed in stage.loras])

    def _encode(self, upload: Upload) -> Admission:
        params, resources = upload.request.params, upload.resources
        noise = tuple(NoiseGenerator(seed) for seed in params.seeds)
        rows = []
        # As in diffusers, clip_skip does not apply to the negative prompt.
        prompts = [(params.prompt, params.clip_skip), (params.negative_prompt, 0)]
        for prompt, clip_skip in prompts if params.guided else prompts[:1]:
            rows.append(self._prompts.acquire(prompt, clip_skip=clip_skip, loras=upload.loras))
            resources.callback(self._release_prompt, prompt, clip_skip, upload.loras)
        pool = self._pools[params.size]
        return Admission(
            upload.request,
            resources,
            loras=upload.loras,
            prompts=tuple(rows),
            noise=noise,
            starts=tuple(pool.start(params, generator) for generator in noise),
            encoded=self._streams.encode.record(),
        )

    def _acquire_lora(self, weighted: WeightedLora, resources: ExitStack) -> PlacedLora:
        assert self._loras  # noqa: S101 - requests have LoRAs only where the model takes them
        rows = self._loras.acquire(weighted.lora)
        resources.callback(self._release_lora, weighted.lora)
        return PlacedLora(weighted.lora, weighted.weight, rows)

    def _release_lora(self, lora: Lora) -> None:
        if self._loras:
            self._loras.release(lora, self.last_step)

    def _release_prompt(self, prompt: Prompt, clip_skip: int, loras: tuple[PlacedLora, ...]) -> None:
        self._prompts.release(prompt, clip_skip=clip_skip, loras=loras, last_read=self.last_step)
