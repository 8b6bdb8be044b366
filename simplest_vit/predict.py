"""Classifies image files with the best checkpoint of a run."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplest_vit.data.augment import normalize
from simplest_vit.data.decode import eval_image
from simplest_vit.errors import UserError
from simplest_vit.training.run import Run, restore_best

# Images computed at once.
_BATCH = 64
_TOP = 5
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

Prediction = dict[str, Any]


def predict(
    workdir: str, images: list[str], rollout_dir: str | None = None, config: Any = None
) -> Iterator[Prediction]:
    """Classify images, prepared as the validation split is; of them, a batch at a time is in memory.

    Args:
      workdir: The run's folder, which is all that is needed.
      images: Files, and folders whose images are meant.
      rollout_dir: Folder for a picture of the attention over each image, or None.
      config: None for the run's own; another is refused.

    Returns:
      For each image `image`, its path, and `top`, the five most probable classes as `class` and `probability`; as soon
      as they are known.

    Raises:
      UserError: If there is no checkpoint, it is one of another config, or a file is no image.
    """
    files = find_images(images)
    run, state = restore_best(workdir, config)
    model = run.model(state)
    graphdef, arrays = nnx.split(model)
    classify = jax.jit(lambda arrays, image: jax.nn.softmax(nnx.merge(graphdef, arrays)(image), axis=-1))
    for first in range(0, len(files), _BATCH):
        batch = files[first : first + _BATCH]
        pixels = np.stack([_read(file, run) for file in batch])
        image = normalize(jnp.asarray(pixels), run.data.mean, run.data.std)
        # The last one is padded, for another size would be compiled anew.
        padded = jnp.pad(image, ((0, (_BATCH if len(files) > _BATCH else len(batch)) - len(batch)), *[(0, 0)] * 3))
        probability = np.asarray(classify(nnx.as_pure(arrays), padded))[: len(batch)]
        predictions = [_prediction(file, p, run.data.class_names) for file, p in zip(batch, probability, strict=True)]
        if rollout_dir is not None:
            # Imported here, for pictures take a second to import.
            from simplest_vit.analysis.attention_rollout import attention_rollout
            from simplest_vit.analysis.rollout_figure import save_rollouts

            save_rollouts(rollout_dir, predictions, pixels, attention_rollout(model, image), first)
        yield from predictions


def find_images(paths: list[str]) -> list[pathlib.Path]:
    """The files among `paths`, and the images in its folders, sorted.

    Raises:
      UserError: If there is none, or a path does not exist.
    """
    files: list[pathlib.Path] = []
    for name in paths:
        path = pathlib.Path(name)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not found:
                raise UserError(f"--images: {name} has no images; expected files such as .jpg or .png")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"--images: {name} does not exist; give image files or folders with images")
    if not files:
        raise UserError("--images is missing; give image files or folders with images: --images a.jpg folder/")
    return files


def _read(file: pathlib.Path, run: Run) -> np.ndarray:
    """Pixels of a file, uint8 [H, W, C]."""
    try:
        return eval_image(file.read_bytes(), run.data.image_shape, run.config.data.random_resized_crop)
    except UserError as error:
        raise UserError(f"--images: {file}: {error}; remove it from the list") from error
    except OSError as error:
        raise UserError(f"--images: {file} cannot be read ({error.strerror})") from error


def _prediction(file: pathlib.Path, probability: np.ndarray, class_names: tuple[str, ...]) -> Prediction:
    top = np.argsort(-probability)[:_TOP]
    return {"image": str(file), "top": [{"class": class_names[k], "probability": float(probability[k])} for k in top]}


def as_text(prediction: Prediction) -> str:
    """One line: the path of an image, then classes with probabilities, the most probable first."""
    best = "  ".join(f"{best['class']} {best['probability']:.1%}" for best in prediction["top"])
    return f"{prediction['image']}  {best}"


def as_json(prediction: Prediction) -> str:
    """One JSON object on one line."""
    return json.dumps(prediction)
