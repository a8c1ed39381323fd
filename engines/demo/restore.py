"""Restore the demo's checkpoint from its bundle, so that it can be exported again without training it again.

python -m engines.demo.restore --out demo-checkpoint
"""

import argparse
import shutil
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from engines.demo import model
from engines.demo.pictures import HERE, all_words
from engines.demo.tokenizer import write_tokenizer
from engines.manifest import Manifest


def read_weights(bundle: Path, manifest: Manifest) -> dict[str, Tensor]:
    """Return every named weight of the graphs as f32, with the transposed ones transposed back."""
    weights: dict[str, Tensor] = {}
    for graph in manifest.graphs.values():
        for stored in onnx.load(bundle / graph.onnx["fp32"].files[0].path).graph.initializer:
            name, array = stored.name, numpy_helper.to_array(stored)
            array = array.T if name.endswith(".T") else array
            weights[name.removesuffix(".T")] = torch.from_numpy(np.array(array, np.float32))
    return weights


def fill(net: nn.Module, prefix: str, weights: dict[str, Tensor]) -> None:
    """Load the weights under `prefix` into `net`. Raises KeyError for one that the graphs do not hold."""
    net.load_state_dict(
        {name: weights[f"{prefix}.{name}"].reshape(old.shape) for name, old in net.state_dict().items()}
    )


def restore(bundle: Path, out: Path) -> None:
    """Write the diffusers checkpoint that `bundle` was exported from to `out`."""
    manifest = Manifest.load(bundle)
    weights = read_weights(bundle, manifest)
    write_tokenizer(out / "tokenizer", all_words())
    tokenizer = model.load_tokenizer(out / "tokenizer")
    vae, painter = model.new_vae(), model.new_painter(tokenizer)
    vae.register_to_config(scaling_factor=manifest.latent.scaling_factor)
    fill(vae, "vae", weights)
    fill(painter.unet, "unet", weights)
    fill(painter.text_encoder, "text_encoder", weights)
    model.save_checkpoint(out, vae, painter, tokenizer)
    shutil.rmtree(out / "tokenizer")
    write_tokenizer(out / "tokenizer", all_words())  # vocab.json and merges.txt, which every library reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=HERE)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    given = parser.parse_args()
    restore(given.bundle, given.out)


if __name__ == "__main__":
    main()
