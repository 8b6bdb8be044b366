"""Small data sets in the original formats, and configs for them."""

import dataclasses
import functools
import gzip
import hashlib
import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from simplest_vit.config import default
from simplest_vit.data.builders import BUILDERS, tiny_imagenet

NUM_CLASSES = {"label": {"cifar10": 10, "cifar100": 100}, "coarse_label": {"cifar100": 20}}


@pytest.fixture
def make_config():
    """Returns a function from a data set's name to a config with everything off but what is given."""

    def make(name, *, dir, batch_size=16, seed=0, **data):
        config = default()
        config.seed, config.batch_size = seed, batch_size
        config.data.update({"name": name, "dir": str(dir), "crop_padding": 0, "flip": False, **data})
        return config

    return make


def train_batches(dataset, config, *, start_step=0, sharding=None):
    """The training batches of a whole config."""
    options = {"batch_size": config.batch_size, "seed": config.seed, "start_step": start_step, "sharding": sharding}
    return input_pipeline.train_batches(dataset, config.data, **options)


def jpeg(pixels, mode="RGB", **options):
    """Returns the JPEG file of an array, uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def smooth_image(seed, height=48, width=64):
    """Returns a colourful image without much detail, uint8 [H, W, 3], so that JPEG hardly changes it."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def published(archive, path):
    """Returns the archive whose file is `path`."""
    return dataclasses.replace(archive, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def write_cifar(folder, monkeypatch, name="cifar10", *, train=40, test=16):
    """Writes CIFAR's archive with few examples; returns {split: (images, labels...)}."""
    builder = BUILDERS[name]
    labels_of, files, archive = builder.read.args
    rng = np.random.default_rng(0)
    content, members = {}, {}
    for label, file in labels_of.items():
        members[file] = "".join(f"{label}{i}\n" for i in range(NUM_CLASSES[label][name])).encode() + b"\n"
    for split, size in (("train", train), ("test", test)):
        images = rng.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8)
        labels = {label: (rng.permutation(size) % NUM_CLASSES[label][name]).astype(np.uint8) for label in labels_of}
        records = np.concatenate(
            [*(values[:, None] for values in labels.values()), images.transpose(0, 3, 1, 2).reshape(size, -1)], 1
        )
        for file, part in zip(files[split], np.split(records, len(files[split])), strict=True):
            members[file] = part.tobytes()
        content[split] = images, labels
    folder.mkdir(parents=True)
    path = folder / archive.file_name
    path.write_bytes(gzip.compress(tar_of({f"folder/{file}": members[file] for file in members}), 1))
    archive = published(archive, path)
    read = functools.partial(builder.read.func, labels_of, files, archive)
    monkeypatch.setitem(BUILDERS, name, dataclasses.replace(builder, read=read, archive=archive))
    return content


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with a small CIFAR-10, and its content."""
    return tmp_path / "original", write_cifar(tmp_path / "original", monkeypatch)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A folder with a small CIFAR-100, and its content."""
    return tmp_path / "original", write_cifar(tmp_path / "original", monkeypatch, "cifar100", train=200)


def write_tiny_imagenet(folder, monkeypatch, members):
    """Writes TinyImageNet's zip with the given members {name: bytes or str}; returns its path."""
    path = folder / tiny_imagenet._ARCHIVE.file_name
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    monkeypatch.setattr(tiny_imagenet, "_ARCHIVE", published(tiny_imagenet._ARCHIVE, path))
    return path


def tar_of(members):
    """Returns a tar of {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path):
    """A folder with two classes, three files each for training and one for validation, of all kinds."""
    folder = tmp_path / "photos"
    for split, count in (("train", 3), ("val", 1)):
        for k, name in enumerate(("cat", "dog")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                (folder / split / name / f"{i}.jpg").write_bytes(jpeg(smooth_image(10 * k + i)))
    Image.fromarray(smooth_image(5)).save(folder / "train/cat/palette.png")
    Image.fromarray(smooth_image(6)).convert("P").save(folder / "train/cat/palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    (folder / "train/dog/turned.jpeg").write_bytes(jpeg(smooth_image(7), exif=exif))
    return folder
