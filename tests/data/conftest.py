"""Small data sets in the original formats, and configs for them."""

import io
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

import input_pipeline
from simplest_vit.config import default
from simplest_vit.data.builders import BUILDERS, cifar


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


def write_cifar(folder, monkeypatch, name="cifar10", *, train=40, test=16):
    """Writes the original files of CIFAR with few examples; returns {split: (images, labels...)}."""
    monkeypatch.setattr(cifar, "EXAMPLES", {"train": train, "test": test})
    labels_of, files, archive = BUILDERS[name].read.args
    folder = folder / archive.folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for label, (file, count) in labels_of.items():
        (folder / file).write_text("\n".join(f"{label}{i}" for i in range(count)) + "\n\n")
    content = {}
    for split, size in (("train", train), ("test", test)):
        images = rng.integers(0, 256, (size, 32, 32, 3)).astype(np.uint8)
        labels = {label: (rng.permutation(size) % n).astype(np.uint8) for label, (_, n) in labels_of.items()}
        records = np.concatenate(
            [*(values[:, None] for values in labels.values()), images.transpose(0, 3, 1, 2).reshape(size, -1)], 1
        )
        for file, part in zip(files[split], np.split(records, len(files[split])), strict=True):
            part.tofile(folder / file)
        content[split] = images, labels
    return content


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A folder with a small CIFAR-10, and its content."""
    return tmp_path / "original", write_cifar(tmp_path / "original", monkeypatch)


@pytest.fixture
def cifar100(tmp_path, monkeypatch):
    """A folder with a small CIFAR-100, and its content."""
    return tmp_path / "original", write_cifar(tmp_path / "original", monkeypatch, "cifar100", train=200)


def write_zip(path, members):
    """Writes a zip of {name: bytes or str}."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


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
