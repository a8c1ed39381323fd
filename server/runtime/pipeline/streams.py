"""The device's streams, and how they share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from engines.backends.device import Device, Stream
from engines.contract import GraphName
from engines.manifest import Manifest

# Whether decodes share a GPU with steps at the same priority, wait for what steps leave, or are launched between them.
DecodePriority = Literal["equal", "low", "between"]


@dataclass(frozen=True, slots=True)
class Streams:
    """The device's work on three streams, which do not wait for each other."""

    encode: Stream  # prompts and init images of admitted requests
    steps: Stream  # everything that touches the state
    decode: Stream  # latents that have left the state

    @classmethod
    def open(cls, device: Device, decode_priority: DecodePriority) -> Streams:
        """The streams of `device`, where decodes run in parallel with steps or between them."""
        steps = device.stream("steps", urgent=True)
        # A CPU shares nothing between streams: there the threads of an urgent one would spin, and slow the steps.
        urgent = device.pads and decode_priority != "low"
        parallel = decode_priority != "between"
        return cls(
            encode=device.stream("encode", urgent=urgent),
            steps=steps,
            decode=device.stream("decode", urgent=urgent) if parallel else steps,
        )


def streams_of_graphs(
    manifest: Manifest, streams: Streams, *, step_cache: bool, checks: bool
) -> dict[GraphName, Stream]:
    """The graphs to load, and the stream that each runs on; `checks`: with the safety checker."""
    on: dict[GraphName, Stream] = {
        "denoise": streams.steps,  # the largest first, while it is alone: loading brings its whole file to memory
        "denoise_lora": streams.steps,
        "denoise_shallow": streams.steps,
        "denoise_shallow_lora": streams.steps,
        "encode_prompt": streams.encode,
        "encode_prompt_lora": streams.encode,
        "decode": streams.decode,
        "decode_fast": streams.decode,
        "encode_image": streams.encode,
        "safety": streams.decode,
    }
    unused = set[GraphName]() if step_cache else {"denoise_shallow", "denoise_shallow_lora"}
    unused |= set() if checks else {"safety"}
    return {name: stream for name, stream in on.items() if name in manifest.graphs and name not in unused}
