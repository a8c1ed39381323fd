"""Builds engines from a full-size small-stable-diffusion-v0 with random weights, and says what that took.

python -m tests.full_size --out DIR [--backend tensorrt_rtx] [arguments of build_engines.py]

Needs about 6 GB of disk. Not part of the test run: it takes minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engines.demo.tokenizer import write_tokenizer
from engines.manifest import Manifest

_TOKENS = 77


def make_full_size(folder: Path) -> None:
    """Write the checkpoint: the architecture of OFA-Sys/small-stable-diffusion-v0, with a smaller vocabulary."""
    write_tokenizer(folder / "tokenizer", ["a photograph of a lighthouse on a rock in the sea"])
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=_TOKENS)
    torch.manual_seed(0)
    StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(_text_config(tokenizer)),
        unet=UNet2DConditionModel(
            sample_size=64,
            layers_per_block=1,
            block_out_channels=(320, 640, 1280, 1280),
            down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        vae=AutoencoderKL(
            sample_size=512,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
        ),
        scheduler=PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def run(command: list[str]) -> tuple[int, float, int]:
    """The exit code, the seconds, and the peak memory in bytes of `command` and all its children together."""
    began, peak = time.monotonic(), 0
    with subprocess.Popen(command) as process:  # noqa: S603 - our own command
        while process.poll() is None:
            peak = max(peak, _memory(process.pid))
            time.sleep(0.5)
    return process.returncode, time.monotonic() - began, peak


def _memory(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.Error:
        pass  # it has just ended
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the bundle")
    parser.add_argument("--backend", default="tensorrt_rtx")
    given, more = parser.parse_known_args()
    checkpoint, bundle = given.out / "checkpoint", given.out / "bundle"
    if not (checkpoint / "model_index.json").exists():
        make_full_size(checkpoint)
    build = ["build_engines.py", "--model", str(checkpoint), "--out", str(bundle), "--backend", given.backend, *more]
    code, seconds, peak = run([sys.executable, *build])
    sys.stderr.write(f"exit {code} after {seconds / 60:.1f} minutes, {peak / 1e9:.1f} GB at the peak\n")
    if code == 0 and (layers := Manifest.load(bundle).builds[given.backend].engines["denoise"].layers):
        sys.stderr.write(f"attentions fused: {layers.fused_attentions} of {layers.attentions}\n")
        return int(layers.fused_attentions < layers.attentions)
    return code


if __name__ == "__main__":
    sys.exit(main())
