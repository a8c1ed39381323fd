"""The demo model's parts: the SD 1.x architecture, small enough to train on two CPU cores in two hours."""

from pathlib import Path

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engines.demo.pictures import SIZE
from engines.demo.tokenizer import MAX_LENGTH

WIDTH = 128  # of one token's embedding
LATENT = SIZE // 4
TRAIN_STEPS = 1000


def new_vae() -> AutoencoderKL:
    """Return a VAE from RGB [n, 3, 64, 64] in -1..1 to latents [n, 4, 16, 16]."""
    return AutoencoderKL(
        sample_size=SIZE,
        latent_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64, 96),
        norm_num_groups=16,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def new_unet() -> UNet2DConditionModel:
    """Return a UNet for latents [n, 4, 16, 16] and text [n, 32, 128], with cross-attention at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        layers_per_block=1,
        block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # read by diffusers as the number of heads, as in SD 1.x
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a text encoder from token ids [n, 32] to text [n, 32, 128]."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DPMSolverMultistepScheduler:
    """Return DPM-Solver++(2M) with SD 1.x's noise schedule."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_STEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
        solver_order=2,
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="leading",
        steps_offset=1,
    )


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the trained tokenizer."""
    return CLIPTokenizer.from_pretrained(folder)


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Return token ids [n, 32] i64, padded as Stable Diffusion pads them."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


class Painter(nn.Module):
    """Text encoder and UNet, which are trained together."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """Predict the noise [n, 4, 16, 16] in latents x [n, 4, 16, 16] at timesteps t [n], for token ids [n, 32]."""
        text = self.text_encoder(ids).last_hidden_state
        noise: Tensor = self.unet(x, t, text).sample
        return noise


def new_painter(tokenizer: CLIPTokenizer) -> Painter:
    """Return an untrained painter."""
    return Painter(new_text_encoder(tokenizer), new_unet())


def save_checkpoint(folder: Path, vae: AutoencoderKL, painter: Painter, tokenizer: CLIPTokenizer) -> None:
    """Write a checkpoint that `StableDiffusionPipeline.from_pretrained` loads."""
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=painter.unet,
        text_encoder=painter.text_encoder,
        tokenizer=tokenizer,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
