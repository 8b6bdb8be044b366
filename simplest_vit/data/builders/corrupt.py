"""What happens to damaged images: all are found and named, then the preparing fails or goes on without them."""

import dataclasses
import sys
from typing import Any

import tensorflow_datasets as tfds

from simplest_vit.data.decode import standardize
from simplest_vit.errors import UserError


@dataclasses.dataclass
class CorruptImages:
    """Collects the damaged images of a data set.

    Attributes:
      skip: whether to go on without them in the end.
      count: how many there were so far.
    """

    skip: bool = False
    count: int = 0

    def standardize(self, name: str, content: bytes, *, keep_grey: bool = False) -> bytes | None:
        """Run `decode.standardize` on a file; None, and a line with its name, where it is damaged."""
        try:
            return standardize(content, keep_grey=keep_grey)
        except UserError as error:
            print(f"corrupt image {name}: {error}", file=sys.stderr, flush=True)
            self.count += 1
            return None

    def finish(self) -> None:
        """Tells the outcome, after the last image.

        Raises:
          UserError: there were corrupt images, which nobody asked to skip.
        """
        if self.count and not self.skip:
            raise UserError(
                f"{self.count} corrupt images, listed above; repair or delete them, or prepare with --skip_corrupt"
            )
        if self.count:
            print(f"skipped {self.count} corrupt images, listed above", file=sys.stderr, flush=True)


class ImageFilesBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A builder whose examples come from image files, some of which may be damaged."""

    def __init__(self, *, skip_corrupt: bool = False, **kwargs: Any):
        """Creates the builder; `skip_corrupt` leaves damaged images out instead of failing."""
        self._corrupt = CorruptImages(skip_corrupt)
        super().__init__(**kwargs)

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        super()._download_and_prepare(*args, **kwargs)
        self._corrupt.finish()  # before TFDS gives the data set its final name
