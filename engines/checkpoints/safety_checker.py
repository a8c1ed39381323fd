"""What a checkpoint's safety checker does to images before it looks at them: `feature_extractor/` of a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from engines.checkpoints.configs import parse_config
from engines.checkpoints.diffusers_folder import CheckpointConfig, read_json
from engines.errors import CheckpointError

_LARGEST = 4096  # pixels


@dataclass(frozen=True)
class Preprocessing:
    """What CLIPImageProcessor does: resize by the shorter side, cut out the centre, scale and normalise the colours."""

    shortest_edge: int  # pixels
    crop: int  # pixels, of each side
    mean: tuple[float, float, float]  # of red, green and blue in 0..1
    std: tuple[float, float, float]


def _side_of(*names: str) -> BeforeValidator:
    """Accept a number of pixels, or an object whose fields `names` all have that number."""

    def number(value: object) -> object:
        if isinstance(value, Mapping) and set(value) == set(names) and len({value[name] for name in names}) == 1:
            return value[names[0]]
        return value

    return BeforeValidator(number)


_Pixels = Annotated[int, Field(ge=1, le=_LARGEST)]
_Deviation = Annotated[float, Field(gt=0)]


class _FeatureExtractor(BaseModel):
    """`feature_extractor/preprocessor_config.json`, of a CLIPImageProcessor or, in older folders, its predecessor."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)

    do_resize: Literal[True] = True
    do_center_crop: Literal[True] = True
    do_rescale: Literal[True] = True
    do_normalize: Literal[True] = True
    resample: Literal[3] = 3  # bicubic, by Pillow's number
    size: Annotated[_Pixels, _side_of("shortest_edge")] = 224
    crop_size: Annotated[_Pixels, _side_of("height", "width")] = 224
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[_Deviation, _Deviation, _Deviation] = (0.26862954, 0.26130258, 0.27577711)


def read_preprocessing(config: CheckpointConfig) -> Preprocessing:
    """Read what the folder's feature extractor does. Raises CheckpointError where that is not supported."""
    path = config.folder / "feature_extractor" / "preprocessor_config.json"
    content: Any = read_json(path, f"{config.name} is not a complete diffusers checkpoint")
    try:
        asked = parse_config(_FeatureExtractor, _with_tuples(content), path)
    except CheckpointError as error:
        raise CheckpointError(f"{error} Or build without the safety checker: --no-safety-checker.") from error
    if asked.crop_size > asked.size or not math.isclose(asked.rescale_factor, 1 / 255, rel_tol=1e-6):
        raise CheckpointError(
            f"{path}: a crop_size above size, or a rescale_factor other than 1/255, is not supported: "
            "build without the safety checker: --no-safety-checker."
        )
    return Preprocessing(asked.size, asked.crop_size, asked.image_mean, asked.image_std)


def _with_tuples(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in content.items()}
