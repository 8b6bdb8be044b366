"""Classify and embed images with the best checkpoint of a run."""

import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from simplest_vit import preemption
from simplest_vit.data.augment import normalize
from simplest_vit.data.builders.image_folder import image_files, name_others
from simplest_vit.data.decode import HEIC_SUFFIXES, SUFFIXES, eval_image
from simplest_vit.errors import UserError, one_line
from simplest_vit.files import write_csv, writing
from simplest_vit.training.evaluate import restore_best

log = logging.getLogger("simplest_vit")
_BATCH = 64  # images computed at a time
_TOP = 5
_PATH = str | os.PathLike

# `image`: a path; `top`: the most probable classes, each with `class` and `probability`.
Prediction = dict[str, Any]
# Paths of image files, or pixels, uint8 [N, H, W, C] of the run's image shape.
Images = Sequence[str | os.PathLike[str]] | np.ndarray


class Predictor:
    """Classifies and embeds images with the best checkpoint of a run, preprocessed as for validation.

    Attributes:
      class_names: Names of the classes in the order of the logits.
      image_shape: (H, W, C) of a preprocessed image.
      step: The step of the checkpoint.
      accuracy: Its validation accuracy, from 0 to 1; None if it was not evaluated.
      model: The network, from normalized float32 images [B, H, W, C] to logits [B, num_classes].
    """

    def __init__(self, workdir: str | os.PathLike[str]):
        """Load the weights; only the run's folder is needed, and nothing is written to it.

        Raises:
          UserError: If there is no checkpoint.
        """
        run, state, self.accuracy = restore_best(os.fspath(workdir))
        self._network, self._data = run.config.model.name, run.data
        self.class_names, self.image_shape, self.step = run.data.class_names, run.data.image_shape, int(state.step)
        self.model = run.model(state)
        self._size = 1
        # Not `nnx.jit`, which copies all parameters in each call.
        graphdef = nnx.graphdef(self.model)
        self._classify = jax.jit(lambda arrays, image: jax.nn.softmax(nnx.merge(graphdef, arrays)(image)))
        self._embed = jax.jit(lambda arrays, image: nnx.merge(graphdef, arrays).features(image))

    def __repr__(self) -> str:
        """Describe the network, its data and its accuracy."""
        size = "x".join(map(str, self.image_shape))
        accuracy = "not evaluated" if self.accuracy is None else f"validation accuracy {self.accuracy:.2%}"
        about = f"{self._network}, {len(self.class_names)} classes, images {size}, step {self.step}, {accuracy}"
        return f"Predictor({about})"

    def read(self, path: str | os.PathLike[str]) -> np.ndarray:
        """Read an image file as uint8 [H, W, C].

        Raises:
          UserError: If it cannot be decoded as an image.
          OSError: If it cannot be read.
        """
        return eval_image(pathlib.Path(path).read_bytes(), self.image_shape, self._data.eval_resize)

    def normalize(self, pixels: np.ndarray) -> jax.Array:
        """Normalize pixels, uint8 [N, H, W, C], to the float32 input of `model`."""
        return normalize(jnp.asarray(pixels), self._data.mean, self._data.std)

    def probabilities(self, images: Images) -> np.ndarray:
        """Compute class probabilities, float32 [N, num_classes].

        Raises:
          UserError: If a file is not an image, or pixels have another shape or type.
          OSError: If a file cannot be read.
        """
        return self._compute(self._classify, images)

    def embed(self, images: Images) -> np.ndarray:
        """Compute features, float32 [N, D], the input of the linear head. Errors as in `probabilities`."""
        return self._compute(self._embed, images)

    def predict(self, images: Images) -> list[Prediction]:
        """Find the five most probable classes of each image. Errors as in `probabilities`."""
        probabilities = self.probabilities(images)
        names = map(str, range(len(images)) if isinstance(images, np.ndarray) else images)
        return [self.describe(name, p) for name, p in zip(names, probabilities, strict=True)]

    def describe(self, name: str, probability: np.ndarray) -> Prediction:
        """List the most probable classes of one image from its probabilities [num_classes]."""
        top = np.argsort(-probability)[:_TOP]
        best = [{"class": self.class_names[k], "probability": float(probability[k])} for k in top]
        return {"image": name, "top": best}

    def _compute(self, function: Callable[..., jax.Array], images: Images) -> np.ndarray:
        if isinstance(images, _PATH):
            raise UserError(f"images={os.fspath(images)!r} must be a list of paths; write [{os.fspath(images)!r}]")
        are_paths = isinstance(images, Collection) and all(isinstance(image, _PATH) for image in images)
        if not isinstance(images, np.ndarray) and not are_paths:
            raise UserError("images must be a list of paths, or pixels as one NumPy array, such as np.stack(images)")
        if len(images) == 0:
            raise UserError("images is empty; give at least one path, or pixels")
        pixels = images if isinstance(images, np.ndarray) else np.stack([self.read(path) for path in images])
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self.image_shape:
            height, width, channels = self.image_shape
            raise UserError(
                f"images: {pixels.dtype} {list(pixels.shape)} must be uint8 [N, {height}, {width}, {channels}]; "
                "give a list of paths to have images resized"
            )
        # Pad batches to the largest size so far, because each new size is compiled. Other threads may change the size.
        size = self._size = max(self._size, min(len(pixels), _BATCH))
        parts = [pixels[start : start + size] for start in range(0, len(pixels), size)]
        padded = [np.pad(part, ((0, size - len(part)), (0, 0), (0, 0), (0, 0))) for part in parts]
        arrays = nnx.as_pure(nnx.state(self.model))  # in each call, because the caller may change the model
        return np.concatenate([function(arrays, self.normalize(part)) for part in padded])[: len(pixels)]


def load(workdir: str | os.PathLike[str]) -> Predictor:
    """Load the best checkpoint of the run in a folder: see `Predictor`."""
    return Predictor(workdir)


def predict(workdir: str, images: list[str], table: str | None = None) -> Iterator[Prediction]:
    """Classify image files, one batch at a time.

    Args:
      workdir: The run's folder; nothing else is needed.
      images: Image files and folders of images.
      table: A CSV file for the most probable class of each image: file, class, probability. It is written at the end,
        as a whole; a caller that stops earlier leaves it as it was.

    Returns:
      An iterator over the predictions, in order. A file that is not an image is logged and skipped.

    Raises:
      UserError: If there is no checkpoint, if `table` cannot be written or, after all that, if some files were skipped.
    """
    if table and (os.path.isdir(table) or not os.access(os.path.dirname(os.path.realpath(table)), os.W_OK | os.X_OK)):
        raise UserError(
            f"--csv={table} cannot be written; expected a file in a folder you may write to, such as predictions.csv"
        )
    target = os.path.realpath(table) if table else ""
    if target.lower().endswith((*SUFFIXES, *HEIC_SUFFIXES)) or target in map(os.path.realpath, images):
        raise UserError(f"--csv={table} is an image; expected a table, such as --csv predictions.csv")
    files = find_images(images)
    predictor = Predictor(workdir)
    unreadable: list[str] = []
    rows = [("file", "class", "probability")]
    readable = _read(files, predictor, unreadable)
    while batch := list(itertools.islice(readable, _BATCH)):
        probability = predictor.probabilities(np.stack([pixels for _, pixels in batch]))
        for (file, _), p in zip(batch, probability, strict=True):
            prediction = predictor.describe(str(file), p)
            if table:
                best = prediction["top"][0]
                rows.append((str(file), best["class"], f"{best['probability']:.6f}"))
            yield prediction
    if table:
        with writing(f"--csv={table}"):
            write_csv(pathlib.Path(table), rows)
    if unreadable:
        count = f"{len(unreadable)} of {len(files)} cannot be read"
        raise UserError(f"--images: {count}, the first of them {unreadable[0]}; repair them or leave them out")


def find_images(paths: list[str]) -> list[pathlib.Path]:
    """List the files among `paths`, and the images in the folders among them in sorted order.

    Prints how many other files are in the folders.

    Raises:
      UserError: If there are none, or a path does not exist.
    """
    files: list[pathlib.Path] = []
    for name in paths:
        path = pathlib.Path(name)
        try:
            found, exists = image_files(path) if path.is_dir() else [name], path.exists()
        except OSError as error:
            raise UserError(f"--images: {name} cannot be read ({error.strerror}); give another") from error
        if not exists:
            raise UserError(f"--images: {name} does not exist; give image files or folders with images")
        if path.is_dir():
            name_others(path, set(found))
        if not found:
            raise UserError(f"--images: {name} has no images; expected files such as .jpg or .png")
        files += map(pathlib.Path, found)
    if not files:
        raise UserError("--images is missing; give image files or folders with images: --images a.jpg folder/")
    return files


def _read(
    files: list[pathlib.Path], predictor: Predictor, unreadable: list[str]
) -> Iterator[tuple[pathlib.Path, np.ndarray]]:
    """Yield each file with its pixels; files that are not images are logged, added to `unreadable` and skipped."""
    for file in files:
        preemption.check()
        try:
            yield file, predictor.read(file)
        except (UserError, OSError) as error:
            unreadable.append(f"{file}: {error.strerror if isinstance(error, OSError) else error}")
            log.warning("--images: %s", unreadable[-1])


def as_text(prediction: Prediction) -> str:
    """Format a prediction as one line: the path of the image, then classes with probabilities, best first."""
    best = "  ".join(f"{best['class']} {best['probability']:.1%}" for best in prediction["top"])
    return one_line(f"{prediction['image']}  {best}")
