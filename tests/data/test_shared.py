"""Preparing by several processes at once, on file systems where flock does not exclude; and what the killed leave."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorflow_datasets as tfds
from conftest import train_batches
from filelock import SoftFileLease
from PIL import Image
from sklearn.datasets import load_digits
from slow_prepare import start

import input_pipeline
from simplest_vit.data import dataset, prepare, records
from simplest_vit.data.builders import BUILDERS
from simplest_vit.data.builders.base import Content, Shard
from simplest_vit.errors import TrainingError, UserError


def begun(folder):
    return {int(path.suffix[1:]) for path in folder.glob("begun.*")}


def _all_have_spoken(folder, processes):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        files = [folder / f"said.{process.pid}" for process in processes]
        said = [file.read_text() if file.exists() else "" for file in files]
        if all(text.endswith("\n") for text in said) and begun(folder):
            return said
        time.sleep(0.05)
    pytest.fail(f"not all processes spoke: {said}")


def test_one_of_several_processes_prepares_and_the_others_wait(tmp_path):
    processes = [start(tmp_path) for _ in range(3)]
    said = _all_have_spoken(tmp_path, processes)
    (tmp_path / "go").touch()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 3, said
    (first,) = begun(tmp_path)
    for process, text in zip(processes, said, strict=True):
        assert ("preparing digits" in text) == (process.pid == first)
        waited = re.search(rf"^waiting for (process {first} of \S+|another process) to prepare ", text, re.MULTILINE)
        assert bool(waited) == (process.pid != first)
    assert os.listdir(tmp_path / "tfds/digits") == ["1.0.0"]


def test_what_a_killed_process_held_is_taken_over_at_once(tmp_path):
    process = start(tmp_path)
    while not begun(tmp_path):
        time.sleep(0.05)
        assert process.is_alive()
    process.kill()
    process.join()
    assert list((tmp_path / "tfds/digits").glob("1.0.0.unfinished*"))
    start_time = time.monotonic()
    assert prepare.prepare("digits", tmp_path / "tfds").info.splits["train"].num_examples == 1437
    assert time.monotonic() - start_time < 30
    assert os.listdir(tmp_path / "tfds/digits") == ["1.0.0"]


def test_a_process_of_another_host_is_waited_for_until_it_is_silent(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(prepare, "_LEASE", 3.0)
    (tmp_path / "digits").mkdir()
    program = (
        "import filelock._marker, filelock, sys, time\n"
        "filelock._marker.host_name = lambda: 'elsewhere'\n"
        "lease = filelock.SoftFileLease(sys.argv[1], lease_duration=3.0)\n"
        "lease.acquire(); print(flush=True); time.sleep(100)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "digits/.preparing")], stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        waiting = threading.Thread(target=prepare.prepare, args=("digits", tmp_path))
        waiting.start()
        time.sleep(4)
        assert not (tmp_path / "digits/1.0.0").exists()
        other.kill()
    waiting.join(60)
    assert f"waiting for process {other.pid} of elsewhere to prepare {tmp_path}/digits" in capfd.readouterr().err
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]


def test_a_process_that_stood_still_takes_what_another_has_prepared(tmp_path, monkeypatch):
    """Its lease is lost and its unfinished folder removed; it ends well all the same."""
    monkeypatch.setattr(prepare, "_LEASE", 0.6)
    digits, calls = BUILDERS["digits"], []

    def overtaken(shard):
        calls.append(shard)
        if len(calls) == 1:
            (tmp_path / "digits/.preparing").unlink()  # as one that takes over would
            (tmp_path / "other/go").touch()
            other = start(tmp_path / "other")
            other.join(60)
            assert other.exitcode == 0
            (unfinished,) = (tmp_path / "digits").glob("*.unfinished*")
            unfinished.rename(tmp_path / "removed")
            (tmp_path / "other/tfds/digits/1.0.0").rename(tmp_path / "digits/1.0.0")
            time.sleep(1)
        yield from shard.examples()

    def read(originals):
        content = digits.read(originals)
        (shard,) = content.splits["train"]
        splits = content.splits | {"train": [Shard(shard.size, lambda: overtaken(shard))]}
        return Content(content.features, splits)

    (tmp_path / "other").mkdir()
    monkeypatch.setitem(BUILDERS, "digits", dataclasses.replace(digits, read=read))
    assert prepare.prepare("digits", tmp_path).info.splits["train"].num_examples == 1437
    assert (tmp_path / "removed").is_dir()
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]


class Store:
    """The key-value store of JAX's coordinator, and who asked for what."""

    def __init__(self):
        self.values, self.asked = {}, 0

    def key_value_set(self, key, value):
        self.values[key] = value

    def blocking_key_value_get(self, key, timeout_ms):
        self.asked += 1
        if self.asked == 2:  # in the meantime
            self.values[key] = self.told
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
        return self.values[key]


@pytest.mark.parametrize("told", ["", "data.manual_dir=/nowhere: no such folder"])
def test_process_0_prepares_while_the_others_wait(tmp_path, make_config, monkeypatch, told):
    store, prepared = Store(), []
    store.told = json.dumps({"error": told, "exit_code": 2} if told else {"answer": None})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(ocp.multihost, "get_jax_distributed_client", lambda: store)
    original = prepare.prepare
    monkeypatch.setattr(dataset, "prepare", lambda *a: prepared.append(store.asked) or original(*a))
    data = make_config("digits", dir=tmp_path).data

    monkeypatch.setattr(jax, "process_index", lambda: 1)
    if told:
        with pytest.raises(UserError, match=f"^{told}$"):
            dataset._prepare_once(data)
        assert prepared == []
    else:
        dataset._prepare_once(data)
        assert prepared == [2]

    monkeypatch.setattr(jax, "process_index", lambda: 0)
    store.values.clear()
    dataset._prepare_once(data)
    assert list(store.values.values()) == ['{"answer": null}']
    data.name = "mnist"
    with pytest.raises(UserError, match="no such data set"):
        dataset._prepare_once(data)
    assert list(store.values.values())[1].startswith('{"error": "config.data.name=mnist: no such data set')
    assert len(store.values) == 2


@pytest.mark.parametrize(
    ("problem", "told"),
    [(MemoryError(), "MemoryError"), (RuntimeError("no\nluck"), "no"), (KeyboardInterrupt("stop"), "stop")],
)
def test_whatever_ends_process_0_is_told_to_the_others(tmp_path, make_config, monkeypatch, problem, told):
    def fail(*_):
        raise problem

    store = Store()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(ocp.multihost, "get_jax_distributed_client", lambda: store)
    monkeypatch.setattr(dataset, "prepare", fail)
    with pytest.raises(type(problem)):
        dataset._prepare_once(make_config("digits", dir=tmp_path).data)
    assert list(store.values.values()) == [json.dumps({"error": told, "exit_code": None})]


def test_one_that_waits_goes_on_if_the_other_fails_and_removes_the_folder(tmp_path, capfd):
    folder = tmp_path / "digits"
    folder.mkdir()
    lease = SoftFileLease(folder / ".preparing", lease_duration=60)
    lease.acquire()
    waiting = threading.Thread(target=prepare.prepare, args=("digits", tmp_path))
    waiting.start()
    while "waiting for process" not in capfd.readouterr().err:
        time.sleep(0.01)
    lease.release()
    folder.rmdir()
    waiting.join(60)
    assert os.listdir(folder) == ["1.0.0"]


# What is prepared there already may be damaged.


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    prepare.prepare("digits", folder)
    return folder


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[100_000:101_000] = bytes(1000)
    path.write_bytes(content)


TRAIN, VALIDATION = (f"digits-{split}.array_record-00000-of-00001" for split in ("train", "validation"))


def read_all(config):
    loaded = input_pipeline.load(config.data)
    batches = train_batches(loaded, config, start_step=0, sharding=None)
    for _ in range(input_pipeline.steps_per_epoch(loaded.train_size, config.batch_size)):
        next(batches)
    list(input_pipeline.eval_batches(loaded, batch_size=360, sharding=None))


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        (TRAIN, truncate, TRAIN),
        (TRAIN, flip, TRAIN),
        (TRAIN, lambda path: path.write_bytes(b""), TRAIN),
        (VALIDATION, truncate, VALIDATION),
        ("features.json", truncate, "features.json"),
        ("features.json", lambda path: path.write_text("{}"), "features.json"),
        ("features.json", lambda path: path.write_bytes(b"\xff\xfe\0"), "features.json"),
        ("dataset_info.json", truncate, "dataset_info.json"),
        ("dataset_info.json", lambda path: path.write_text(path.read_text().replace('"1437"', '"1438"')), TRAIN),
    ],
)
@pytest.mark.parametrize("budget", [10**9, 0])
def test_a_damaged_data_set_is_told_in_one_line_that_names_the_file(
    digits, tmp_path, make_config, file, damage, named, budget
):
    shutil.copytree(digits / "digits", tmp_path / "digits")
    prepared = tmp_path / "digits/1.0.0"
    damage(prepared / file)
    if damage is flip:  # what is on the device is decoded already
        budget = 0
    config = make_config("digits", dir=tmp_path, device_budget_bytes=budget, num_workers=0)
    with pytest.raises(UserError) as error:
        read_all(config)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{prepared / named}: damaged (")
    assert message.endswith(f"; restore it, or remove {prepared} to prepare it again")


def replace(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "file", "change", "message"),
    [
        # Of a newer version, or of the user's own builder.
        ("digits", "features.json", replace("image_feature.Image", "new.Image"), "new.Image.*use the version"),
        ("other", "features.json", replace("image_feature.Image", "new.Image"), "new.Image.*use the version"),
        ("other", "dataset_info.json", replace("{", '{"new": 1, '), '"new".*use the version'),
        ("digits", "features.json", pathlib.Path.unlink, "old TFDS version.*restore its metadata"),
        # Perhaps on a disk that is not mounted.
        ("digits", TRAIN, pathlib.Path.unlink, rf"{TRAIN}: cannot be read .No such file"),
        ("other", VALIDATION, pathlib.Path.unlink, rf"{VALIDATION}: cannot be read .No such file"),
    ],
)
def test_files_that_may_be_sound_are_kept(digits, tmp_path, make_config, name, file, change, message):
    prepared = tmp_path / name / "1.0.0"
    shutil.copytree(digits / "digits/1.0.0", prepared)
    change(prepared / file)
    with pytest.raises((UserError, TrainingError), match=message) as error:
        read_all(make_config(name, dir=tmp_path, device_budget_bytes=0, num_workers=0))
    assert "\n" not in str(error.value)
    assert "damaged" not in str(error.value)
    assert "remove" not in str(error.value)


@pytest.fixture(scope="module")
def digits_in_shards(tmp_path_factory):
    """Digits in files of about 2 kB of pixels, of which an image has 64 bytes."""
    folder = tmp_path_factory.mktemp("shards")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("simplest_vit.data.builders.base._SHARD_BYTES", 2000)
        prepare.prepare("digits", folder)
    return folder


def test_a_split_of_many_files_has_each_example_once_and_in_order(digits_in_shards):
    data = load_digits()
    of_validation = np.isin(np.arange(1797), np.argsort(data.target, kind="stable")[::5])
    prepared = tfds.builder_from_directory(digits_in_shards / "digits/1.0.0")
    for split, which in (("train", ~of_validation), ("validation", of_validation)):
        examples = list(prepared.as_data_source(split))
        expected = np.round(data.images[which] * 255 / 16)
        np.testing.assert_array_equal([example["image"][..., 0] for example in examples], expected)
        np.testing.assert_array_equal([example["label"] for example in examples], data.target[which])
        lengths = prepared.info.splits[split].shard_lengths
        assert len(lengths) == which.sum() * 64 // 2000 + 1
        assert {30, 31, 32} >= set(lengths[:-1])


@pytest.mark.parametrize("budget", [10**9, 0])
@pytest.mark.parametrize("number", [0, 1, 45])
def test_of_many_files_the_damaged_one_is_named(digits_in_shards, tmp_path, make_config, number, budget):
    shutil.copytree(digits_in_shards, tmp_path, dirs_exist_ok=True)
    file = tmp_path / f"digits/1.0.0/digits-train.array_record-{number:05d}-of-00046"
    truncate(file)
    config = make_config("digits", dir=tmp_path, device_budget_bytes=budget, num_workers=0)
    with pytest.raises(UserError, match=rf"^{file}: damaged \("):
        read_all(config)


def test_decoding_for_the_device_reports_progress_and_uses_all_cores(digits, make_config, monkeypatch, caplog):
    monkeypatch.setattr("simplest_vit.data.records._REPORT_EVERY", -1)
    monkeypatch.setattr(records, "cpu_count", lambda: 3)
    caplog.set_level("INFO", "simplest_vit")
    threads = set()
    original = dataset.eval_image

    def decode(*arguments):
        threads.add(threading.get_ident())
        time.sleep(1e-5)
        return original(*arguments)

    monkeypatch.setattr(dataset, "eval_image", decode)
    loaded = input_pipeline.load(make_config("digits", dir=digits, image_size=4).data)
    assert len(threads) >= 2
    lines = [record.getMessage() for record in caplog.records if "decoding" in record.getMessage()]
    assert len(lines) == 2 + 6
    lines = [line for line in lines if ", train:" in line]
    assert lines[0].startswith("decoding digits, train: 256 images, 18%, ")
    assert lines[5].startswith("decoding digits, train: 1,437 images, 100%, ")
    assert lines[5].endswith(" 0 s to go")
    images = [example["image"] for example in prepare.prepare("digits", digits).builder.as_data_source("train")]
    halved = [Image.fromarray(image[..., 0]).resize((4, 4), Image.Resampling.BILINEAR) for image in images]
    np.testing.assert_array_equal(loaded.train.images[..., 0], [np.asarray(image) for image in halved])


def test_progress_counts_items_and_foresees_the_end_by_their_sizes(monkeypatch):
    times, lines = iter([0.0, 4.0, 10.0, 12.0, 20.0]), []
    monkeypatch.setattr(records, "time", types.SimpleNamespace(monotonic=lambda: next(times)))
    work = records.Progress("preparing", 8000, lines.append)
    for count, size in ((10, 1000), (20, 1000), (30, 1000), (40, 3000)):  # a line when more than five seconds are over
        work.add(count, size)
    assert lines == [
        "preparing: 30 images, 25%, 3 images/s, 30 s to go",
        "preparing: 100 images, 75%, 5 images/s, 7 s to go",
    ]


def test_each_split_has_the_budget(digits, make_config, caplog):
    caplog.set_level("INFO", "simplest_vit")
    on_device, streamed = "0.09 MB on the device", "> data.device_budget_bytes="
    for budget, kinds, told in (
        (1437 * 64, (input_pipeline.InMemorySplit, input_pipeline.InMemorySplit), on_device),
        (1437 * 64 - 1, (input_pipeline.DiskSplit, input_pipeline.InMemorySplit), streamed),
        (360 * 64 - 1, (input_pipeline.DiskSplit, input_pipeline.DiskSplit), streamed),
    ):
        caplog.clear()
        loaded = input_pipeline.load(make_config("digits", dir=digits, device_budget_bytes=budget).data)
        assert (type(loaded.train), type(loaded.validation)) == kinds
        (line,) = (line for line in caplog.messages if line.startswith("digits, train: 1,437 images of 8x8x1, "))
        assert told in line
