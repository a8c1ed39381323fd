"""Single files of Stable Diffusion XL, with the names of Stability's generative-models (SGM)."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

CONFIGS: Final = "stabilityai/stable-diffusion-xl-base-1.0"  # its configs describe every file of this layout
TEXT_ENCODERS: Final = {
    "conditioner.embedders.0.transformer.": "first text encoder",  # CLIP
    "conditioner.embedders.1.model.": "second text encoder",  # OpenCLIP
}
UNET_LAYERS: Final = ("label_emb.",)  # of the pooled embedding and time_ids
# Names by which files are recognised that have the same layout and are of another kind.
OTHER_MODELS: Final = {
    r"conditioner\.embedders\.0\.model\.": "a Stable Diffusion XL refiner (pass the base model)",
    r"edm_(mean|std|vpred)\b": "a model with the noise schedule of EDM, such as Playground v2.5 or CosXL",
}
_CONDITIONER = "conditioner."
_ADDED, _OTHER_TEXT = "model.diffusion_model.label_emb.0.0.", "cond_stage_model."


def is_xl(names: Collection[str]) -> bool:
    """Whether tensors of these names are of this layout, complete or not."""
    return any(name.startswith(_CONDITIONER) for name in names) or (
        any(name.startswith(_ADDED) for name in names) and not any(name.startswith(_OTHER_TEXT) for name in names)
    )
