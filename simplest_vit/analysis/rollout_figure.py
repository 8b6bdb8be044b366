"""Figures of attention rollout over images."""

import pathlib
from typing import Any

import numpy as np

from simplest_vit.analysis import figures
from simplest_vit.errors import UserError


def save_rollouts(
    folder: str, predictions: list[dict[str, Any]], pixels: np.ndarray, shares: np.ndarray, first: int = 0
) -> None:
    """Write one PNG for each image: the image as the model sees it, and beside it the share of each patch.

    Args:
      folder: Created if missing. Files are numbered in the order of the images, from `first` on.
      predictions: From `predict`.
      pixels: uint8 [N, H, W, C].
      shares: float32 [N, rows, columns], from `attention_rollout`.
      first: Number of the first file.

    Raises:
      UserError: If the folder cannot be written.
    """
    try:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        for i, prediction in enumerate(predictions):
            name = f"{first + i:04d}_{pathlib.Path(prediction['image']).stem}.png"
            with figures.style():
                draw_rollout(prediction, pixels[i], shares[i]).savefig(pathlib.Path(folder, name))
    except OSError as error:
        raise UserError(f"--attention_rollout={folder} cannot be written ({error.strerror})") from error


def draw_rollout(prediction: dict[str, Any], pixels: np.ndarray, shares: np.ndarray) -> Any:
    """Draw the figure of one image; 1 is the share that every patch has if all count alike."""
    figure = figures.create(height=3.8)
    left, right = figure.subplots(1, 2)
    height, width = pixels.shape[:2]
    extent = (0, width, height, 0)
    # The image under the shares is grey, so that their colours match the bar.
    for axis, background in ((left, pixels.squeeze()), (right, pixels.mean(axis=-1))):
        axis.imshow(background, extent=extent, cmap="gray", vmin=0, vmax=255)
        axis.set_axis_off()
    relative = shares * shares.size
    heat = right.imshow(relative, extent=extent, cmap="magma", alpha=0.65, vmin=0, vmax=max(2.0, relative.max()))
    figure.colorbar(heat, ax=right, label="share of a patch, relative to 1 / patches", shrink=0.85)
    best = prediction["top"][0]
    name = best["class"].replace("$", r"\$")  # matplotlib takes $...$ for a formula
    left.set_title(f"{name} {best['probability']:.1%}")
    right.set_title("attention rollout over all blocks")
    return figure
