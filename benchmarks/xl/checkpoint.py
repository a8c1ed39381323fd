"""Stable Diffusion XL at its full size, with random weights in FP16: 3.5 billion, written one at a time.

python -m benchmarks.xl.checkpoint --out DIR
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_TOKENS, _VOCABULARY = 77, 49408
_CAPTION = "a photograph of a lighthouse on a rock in the sea"
# Published configs of stabilityai/stable-diffusion-xl-base-1.0, where they differ from diffusers' defaults.
_UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_VAE: Mapping[str, Any] = {
    "sample_size": 1024,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
_TEXT: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_TEXT_2: Mapping[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
_SCHEDULE: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def write_xl_checkpoint(folder: Path) -> None:
    """Write a diffusers folder of 7 GB with weights of seed 0; memory holds one tensor at a time."""
    import torch  # noqa: PLC0415 - takes seconds to import
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel  # noqa: PLC0415 - as above
    from transformers import CLIPTextModel, CLIPTextModelWithProjection  # noqa: PLC0415 - as above

    ids = _write_tokenizers(folder)
    torch.manual_seed(0)
    with torch.device("meta"):
        encoders = {
            "text_encoder": CLIPTextModel(_text_config(_TEXT, ids)),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config(_TEXT_2, ids)),
        }
        parts = {"unet": UNet2DConditionModel(**_UNET), "vae": AutoencoderKL(**_VAE)}
    for name, module in encoders.items():
        module.config.save_pretrained(folder / name)
        # As in published checkpoints; newer versions of transformers leave the first part of these names out.
        _write_weights(module, folder / name / "model.safetensors", prefix="text_model.")
    for name, module in parts.items():
        module.save_config(folder / name)
        _write_weights(module, folder / name / "diffusion_pytorch_model.safetensors")
    EulerDiscreteScheduler(**_SCHEDULE).save_pretrained(folder / "scheduler")
    _write_index(folder)


def _write_tokenizers(folder: Path) -> dict[str, int]:
    """Write both tokenizers; return the ids that the text encoders' configs name."""
    from transformers import CLIPTokenizer  # noqa: PLC0415 - as above

    from engines.demo.tokenizer import write_tokenizer  # noqa: PLC0415 - as above

    write_tokenizer(folder / "tokenizer", [_CAPTION])
    first = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=_TOKENS)
    first.save_pretrained(folder / "tokenizer")
    second = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=_TOKENS, pad_token="!")  # noqa: S106 - no password
    second.save_pretrained(folder / "tokenizer_2")
    return {name: getattr(first, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _text_config(config: Mapping[str, Any], ids: Mapping[str, int]) -> Any:
    from transformers import CLIPTextConfig  # noqa: PLC0415 - as above

    return CLIPTextConfig(vocab_size=_VOCABULARY, max_position_embeddings=_TOKENS, **config, **ids)


def _write_index(folder: Path) -> None:
    classes = {
        "scheduler": ("diffusers", "EulerDiscreteScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **classes}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_weights(module: nn.Module, path: Path, *, prefix: str = "") -> None:
    """Write a .safetensors file of the parameters of a module on the `meta` device, in FP16."""
    weights = {_published(name, prefix): weight for name, weight in module.named_parameters()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + 2 * weight.numel()
        header[name] = {"dtype": "F16", "shape": list(weight.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for values in _random(weights):
            file.write(values.numpy().data)


def _published(name: str, prefix: str) -> str:
    if not prefix or name.startswith("text_projection"):
        return name
    return f"{prefix}{name.removeprefix(prefix)}"


def _random(weights: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Values with the spread of new layers: ones in norms, zeros in biases, the rest by the inputs of each output."""
    import torch  # noqa: PLC0415 - as above

    for name, weight in weights.items():
        if weight.ndim < 2:
            yield torch.full(weight.shape, float(name.endswith("weight")), dtype=torch.float16)
        else:
            spread = 0.02 if "embedding.weight" in name else 1 / math.sqrt(3 * weight[0].numel())
            yield (torch.randn(weight.shape) * spread).half()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    write_xl_checkpoint(parser.parse_args().out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
