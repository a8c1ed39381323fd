"""What a step costs when its rows are told several chunks of a prompt, in CPU time beside one chunk.

python -m tests.tools.full_size --out DIR && python -m tests.support.long_prompts --bundle DIR/bundle --size 256x256
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from engines.backends.device import Call, Device, Engine, Stream
from engines.backends.registry import open_device
from engines.contract import INPAINT_LANES, LANES, MAX_CHUNKS, TERMS, Array
from engines.manifest import Manifest
from server.requests.tokenizer import CHUNK_COUNTS

ROWS = 2


def step_inputs(manifest: Manifest, *, width: int, height: int, chunks: int) -> dict[str, Array]:
    """One guided image's step, of noise."""
    latent, context = manifest.latent, manifest.context
    latents = (latent.channels, height // latent.downscale, width // latent.downscale)
    random = np.random.default_rng(0)
    return {
        "state": random.standard_normal((1, LANES, *latents), np.float32),
        "context": random.standard_normal((MAX_CHUNKS, context.tokens, context.width), np.float32),
        "inpaint": np.zeros((1, INPAINT_LANES, *latents), np.float32),
        "noise": np.zeros((1, *latents), np.float32),
        "slot": np.zeros(1, np.int64),
        "row_image": np.zeros(ROWS, np.int64),
        "row_context": random.integers(MAX_CHUNKS, size=(ROWS, chunks)),
        "timestep": np.full(ROWS, 500, np.float32),
        "guidance": np.array([[7.5, -6.5]], np.float32),
        "scale": np.ones(1, np.float32),
        "coef": np.zeros((1, LANES, TERMS), np.float32),
        "level": np.zeros((1, 2), np.float32),
    }


def bound(device: Device, stream: Stream, engine: Engine, inputs: dict[str, Array]) -> Call:
    buffers = {name: device.allocate(array.shape, array.dtype) for name, array in inputs.items()}
    for name, array in inputs.items():
        stream.write(buffers[name], array)
    return engine.bind({**buffers, "state_next": device.allocate(inputs["state"].shape, np.float32)})


def seconds(call: Call) -> float:
    start = time.process_time()
    call.launch()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--backend", default="openvino")
    parser.add_argument("--size", default="512x512")
    parser.add_argument("--repeat", type=int, default=6)
    given = parser.parse_args()
    manifest, device = Manifest.read(given.bundle), open_device(given.backend, threads=1)
    stream = device.stream("steps")
    engine = device.load(given.bundle / manifest.graphs["denoise"].onnx["fp32"].files[0].path, stream)
    width, height = map(int, given.size.split("x"))
    calls = {
        chunks: bound(device, stream, engine, step_inputs(manifest, width=width, height=height, chunks=chunks))
        for chunks in CHUNK_COUNTS
    }
    for call in calls.values():
        call.launch()
    rounds = [{chunks: seconds(call) for chunks, call in calls.items()} for _ in range(given.repeat)]
    for chunks in CHUNK_COUNTS:
        median = statistics.median(one[chunks] for one in rounds)
        ratio = statistics.median(one[chunks] / one[1] for one in rounds)
        sys.stdout.write(f"{chunks} chunks: {median:.2f} s of CPU time a step, {ratio:.3f} times one chunk's\n")


if __name__ == "__main__":
    main()
