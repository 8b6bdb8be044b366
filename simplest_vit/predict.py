"""Classifies image files with the best checkpoint of a run."""

import itertools
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplest_vit import preemption
from simplest_vit.data.augment import normalize
from simplest_vit.data.builders.image_folder import image_files
from simplest_vit.data.decode import eval_image
from simplest_vit.errors import UserError, one_line
from simplest_vit.training.evaluate import restore_best
from simplest_vit.training.run import Run

log = logging.getLogger("simplest_vit")
# Images computed at once.
_BATCH = 64
_TOP = 5

Prediction = dict[str, Any]


def predict(
    workdir: str, images: list[str], rollout_dir: str | None = None, config: Any = None
) -> Iterator[Prediction]:
    """Classify images, preprocessed as the validation split is, with one batch at a time in memory.

    Args:
      workdir: The run's folder, which is all that is needed.
      images: Files, and folders of images.
      rollout_dir: Folder for a picture of the attention over each image, or None.
      config: None for the run's own; another is refused.

    Returns:
      For each image, as soon as it is known: `image`, its path, and `top`, the five most probable classes as `class`
      and `probability`. A file that is no image is logged and skipped.

    Raises:
      UserError: If there is no checkpoint, it is one of another config, or, after all predictions, if files were
        skipped.
    """
    files = find_images(images)
    run, state = restore_best(workdir, config)
    model = run.model(state)
    graphdef, arrays = nnx.split(model)
    classify = jax.jit(lambda arrays, image: jax.nn.softmax(nnx.merge(graphdef, arrays)(image), axis=-1))
    unreadable: list[str] = []
    readable, predicted = _read(files, run, unreadable), 0
    while batch := list(itertools.islice(readable, _BATCH)):
        pixels = np.stack([pixels for _, pixels in batch])
        image = normalize(jnp.asarray(pixels), run.data.mean, run.data.std)
        # After others the last batch is padded, because another size would be compiled again.
        padded = jnp.pad(image, ((0, _BATCH - len(batch) if predicted else 0), *[(0, 0)] * 3))
        probability = np.asarray(classify(nnx.as_pure(arrays), padded))[: len(batch)]
        names = run.data.class_names
        predictions = [_prediction(file, p, names) for (file, _), p in zip(batch, probability, strict=True)]
        if rollout_dir is not None:
            # Imported here, because matplotlib takes a second to import.
            from simplest_vit.analysis.attention_rollout import attention_rollout
            from simplest_vit.analysis.rollout_figure import save_rollouts

            save_rollouts(rollout_dir, predictions, pixels, attention_rollout(model, image), predicted)
        yield from predictions
        predicted += len(batch)
    if unreadable:
        count = f"{len(unreadable)} of {len(files)} cannot be read"
        raise UserError(f"--images: {count}, the first of them {unreadable[0]}; repair or remove them")


def find_images(paths: list[str]) -> list[pathlib.Path]:
    """List the files among `paths`, and the images in its folders, sorted.

    Raises:
      UserError: If there is none, or a path does not exist.
    """
    files: list[pathlib.Path] = []
    for name in paths:
        path = pathlib.Path(name)
        try:
            found, exists = list(map(pathlib.Path, image_files(path))) if path.is_dir() else [path], path.exists()
        except OSError as error:
            raise UserError(f"--images: {name} cannot be read ({error.strerror}); give another") from error
        if not exists:
            raise UserError(f"--images: {name} does not exist; give image files or folders with images")
        if not found:
            raise UserError(f"--images: {name} has no images; expected files such as .jpg or .png")
        files += found
    if not files:
        raise UserError("--images is missing; give image files or folders with images: --images a.jpg folder/")
    return files


def _read(files: list[pathlib.Path], run: Run, unreadable: list[str]) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    """Yield each file with its pixels, uint8 [H, W, C]; what is no image is logged, added to `unreadable`, skipped."""
    for file in files:
        preemption.check()
        try:
            yield file, eval_image(file.read_bytes(), run.data.image_shape, run.data.eval_resize)
        except (UserError, OSError) as error:
            unreadable.append(f"{file}: {error.strerror if isinstance(error, OSError) else error}")
            log.warning("--images: %s", unreadable[-1])


def _prediction(file: pathlib.Path, probability: np.ndarray, class_names: tuple[str, ...]) -> Prediction:
    top = np.argsort(-probability)[:_TOP]
    return {"image": str(file), "top": [{"class": class_names[k], "probability": float(probability[k])} for k in top]}


def as_text(prediction: Prediction) -> str:
    """Describe a prediction in one line: the path of an image, then classes with probabilities, best first."""
    best = "  ".join(f"{best['class']} {best['probability']:.1%}" for best in prediction["top"])
    return one_line(f"{prediction['image']}  {best}")
