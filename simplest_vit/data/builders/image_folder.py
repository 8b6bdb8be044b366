"""A folder of one's own images: a folder for each split, in it a folder for each class."""

import hashlib
import itertools
import os
import re
from pathlib import Path

import tensorflow_datasets as tfds

from simplest_vit.data.builders.base import Builder, Content, Example, group
from simplest_vit.data.builders.imagenet import IMAGENET
from simplest_vit.data.decode import standardize
from simplest_vit.errors import UserError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
_VALIDATION_FOLDERS = ("val", "validation", "valid", "test")


def image_files(folder: Path) -> list[Path]:
    """The images of a folder by their suffixes, sorted; what begins with a dot, as macOS's own files do, is none."""
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in _SUFFIXES and not f.name.startswith("."))


def _read(folder: Path) -> Content:
    """Keep RGB JPEG files as they are, to be turned by their EXIF orientation when decoded; others become RGB PNG."""
    files = _list_files(folder)
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "image/filename": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=sorted({path.parent.name for path in files["train"]})),
    }

    def example(path: Path) -> Example:
        features = {"image/filename": os.fsencode(path.name), "label": path.parent.name}
        return Example(str(path), _size(path), lambda: standardize(path.read_bytes()), features)

    return Content(features, group({split: [example(path) for path in paths] for split, paths in files.items()}))


def _config(folder: Path) -> str:
    """Each folder is a data set of its own, and a new one when a file is added, removed or changed in size."""
    fingerprint = hashlib.sha256(os.fsencode(folder.resolve()))
    for path in itertools.chain(*_list_files(folder).values()):
        fingerprint.update(b"%s %d\n" % (os.fsencode(path.relative_to(folder)), _size(path)))
    name = re.sub(r"[^\w.-]+", "_", folder.resolve().name)  # TFDS allows no more
    return f"{name}-{fingerprint.hexdigest()[:12]}"


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
            images = image_files(path)
            if not images:
                raise UserError(
                    f"{path}: a class folder without images; add some ({', '.join(_SUFFIXES)}) or delete it"
                )
            files[split] += images
    known = {path.parent.name for path in files["train"]}
    for path in files["validation"]:
        if path.parent.name not in known:
            raise UserError(f"{path.parent}: no such class in {folder / 'train'}; add it there or delete it")
    return files


IMAGE_FOLDER = Builder(
    name="image_folder",
    version="1.1.0",  # 1.0.0 held 16-bit images as white ones
    description="Images in train/CLASS/ and val/CLASS/ (or validation/, valid/, test/); the folders name the classes.",
    image_shape=IMAGENET.image_shape,
    mean=IMAGENET.mean,
    std=IMAGENET.std,
    read=_read,
    config=_config,
)
