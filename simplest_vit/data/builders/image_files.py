"""Data sets made of image files: damaged ones are all found and named, then preparing fails or goes on without them."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from simplest_vit.data.decode import standardize
from simplest_vit.data.progress import Progress
from simplest_vit.errors import UserError


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image file to read, of which some are damaged.

    Attributes:
      name: What messages call it.
      size: In bytes.
      read: Gives its content.
      features: Of the example besides `image`.
    """

    name: str
    size: int
    read: Callable[[], bytes]
    features: dict[str, Any]


class ImageFilesBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A builder whose examples come from image files.

    Args:
      skip_corrupt: Whether to leave damaged images out instead of failing.
      **kwargs: Of the base class.
    """

    def __init__(self, *, skip_corrupt: bool = False, **kwargs: Any):
        self._skip_corrupt, self._corrupt = skip_corrupt, 0
        super().__init__(**kwargs)

    def _standardize(self, name: str, read: Callable[[], bytes], *, keep_grey: bool = False) -> bytes | None:
        """`decode.standardize` of a file, or nothing but a line with its name where it is damaged."""
        try:
            return standardize(read(), keep_grey=keep_grey)
        except Exception as error:  # also of a zip, a directory, a link to nowhere
            reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
            print(f"corrupt image {name}: {reason}", file=sys.stderr, flush=True)
            self._corrupt += 1
            return None

    def _generate_examples(self, split: str, files: Sequence[ImageFile]) -> Iterator[tuple[int, dict[str, Any]]]:
        progress = Progress(f"preparing {split}", sum(file.size for file in files))
        found = False
        for index, file in enumerate(files):
            image = self._standardize(file.name, file.read)
            progress.add(1, file.size)
            if image is not None:
                found = True
                yield index, {"image": image, **file.features}
        self._check_any(split, found)

    def _check_any(self, split: str, found: bool) -> None:
        if not found:
            raise UserError(f"{split}: all images are corrupt, listed above; repair some")

    def _check_corrupt(self) -> None:
        """Tell the outcome, after the last image; an error if nobody asked to skip the corrupt ones."""
        if self._corrupt and not self._skip_corrupt:
            raise UserError(
                f"{self._corrupt} corrupt images, listed above; repair or delete them, or prepare with --skip_corrupt"
            )
        if self._corrupt:
            print(f"skipped {self._corrupt} corrupt images, listed above", file=sys.stderr, flush=True)

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        super()._download_and_prepare(*args, **kwargs)
        self._check_corrupt()  # before TFDS gives the data set its final name
