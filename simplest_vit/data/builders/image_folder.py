"""A folder of one's own images: a folder for each split, in it a folder for each class."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from simplest_vit.data.builders.corrupt import ImageFilesBuilder
from simplest_vit.errors import UserError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_VALIDATION_FOLDERS = ("val", "validation", "valid", "test")


class ImageFolder(ImageFilesBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Images in train/CLASS/ and val/CLASS/ (or validation/, valid/, test/); the folders name the classes.

    RGB JPEG files are kept as they are, and turned by their EXIF orientation when they are decoded; all others become
    upright RGB PNG. Each folder has a prepared data set of its own, and a new one when a file is added, removed or
    changed in size.
    """

    name = "image_folder"
    VERSION = tfds.core.Version("1.1.0")  # 1.0.0 held 16-bit images as white ones
    MANUAL_DOWNLOAD_INSTRUCTIONS = "A folder with train/CLASS/ and val/CLASS/."

    def __init__(self, *, folder: Path, **kwargs: Any):
        """Creates the builder for a folder.

        Args:
          folder: the folder.
          **kwargs: of the base class.

        Raises:
          UserError: the folder has not the expected layout.
        """
        self._files = _list_files(folder)
        fingerprint = hashlib.sha256(str(folder.resolve()).encode())
        for files in self._files.values():
            for path in files:
                fingerprint.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
        config = tfds.core.BuilderConfig(name=f"{folder.resolve().name}-{fingerprint.hexdigest()[:12]}")
        super().__init__(config=config, **kwargs)

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
        return {split: self._generate_examples(split) for split in self._files}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, path in enumerate(self._files[split]):
            image = self._corrupt.standardize(str(path), path.read_bytes())
            if image is not None:
                yield index, {"image": image, "image/filename": path.name, "label": path.parent.name}


def _list_files(folder: Path) -> dict[str, list[Path]]:
    """Returns the images of the splits train and validation, by class and name."""
    validation = next((name for name in _VALIDATION_FOLDERS if (folder / name).is_dir()), "val")
    files: dict[str, list[Path]] = {}
    for split, name in (("train", "train"), ("validation", validation)):
        classes = sorted(path for path in (folder / name).glob("[!.]*") if path.is_dir())
        if not classes:
            raise UserError(f"data.manual_dir={folder}: no class folders in {name}/; expected {name}/CLASS/*.jpg")
        files[split] = []
        for path in classes:
            images = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
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
