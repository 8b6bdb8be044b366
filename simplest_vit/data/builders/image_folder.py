"""A user's own images: a folder for each class, in a folder for each split or in one folder."""

import collections
import hashlib
import os
import re
import sys
import unicodedata
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from simplest_vit.data.builders.base import Builder, Content, Example, checked, group
from simplest_vit.data.builders.imagenet import IMAGENET
from simplest_vit.data.decode import SUFFIXES
from simplest_vit.errors import UserError

_VALIDATION_FOLDERS = ("val", "validation", "valid", "test")  # the first that exists is used
_HELD_OUT = 0.2  # of each class, if one folder holds both splits
_RULE = (
    "Images in CLASS/; of each class 80 % train and 20 % validate, chosen by a hash of the file's name: the same for "
    "every seed."
)


class _File(NamedTuple):
    path: str
    name: str  # the path relative to the folder that is prepared
    label: str
    size: int
    changed: tuple[int, int]  # times of the last change of the content and of anything, in ns


def image_files(folder: Path, passed_over: "collections.Counter[str] | None" = None) -> list[str]:
    """Find the paths of the images of a folder and of the folders in it, by their suffixes; sorted.

    Args:
      folder: Links in it are followed; names that begin with a dot are ignored, such as macOS's own files.
      passed_over: Counts the other files by suffix.

    Raises:
      OSError: If a folder cannot be read.
    """
    found, seen, pending = [], set(), [str(folder)]
    while pending:
        path = pending.pop()
        identity = os.stat(path)
        if (identity.st_dev, identity.st_ino) in seen:  # a link to a folder above
            continue
        seen.add((identity.st_dev, identity.st_ino))
        with os.scandir(path) as entries:
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    pending.append(entry.path)
                elif suffix in SUFFIXES:
                    found.append(entry.path)
                elif passed_over is not None:
                    passed_over[suffix or "no suffix"] += 1
    return sorted(found)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _read(folder: Path) -> Content:
    """Read a folder, whose files are kept as they are."""
    passed_over: collections.Counter[str] = collections.Counter()
    files, is_split = _list_files(folder, passed_over)
    if passed_over:
        kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in passed_over.most_common())
        print(f"skipped {passed_over.total():,} other files: {kinds}", file=sys.stderr, flush=True)
    if is_split:
        print(f"{folder}: {_RULE}", file=sys.stderr, flush=True)
    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "image/filename": tfds.features.Text(),
        "label": tfds.features.ClassLabel(names=sorted({file.label for file in files["train"]})),
    }

    def example(file: _File) -> Example:
        features = {"image/filename": os.fsencode(file.name), "label": file.label}
        return Example(file.name, file.size, checked(Path(file.path).read_bytes), features)

    splits = {split: [example(file) for file in found] for split, found in files.items()}
    return Content(features, group(splits), _RULE if is_split else "")


def _config(folder: Path) -> str:
    """Name the state of a folder: NAME-ORIGINALS-STATE; another state is another data set."""
    state = hashlib.sha256()
    for split, found in _list_files(folder)[0].items():
        for file in found:
            state.update(f"{split} {file.name!r} {file.size} {file.changed}\n".encode())
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:6]
    name = re.sub(r"[^\w.]+", "_", folder.resolve().name)  # TFDS allows no more
    return f"{name}-{place}-{state.hexdigest()[:12]}"


def _list_files(
    folder: Path, passed_over: "collections.Counter[str] | None" = None
) -> tuple[dict[str, list[_File]], bool]:
    """Return the images of the splits train and validation, by class and name, and whether this function split them."""
    if not (folder / "train").is_dir():
        splits: dict[str, list[_File]] = {"train": [], "validation": []}
        for path in _classes(folder, "CLASS/*.jpg, or train/CLASS/*.jpg"):
            found = _class(folder, path, passed_over)
            by_hash = sorted(found, key=lambda file: hashlib.sha256(os.fsencode(file.name)).digest())
            held_out = set(by_hash[: max(round(_HELD_OUT * len(found)), int(len(found) > 1))])
            splits["train"] += [file for file in found if file not in held_out]
            splits["validation"] += [file for file in found if file in held_out]
        if not splits["validation"]:
            raise UserError(f"data.manual_dir={folder}: one image a class, none is left to validate; add some")
        return splits, True
    validation = next((name for name in _VALIDATION_FOLDERS if (folder / name).is_dir()), "val")
    splits = {}
    for split, name in (("train", "train"), ("validation", validation)):
        paths = _classes(folder / name, f"{name}/CLASS/*.jpg")
        splits[split] = [file for path in paths for file in _class(folder, path, passed_over)]
    known = {file.label for file in splits["train"]}
    for file in splits["validation"]:
        if file.label not in known:
            unknown = folder / validation / file.label
            raise UserError(f"{unknown}: no such class in {folder / 'train'}; add it there or delete it")
    return splits, False


def _classes(folder: Path, expected: str) -> list[Path]:
    found = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    if not found:
        raise UserError(f"data.manual_dir={folder}: no class folders; expected {expected}")
    for path in found:
        name = path.name
        odd = any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name)  # control, no UTF-8, line breaks
        if odd or name != name.strip():
            raise UserError(
                f"{str(path)!a}: a class name that TFDS cannot keep (blanks around it, a control character or no "
                "UTF-8); rename the folder"
            )
    return found


def _class(root: Path, folder: Path, passed_over: "collections.Counter[str] | None") -> list[_File]:
    """Return the images of a class, with their names relative to `root`."""
    files = []
    for path in image_files(folder, passed_over):
        try:
            status = os.stat(path)
            size, changed = status.st_size, (status.st_mtime_ns, status.st_ctime_ns)
        except OSError:  # listed as unreadable later
            size, changed = 0, (0, 0)
        files.append(_File(path, path[len(str(root)) + 1 :], folder.name, size, changed))
    if not files:
        raise UserError(f"{folder}: a class folder without images; add some ({', '.join(SUFFIXES)}) or delete it")
    return files


IMAGE_FOLDER = Builder(
    name="image_folder",
    version="2.0.0",  # 1.1.0 held grey images as PNG, and no folder in the name of a file
    description="Images in train/CLASS/ and val/CLASS/ (or validation/, valid/, test/); the folders name the classes.",
    image_shape=IMAGENET.image_shape,
    mean=IMAGENET.mean,
    std=IMAGENET.std,
    read=_read,
    config=_config,
)
