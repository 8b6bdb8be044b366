"""A folder of one's own images: a folder for each split, in it a folder for each class."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from simplest_vit.data.builders.image_files import ImageFile, ImageFilesBuilder
from simplest_vit.errors import UserError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_VALIDATION_FOLDERS = ("val", "validation", "valid", "test")


class ImageFolder(ImageFilesBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Images in train/CLASS/ and val/CLASS/ (or validation/, valid/, test/); the folders name the classes.

    RGB JPEG files are kept as they are, and turned by their EXIF orientation when they are decoded; all others become
    upright RGB PNG. Each folder has a prepared data set of its own, and a new one when a file is added, removed or
    changed in size.

    Args:
      folder: The folder.
      **kwargs: Of the base class.

    Raises:
      UserError: If the folder has not the expected layout.
    """

    name = "image_folder"
    VERSION = tfds.core.Version("1.1.0")  # 1.0.0 held 16-bit images as white ones
    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with train/CLASS/ and val/CLASS/."

    def __init__(self, *, folder: Path, **kwargs: Any):
        self._files = _list_files(folder)
        fingerprint = hashlib.sha256(os.fsencode(folder.resolve()))
        for files in self._files.values():
            for path in files:
                fingerprint.update(b"%s %d\n" % (os.fsencode(path.relative_to(folder)), _size(path)))
        name = re.sub(r"[^\w.-]+", "_", folder.resolve().name)  # TFDS allows no more
        super().__init__(config=tfds.core.BuilderConfig(name=f"{name}-{fingerprint.hexdigest()[:12]}"), **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "image/filename": tfds.features.Text(),
                    "label": tfds.features.ClassLabel(names=_class_names(self._files["train"])),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager
        return {
            split: self._generate_examples(
                split,
                [
                    ImageFile(
                        str(path),
                        _size(path),
                        path.read_bytes,
                        {"image/filename": os.fsencode(path.name), "label": path.parent.name},
                    )
                    for path in files
                ],
            )
            for split, files in self._files.items()
        }


def _size(path: Path) -> int:
    """In bytes; of what cannot be read, which is told later, 0."""
    return path.stat().st_size if path.is_file() else 0


def _list_files(folder: Path) -> dict[str, list[Path]]:
    """The images of the splits train and validation, by class and name."""
    validation = next((name for name in _VALIDATION_FOLDERS if (folder / name).is_dir()), "val")
    files: dict[str, list[Path]] = {}
    for split, name in (("train", "train"), ("validation", validation)):
        classes = sorted(path for path in (folder / name).glob("[!.]*") if path.is_dir())
        if not classes:
            raise UserError(f"data.manual_dir={folder}: no class folders in {name}/; expected {name}/CLASS/*.jpg")
        files[split] = []
        for path in classes:
            if path.name.split("\n") != [path.name.strip()] or not path.name.isprintable():
                raise UserError(
                    f"{str(path)!r}: a class name that TFDS cannot keep (blanks around it, a line break or no UTF-8); "
                    "rename the folder"
                )
            images = sorted(
                file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".")
            )
            if not images:
                raise UserError(
                    f"{path}: a class folder without images; add some ({', '.join(_SUFFIXES)}) or delete it"
                )
            files[split] += images
    unknown = set(_class_names(files["validation"])) - set(_class_names(files["train"]))
    if unknown:
        raise UserError(
            f"{folder / validation}: class {sorted(unknown)[0]} is not in {folder / 'train'}; add it there or delete it"
        )
    return files


def _class_names(files: list[Path]) -> list[str]:
    return sorted({path.parent.name for path in files})
