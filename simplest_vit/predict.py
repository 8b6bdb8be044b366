"""Classifies image files with the best checkpoint of a run."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplest_vit.data import pipeline as input_pipeline
from simplest_vit.data.augment import normalize
from simplest_vit.data.decode import resize_and_centre_crop
from simplest_vit.errors import UserError
from simplest_vit.training.restored import restore_best
from simplest_vit.training.workdir import check_workdir

# Images computed at once.
_BATCH = 64
_TOP = 5
_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")

Prediction = dict[str, Any]


def predict(config: Any, workdir: str, images: list[str], rollout_dir: str | None = None) -> list[Prediction]:
    """Classify images, prepared as the validation split is.

    Args:
      config: The run's config.
      workdir: The run's folder.
      images: Files, and folders whose images are meant.
      rollout_dir: Folder for a picture of the attention over each image, or None.

    Returns:
      For each image `image`, its path, and `top`, the five most probable classes as `class` and `probability`.

    Raises:
      UserError: If the config does not fit, there is no checkpoint, or a file is no image.
    """
    check_workdir(workdir, config.to_dict())
    files = find_images(images)
    dataset = input_pipeline.load(config.data)
    pixels = np.stack([_read(file, dataset, config) for file in files])
    model, _ = restore_best(config, workdir, dataset)
    graphdef, state = nnx.split(model)
    classify = jax.jit(lambda state, image: nnx.merge(graphdef, state)(image))
    batches = [
        normalize(jnp.asarray(pixels[start : start + _BATCH]), dataset.mean, dataset.std)
        for start in range(0, len(files), _BATCH)
    ]
    logits = np.concatenate([classify(nnx.as_pure(state), batch) for batch in batches])
    probability = np.asarray(jax.nn.softmax(logits, axis=-1))
    top = np.argsort(-probability, axis=-1)[:, :_TOP]
    predictions = [
        {"image": str(file), "top": [{"class": dataset.class_names[k], "probability": float(p[k])} for k in best]}
        for file, p, best in zip(files, probability, top, strict=True)
    ]
    if rollout_dir is not None:
        # Imported here, for pictures take a second to import.
        from simplest_vit.analysis.attention_rollout import attention_rollout
        from simplest_vit.analysis.rollout_figure import save_rollouts

        shares = np.concatenate([attention_rollout(model, batch) for batch in batches])
        save_rollouts(rollout_dir, predictions, pixels, shares)
    return predictions


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


def _read(file: pathlib.Path, dataset: input_pipeline.Dataset, config: Any) -> np.ndarray:
    """Pixels of a file, uint8 [H, W, C], resized and cropped as the validation split is."""
    size, _, channels = dataset.image_shape
    resize = round(size * 256 / 224) if config.data.get("random_resized_crop", False) else size
    try:
        return resize_and_centre_crop(file.read_bytes(), channels, resize, size)
    except UserError as error:
        raise UserError(f"--images: {file}: {error}; remove it from the list") from error
    except OSError as error:
        raise UserError(f"--images: {file} cannot be read ({error.strerror})") from error


def as_table(predictions: list[Prediction]) -> str:
    """One line for each image: its path, then classes with probabilities, the most probable first."""
    width = max(len(prediction["image"]) for prediction in predictions)
    return "\n".join(
        f"{prediction['image']:<{width}}  "
        + "  ".join(f"{best['class']} {best['probability']:.1%}" for best in prediction["top"])
        for prediction in predictions
    )


def as_json_lines(predictions: list[Prediction]) -> str:
    """One JSON object for each image."""
    return "\n".join(json.dumps(prediction) for prediction in predictions)
