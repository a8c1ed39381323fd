"""The names that a UNet's layers have in Stability's generative-models (SGM), where blocks are numbered in sequence.

kohya's tools train Stable Diffusion XL on that UNet, and LoRAs of theirs have its names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

_ALONE: Mapping[str, str] = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_MIDDLE: Mapping[str, str] = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_INNER: Mapping[str, Mapping[str, str]] = {
    "resnets": {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
}


def sgm_names(layers: Iterable[str]) -> dict[str, str]:
    """Return the names of a UNet's `layers` in SGM's, by those in diffusers'; only those that SGM's has."""
    layers = list(layers)
    modules = dict.fromkeys(_module(layer) for layer in layers)
    places = {**_MIDDLE, **dict(_down(modules)), **dict(_up(modules))}
    named = {}
    for layer in layers:
        module = _module(layer)
        if module in places:
            inner = layer.removeprefix(f"{module}.")
            named[layer] = f"{places[module]}.{_INNER.get(module.split('.')[-2], {}).get(inner, inner)}"
    return named | {layer: _ALONE[layer] for layer in layers if layer in _ALONE}


def _module(layer: str) -> str:
    """The resnet, attention or sampler that a layer is in, such as `down_blocks.0.resnets.1`."""
    return ".".join(layer.split(".")[: 3 if layer.startswith("mid_block.") else 4])


def _down(modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Block 0 is conv_in; every resnet, with the attention behind it, is a block, and so is a downsampler."""
    for number, module in enumerate(_in_order("down_blocks", modules), start=1):
        yield module.replace("resnets", "attentions"), f"input_blocks.{number}.1"
        yield module, f"input_blocks.{number}.0"


def _up(modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """As down; an upsampler is the last part of the block before it."""
    modules, number = list(modules), -1
    for module in _in_order("up_blocks", modules):
        if "upsamplers" in module:
            attends = any(other.startswith(module.replace("upsamplers.0", "attentions.")) for other in modules)
            yield module, f"output_blocks.{number}.{1 + attends}"
            continue
        number += 1
        yield module, f"output_blocks.{number}.0"
        yield module.replace("resnets", "attentions"), f"output_blocks.{number}.1"


def _in_order(side: str, modules: Iterable[str]) -> list[str]:
    """Resnets and samplers of the blocks of a side; a block's sampler comes last."""
    found = [name for name in modules if name.startswith(side) and ".attentions." not in name]
    return sorted(found, key=lambda name: (int(name.split(".")[1]), "samplers" in name, int(name.split(".")[3])))
