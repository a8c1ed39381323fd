"""LoRAs of every form for the tiny checkpoint, what diffusers draws with them fused, and a crowd that asks for them.

The updates are kept as they were drawn, so that what the server makes of the files is compared with what they mean, and
not with what our own reader finds in them.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.support.references import CLASSES, Pixels, draw

Layers = Mapping[str, nn.Module]
Factors = Mapping[str, tuple[Tensor, Tensor]]  # up [out, rank] and down [rank, in] of each layer
Naming = Callable[[str, str], str]  # the name of a layer's factor, "up" or "down", in a file
_STRENGTH = 0.35  # of an update, relative to the layer's weights: pictures differ, and stay pictures
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TEXT = ("k_proj", "v_proj", "q_proj", "out_proj")


@dataclass(frozen=True, eq=False)
class WrittenLora:
    """A LoRA in a file."""

    name: str
    updates: dict[tuple[str, str], Tensor]  # at weight 1, by part ("unet", "text_encoder") and layer: W' - W

    @property
    def updates_text(self) -> bool:
        return any(part == "text_encoder" for part, _ in self.updates)


@dataclass(frozen=True)
class Form:
    """How a tool writes LoRAs: which layers it trains, and how it names them."""

    unet: Naming
    text: Naming | None = None
    attention_only: bool = False
    alpha: Callable[[str], str] | None = None  # the name of a layer's alpha; without one, the scale is 1


def _kohya(prefix: str) -> Naming:
    return lambda layer, kind: f"{prefix}_{layer.replace('.', '_')}.lora_{kind}.weight"


def _peft(prefix: str) -> Naming:
    return lambda layer, kind: f"{prefix}{layer}.lora_{'A' if kind == 'down' else 'B'}.weight"


def _processor(layer: str, kind: str) -> str:
    parent, last = layer.removesuffix(".0").rpartition(".")[::2]
    return f"unet.{parent}.processor.{last}_lora.{kind}.weight"


_KOHYA = Form(
    _kohya("lora_unet"), _kohya("lora_te_text_model"), alpha=lambda name: f"{name.partition('.lora_')[0]}.alpha"
)
FORMS: dict[str, Form] = {
    "kohya": _KOHYA,
    "kohya-unet": Form(_KOHYA.unet, alpha=_KOHYA.alpha),
    "diffusers": Form(_peft("unet."), _peft("text_encoder.text_model.")),
    "diffusers-unet": Form(_peft("unet.")),
    "diffusers-old": Form(_processor, attention_only=True),
    "diffusers-linear": Form(
        lambda layer, kind: f"unet.{layer}.lora.{kind}.weight",
        lambda layer, kind: f"text_encoder.text_model.{layer}.lora_linear_layer.{kind}.weight",
    ),
}


def write_loras(folder: Path, pipeline: Any, ranks: Sequence[int] = (2, 4, 4, 8, 2, 4, 4, 4)) -> list[WrittenLora]:
    """One LoRA of each form, of PEFT with its config, and of the early package, in `folder`."""
    folder.mkdir(exist_ok=True)
    unet, text = _linear(pipeline.unet), _linear(pipeline.text_encoder)
    made = [
        _write_form(folder, name, FORMS[name], (unet, text), rank, seed)
        for seed, (name, rank) in enumerate(zip(FORMS, ranks, strict=False))
    ]
    made.append(_write_peft(folder, unet, ranks[len(FORMS)]))
    made.append(_write_early(folder, unet, text, ranks[len(FORMS) + 1]))
    return made


def _linear(module: nn.Module) -> dict[str, nn.Module]:
    """Its linear layers and 1x1 convolutions."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    }


def _factors(layers: Layers, rank: int, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Random ones, whose product is a share of each layer's weights in size."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, Tensor)
        out, width = weight.shape[:2]
        size = math.sqrt(_STRENGTH * float(weight.detach().std()) / math.sqrt(rank))
        up, down = (torch.randn(shape, generator=generator) * size for shape in ((out, rank), (rank, width)))
        made[name] = up, down
    return made


def _write_form(folder: Path, name: str, form: Form, parts: tuple[Layers, Layers], rank: int, seed: int) -> WrittenLora:
    unet, text = parts
    if form.attention_only:
        unet = {layer: module for layer, module in unet.items() if layer.endswith(_ATTENTION)}
    text = {layer: module for layer, module in text.items() if layer.endswith(_TEXT)} if form.text else {}
    strength = 2.0 if form.alpha else 1.0  # rank / alpha: what the file holds is the stronger by it
    tensors: dict[str, Tensor] = {}
    updates = {}
    for part, naming, layers in (("unet", form.unet, unet), ("text_encoder", form.text or form.unet, text)):
        for layer, (up, down) in _factors(layers, rank, seed).items():
            for kind, factor in (("up", strength * up), ("down", down)):
                conv = isinstance(layers[layer], nn.Conv2d)
                tensors[naming(layer, kind)] = factor[:, :, None, None] if conv else factor
            if form.alpha:
                tensors[form.alpha(naming(layer, "up"))] = torch.tensor(rank / strength)
            updates[part, layer] = up @ down
    save_file(tensors, folder / f"{name}.safetensors")
    return WrittenLora(name, updates)


def _write_peft(folder: Path, unet: Layers, rank: int) -> WrittenLora:
    """As PEFT's `save_pretrained` does: a folder of its own, and the strength in a config."""
    home = folder / "peft"
    home.mkdir()
    naming = _peft("base_model.model.")
    layers = {layer: module for layer, module in unet.items() if isinstance(module, nn.Linear)}
    factors = _factors(layers, rank, seed=71)
    tensors = {naming(layer, kind): value for layer, pair in factors.items() for kind, value in _named(pair)}
    save_file(tensors, home / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "use_rslora": False}
    (home / "adapter_config.json").write_text(json.dumps(config))
    return WrittenLora("peft", {("unet", layer): 2 * up @ down for layer, (up, down) in factors.items()})


def _named(pair: tuple[Tensor, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from zip(("up", "down"), pair, strict=True)


def _write_early(folder: Path, unet: Layers, text: Layers, rank: int) -> WrittenLora:
    """Layers by number: blocks down, up and middle, in each attention, GEGLU, attention."""
    prefixes = dict.fromkeys(
        name.partition(".attn1.")[0]
        for block in ("down", "up", "mid")
        for name in unet
        if name.startswith(block)
        if ".attn1." in name
    )
    inner = (*(f"attn1.{one}" for one in _ATTENTION), "ff.net.0.proj", *(f"attn2.{one}" for one in _ATTENTION))
    names = [f"{prefix}.{layer}" for prefix in prefixes for layer in inner]
    blocks = sorted({name.rpartition(".self_attn.")[0] for name in text if ".self_attn." in name})
    text_names = [f"{block}.self_attn.{layer}" for block in blocks for layer in _TEXT]
    tensors: dict[str, Tensor] = {}
    updates = {}
    for part, layers, ordered in (("unet", unet, names), ("text_encoder", text, text_names)):
        factors = _factors({name: layers[name] for name in ordered}, rank, seed=72)
        for number, (layer, pair) in enumerate(factors.items()):
            tensors |= {f"{part}:{number}:{kind}": value for kind, value in _named(pair)}
            updates[part, layer] = pair[0] @ pair[1]
    classes = {"unet": ["CrossAttention", "Attention", "GEGLU"], "text_encoder": ["CLIPAttention"]}
    metadata = {part: json.dumps(named) for part, named in classes.items()}
    save_file(tensors, folder / "early.safetensors", metadata=metadata)
    return WrittenLora("early", updates)


@contextmanager
def fused(pipeline: Any, loras: Sequence[tuple[WrittenLora, float]]) -> Iterator[None]:
    """Within it, the pipeline's weights have these LoRAs added, each by its weight."""
    changed: dict[nn.Linear | nn.Conv2d, Tensor] = {}
    for lora, weight in loras:
        for (part, name), update in lora.updates.items():
            layer: nn.Linear | nn.Conv2d = getattr(pipeline, part).get_submodule(name)
            changed.setdefault(layer, layer.weight.detach().clone())
            with torch.no_grad():
                layer.weight.add_(weight * update.view_as(layer.weight))
    try:
        yield
    finally:
        for layer, before in changed.items():
            with torch.no_grad():
                layer.weight.copy_(before)


@dataclass(frozen=True, eq=False)
class Wish:
    """A request of the crowd."""

    body: dict[str, Any]
    loras: tuple[tuple[WrittenLora, float], ...] = ()

    @property
    def with_loras(self) -> dict[str, Any]:
        chosen = [{"name": lora.name, "weight": weight} for lora, weight in self.loras]
        return {**self.body, "loras": chosen} if chosen else self.body

    def drawn_by(self, pipeline: Any) -> Pixels:
        """What diffusers draws with the LoRAs fused."""
        body = dict(self.body)
        with fused(pipeline, self.loras):
            return draw(pipeline, scheduler=body.pop("scheduler"), seed=body.pop("seed"), **body)


def crowd(loras: Sequence[WrittenLora], count: int, *, seed: int = 5) -> list[Wish]:
    """`count` requests of every scheduler in turn; a quarter has no LoRA, and another two."""
    dice, schedulers = random.Random(seed), list(CLASSES)
    wishes = []
    for index in range(count):
        body = {
            "prompt": f"a {dice.choice(['red', 'green', 'blue'])} bird at night",
            "negative_prompt": dice.choice(["", "rain"]),
            "seed": 100 + index,
            "scheduler": schedulers[(index * 7) % len(schedulers)],
            "num_inference_steps": dice.randint(4, 12),
            "guidance_scale": round(dice.uniform(2, 8), 2),
            "width": 32,
            "height": 32,
        }
        chosen = [loras[index % len(loras)], loras[(index * 3 + 1) % len(loras)]]
        some = () if index % 4 == 3 else tuple(dict.fromkeys(chosen[: 1 + (index % 4 == 2)]))
        wishes.append(Wish(body, tuple((lora, round(dice.uniform(0.4, 1.2), 2)) for lora in some)))
    return wishes
