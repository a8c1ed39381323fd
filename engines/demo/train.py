"""Train the demo model from glyphs.png and concepts.json, and write a diffusers checkpoint.

    python -m engines.demo.train --out demo-checkpoint --state demo-state

The stages are tokenizer, vae, latents, unet and save. Those already in the `--state` folder are skipped, so the same
command resumes an interrupted run. `losses.jsonl` in the state folder logs every tenth step.
"""

import argparse
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from rich.logging import RichHandler
from torch import Tensor

from engines.demo import data, model
from engines.demo.learner import load, new_learner, save_atomically
from engines.demo.pictures import all_words, random_caption
from engines.demo.tokenizer import write_tokenizer

log = logging.getLogger("engines.demo.train")

VAE_RATE = 2e-3
UNET_RATE = 6e-4
KL_WEIGHT = 2e-6
GRADIENT_WEIGHT = 0.5
EMPTY_CAPTIONS = 0.1
WARM_UP = 100  # steps
SNR_CAP = 5.0
REPORT_EVERY = 500  # steps of the VAE


@dataclass(frozen=True)
class Training:
    """Options of a training run."""

    out: Path
    state: Path
    device: torch.device
    seed: int
    vae_steps: int
    vae_batch: int
    unet_steps: int
    unet_batch: int
    places: int
    save_every: int

    def autocast(self) -> torch.autocast:
        """Return a context that computes in bfloat16 where it is safe."""
        return torch.autocast(self.device.type, torch.bfloat16)


# Learning rates


def one_cycle(steps: int) -> Callable[[int], float]:
    """Return a schedule, as a fraction of the peak rate: linear warm-up over the first 5 %, then cosine decay."""
    rise = max(1, steps // 20)
    return lambda step: min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))) + 1e-3


def warm_then_decay(steps: int) -> Callable[[int], float]:
    """Return a schedule, as a fraction of the peak rate: warm-up over 100 steps, and decay over the last 40 %."""
    return lambda step: min((step + 1) / WARM_UP, max(1e-3, (steps - step) / (0.4 * steps)), 1.0)


# Stages


def train_tokenizer(run: Training) -> None:
    """Stage 1: learn the vocabulary."""
    folder = run.state / "tokenizer"
    if not folder.exists():
        write_tokenizer(folder, all_words())


def train_vae(run: Training, layers: data.Layers) -> AutoencoderKL:
    """Stage 2: learn to compress images to latents."""
    torch.manual_seed(run.seed)
    learner = new_learner(model.new_vae().to(run.device), one_cycle(run.vae_steps), VAE_RATE, run.state / "vae.pt")
    parts = data.split(run.seed)
    batches = picture_batches(layers, parts.train, run.vae_batch, run.seed + learner.step)

    def loss() -> Tensor:
        return vae_loss(learner.net, next(batches).to(run.device), run)

    def report() -> None:
        report_psnr(learner.average, layers, parts.held_out, run)

    learner.learn_until(run.vae_steps, loss, report, every=REPORT_EVERY)
    return learner.average.eval()


def picture_batches(layers: data.Layers, among: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of random images [size, 3, 64, 64] forever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        index = among[torch.randint(len(among), (size,), generator=generator)]
        color = torch.randint(len(layers.colors), (size,), generator=generator)
        yield layers.compose(index, color)


def vae_loss(vae: AutoencoderKL, pictures: Tensor, run: Training) -> Tensor:
    """Return the L1 loss of pixels and of their gradients, plus a small KL divergence of the latents from N(0, 1)."""
    with run.autocast():
        posterior = vae.encode(pictures).latent_dist
        drawn = vae.decode(posterior.sample()).sample
    error = drawn.float() - pictures
    gradient = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=(1, 2, 3)).mean()
    loss: Tensor = error.abs().mean() + GRADIENT_WEIGHT * gradient + KL_WEIGHT * kl
    return loss


@torch.no_grad()
def report_psnr(vae: AutoencoderKL, layers: data.Layers, held_out: Tensor, run: Training) -> None:
    """Log the mean PSNR in dB over held-out images, cycling through the colors."""
    color = torch.arange(len(held_out)) % len(layers.colors)
    ratios: list[Tensor] = []
    for batch in layers.compose_all(held_out, color):
        pictures = batch.to(run.device)
        drawn = vae.decode(vae.encode(pictures).latent_dist.mean).sample.clamp(-1, 1)
        ratios.append(10 * torch.log10(4 / (drawn - pictures).square().mean(dim=(1, 2, 3))))
    log.info("VAE: %.2f dB on %d held-out images", torch.cat(ratios).mean().item(), len(held_out))


@dataclass(frozen=True)
class Latents:
    """The latents of the training images."""

    values: Tensor  # [n, 4, 16, 16] f32, unit variance
    scale: float  # the VAE's scaling factor, which makes the variance 1


def encode_pictures(run: Training, vae: AutoencoderKL, layers: data.Layers, pairs: data.Pairs) -> Latents:
    """Stage 3: encode every training image once."""
    path = run.state / "latents.pt"
    if not path.exists():
        values = torch.cat([_encode(run, vae, part) for part in layers.compose_all(pairs.layer, pairs.color)])
        scale = 1 / values.std().item()
        save_atomically({"values": values * scale, "scale": scale}, path)
    latents = Latents(**load(path))
    vae.register_to_config(scaling_factor=latents.scale)
    return latents


@torch.no_grad()
def _encode(run: Training, vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    mean: Tensor = vae.encode(pictures.to(run.device)).latent_dist.mean
    return mean.float().cpu()


def train_unet(
    run: Training, latents: Latents, pairs: data.Pairs, save: Callable[[model.Painter], None]
) -> model.Painter:
    """Stage 4: learn to predict the noise in latents, given the image's caption."""
    torch.manual_seed(run.seed)
    tokenizer = model.load_tokenizer(run.state / "tokenizer")
    net = model.new_painter(tokenizer).to(run.device)
    net.unet.set_attn_processor(AttnProcessor())  # on a CPU, the backward pass of fused attention takes twice as long
    learner = new_learner(net, warm_then_decay(run.unet_steps), UNET_RATE, run.state / "unet.pt")
    torch.manual_seed(run.seed + learner.step)
    rng = random.Random(run.seed + learner.step)  # noqa: S311
    alpha_bar = model.new_scheduler().alphas_cumprod.to(run.device)

    def loss() -> Tensor:
        index = torch.randint(len(latents.values), (run.unet_batch,))
        captions = [caption_of(pairs, i, rng) for i in index.tolist()]
        ids = model.token_ids(tokenizer, captions).to(run.device)
        return noise_loss(learner.net, latents.values[index].to(run.device), ids, alpha_bar, run)

    learner.learn_until(run.unet_steps, loss, lambda: save(learner.average), every=run.save_every)
    return learner.average


def caption_of(pairs: data.Pairs, index: int, rng: random.Random) -> str:
    """Return a caption of one image, or an empty one for classifier-free guidance; Ho & Salimans (2022)."""
    return "" if rng.random() < EMPTY_CAPTIONS else random_caption(*pairs.names(index), rng)


def noise_loss(net: model.Painter, x: Tensor, ids: Tensor, alpha_bar: Tensor, run: Training) -> Tensor:
    """Return the squared error of the predicted noise, weighted by Min-SNR, Hang et al. (2023), section 3.4.

    x: latents [n, 4, 16, 16] f32; ids: tokens [n, 32] i64; alpha_bar: [1000] f32.
    """
    t = torch.randint(len(alpha_bar), (len(x),), device=x.device)
    a = alpha_bar[t][:, None, None, None]
    noise = torch.randn_like(x)
    with run.autocast():
        predicted = net(a.sqrt() * x + (1 - a).sqrt() * noise, t, ids)
    snr = alpha_bar[t] / (1 - alpha_bar[t])
    weight = snr.clamp(max=SNR_CAP) / snr
    loss: Tensor = (weight * (predicted.float() - noise).square().mean(dim=(1, 2, 3))).mean()
    return loss


def save_checkpoint(run: Training, vae: AutoencoderKL, painter: model.Painter) -> None:
    """Stage 5: write the checkpoint; readers see the old one or the new one, never a part of it."""
    half, old = (run.out.with_name(f"{run.out.name}.{part}") for part in ("half", "old"))
    shutil.rmtree(half, ignore_errors=True)
    model.save_checkpoint(half, vae, painter, model.load_tokenizer(run.state / "tokenizer"))
    copy_tokenizer(run.state / "tokenizer", half / "tokenizer")
    if run.out.exists():
        run.out.rename(old)
    half.rename(run.out)
    shutil.rmtree(old, ignore_errors=True)
    log.info("wrote %s", run.out)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Write the tokenizer as vocab.json and merges.txt, which every library reads."""
    shutil.rmtree(target)
    shutil.copytree(source, target)


# Command line


def parse() -> Training:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--state", type=Path, required=True, help="folder of the work in progress")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-steps", type=int, default=4500)
    parser.add_argument("--vae-batch", type=int, default=16)
    parser.add_argument("--unet-steps", type=int, default=3400)
    parser.add_argument("--unet-batch", type=int, default=64)
    parser.add_argument("--places", type=int, default=12, help="images of each thing on each color")
    parser.add_argument("--save-every", type=int, default=500, help="UNet steps between checkpoints")
    given = vars(parser.parse_args())
    return Training(**{**given, "device": torch.device(given["device"])})


def main() -> None:
    """Run the stages that are not done yet."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    run = parse()
    run.state.mkdir(parents=True, exist_ok=True)
    train_tokenizer(run)
    layers, pairs = data.load_layers(), data.draw_pairs(run.places, run.seed)
    vae = train_vae(run, layers)
    latents = encode_pictures(run, vae, layers, pairs)
    painter = train_unet(run, latents, pairs, lambda painter: save_checkpoint(run, vae, painter))
    save_checkpoint(run, vae, painter)


if __name__ == "__main__":
    main()
