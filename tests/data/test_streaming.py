"""The pipeline for what does not fit the device: the same through one process or several, on one host or two."""

import dataclasses
import io
import itertools
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from conftest import jpeg, smooth_image, train_batches
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw

import input_pipeline
from simplest_vit.data import preview, streaming
from simplest_vit.data.builders import image_folder
from simplest_vit.data.records import cpu_count
from simplest_vit.errors import TrainingError, UserError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """An image folder: 4 classes, 10 training and 3 validation images each, of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    for k in range(4):
        for split, count in (("train", 10), ("val", 3)):
            (folder / split / f"class{k}").mkdir(parents=True)
            for i in range(count):
                content = jpeg(smooth_image(100 * k + i, 40 + 4 * i, 60 + k))
                (folder / split / f"class{k}" / f"{i}.jpg").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def config(make_config, photos, data_dir):
    return make_config(
        "image_folder", dir=data_dir, manual_dir=str(photos), image_size=32, random_resized_crop=True, flip=True,
        batch_size=8, num_workers=0,
    )  # fmt: skip


def take(dataset, config, count, start_step=0):
    batches = train_batches(dataset, config, start_step=start_step, sharding=None)
    return [jax.tree.map(np.asarray, next(batches)) for _ in range(count)]


def train_chunks(dataset, config):
    return streaming.train_chunks(dataset, config.data, batch_size=config.batch_size, seed=config.seed)


def grain_workers():
    return [process for process in multiprocessing.active_children() if process.name.startswith("grain")]


def test_batches_depend_on_seed_and_step_not_on_workers_and_a_lost_worker_is_told(config):
    dataset = input_pipeline.load(config.data)
    assert isinstance(dataset.train, input_pipeline.DiskSplit)
    in_process = take(dataset, config, 4)
    assert in_process[0]["image"].shape == (8, 32, 32, 3)
    jax.tree.map(np.testing.assert_array_equal, take(dataset, config, 2, start_step=2), in_process[2:])
    config.seed = 1
    assert not np.array_equal(take(dataset, config, 1)[0]["image"], in_process[0]["image"])
    config.seed = 0
    batches = train_batches(dataclasses.replace(dataset, num_workers=2), config, start_step=0, sharding=None)
    for expected in in_process:
        jax.tree.map(np.testing.assert_array_equal, next(batches), expected)
    first, second = grain_workers()
    for worker in (first, second):  # a run saves and ends them, also where a terminal sends SIGINT to all
        (blocked,) = re.findall(
            r"^SigBlk:\s(\w+)", pathlib.Path(f"/proc/{worker.pid}/status").read_text(), re.MULTILINE
        )
        assert {signal.SIGINT, signal.SIGTERM} <= {n for n in range(1, 65) if int(blocked, 16) >> (n - 1) & 1}
    assert not {signal.SIGINT, signal.SIGTERM} & signal.pthread_sigmask(signal.SIG_BLOCK, ())
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match=r"SIGKILL, .* memory runs out; lower config.data.num_workers") as error:
        list(itertools.islice(batches, 100))
    assert "\n" not in str(error.value)
    second.join(10)
    assert grain_workers() == []


def test_a_full_dev_shm_is_told():
    """Its pages are missing only when they are written: SIGBUS. (Tried with a mount of 8 MB.)"""
    with pytest.raises(TrainingError) as error:
        list(failing(RuntimeError("Worker process was terminated unexpectedly with exit code -7. Search")))
    expected = "/dev/shm is full; enlarge it (docker run --shm-size=1g) or set config.data.num_workers=0"
    assert expected in str(error.value)


@pytest.mark.parametrize("code", [1, -50])  # -50: a real-time signal, which has no name
def test_any_other_error_of_a_worker_is_raised_as_it_is(code):
    """And not as its own cause: who follows the causes would not come to an end."""
    other = RuntimeError(f"Worker process was terminated unexpectedly with exit code {code}. Search")
    with pytest.raises(RuntimeError) as error:
        list(failing(other))
    assert error.value is other
    assert other.__cause__ is None


def failing(error):
    """What is read where reading raises an error."""

    def chunks():
        raise error
        yield

    return streaming._read_batches(types.SimpleNamespace(to_iter_dataset=lambda options: chunks()), 1, 0)


def test_what_still_reads_when_the_program_ends_is_closed_before_multiprocessing_ends(config, monkeypatch):
    closers = []

    def register(close):
        closers.append(close)
        return close

    monkeypatch.setattr(streaming, "atexit", types.SimpleNamespace(register=register, unregister=closers.remove))
    batches = train_batches(input_pipeline.load(config.data), config, start_step=0, sharding=None)
    next(batches)
    (close,) = closers
    close()
    with pytest.raises(ValueError, match="closed"):
        list(itertools.islice(batches, 100))
    assert closers == []


def test_workers_do_not_outlive_a_run_that_is_killed(config):
    """Nor does their shared memory."""
    program = (
        "import multiprocessing, sys, time, input_pipeline\n"
        "from simplest_vit.config import default\n"
        "if __name__ == '__main__':\n"
        f"    data = default().data; data.update({config.data.to_dict() | {'num_workers': 1}!r})\n"
        "    dataset = input_pipeline.load(data)\n"
        "    options = dict(batch_size=8, seed=0, start_step=0, sharding=None)\n"
        "    batches = input_pipeline.train_batches(dataset, data, **options)\n"
        "    next(batches)\n"
        "    print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        worker = pathlib.Path("/proc") / run.stdout.readline().strip()
        assert worker.is_dir()
        run.kill()
    deadline = time.monotonic() + 20
    while worker.is_dir() and "zombie" not in (worker / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [(8, "max 100000", 8), (8, "250000 100000", 2), (8, "50000 100000", 1), (2, "800000 100000", 2), (3, None, 3)],
)
def test_cores_are_those_of_affinity_and_cgroup(monkeypatch, affinity, quota, expected):
    def read_text(path):
        assert str(path) == "/sys/fs/cgroup/cpu.max"
        if quota is None:
            raise FileNotFoundError
        return quota + "\n"

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
    monkeypatch.setattr(pathlib.Path, "read_text", read_text)
    assert cpu_count() == expected


@pytest.mark.parametrize(
    ("num_workers", "cores", "images", "expected"),
    [(None, 8, 10**6, 8), (None, 8, 9000, 4), (None, 8, 1999, 0), (None, 1, 10**6, 1), (3, 8, 10, 3), (0, 8, 10**6, 0)],
)
def test_workers_are_as_many_as_cores_but_none_without_work(monkeypatch, num_workers, cores, images, expected):
    monkeypatch.setattr(streaming, "cpu_count", lambda: cores)
    assert streaming._workers(num_workers, images) == expected
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert streaming._workers(num_workers, 2 * images) == expected


def test_each_example_of_each_step_and_seed_has_a_crop_of_its_own(config, tmp_path):
    """Of one image in all places, so that nothing but the crops can differ."""
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(8):
            (tmp_path / split / "cat" / f"{i}.jpg").write_bytes(jpeg(smooth_image(0, 64, 64)))
    config.data.manual_dir = str(tmp_path)
    dataset, crops = input_pipeline.load(config.data), {}
    for config.seed in (0, 1):
        chunks = train_chunks(dataset, config)
        crops |= {(config.seed, step): chunks[step]["image"] for step in range(3)}
        np.testing.assert_array_equal(
            crops[config.seed, 1],
            train_chunks(dataset, config)[1]["image"],
        )
    assert len({image.tobytes() for images in crops.values() for image in images}) == 2 * 3 * 8


def test_an_epoch_is_the_permutation_that_the_device_would_draw(config):
    """Without random crops, the streamed batches equal those of the same set on the device."""
    config.data.random_resized_crop = False
    config.data.crop_padding = 2
    on_device = take(input_pipeline.load(config.data), config, 7)
    config.data.device_budget_bytes = 1000
    dataset = input_pipeline.load(config.data)
    assert isinstance(dataset.train, input_pipeline.DiskSplit)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), take(dataset, config, 7), on_device)


@pytest.mark.parametrize(("budget", "num_workers"), [(10**9, 0), (0, 0), (0, 1)])
def test_evaluation_covers_each_example_once(config, photos, budget, num_workers):
    config.data.device_budget_bytes, config.data.num_workers = budget, num_workers
    dataset = input_pipeline.load(config.data)
    batches = list(input_pipeline.eval_batches(dataset, batch_size=8, sharding=None))
    assert np.concatenate([b["weight"] for b in batches]).tolist() == [1.0] * 12 + [0.0] * 4
    labels = np.concatenate([b["label"].argmax(1) for b in batches])[:12]
    np.testing.assert_array_equal(np.sort(labels), np.repeat(np.arange(4), 3))
    with Image.open(photos / "val/class0/1.jpg") as image:  # 60 x 44; the shorter side becomes 37
        resized = image.resize((int(60 * 37 / 44), 37), Image.Resampling.BILINEAR)
    left, top = round((resized.width - 32) / 2), round((37 - 32) / 2)
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32)), np.float64)
    images = np.concatenate([b["image"] for b in batches])[:12][labels == 0]
    pixels = (images * dataset.std + dataset.mean) * 255
    # Two JPEG decoders, and the crop is taken before the resizing.
    assert np.sort(np.abs(pixels - expected).max(axis=(1, 2, 3)) < 4).tolist() == [False, False, True]
    deadline = time.monotonic() + 10
    while num_workers and "psm_" in pathlib.Path("/proc/self/maps").read_text():  # shared memory, freed by a thread
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("chunk", [2, 32])
@pytest.mark.parametrize(("split", "steps"), [("train", 6), ("validation", 2)])
def test_two_hosts_read_the_two_halves_of_the_batch_of_one(config, monkeypatch, split, steps, chunk):
    """Crops included, and into however many chunks a batch is cut."""
    config.data.device_budget_bytes = 0
    dataset = input_pipeline.load(config.data)

    def chunks():
        return train_chunks(dataset, config) if split == "train" else streaming.eval_chunks(dataset, config.batch_size)

    def batch(chunks, step, size):
        each = max(size // chunk, 1)
        parts = [chunks[k] for k in range(step * each, (step + 1) * each)]
        assert [len(part["label"]) for part in parts] == [size // each] * each
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    monkeypatch.setattr(streaming, "_MAX_CHUNK", chunk)
    whole, hosts = chunks(), []
    for process in range(2):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        hosts.append(chunks())
    for step in range(steps):
        halves = [batch(host, step, 4) for host in hosts]
        both = {name: np.concatenate([half[name] for half in halves]) for name in halves[0]}
        jax.tree.map(np.testing.assert_array_equal, both, batch(whole, step, 8))
    config.batch_size = 9
    with pytest.raises(UserError, match="batch_size=9: not divisible by the 2 hosts"):
        chunks()


def test_random_boxes_are_torchvisions():
    """Area and aspect ratio are distributed as stated; a box that cannot be had becomes the central one."""
    rng = np.random.default_rng(0)
    boxes = np.array([streaming._random_box(rng, 300, 400) for _ in range(4000)])
    left, top, width, height = boxes.T
    assert np.all((left >= 0) & (top >= 0) & (left + width <= 400) & (top + height <= 300))
    area, ratio = width * height / 120_000, width / height
    assert 0.079 < area.min() < 0.1
    assert 0.9 < area.max() <= 1
    assert 0.74 < ratio.min() < 0.78
    assert 1.29 < ratio.max() < 1.35
    assert abs(np.log(ratio).mean()) < 0.05
    assert abs(left[width < 200].mean() - ((400 - width[width < 200]) / 2).mean()) < 5
    assert streaming._random_box(rng, 10, 1000) == ((1000 - 13) // 2, 0, 13, 10)


def test_a_random_resized_crop_equals_pils_resize_of_its_box(monkeypatch):
    pixels = smooth_image(3, 200, 300)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    monkeypatch.setattr(streaming, "_random_box", lambda *_: (30, 20, 120, 150))
    result = streaming.random_resized_crop(buffer.getvalue(), np.random.default_rng(0), 64, 3)
    crop = Image.fromarray(pixels[20:170, 30:150]).resize((64, 64), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(result, crop)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_named_in_one_line(config, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(image_folder, "checked", lambda read: read)  # as in a set that somebody else has prepared
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        for i in range(8):
            content = jpeg(smooth_image(i, 64, 64))
            if split == "train" and i == 5:
                content = content.replace(b"\xff\xdb", b"\xff\xed")  # no quantization: only decoding tells
            (tmp_path / split / "cat" / f"{i}.jpg").write_bytes(content)
    config.data.manual_dir = str(tmp_path)
    config.data.num_workers = num_workers
    dataset = input_pipeline.load(config.data)
    with pytest.raises(UserError, match=r"5.jpg: not a complete image") as error:
        take(dataset, config, 1)
    assert "\n" not in str(error.value)


def test_the_preview_tells_the_heavier_class_first(config, monkeypatch):
    dataset, texts = input_pipeline.load(config.data), []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, position, text, colour, font: texts.append((position, text, colour))
    )
    label = np.array([[0, 0.304, 0.696, 0], [0, 0, 0.003, 0.997], [1, 0, 0, 0]], np.float32)
    preview.image_grid(dataset, {"image": np.zeros((3, 32, 32, 3), np.float32), "label": label}, rows=2, columns=2)
    assert texts == [
        ((2, 96), "70% class2", "black"),
        ((2, 106), "30% class1", "black"),
        ((102, 96), "class3", "black"),
        ((2, 118 + 96), "class0", "black"),
    ]


@pytest.mark.parametrize("name", ["Früchte", "кот", "γάτα", "mèo", "a\u200db"])
def test_the_preview_has_the_letters_of_a_name(name):
    charmap = FT2Font(preview.find_font(name).path).get_charmap()
    assert all(ord(letter) in charmap for letter in set(name) - {"\u200d"})


def test_the_preview_shows_the_images_of_the_batch(config):
    dataset = input_pipeline.load(config.data)
    (batch,) = take(dataset, config, 1)
    grid = preview.image_grid(dataset, batch, rows=2, columns=4)
    assert grid.shape == (2 * (96 + 22), 4 * (96 + 4), 3)
    pixels = (batch["image"][5] * np.array(dataset.std) + np.array(dataset.mean)) * 255
    tile = grid[118 : 118 + 96, 102 : 102 + 96]
    assert np.abs(tile[1::3, 1::3].astype(float) - pixels).max() <= 1
