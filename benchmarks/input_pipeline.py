"""Measure images/s of each stage of the input pipeline, and of a PIL pipeline in the same run.

python -m benchmarks.input_pipeline cifar10 --data_dir=/data/tfds
python -m benchmarks.input_pipeline imagenet --data_dir=/data/tfds --num_workers=2
python -m benchmarks.input_pipeline cifar10 --data_dir=/data/tfds --train_step_s=1.2 --batch_size=128

The peer is what the PyTorch reference does with each image, on all cores: decode, crop, flip, RandAugment in PIL,
then normalize and mixup in NumPy. It reads images that are already in memory. (PyTorch's DataLoader was faster here
than Grain.) `--train_step_s` (from benchmarks/train_step.py) gives the share of a step that the input takes.
"""

import argparse
import dataclasses
import functools
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, ImageEnhance, ImageOps

import input_pipeline
from benchmarks import speed
from simplest_vit import commands
from simplest_vit.config import default
from simplest_vit.data import streaming
from simplest_vit.data.decode import decode_image
from simplest_vit.errors import UserError

# Stages; each includes all previous ones.
STAGES = {
    "sampling, normalization": {},
    "+ crop, flip": {"flip": True},
    "+ RandAugment": {"rand_augment": {"num_ops": 2, "magnitude": 10}},
    "+ mixup": {"mixup_alpha": 0.2},
}


def rate(batches: Iterator[input_pipeline.Batch], batch_size: int, seconds: float) -> float:
    """Return images/s: the median over the batches of a few seconds, after two to warm up."""
    for _ in range(2):
        jax.block_until_ready(next(batches))
    times = []
    while sum(times) < seconds:
        start = time.perf_counter()
        jax.block_until_ready(next(batches))
        times.append(time.perf_counter() - start)
    # Streamed batches come in bursts, so take the mean; on the device all batches take equally long.
    return batch_size / (statistics.median(times) if len(times) > 20 else statistics.mean(times))


def alternate(stages: list[Callable[[], object]], images: int, seconds: float) -> np.ndarray:
    """Return images/s of each stage and round, [stages, rounds >= 5]; they alternate, after one round to warm up."""
    rounds: list[list[float]] = []
    begin = time.perf_counter()
    while len(rounds) < 6 or time.perf_counter() - begin < len(stages) * seconds:
        rounds.append([])
        for stage in stages:
            start = time.perf_counter()
            stage()
            rounds[-1].append(images / (time.perf_counter() - start))
    return np.array(rounds[1:]).T


def median(ratios: np.ndarray) -> str:
    """Return median and quartiles."""
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


# The peer.


def pil_operations(image: Image.Image, sign: int) -> list[Callable[[], Image.Image]]:
    """Return RandAugment's 14 operations of magnitude 10, as torchvision applies them to a PIL image."""
    affine = functools.partial(image.transform, image.size, Image.Transform.AFFINE)
    shift_x, shift_y = (int(sign * size * 50 / 331) for size in image.size)
    factor = 1 + 0.3 * sign
    return [
        lambda: image,
        lambda: affine((1, 0.1 * sign, 0, 0, 1, 0)),
        lambda: affine((1, 0, 0, 0.1 * sign, 1, 0)),
        lambda: affine((1, 0, shift_x, 0, 1, 0)),
        lambda: affine((1, 0, 0, 0, 1, shift_y)),
        lambda: image.rotate(10 * sign),
        lambda: ImageEnhance.Brightness(image).enhance(factor),
        lambda: ImageEnhance.Color(image).enhance(factor),
        lambda: ImageEnhance.Contrast(image).enhance(factor),
        lambda: ImageEnhance.Sharpness(image).enhance(factor),
        lambda: ImageOps.posterize(image, 7),
        lambda: ImageOps.solarize(image, 170),
        lambda: ImageOps.autocontrast(image),
        lambda: ImageOps.equalize(image),
    ]


def pil_example(
    content: bytes | np.ndarray, rng: np.random.Generator, size: int | None, augment: bool, mean: tuple, std: tuple
) -> np.ndarray:
    """Return one example as the reference makes it: a pad-4 crop of an array, or a random resized crop of a file."""
    if isinstance(content, bytes):
        with Image.open(io.BytesIO(content)) as file:
            image = file.convert("RGB")
        left, top, w, h = streaming._random_box(rng, image.height, image.width)
        image = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
    else:
        image = ImageOps.expand(Image.fromarray(content), 4)
        x, y = rng.integers(0, 9, 2)
        image = image.crop((x, y, x + content.shape[1], y + content.shape[0]))
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    if augment:
        for _ in range(2):
            image = pil_operations(image, rng.choice((-1, 1)))[rng.integers(14)]()
    pixels = np.asarray(image, np.float32) / 255
    return (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)


def mixed(x: np.ndarray, seed: int) -> np.ndarray:
    """Return a batch after mixup."""
    z = np.random.default_rng(seed).beta(0.2, 0.2)
    weight = np.float32(min(z, 1 - z))
    return (1 - weight) * x + weight * x[::-1]


def pil_batch(contents: list, seed: int, **options: object) -> np.ndarray:
    """Return a batch of all examples, after mixup."""
    rng = np.random.default_rng(seed)
    return mixed(np.stack([pil_example(content, rng, **options) for content in contents]), seed)


@dataclasses.dataclass(frozen=True)
class PilExamples:
    """Endless examples of a few images: the peer's data set."""

    contents: list
    options: dict

    def __len__(self) -> int:
        return 2**30

    def __getitem__(self, index: int) -> np.ndarray:
        rng = np.random.default_rng(index)
        return pil_example(self.contents[index % len(self.contents)], rng, **self.options)


def loaded_batches(contents: list, batch_size: int, **options: object) -> Iterator[np.ndarray]:
    """Return batches of the peer: made and stacked by PyTorch's DataLoader, with one worker process per core."""
    from torch.utils.data import DataLoader

    workers = os.cpu_count() or 1
    loader = DataLoader(
        PilExamples(contents, options), batch_size, num_workers=workers, multiprocessing_context="spawn"
    )
    return (mixed(batch.numpy(), seed) for seed, batch in enumerate(loader))


# Reports.


def config_of(arguments: argparse.Namespace, **data: object) -> ConfigDict:
    """Return `config.data` with everything off except what is given."""
    config = default().data
    fields = {"name": arguments.name, "dir": arguments.data_dir, "manual_dir": arguments.manual_dir}
    config.update({**fields, "num_workers": arguments.num_workers, "crop_padding": 0, "flip": False, **data})
    return config


def train_batches(dataset: input_pipeline.Dataset, data: ConfigDict, batch_size: int) -> Iterator[input_pipeline.Batch]:
    """Return the batches from the first one on, on one device."""
    return input_pipeline.train_batches(dataset, data, batch_size=batch_size, seed=0, start_step=0, sharding=None)


def report(arguments: argparse.Namespace, name: str, value: float, extra: str = "") -> None:
    """Print and record a line."""
    arguments.record.add("images/s", value, row=f"{arguments.name}: {name}")
    print(f"  {name:<44} {value:>10,.0f} images/s  {extra}", flush=True)


def benchmark_device(arguments: argparse.Namespace) -> None:
    """Measure a data set that is kept on the device."""
    start = time.perf_counter()
    dataset = input_pipeline.load(config_of(arguments))
    print(f"  loading {time.perf_counter() - start:.1f} s")
    options: dict = {}
    for stage, more in STAGES.items():
        options |= more
        padding = 4 if options else 0
        config = config_of(arguments, crop_padding=padding, **options)
        batches = train_batches(dataset, config, arguments.batch_size)
        ours = rate(batches, arguments.batch_size, arguments.seconds)
        report(arguments, stage, ours, f"{1e3 * arguments.batch_size / ours:.2f} ms a batch")
    if dataset.image_shape[2] == 3:
        images = list(np.asarray(dataset.train.images[:256]))
        options = {"size": None, "augment": True, "mean": dataset.mean, "std": dataset.std}
        try:
            batches = loaded_batches(images, arguments.batch_size, **options)
            peer = rate(batches, arguments.batch_size, 2 * arguments.seconds)
            name = f"peer: PIL and NumPy by DataLoader, {os.cpu_count()} workers"
            report(arguments, name, peer, f"ours is {ours / peer:.1f} times as fast")
        except ImportError:
            print("  without the peer, PyTorch's DataLoader, because PyTorch is missing")
    if arguments.train_step_s:
        share = arguments.batch_size / ours / arguments.train_step_s
        print(f"  share of a training step of {arguments.train_step_s:.3f} s: {share:.1%}")


def benchmark_host(arguments: argparse.Namespace) -> None:
    """Measure a data set that is streamed from disk: each stage on one core, then the whole pipeline."""
    config = config_of(arguments, flip=True, random_resized_crop=True, image_size=224)
    dataset = input_pipeline.load(config)
    cores = os.cpu_count() or 1
    chunks = streaming.train_chunks(dataset, config, batch_size=200, seed=0)
    contents = [content for content, _, _ in dataset.train.read(list(range(200)))]
    options = {"size": 224, "augment": False, "mean": dataset.mean, "std": dataset.std}
    stages = {
        "bare JPEG decoding, one core": lambda: [decode_image(content, 3) for content in contents],
        "read, decode, random resized crop, one core": lambda: [chunks[k] for k in range(len(streaming._rows(200)))],
        "peer: PIL and NumPy, one core": lambda: pil_batch(contents, 0, **options),
    }
    bare, ours, peer = rates = alternate(list(stages.values()), 200, arguments.seconds)
    extras = ("", f"{median(ours / bare)} of bare decoding", f"ours is {median(ours / peer)} times as fast")
    for name, rounds, extra in zip(stages, rates, extras, strict=True):
        report(arguments, name, float(np.median(rounds)), extra)
    batches = train_batches(dataset, config, arguments.batch_size)
    whole = rate(batches, arguments.batch_size, arguments.seconds)
    report(arguments, f"whole pipeline, {arguments.num_workers} workers, {cores} cores", whole)
    if arguments.train_step_s:
        share = max(0.0, arguments.batch_size / whole / arguments.train_step_s - 1)
        print(f"  waiting beyond a training step of {arguments.train_step_s:.3f} s: {share:.1%}")


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="data set, as in data.name")
    parser.add_argument("--data_dir")
    parser.add_argument("--manual_dir")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of each measurement")
    parser.add_argument("--train_step_s", type=float, help="time of a training step of this batch size")
    parser.add_argument("--record", help=speed.HELP)
    try:
        arguments = parser.parse_args()
        arguments.record = speed.Recorder(arguments.record)
        print(f"{arguments.name}, batch {arguments.batch_size}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores")
        (benchmark_host if arguments.name == "imagenet" else benchmark_device)(arguments)
        arguments.record.write()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    commands.restart()
    main()
