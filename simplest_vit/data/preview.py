"""A picture of what a model is trained on: a grid of augmented training images with their labels."""

import contextlib
import functools
import importlib.util
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
from jax.experimental.multihost_utils import process_allgather
from PIL import Image, ImageDraw, ImageFont

from simplest_vit.data.augment import Batch
from simplest_vit.data.dataset import Dataset

_CAPTION_HEIGHT = 22
_FONT_SIZE = 9
_MIN_CELL = 96  # small images are magnified to about this size


def image_grid(dataset: Dataset, batch: Batch, *, rows: int = 4, columns: int = 8) -> np.ndarray:
    """Draw the first images of a batch with their labels, as the model sees them except for the normalization.

    With several processes, all must call it. A small batch gives fewer rows.

    Returns:
      The picture, uint8 [height, width, 3].
    """
    first = {name: batch[name][: rows * columns] for name in ("image", "label")}
    images, labels = process_allgather(first, tiled=True).values()
    pixels = np.clip((images * np.array(dataset.std) + np.array(dataset.mean)) * 255 + 0.5, 0, 255).astype(np.uint8)
    height, width, channels = dataset.image_shape
    zoom = max(1, -(-_MIN_CELL // width))
    cell_height, cell_width = height * zoom + _CAPTION_HEIGHT, width * zoom + 4
    grid = Image.new("RGB", (columns * cell_width, -(-len(pixels) // columns) * cell_height), "white")
    draw = ImageDraw.Draw(grid)
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        x, y = i % columns * cell_width, i // columns * cell_height
        tile = Image.fromarray(image.repeat(3, 2) if channels == 1 else image)
        grid.paste(tile.resize((width * zoom, height * zoom), Image.Resampling.NEAREST), (x + 2, y))
        for line, text in enumerate(_captions(dataset, label)):
            font = find_font(text)
            while font.getlength(text) > width * zoom:
                text = text[:-1]
            draw.text((x + 2, y + height * zoom + 10 * line), text, "black", font)
    return np.asarray(grid)


def _captions(dataset: Dataset, label: np.ndarray) -> list[str]:
    """Name the one or two classes of a label, the heavier first, with their weights if there are two."""
    classes = [k for k in np.argsort(-label)[:2] if label[k] > 0.005]
    if len(classes) == 1:
        return [dataset.class_names[classes[0]]]
    return [f"{label[k]:.0%} {dataset.class_names[k]}" for k in classes]


@functools.cache
def find_font(text: str) -> ImageFont.FreeTypeFont:
    """Find a font with all letters of a text: DejaVu Sans, which comes with matplotlib, or a font of the system."""
    matplotlib: Any = importlib.util.find_spec("matplotlib")  # importing it takes longer than drawing the grid
    file = Path(matplotlib.submodule_search_locations[0], "mpl-data/fonts/ttf/DejaVuSans.ttf")
    dejavu = ImageFont.truetype(str(file), _FONT_SIZE)
    if has_letters(dejavu, text):
        return dejavu
    from matplotlib.font_manager import findSystemFonts

    for path in sorted(findSystemFonts()):
        with contextlib.suppress(OSError):  # a font file that is damaged
            if has_letters(font := ImageFont.truetype(path, _FONT_SIZE), text):
                return font
    return dejavu


def has_letters(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Return whether no letter is drawn as the box of a missing one; joiners (Cf) have no shape."""
    box = bytes(font.getmask("\uffff"))
    return all(bytes(font.getmask(c)) != box for c in text if unicodedata.category(c) != "Cf")
