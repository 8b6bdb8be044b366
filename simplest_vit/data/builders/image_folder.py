"""A user's own images: a folder for each class, in a folder for each split or in one folder."""

import collections
import contextlib
import hashlib
import os
import re
import stat
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from simplest_vit.data.builders.base import Builder, Content, Example, checked, group
from simplest_vit.data.builders.imagenet import IMAGENET
from simplest_vit.data.decode import HEIC_REMEDY, HEIC_SUFFIXES, SUFFIXES
from simplest_vit.errors import UserError, one_line

_VALIDATION_FOLDERS = ("val", "validation", "valid", "test")  # the first that exists is used
_SPLIT_NAMES = {"train", "training", "test", "testing", *_VALIDATION_FOLDERS}
_HELD_OUT = 0.2  # of each class, if one folder holds both splits
_TRAIN = "train/ is the training split; if it is a class, rename it"
_RULE = (
    "Images in CLASS/; 80 % of each class for training, 20 % for validation, by a hash of the file name: the same for "
    "every seed."
)


class _File(NamedTuple):
    path: str
    name: str  # the path relative to the folder that is prepared
    label: str
    size: int
    changed: tuple[int, int]  # times of the last change of the content and of anything, in ns


def image_files(folder: Path) -> list[str]:
    """Find the images in a folder and its subfolders by their suffixes; return their paths, sorted.

    Links are followed; names that begin with a dot, such as files of macOS, are ignored, and so are pipes, sockets and
    devices. An OSError if a folder cannot be read.
    """
    return sorted(path for path in _walk(folder) if _suffix(path) in SUFFIXES and not _is_endless(path))


def _walk(folder: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise error

    seen = set()
    for path, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        identity = os.stat(path)
        if (identity.st_dev, identity.st_ino) in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (os.path.join(path, name) for name in names if not name.startswith("."))


def _is_endless(path: str) -> bool:
    """Return whether reading may never end: of a pipe, a socket or a device. A broken link is a file."""
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def has_splits(folder: Path) -> bool:
    """Return whether a folder holds splits, train/CLASS/ and val/CLASS/, rather than CLASS/."""
    return (folder / "train").is_dir()


def _read(folder: Path) -> Content:
    """Read a folder, whose files are kept as they are."""
    files = _list_files(folder)
    name_others(folder, {file.path for found in files.values() for file in found})
    beside = sorted(path.name for path in folder.glob("[!.]*") if path.is_dir() and path.name not in _SPLIT_NAMES)
    if has_splits(folder) and beside:
        print(f"folders beside train/ are not used, such as {one_line(beside[0])}/; {_TRAIN}", file=sys.stderr)
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "image/filename": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=sorted({file.label for file in files["train"]})),
    }

    def example(file: _File) -> Example:
        features = {"image/filename": os.fsencode(file.name), "label": file.label}
        return Example(file.name, file.size, checked(Path(file.path).read_bytes), features)

    splits = group({split: list(map(example, found)) for split, found in files.items()})
    return Content(features, splits, "" if has_splits(folder) else _RULE)


def name_others(folder: Path, taken: set[str]) -> None:
    """Print by suffix how many files of a folder are not among `taken`; images among them are in no class folder."""
    others: set[str] = set()
    with contextlib.suppress(OSError):  # a folder that nobody asked for, such as lost+found
        others = set(_walk(folder)) - taken
    kinds = ["pipes, sockets or devices" if _is_endless(path) else _kind(path) for path in others]
    if kinds:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in sorted(collections.Counter(kinds).items()))
        remedy = f"; {HEIC_REMEDY}" if set(HEIC_SUFFIXES) & set(kinds) else ""
        print(f"skipped unused files: {counts}{remedy}", file=sys.stderr, flush=True)


def _kind(path: str) -> str:
    return "images in no class folder" if _suffix(path) in SUFFIXES else _suffix(path) or "without a suffix"


def _variant(folder: Path) -> str:
    """Name the state of a folder: NAME-ORIGINALS-STATE; another state is another data set."""
    state = hashlib.sha256()
    for split, found in _list_files(folder).items():
        for file in found:
            state.update(f"{split} {file.name!r} {file.size} {file.changed}\n".encode())
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:6]
    name = re.sub(r"[^\w.]+", "_", folder.resolve().name)  # TFDS allows no more
    return f"{name}-{place}-{state.hexdigest()[:12]}"


def _list_files(folder: Path) -> dict[str, list[_File]]:
    """List the images of the splits train and validation, mixed: `train[:90%]` has images of every class."""
    if has_splits(folder):
        validation = folder / next((name for name in _VALIDATION_FOLDERS if (folder / name).is_dir()), "val")
        splits = {"train": _images(folder, folder / "train"), "validation": _images(folder, validation)}
        for label in {file.label for file in splits["validation"]} - {file.label for file in splits["train"]}:
            raise UserError(f"{validation / label}: no such class in {folder / 'train'}; add it there or move it away")
        return splits
    files = _images(folder, folder)
    labels = {file.label for file in files}
    splits_by_name = sorted(label for label in labels if label.lower() in _SPLIT_NAMES)
    with_classes = any((folder / split / label).is_dir() for split in splits_by_name for label in labels)
    if len(splits_by_name) >= min(2, len(labels)) or with_classes:
        raise UserError(
            f"config.data.manual_dir={folder}: {' and '.join(splits_by_name)} are names of splits, expected classes; "
            "name the splits train/ and val/, with CLASS/*.jpg in each"
        )
    splits, counts = {"train": [], "validation": []}, collections.Counter(file.label for file in files)
    held_out = {label: max(round(_HELD_OUT * count), int(count > 1)) for label, count in counts.items()}
    for file in files:
        splits["validation" if held_out[file.label] > 0 else "train"].append(file)
        held_out[file.label] -= 1
    return {split: found for split, found in splits.items() if found}  # one image per class leaves no validation


def _images(root: Path, folder: Path) -> list[_File]:
    """List the images of the classes in `folder`, named relative to `root`, in the order of a hash of their names."""
    classes = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    if not classes:
        expected = "expected CLASS/*.jpg in it" + (f"; {_TRAIN}" if folder != root else "")
        raise UserError(f"config.data.manual_dir={root}: no class folders in {folder}; {expected}")
    files = []
    for path in classes:
        odd = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in path.name)  # control, no UTF-8, breaks
        if odd or path.name != path.name.strip():
            raise UserError(
                f"{str(path)!a}: a class name that TFDS cannot store (surrounding blanks, a control character or not "
                "UTF-8); rename the folder"
            )
        found = image_files(path)
        if not found:
            name_others(path, set())  # which may be a run, prepared data, or photos of another format
            raise UserError(f"{path}: a class folder without images; add some ({', '.join(SUFFIXES)}) or move it away")
        for image in found:
            try:
                status = os.stat(image)
                size, changed = status.st_size, (status.st_mtime_ns, status.st_ctime_ns)
            except OSError:  # listed as unreadable later
                size, changed = 0, (0, 0)
            files.append(_File(image, image[len(str(root)) + 1 :], path.name, size, changed))
    return sorted(files, key=lambda file: hashlib.sha256(os.fsencode(file.name)).digest())


IMAGE_FOLDER = Builder(
    name="image_folder",
    version="3.0.0",
    description="Images in train/CLASS/ and val/CLASS/ (or validation/, valid/, test/); the folders name the classes.",
    image_shape=IMAGENET.image_shape,
    mean=IMAGENET.mean,
    std=IMAGENET.std,
    read=_read,
    variant=_variant,
)
