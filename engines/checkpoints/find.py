"""Find a checkpoint in a folder, in a file or on the hub, and refuse what is not supported before weights are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.checkpoints.adapters.embedding import Embedding, check_tokens_distinct
from engines.checkpoints.adapters.lora import Lora, check_lora, embeddings_in
from engines.checkpoints.checkpoint import Checkpoint
from engines.checkpoints.decoder import DECODER_CONFIG, DECODER_WEIGHTS, Decoder, check_decoder_kind
from engines.checkpoints.diffusers_folder import (
    CONFIG_PATTERNS,
    SAFETY_CHECKER,
    SAFETY_CONFIGS,
    CheckpointConfig,
    variants_among,
    weight_patterns,
    weights_name,
)
from engines.checkpoints.hub import check_hub_id, download, list_files
from engines.checkpoints.prediction import read_prediction
from engines.checkpoints.single_file import SD1_CONFIGS, SingleFileLayout, check_configs_fit, read_layout
from engines.checkpoints.supported import check_supported
from engines.checkpoints.vae import Vae, find_vae
from engines.errors import CheckpointError
from engines.progress import NullProgress, Progress
from engines.safetensors_header import read_header

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_SILENT = NullProgress()


def find_checkpoint(  # noqa: PLR0913 - what a checkpoint is built from, by keyword
    model: str,
    *,
    revision: str | None = None,
    config: str | None = None,
    allow_pickle: bool = False,
    loras: Sequence[Lora] = (),
    embeddings: Sequence[Embedding] = (),
    decoder: str | None = None,
    vae: str | None = None,
    variant: str | None = None,
    with_safety_checker: bool = True,
    check: Callable[[Checkpoint], None] = lambda _: None,
    progress: Progress = _SILENT,
) -> Checkpoint:
    """Find the checkpoint in folder or file `model`, or download the one with hub id `model`.

    A single file needs `config`, the folder or hub id of a checkpoint whose configs describe it; for SD 1.x and XL
    there is a default. `revision` is the hub's: of the model, or of `config` for a single file. `decoder` is the
    folder or hub id of a decoder that replaces the VAE's, or its file; `vae` is the file or folder of a VAE that
    replaces the checkpoint's own. `variant` selects weights such as `model.fp16.safetensors`; parts without it have
    their plain weights, as in diffusers. Its safety checker, where it has one, is a part of it only
    `with_safety_checker`. `check` is called with what the configs say, before weights are downloaded, and may raise.

    Raises:
        CheckpointError: there is none, the hub cannot be reached, its architecture is not supported, or a LoRA, an
            embedding or the decoder does not fit it.
    """
    for lora in loras:
        check_lora(lora.path)
    embeddings = tuple(dict.fromkeys((*embeddings, *_trained_with(loras, embeddings, progress))))
    check_tokens_distinct(embeddings)
    path = Path(model)
    search = _Search(
        revision=revision,
        config=config,
        allow_pickle=allow_pickle,
        loras=tuple(loras),
        embeddings=tuple(embeddings),
        decoder=_find_decoder(decoder, progress) if decoder else None,
        vae=find_vae(vae) if vae else None,
        variant=variant,
        with_safety_checker=with_safety_checker,
        check=check,
        progress=progress,
    )
    if path.suffix.lower() in {".safetensors", *_PICKLES} and not path.is_dir():
        return search.in_file(path)
    if path.is_file():
        raise CheckpointError(f"{path} is not a checkpoint: pass a diffusers folder, a hub id or a .safetensors file.")
    if config:
        raise CheckpointError(f"--config describes a single file, and {model} is not one: leave --config out.")
    if path.is_dir():
        return search.in_folder(path)
    check_hub_id(model)
    return search.on_hub(model)


def _trained_with(loras: Sequence[Lora], embeddings: Sequence[Embedding], progress: Progress) -> list[Embedding]:
    """The tokens that lie in the files of `loras`, unless they are among `embeddings`."""
    given = {embedding.path for embedding in embeddings}
    found = [embedding for embedding in embeddings_in(loras) if embedding.path not in given]
    for embedding in found:
        tokens = ", ".join(learned.token for learned in embedding.learned_tokens)
        progress.note(f"{embedding.path.name}: adds the tokens {tokens}, which were trained with the LoRA")
    return found


@dataclass(frozen=True)
class _Search:
    """The arguments of `find_checkpoint` but the model, which is in a folder, on the hub, or a single file."""

    revision: str | None
    config: str | None
    allow_pickle: bool
    loras: tuple[Lora, ...]
    embeddings: tuple[Embedding, ...]
    decoder: Decoder | None
    vae: Vae | None
    variant: str | None
    with_safety_checker: bool
    check: Callable[[Checkpoint], None]
    progress: Progress

    def in_folder(self, path: Path) -> Checkpoint:
        checkpoint = self._supported(path.resolve().name, path)
        self._check_weights(checkpoint.config)
        return checkpoint

    def on_hub(self, model: str) -> Checkpoint:
        """Download the configs, and only once they are found to be supported the gigabytes, of the same commit."""
        folder = self._download(model, CONFIG_PATTERNS, self.revision)
        checkpoint = self._supported(model, folder)
        self._download_weights(model, checkpoint.config, commit=folder.name)
        if checkpoint.wants_safety_checker:
            self._download_safety_checker(model, checkpoint.config, commit=folder.name)
        self._check_weights(checkpoint.config)
        return checkpoint

    def _download_weights(self, model: str, config: CheckpointConfig, *, commit: str) -> None:
        """Download the weights of every part: of the variant, or plain ones where the part lacks it."""
        remaining: Sequence[str] = config.parts
        for variant in dict.fromkeys((self.variant, None)):
            for pickled in (False, True)[: 1 + self.allow_pickle]:
                # The index is in the cache already: without it, the hub client warns of patterns that match nothing.
                patterns = ("model_index.json", *weight_patterns(remaining, pickled=pickled, variant=variant))
                self._download(model, patterns, commit)
                remaining = [part for part in remaining if not config.files_of(part, pickled=pickled, variant=variant)]
                if not remaining:
                    return
            if variant is None or len(remaining) == len(config.parts):
                raise CheckpointError(self._lacking(model, remaining, list_files(model, commit)))

    def _download_safety_checker(self, model: str, config: CheckpointConfig, *, commit: str) -> None:
        """Download the safety checker, as far as there is one."""
        for variant in dict.fromkeys((self.variant, None)):
            for pickled in (False, True)[: 1 + self.allow_pickle]:
                weights = weight_patterns([SAFETY_CHECKER], pickled=pickled, variant=variant)
                self._download(model, ("model_index.json", *SAFETY_CONFIGS, *weights), commit)
                if config.files_of(SAFETY_CHECKER, pickled=pickled, variant=variant):
                    return

    def _lacking(self, model: str, parts: Sequence[str], files: Sequence[str]) -> str:
        """Why the hub's model cannot be built, which has no weights for `parts`."""
        kind = f"weights of the variant {self.variant}" if self.variant else ".safetensors weights"
        text = f"{model} has no {kind} for {', '.join(parts)}."
        if others := [name for name in variants_among(files) if name != self.variant]:
            return f"{text} It has the variants {', '.join(others)}: pass one as --variant {others[0]}."
        return (
            f"{text} If it has pickled ones, which can run code, pass --allow-pickle to read them as plain tensors, or "
            "--revision with a branch that has .safetensors."
        )

    def in_file(self, path: Path) -> Checkpoint:
        if not path.is_file():
            raise CheckpointError(f"{path} does not exist: check the path.")
        if self.variant:
            raise CheckpointError(
                f"--variant chooses among the weights of a folder, and {path} is one file: leave it out."
            )
        pickled = path.suffix.lower() in _PICKLES
        if pickled:
            self._check_pickle_allowed(str(path))
        layout = None if pickled else read_layout(path, needs_vae=self.vae is None)
        checkpoint = self._supported(path.stem, path, self._find_configs(path, layout))
        if layout:
            check_configs_fit(checkpoint, layout)
        return checkpoint

    def _find_configs(self, path: Path, layout: SingleFileLayout | None) -> Path:
        """Return the folder of configs that describe a single file."""
        if self.config and Path(self.config).is_dir():
            return Path(self.config)
        config = self.config or (layout.default_configs if layout else SD1_CONFIGS)
        if config is None:
            raise CheckpointError(_needs_config(path))
        check_hub_id(config)
        try:
            return self._download(config, CONFIG_PATTERNS, self.revision)
        except CheckpointError as error:
            raise CheckpointError(
                f"The configs that describe {path.name} are missing. {error} "
                "Pass --config DIR, a diffusers folder of the same architecture."
            ) from error

    def _supported(self, name: str, path: Path, config_folder: Path | None = None) -> Checkpoint:
        checkpoint = Checkpoint(
            name=name,
            path=path,
            config_folder=config_folder,
            allow_pickle=self.allow_pickle,
            loras=self.loras,
            embeddings=self.embeddings,
            decoder=self.decoder,
            vae=self.vae,
            variant=self.variant,
            with_safety_checker=self.with_safety_checker,
        )
        check_supported(checkpoint)
        self.check(checkpoint)
        return checkpoint

    def _check_weights(self, config: CheckpointConfig) -> None:
        if self.variant and not any(config.part_weights(part).variant for part in config.parts):
            raise CheckpointError(_lacks_variant(config, self.variant))
        for part in config.parts:
            folder = config.folder / part
            if not config.weights(part):
                raise CheckpointError(_lacks_weights(config, part))
            if config.pickled(part):
                self._check_pickle_allowed(str(folder))

    def _check_pickle_allowed(self, source: str) -> None:
        if not self.allow_pickle:
            raise CheckpointError(
                f"{source} holds no .safetensors weights, and pickled ones can run code: convert them with diffusers' "
                "save_pretrained(safe_serialization=True), or pass --allow-pickle to read them as plain tensors."
            )
        self.progress.note(f"{source}: reading pickled weights, as plain tensors only. Prefer .safetensors.")

    def _download(self, model: str, patterns: Sequence[str], revision: str | None) -> Path:
        return download(model, patterns, revision=revision, progress=self.progress)


def _lacks_variant(config: CheckpointConfig, variant: str) -> str:
    others = ", ".join(config.variants) or "none"
    return f"{config.folder} holds no weights of the variant {variant} (it has {others}): choose another --variant."


def _lacks_weights(config: CheckpointConfig, part: str) -> str:
    folder, expected = config.folder / part, weights_name(part)
    if variants := variants_among([f"{part}/{path.name}" for path in folder.glob("*")]):
        return (
            f"{folder} holds no {expected}, and weights of the variants {', '.join(variants)}: pass one as "
            f"--variant {variants[0]}."
        )
    if other := next(folder.glob("*.safetensors"), None):
        return (
            f"{folder} holds {other.name} but no {expected}: if those are the weights to build from, rename the file."
        )
    return f"{folder} holds no .safetensors weights: the checkpoint is incomplete. Download {part}/{expected}."


def _needs_config(path: Path) -> str:
    if prediction := read_prediction(path):
        return (
            f"{path.name} is a Stable Diffusion 2 file, and {prediction.source} says that its UNet predicts "
            f"{prediction.kind}: pass --config with a diffusers folder or hub id of any Stable Diffusion 2.x."
        )
    return (
        f"{path.name} is a Stable Diffusion 2 file, which does not say what its UNet predicts: pass --config with a "
        "diffusers folder or hub id of the same kind (768-pixel models predict v, 512-pixel ones the noise)."
    )


def _find_decoder(decoder: str, progress: Progress) -> Decoder:
    """Find the decoder in folder `decoder`, or download the one with that hub id once its config is checked."""
    path = Path(decoder)
    if path.suffix.lower() == ".safetensors":
        found = Decoder(name=path.stem, folder=path.parent, file=path)
        check_decoder_kind(found)  # reads its header
    elif path.is_dir():
        found = Decoder(name=path.resolve().name, folder=path)
        check_decoder_kind(found)
    else:
        check_hub_id(decoder)
        found = Decoder(name=decoder, folder=download(decoder, [DECODER_CONFIG], revision=None, progress=progress))
        check_decoder_kind(found)
        files = [DECODER_CONFIG, DECODER_WEIGHTS]
        download(decoder, files, revision=found.folder.name, progress=progress)
    if not found.weights.is_file():
        raise CheckpointError(
            f"{found.name} has no {found.weights.name}: pass a decoder that has one, or write it with diffusers' "
            "AutoencoderTiny.save_pretrained(safe_serialization=True)."
        )
    read_header(found.weights)  # refuses a damaged file
    return found
