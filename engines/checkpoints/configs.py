"""The config files of a diffusers folder as models: the keys that decide a build, with the defaults of the libraries.

A key that is absent has the default that diffusers and transformers give it. Other keys are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from engines.errors import CheckpointError

_MAX_CHANNELS, _MAX_LEVELS, _MAX_LAYERS, _MAX_TIMESTEPS = 16_384, 6, 64, 10_000  # beyond real models
_SHOWN = 60  # characters of a wrong value
# Keys of the UNet with one value, or one for each level.
_PER_LEVEL = ("layers_per_block", "cross_attention_dim", "attention_head_dim", "only_cross_attention")
_DEPTHS = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")  # one for each layer, besides
_Config = TypeVar("_Config", bound=BaseModel)

Width = Annotated[int, Field(ge=1, le=_MAX_CHANNELS)]
Layers = Annotated[int, Field(ge=1, le=_MAX_LAYERS)]
Widths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=_MAX_LEVELS)]
BlockCounts = Annotated[tuple[Layers, ...], Field(max_length=_MAX_LEVELS)]
Names = Annotated[tuple[str, ...], Field(min_length=1, max_length=_MAX_LEVELS)]
DownBlocks = Annotated[tuple[Literal["CrossAttnDownBlock2D", "DownBlock2D"], ...], Field(max_length=_MAX_LEVELS)]
UpBlocks = Annotated[tuple[Literal["CrossAttnUpBlock2D", "UpBlock2D"], ...], Field(max_length=_MAX_LEVELS)]
Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(gt=0, lt=1)]


def _one_or_each(most: int) -> BeforeValidator:
    """Accept one count, or one for each level of the UNet."""

    def check(value: object) -> object:
        counts = value if isinstance(value, list | tuple) else [value]
        if not 0 < len(counts) <= _MAX_LEVELS or not all(type(one) is int and 1 <= one <= most for one in counts):
            raise ValueError(f"should be a whole number from 1 to {most}, or a list of them")
        return tuple(counts) if isinstance(value, list) else value

    return BeforeValidator(check)


def _depths(value: object) -> object:
    """Accept one depth, or one for each level, or in a level's place a list with one for each of its layers."""
    levels = value if isinstance(value, list | tuple) else [value]
    each = [depth for level in levels for depth in (level if isinstance(level, list | tuple) else [level])]
    if not 0 < len(levels) <= _MAX_LEVELS or not all(type(one) is int and 0 <= one <= _MAX_LAYERS for one in each):
        raise ValueError(f"should be a whole number from 0 to {_MAX_LAYERS}, or a list of them or of lists")
    return _tupled(value)


def _tupled(value: object) -> object:
    return tuple(map(_tupled, value)) if isinstance(value, list) else value


Counts = Annotated[int | tuple[int, ...], _one_or_each(_MAX_CHANNELS)]
LayerCounts = Annotated[int | tuple[int, ...], _one_or_each(_MAX_LAYERS)]
LevelDepths = tuple[int | tuple[int, ...], ...]
Depths = Annotated[int | LevelDepths, BeforeValidator(_depths)]
UpDepths = Annotated[LevelDepths | None, BeforeValidator(lambda value: value if value is None else _depths(value))]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class _Weights(_File):
    """A config whose part has weights."""

    quantization_config: Any = None

    @model_validator(mode="after")
    def _is_not_quantized(self) -> Self:
        if self.quantization_config is not None:
            raise ValueError(
                "has a quantization_config, and quantized weights cannot be exported: pass the model they were made of"
            )
        return self


class ModelIndex(_File):
    """`model_index.json`: the classes of the pipeline and of its parts, each as [library, class]."""

    pipeline: str = Field(alias="_class_name")
    name_or_path: str | None = Field(None, alias="_name_or_path")  # where it was loaded from before it was saved
    text_encoder: tuple[str | None, str | None] | None = None
    text_encoder_2: tuple[str | None, str | None] | None = None
    tokenizer: tuple[str | None, str | None] | None = None
    tokenizer_2: tuple[str | None, str | None] | None = None
    unet: tuple[str | None, str | None] | None = None
    vae: tuple[str | None, str | None] | None = None
    scheduler: tuple[str | None, str | None] | None = None
    safety_checker: tuple[str | None, str | None] | None = None
    force_zeros_for_empty_prompt: bool = True  # of pipelines with two text encoders

    def class_of(self, part: str) -> str | None:
        """The class of a part; None where the pipeline has no such part."""
        published: tuple[str | None, str | None] | None = getattr(self, part)
        return published[1] if published else None


class UnetConfig(_Weights):
    """`unet/config.json`, of a `UNet2DConditionModel`."""

    diffusers_version: str | None = Field(None, alias="_diffusers_version", pattern=r"^\d{1,4}\.\d{1,4}")
    sample_size: Counts
    in_channels: Width = 4
    out_channels: Width = 4
    block_out_channels: Widths = (320, 640, 1280, 1280)
    down_block_types: DownBlocks = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: UpBlocks = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    mid_block_type: Literal["UNetMidBlock2DCrossAttn", "UNetMidBlock2D"] | None = "UNetMidBlock2DCrossAttn"
    layers_per_block: LayerCounts = 2
    transformer_layers_per_block: Depths = 1
    reverse_transformer_layers_per_block: UpDepths = None  # from the deepest level up
    cross_attention_dim: Counts = 1280
    attention_head_dim: Counts = 8
    num_attention_heads: None = None  # diffusers refuses it: what it means is under attention_head_dim
    norm_num_groups: Width = 32
    norm_eps: Positive = 1e-5
    act_fn: str = "silu"
    only_cross_attention: bool | tuple[bool, ...] = False
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    upcast_attention: bool = False
    flip_sin_to_cos: bool = True
    center_input_sample: bool = False
    freq_shift: Annotated[int, Field(ge=0, le=1)] = 0
    time_embedding_act_fn: None = None
    time_cond_proj_dim: Width | None = None
    # When set, the UNet has inputs besides the latent, the timestep and the prompt.
    class_embed_type: Any = None
    num_class_embeds: Any = None
    addition_embed_type: Any = None
    addition_time_embed_dim: Width | None = None  # of each number of time_ids
    projection_class_embeddings_input_dim: Width | None = None  # of time_ids and the pooled embedding together
    encoder_hid_dim: Any = None
    encoder_hid_dim_type: Any = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _check_levels(self, "down_block_types", "up_block_types", *_PER_LEVEL, *_DEPTHS)
        self._check_depths()
        _check_groups(self.norm_num_groups, self.block_out_channels)
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise ValueError("sample_size should be a whole number, or height and width")
        return self

    def _check_depths(self) -> None:
        """Raise ValueError unless every layer with attention has a depth of its transformer."""
        down, up = self.transformer_layers_per_block, self.reverse_transformer_layers_per_block
        if up is None and isinstance(down, tuple) and any(isinstance(one, tuple) for one in down):
            raise ValueError(
                f"{_DEPTHS[1]} is missing: the depths of the way up, where those of the way down are lists"
            )
        counts, levels = self.layers_per_block, len(self.block_out_channels)
        layers = (counts,) * levels if isinstance(counts, int) else counts
        _check_lengths(_DEPTHS[0], down, self.down_block_types, layers)
        _check_lengths(_DEPTHS[1], up, self.up_block_types, [count + 1 for count in reversed(layers)])

    @property
    def precedes_0_9(self) -> bool:
        """Whether a version of diffusers before 0.9 wrote the config."""
        return tuple(map(int, (self.diffusers_version or "1.0").split(".")[:2])) < (0, 9)


class VaeConfig(_Weights):
    """`vae/config.json`, of an `AutoencoderKL`."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Annotated[int, Field(ge=1, le=256)] = 4
    block_out_channels: Widths = (64,)
    down_block_types: Names = ("DownEncoderBlock2D",)
    up_block_types: Names = ("UpDecoderBlock2D",)
    layers_per_block: Layers = 1
    norm_num_groups: Width = 32
    act_fn: str = "silu"
    scaling_factor: Positive = 0.18215  # the oldest configs omit it
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True  # it leaves FP16's range, as those of Stable Diffusion XL do; of others it says nothing
    latents_mean: None = None  # set where latents have another mean and spread than those of Stable Diffusion
    latents_std: None = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        _check_levels(self, "down_block_types", "up_block_types")
        _check_groups(self.norm_num_groups, self.block_out_channels)
        return self

    @property
    def downscale(self) -> int:
        """Pixels per latent, in each direction."""
        return 1 << (len(self.block_out_channels) - 1)


class TinyVaeConfig(_Weights):
    """`vae/config.json`, of an `AutoencoderTiny`, a distilled VAE: its encoder returns latents, and no distribution."""

    in_channels: Literal[3] = 3
    out_channels: Literal[3] = 3
    latent_channels: Annotated[int, Field(ge=1, le=256)] = 4
    encoder_block_out_channels: Widths = (64,) * 4
    decoder_block_out_channels: Widths = (64,) * 4
    num_encoder_blocks: BlockCounts = (1, 3, 3, 3)
    num_decoder_blocks: BlockCounts = (3, 3, 3, 1)
    upsampling_scaling_factor: Literal[2] = 2
    act_fn: str = "relu"
    scaling_factor: Positive = 1.0
    force_upcast: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        levels = len(self.encoder_block_out_channels)
        for key in ("decoder_block_out_channels", "num_encoder_blocks", "num_decoder_blocks"):
            if len(getattr(self, key)) != levels:
                raise ValueError(f"{key} should have {levels} entries, one for each of encoder_block_out_channels")
        return self

    @property
    def downscale(self) -> int:
        """As of `VaeConfig`."""
        return 1 << (len(self.encoder_block_out_channels) - 1)


class TextEncoderConfig(_Weights):
    """`text_encoder/config.json`, of a `CLIPTextModel`."""

    hidden_size: Width = 512
    intermediate_size: Annotated[int, Field(ge=1, le=4 * _MAX_CHANNELS)] = 2048
    num_hidden_layers: Layers = 12
    num_attention_heads: Annotated[int, Field(ge=1, le=256)] = 8
    max_position_embeddings: Annotated[int, Field(ge=3, le=4096)] = 77
    vocab_size: Annotated[int, Field(ge=3, le=1_000_000)] = 49_408
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Positive = 1e-5
    projection_dim: Width = 512  # of pooled embeddings, in a `CLIPTextModelWithProjection`

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads should divide hidden_size, and {self.num_attention_heads} does not divide "
                f"{self.hidden_size}"
            )
        return self


class SchedulerConfig(_File):
    """`scheduler/scheduler_config.json`: the noise schedule. None: absent, so that the default of the class holds."""

    num_train_timesteps: Annotated[int, Field(ge=2, le=_MAX_TIMESTEPS)] = 1000
    beta_start: Beta | None = None
    beta_end: Beta | None = None
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] | None = None
    trained_betas: Annotated[tuple[Beta, ...], Field(max_length=_MAX_TIMESTEPS)] | None = None
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = None
    steps_offset: Annotated[int, Field(ge=0, le=_MAX_TIMESTEPS)] | None = None
    set_alpha_to_one: bool | None = None
    skip_prk_steps: bool = True
    final_sigmas_type: Literal["zero", "sigma_min"] | None = None
    rescale_betas_zero_snr: bool = False

    @field_validator("*")
    @classmethod
    def _is_not_null(cls, value: object, info: ValidationInfo) -> object:
        """Refuse null, which no scheduler's class accepts for these keys. Keys that are absent do not come here."""
        if value is None and info.field_name != "trained_betas":
            raise ValueError("should have a value")
        return value

    @model_validator(mode="after")
    def _has_a_beta_for_every_timestep(self) -> Self:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ValueError(
                f"trained_betas should have {self.num_train_timesteps} entries, as num_train_timesteps says, and has "
                f"{len(self.trained_betas)}"
            )
        return self


class _Token(_File):
    content: str


class _Vocabulary(_File):
    vocab: dict[str, int]


class _VocabularyFile(RootModel[dict[str, int]]):
    """`vocab.json` and `added_tokens.json`: the id of each token."""

    model_config = ConfigDict(strict=True)

    @property
    def tokens(self) -> Iterable[str]:
        return self.root


class _TokenizerJson(_File):
    """`tokenizer.json`: a fast tokenizer."""

    model: _Vocabulary
    added_tokens: tuple[_Token, ...] = ()

    @property
    def tokens(self) -> Iterable[str]:
        return (*self.model.vocab, *(token.content for token in self.added_tokens))


class _TokenizerConfig(_File):
    """`tokenizer_config.json`: tokens in addition to the vocabulary."""

    added_tokens_decoder: dict[str, _Token] = {}

    @property
    def tokens(self) -> Iterable[str]:
        return [token.content for token in self.added_tokens_decoder.values()]


_TokenizerFile = _VocabularyFile | _TokenizerJson | _TokenizerConfig
TOKENIZER_FILES: Mapping[str, type[_TokenizerFile]] = {
    "vocab.json": _VocabularyFile,
    "added_tokens.json": _VocabularyFile,
    "tokenizer.json": _TokenizerJson,
    "tokenizer_config.json": _TokenizerConfig,
}


def parse_config(model: type[_Config], content: Mapping[str, Any], path: Path) -> _Config:
    """Check the content of the config at `path`. Raises CheckpointError, in one line with the file and the key."""
    try:
        return model.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: {_explained(error.errors()[0])}. Correct it, or take the original file."
        ) from error


def _explained(error: ErrorDetails) -> str:
    """The key, what it should be, and what it is."""
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not error["loc"]:
        return message
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{key} is missing"
    value = json.dumps(error["input"], default=str)
    return f"{key} {message}, not {value if len(value) <= _SHOWN else value[:_SHOWN] + '…'}"


def _check_levels(config: UnetConfig | VaeConfig, *keys: str) -> None:
    levels = len(config.block_out_channels)
    for key in keys:
        value = getattr(config, key)
        if isinstance(value, tuple) and len(value) != levels:
            raise ValueError(f"{key} should have {levels} entries, one for each of block_out_channels")


def _check_lengths(key: str, depths: object, blocks: Sequence[str], layers: Sequence[int]) -> None:
    """Raise ValueError unless a list in `depths` has an entry for each of a block's `layers`, where they attend."""
    for block, depth, count in zip(blocks, depths if isinstance(depths, tuple) else (), layers, strict=False):
        if block.startswith("CrossAttn") and isinstance(depth, tuple) and len(depth) != count:
            raise ValueError(f"{key} should have {count} entries for a level of {count} layers, and has {len(depth)}")


def _check_groups(groups: int, channels: tuple[int, ...]) -> None:
    if odd := next((one for one in channels if one % groups), None):
        raise ValueError(f"norm_num_groups should divide block_out_channels, and {groups} does not divide {odd}")
