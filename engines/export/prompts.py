"""The graphs that encode prompts, of models with one text encoder and with two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from engines.contract import IDS_2, TEXT_EMBEDS, GraphName
from engines.export.graph_module import GraphModule
from engines.export.lora import LoraUpdates, updated
from engines.manifest import LoraLayer


class EncodePrompt(GraphModule):
    """Token ids to embeddings: one of the text encoder's hidden states, normalized, and its tokens weighted."""

    graph: ClassVar[GraphName] = "encode_prompt"

    def __init__(self, text_encoder: Any, lora_layers: Sequence[LoraLayer] = ()) -> None:
        """`lora_layers` are those that LoRAs update, in the variant for them."""
        super().__init__()
        self.text_encoder = text_encoder
        self.updates = LoraUpdates("text_encoder", text_encoder, lora_layers)

    def forward(
        self,
        ids: Tensor,
        layer: Tensor,
        weights: Tensor,
        lora_pool: Tensor | None = None,
        row_lora: Tensor | None = None,
        lora_weight: Tensor | None = None,
    ) -> Tensor:
        with updated(self.updates, lora_pool, row_lora, lora_weight):
            states = self.text_encoder(input_ids=ids, output_hidden_states=True).hidden_states
        return _weighted(self.text_encoder.final_layer_norm(_chosen(states, layer)).float(), weights)


class LoraEncodePrompt(EncodePrompt):
    """Chunks of prompts, each with the LoRAs of its own request."""

    graph: ClassVar[GraphName] = "encode_prompt_lora"


class EncodePromptPair(GraphModule):
    """Token ids of two encoders to their hidden states, side by side, and the pooled embedding of the second.

    As in Stable Diffusion XL hidden states are not normalized. `layer` counts in the encoder with fewer layers; the
    other leaves out as many. A chunk without weight, all of them 0, has embeddings of zeros.
    """

    graph: ClassVar[GraphName] = "encode_prompt"
    optional = (IDS_2, TEXT_EMBEDS)

    def __init__(self, text_encoder: Any, text_encoder_2: Any, lora_layers: Sequence[LoraLayer] = ()) -> None:
        """`lora_layers` are those that LoRAs update, in the variant for them."""
        super().__init__()
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        layers = [one.config.num_hidden_layers for one in (text_encoder, text_encoder_2)]
        self.more_layers = [count - min(layers) for count in layers]
        self.updates = LoraUpdates("text_encoder", text_encoder, lora_layers)
        self.updates_2 = LoraUpdates("text_encoder_2", text_encoder_2, lora_layers)

    def forward(  # noqa: PLR0913, PLR0917 - the graph's inputs, bound by name
        self,
        ids: Tensor,
        layer: Tensor,
        weights: Tensor,
        ids_2: Tensor,
        lora_pool: Tensor | None = None,
        row_lora: Tensor | None = None,
        lora_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        loras = (lora_pool, row_lora, lora_weight)
        with updated(self.updates, *loras), updated(self.updates_2, *loras):
            first = self.text_encoder(input_ids=ids, output_hidden_states=True)
            second = self.text_encoder_2(input_ids=ids_2, output_hidden_states=True)
        embeddings = [
            _weighted(_chosen(encoded.hidden_states, layer + more).float(), weights)
            for encoded, more in zip((first, second), self.more_layers, strict=True)
        ]
        has_weight = torch.where(weights.abs().amax(dim=1, keepdim=True) > 0, 1.0, 0.0)
        return torch.cat(embeddings, dim=2), second.text_embeds.float() * has_weight


class LoraEncodePromptPair(EncodePromptPair):
    """As `LoraEncodePrompt`; LoRAs update both encoders."""

    graph: ClassVar[GraphName] = "encode_prompt_lora"


def _chosen(states: Sequence[Tensor], layer: Tensor) -> Tensor:
    """For each chunk the hidden state of number `layer` [N]: [N, T, D]."""
    return torch.stack(tuple(states), dim=1)[torch.arange(layer.shape[0]), layer]


def _weighted(embeddings: Tensor, weights: Tensor) -> Tensor:
    """Embeddings [N, T, D] with the weights [N, T] of their tokens.

    As AUTOMATIC1111's web UI does: emphasis changes the balance of a chunk's tokens, not their mean. Where values
    cancel out there is no mean to restore.
    """
    weighted = embeddings * weights[:, :, None]
    before, after = (values.mean(dim=(1, 2), keepdim=True) for values in (embeddings, weighted))
    meant = after.abs() > 1e-3 * weighted.abs().mean(dim=(1, 2), keepdim=True)
    return weighted * torch.where(meant, before / torch.where(meant, after, 1.0), 1.0)
