"""What a build is asked for, and where it reports: the values that `engines.build.api` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

from engines.checkpoints.adapters.embedding import Embedding
from engines.checkpoints.adapters.lora import Lora
from engines.contract import GraphName
from engines.manifest import Geometry, LoraCapacity, Manifest, Precision, Size, Storage
from engines.progress import NullProgress, Progress
from engines.schedulers import Spacing

DEFAULT_ROWS = (2, 4, 8, 16)  # row buckets
OWN = "none"  # in place of a preset: the checkpoint's own defaults, whatever it is named


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """A checkpoint to build from, and what is added to it before the export.

    Attributes:
        model: a diffusers folder, a .safetensors file, or a hub id.
        revision: the hub revision to download: a branch, tag or commit.
        config: for a single file, the diffusers folder or hub id whose configs describe it.
        loras: LoRAs that are fused into the weights, in this order.
        embeddings: textual inversions, whose tokens are added to the vocabulary.
        decoder: folder, hub id or .safetensors file of an `AutoencoderTiny` that requests may choose over the VAE.
        vae: folder or .safetensors file of a VAE that replaces the checkpoint's own.
        allow_pickle: whether pickled weights may be read, which can run code.
        variant: weights of a folder or hub id to read, such as fp16; parts that lack it have their plain weights.
        safety_checker: whether the checkpoint's safety checker becomes a graph too, where it has one.
    """

    model: str
    _: KW_ONLY
    revision: str | None = None
    config: str | None = None
    loras: tuple[Lora, ...] = ()
    embeddings: tuple[Embedding, ...] = ()
    decoder: str | None = None
    vae: str | None = None
    allow_pickle: bool = False
    variant: str | None = None
    safety_checker: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """The bundle that an export makes. None and empty values are replaced by the checkpoint's own.

    Attributes:
        weights: how weights are stored, once for all precisions. None: as in the existing bundle; in a new one fp16 if
            all its backends run on GPUs, otherwise fp32.
        rows: row buckets, ascending. The largest bounds a step; a guided image takes two rows.
        decode_batch: images that one call of the decoder may take.
        lora: how many LoRAs of requests the device holds. None: requests have none.
        name: the model's name in the API.
        resolutions: the image sizes to serve; the first is the default of requests.
        preset: a name of `PRESETS`, for the defaults of requests below, or `OWN`. None: the one that the checkpoint or
            a LoRA is named after, if any.
        steps: the default number of denoising steps of requests: 50, or 4 for latent consistency models.
        guidance: the default guidance scale of requests: 7.5, or 8.5 for latent consistency models.
        scheduler: the default scheduler of requests.
        timestep_spacing: the default spacing of its timesteps.
        eta: its default share of fresh noise.
        examples: prompts that show what the model can draw.
        notes: what users should know of the model, in a sentence or two.
    """

    weights: Storage | None = None
    rows: tuple[int, ...] = DEFAULT_ROWS
    decode_batch: int = 1
    lora: LoraCapacity | None = None
    name: str | None = None
    resolutions: tuple[Size, ...] = ()
    preset: str | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None
    timestep_spacing: Spacing | None = None
    eta: float | None = None
    examples: tuple[str, ...] = ()
    notes: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShapeOptions:
    """Input shapes that a compilation changes in the bundle. None and empty values leave those of the bundle."""

    resolutions: tuple[Size, ...] = ()
    rows: tuple[int, ...] = ()
    decode_batch: int | None = None
    lora_slots: int | None = None
    lora_rank: int | None = None


@dataclass(frozen=True, slots=True)
class BackendPlan:
    """What will be compiled for one backend."""

    backend: str
    geometry: Geometry
    precisions: Mapping[GraphName, Precision]
    parameters: Mapping[GraphName, int]  # weights of each graph, where they are known


def _ignore(*_: object) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Reporter:
    """Where a build reports. By default nowhere.

    Attributes:
        progress: receives stages and notes.
        on_plan: called for each backend before it is compiled; before the export, where there is one.
        on_built: called with the manifest and the backend once engines are compiled and verified.
        on_not_followed: called at the end with what the configs ask for and latentd does not do, a sentence for each.
    """

    progress: Progress = field(default_factory=NullProgress)
    on_plan: Callable[[BackendPlan], None] = _ignore
    on_built: Callable[[Manifest, str], None] = _ignore
    on_not_followed: Callable[[Sequence[str]], None] = _ignore
