"""Descriptions of data sets, and readers of the files that their authors published."""

import contextlib
import dataclasses
import http.client
import itertools
import sys
import tarfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from simplest_vit.data.decode import decode_image
from simplest_vit.data.records import Progress
from simplest_vit.errors import UserError, first_line
from simplest_vit.files import sha256

_SHARD_BYTES = 2**28


class Example(NamedTuple):
    """An example whose image has not been read yet."""

    name: str  # for messages
    size: int  # of the original in bytes
    image: Callable[[], bytes]  # returns a JPEG or PNG; may raise any error
    features: dict[str, Any]  # other than `image`


class Shard(NamedTuple):
    """A file to write: the size of its originals in bytes, and a function that reads its examples."""

    size: int
    examples: Callable[[], Iterator[Example]]


class Content(NamedTuple):
    """The content of the original files: TFDS's features, and the shards of each split."""

    features: dict[str, Any]
    splits: dict[str, list[Shard]]
    description: str = ""  # replaces the builder's


@dataclasses.dataclass(frozen=True)
class Archive:
    """A published archive, and the folder it unpacks to."""

    url: str
    size: int
    sha256: str
    folder: str

    @property
    def file_name(self) -> str:
        """The name of the archive's file."""
        return self.url.rsplit("/", 1)[-1]

    def _difference(self, path: Path) -> str:
        """Describe how a file differs from the published archive; empty if it does not."""
        size = path.stat().st_size
        if size != self.size:
            return f"{size:,} bytes, expected {self.size:,}"
        found = sha256(path)
        return f"SHA-256 {found}, expected {self.sha256}" if found != self.sha256 else ""

    def download(self, folder: Path) -> None:
        """Download the archive into a folder unless it exists; raise a UserError if that fails or the file differs."""
        path = folder / self.file_name
        if path.exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        print(f"downloading {self.url} ({self.size / 1e6:.0f} MB) to {path}", file=sys.stderr, flush=True)
        progress = Progress(f"downloading {self.file_name}", self.size / 1e6, unit="MB")

        def count(block: int, size: int, total: int) -> None:
            megabytes = size / 1e6 if block else 0.0  # urlretrieve calls it with block 0 before the first block
            progress.add(megabytes, megabytes)

        try:
            urllib.request.urlretrieve(self.url, partial, count)
            if difference := self._difference(partial):
                raise OSError(difference)
            partial.rename(path)
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"cannot download {self.url} ({first_line(error)}); download {self.file_name} by other "
                "means and name its folder: --config.data.manual_dir=FOLDER"
            ) from error
        finally:
            partial.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # of a folder that is not empty
                folder.rmdir()

    def read(self, folder: Path, members: Sequence[str]) -> dict[str, tuple[str, bytes]]:
        """Read members of the archive, packed or unpacked.

        Args:
          folder: Contains the archive or its unpacked folder, or is that folder.
          members: Names in the archive's folder; the first one identifies that folder.

        Returns:
          For each member its location (for messages) and its content.

        Raises:
          UserError: If the archive and its files are missing, or damaged.
        """
        unpacked = next((f for f in (folder / self.folder, folder) if (f / members[0]).is_file()), None)
        if unpacked:
            for path in (unpacked / member for member in members):
                if not path.is_file():
                    raise UserError(f"{path}: missing; unpack {self.url} again")
            return {member: (str(unpacked / member), (unpacked / member).read_bytes()) for member in members}
        path = folder / self.file_name
        if not path.is_file():
            raise UserError(
                f"config.data.manual_dir={folder}: neither {self.file_name} nor {self.folder}/{members[0]} in it; "
                f"download {self.url} into it"
            )
        if difference := self._difference(path):
            raise UserError(f"{path}: {difference}; delete it and download {self.url} again")
        with tarfile.open(path) as tar:
            files = {member: tar.extractfile(f"{self.folder}/{member}") for member in members}
            return {member: (f"{path}:{member}", file.read()) for member, file in files.items() if file}


@dataclasses.dataclass(frozen=True)
class Builder:
    """A data set that can be prepared."""

    name: str  # TFDS's name; the version is TFDS's as well
    version: str
    description: str
    image_shape: tuple[int, int, int]  # (H, W, C) of the images; if sizes differ, the shape that they are resized to
    mean: tuple[float, ...]  # per channel, of pixels in [0, 1], as commonly used; `std` likewise
    std: tuple[float, ...]
    read: Callable[[Path], Content]  # reads the content of the folder with the original files
    # Returns the name of the variant in that folder, if there are several; TFDS calls it the config.
    variant: Callable[[Path], str] | None = None
    archive: Archive | None = None  # to download if no folder is given
    resumable: bool = False  # whether the files that an interrupted process has written are kept
    # Published number of images in each split, if the originals may hold fewer.
    expected: dict[str, int] = dataclasses.field(default_factory=dict)


def checked(read: Callable[[], bytes]) -> Callable[[], bytes]:
    """Return a function that reads an image file and decodes it once at minimal size, as a check.

    It raises a UserError if the file cannot be decoded, and whatever `read` raises.
    """

    def image() -> bytes:
        content = read()
        decode_image(content, 3, (1, 1))
        return content

    return image


def group(splits: dict[str, list[Example]]) -> dict[str, list[Shard]]:
    """Divide the examples of each split into shards of about 256 MB."""
    shards: dict[str, list[Shard]] = {}
    for split, examples in splits.items():
        ends = itertools.accumulate(example.size for example in examples)
        numbered = zip((end // _SHARD_BYTES for end in ends), examples, strict=True)
        parts = [[example for _, example in part] for _, part in itertools.groupby(numbered, lambda pair: pair[0])]
        shards[split] = [Shard(sum(example.size for example in part), part.__iter__) for part in parts]
    return shards
