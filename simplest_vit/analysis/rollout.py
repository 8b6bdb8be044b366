"""Attention rollout (Abnar and Zuidema, arXiv 2005.00928): the share of each patch in a classification.

The attention matrices of all blocks are averaged over heads and multiplied. If the model has skip connections, each is
first averaged with the identity. The head reads the mean over tokens, so the rows of the product are averaged.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplest_vit.analysis import figures
from simplest_vit.files import writing
from simplest_vit.models import ViT
from simplest_vit.models.layers import token_grid


def attention_rollout(model: ViT, image: jax.Array) -> np.ndarray:
    """Compute the share of each patch in the tokens that the head reads: float32 [B, rows, columns], each sums to 1.

    Images are normalized, [B, H, W, C].
    """
    grid = token_grid(image.shape[1:], model.patch_size)
    return np.asarray(_rollout(model, image)).reshape(len(image), *grid)


@nnx.jit
def _rollout(model: ViT, image: jax.Array) -> jax.Array:
    blocks_def, blocks = nnx.split(model.blocks)
    x = model.embed(image)
    eye = jnp.eye(x.shape[1])[None]

    def body(carry: tuple[jax.Array, jax.Array], layer: Any) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, product = carry
        block = nnx.merge(blocks_def, layer)
        # Value-SkipInit may have negative weights; their magnitude counts.
        matrix = jnp.abs(block.attention.matrix(x).mean(axis=1))
        matrix = matrix / matrix.sum(axis=-1, keepdims=True)
        if block.skip != "none":
            matrix = (matrix + eye) / 2
        return (block(x), matrix @ product), None

    start = x, jnp.broadcast_to(eye, (len(x), *eye.shape[1:]))
    (_, product), _ = jax.lax.scan(body, start, nnx.as_pure(blocks))
    return product.mean(axis=1)


def save_rollouts(
    folder: str, predictions: list[dict[str, Any]], pixels: np.ndarray, shares: np.ndarray, first: int = 0
) -> None:
    """Write one PNG for each image: the image as the model sees it, and beside it the share of each patch.

    Args:
      folder: Created if missing. Files are numbered in the order of the images, from `first` on.
      pixels: uint8 [N, H, W, C].
      shares: float32 [N, rows, columns], from `attention_rollout`.

    Raises:
      UserError: If the folder cannot be written.
    """
    with writing(f"--attention_rollout={folder}"):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        with figures.style({prediction["top"][0]["class"] for prediction in predictions}):
            for i, prediction in enumerate(predictions):
                name = f"{first + i:04d}_{pathlib.Path(prediction['image']).stem}.png"
                draw_rollout(prediction, pixels[i], shares[i]).savefig(pathlib.Path(folder, name))


def draw_rollout(prediction: dict[str, Any], pixels: np.ndarray, shares: np.ndarray) -> Any:
    """Draw the figure of one image; 1 is the share of every patch if all count equally."""
    figure = figures.create(height=3.8)
    left, right = figure.subplots(1, 2)
    height, width = pixels.shape[:2]
    extent = (0, width, height, 0)
    # The image under the shares is grey, so that their colours match the bar.
    for axis, background in ((left, pixels.squeeze()), (right, pixels.mean(axis=-1))):
        axis.imshow(background, extent=extent, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
    relative = shares * shares.size
    low, high = min(0.95, relative.min()), max(1.05, relative.max())  # small differences are rounding or chance
    heat = right.imshow(relative, extent=extent, cmap="magma", alpha=0.65, vmin=low, vmax=high)
    figure.colorbar(heat, ax=right, label="share of a patch, relative to 1 / patches", shrink=0.85)
    best = prediction["top"][0]
    left.set_title(f"{best['class']} {best['probability']:.1%}", parse_math=False)  # a name may have two dollar signs
    right.set_title("attention rollout over all blocks")
    return figure
