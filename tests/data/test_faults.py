"""The system's errors are themselves: through preparing and reading, none is called damage, none costs data."""

import errno
import io
import os
import pathlib
import resource
import subprocess
import sys
import tarfile
import types

import numpy as np
import pytest
from array_record.python import array_record_module
from conftest import jpeg, smooth_image, tar_of, train_batches

import input_pipeline
from simplest_vit.data import prepare as prepare_module
from simplest_vit.data import records
from simplest_vit.data.builders import base, imagenet
from simplest_vit.data.prepare import prepare
from simplest_vit.errors import TrainingError, UserError

ERRORS = ("EMFILE", "ENOSPC", "EACCES", "ESTALE", "EIO")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Digits in 46 + 12 files."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(base, "_SHARD_BYTES", 2000)
        prepare("digits", folder)
    return folder


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def is_one_honest_line(message, number):
    reason = os.strerror(number)
    return reason in message and "\n" not in message and "damaged" not in message and "remove" not in message


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", ["open", "read"])
def test_reading(digits, make_config, monkeypatch, name, call):
    """array_record has errors of the system as texts only."""
    number = getattr(errno, name)
    text = f"{'open' if call == 'open' else 'pread'}() failed: {os.strerror(number)}; reading x"

    class Reader(array_record_module.ArrayRecordReader):
        def __init__(self, *args, **kwargs):
            if call == "open":
                raise RuntimeError(text)
            super().__init__(*args, **kwargs)

        def read(self, *_):
            raise RuntimeError(text)

    config = make_config("digits", dir=digits, device_budget_bytes=0, num_workers=0)
    dataset, before = input_pipeline.load(config.data), files(digits)
    monkeypatch.setattr(array_record_module, "ArrayRecordReader", Reader)
    with pytest.raises(TrainingError, match=r"array_record-000.*cannot be read .* then run the same command") as error:
        next(train_batches(dataset, config))
    assert is_one_honest_line(str(error.value), number)
    assert files(digits) == before


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("file", ["dataset_info.json", "features.json", "simplest_vit.npz"])
def test_reading_what_describes_a_set(digits, make_config, monkeypatch, name, file):
    number, opened, read_text = getattr(errno, name), io.open, pathlib.Path.open

    def fails(original):
        def wrapped(path, *args, **kwargs):
            if os.fspath(path).endswith(file):
                raise OSError(number, os.strerror(number), os.fspath(path))
            return original(path, *args, **kwargs)

        return wrapped

    before = files(digits)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fails(opened))
        patch.setattr(pathlib.Path, "open", fails(read_text))
        with pytest.raises((UserError, TrainingError), match=rf"{file}: cannot be read") as error:
            input_pipeline.load(make_config("digits", dir=digits).data)
    assert is_one_honest_line(str(error.value), number)
    assert files(digits) == before


@pytest.mark.parametrize("name", ERRORS)
def test_reading_the_originals(photos, tmp_path, monkeypatch, name):
    number, original = getattr(errno, name), pathlib.Path.read_bytes

    def read_bytes(path):
        if path.name == "1.jpg":
            raise OSError(number, os.strerror(number))  # of read(), without a name
        return original(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    with pytest.raises(UserError) as error:
        prepare("image_folder", tmp_path / "tfds", photos, skip_corrupt=name != "EACCES")
    if name == "EACCES":  # the fault of a file, which is listed with the others
        assert str(error.value).startswith("unreadable images, listed above: 2;")
    else:  # no image is skipped because a disk or a limit has failed
        assert str(error.value).startswith("train/cat/1.jpg: cannot be read (")
        assert is_one_honest_line(str(error.value), number)
    assert not list((tmp_path / "tfds").rglob("*.array_record*"))


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("call", ["open", "write", "close"])
def test_writing(tmp_path, monkeypatch, name, call):
    number = getattr(errno, name)
    error = RuntimeError(f"{call}() failed: {os.strerror(number)}; writing x; at byte 303104")

    class Writer(array_record_module.ArrayRecordWriter):
        def __init__(self, *args):
            if call == "open":
                raise error
            super().__init__(*args)

        def write(self, record):
            if call == "write":
                raise error
            super().write(record)

        def close(self):
            super().close()
            raise error

    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", Writer)
    with pytest.raises(UserError, match=r"^config.data.dir=.*: cannot prepare digits there") as caught:
        prepare("digits", tmp_path)
    assert is_one_honest_line(str(caught.value), number)
    assert files(tmp_path) == {}


def test_the_space_that_is_needed_is_checked_before(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=50_000))
    with pytest.raises(UserError, match=r"^config.data.dir=.*: digits takes 0.1 MB, 0.1 MB are free; free some"):
        prepare("digits", tmp_path)
    assert files(tmp_path) == {}


def test_a_set_of_many_files_under_a_low_limit_of_open_files(digits, server, tmp_path):
    """46 + 12 files: readers are closed."""
    program = tmp_path / "program.py"
    program.write_text(
        "import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (64,) * 2)\n"
        "import itertools, input_pipeline\n"
        "from simplest_vit.config import default\n"
        "data = default().data; data.dir = sys.argv[1]; data.device_budget_bytes = data.num_workers = 0\n"
        "dataset = input_pipeline.load(data)\n"
        "options = dict(batch_size=479, seed=0, start_step=0, sharding=None)\n"
        "batches = list(itertools.islice(input_pipeline.train_batches(dataset, data, **options), 3))\n"
        "print(sum(batch['label'].sum() for batch in batches))"
    )
    _, out, err = server.run([program, digits])
    assert out.strip() == "1437.0", err


def test_readers_that_are_dropped_are_closed(digits, make_config, monkeypatch):
    monkeypatch.setattr(records, "_max_open_files", lambda: 16)
    dataset = input_pipeline.load(make_config("digits", dir=digits, device_budget_bytes=0).data)
    before = len(os.listdir("/proc/self/fd"))
    examples = dataset.train.read(range(1437))
    assert len(os.listdir("/proc/self/fd")) <= before + 16 // 4
    labels = [example.labels[0] for example in examples]
    one_by_one = [dataset.train.read([i])[0].labels[0] for i in range(0, 1437, 100)]
    assert labels[::100] == one_by_one
    mixed = np.random.default_rng(0).permutation(1437)[:200].tolist()
    assert [example.labels[0] for example in dataset.train.read(mixed)] == [labels[i] for i in mixed]


def test_the_soft_limit_is_raised_as_far_as_the_hard_one(monkeypatch):
    limits = {}
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.update(now=both))
    for before, raised, found in (
        ((1024, 4096), (4096, 4096), 4096),
        ((1024, resource.RLIM_INFINITY), (8192, resource.RLIM_INFINITY), 8192),
        ((1024, 1024), None, 1024),
        ((100_000, 200_000), None, 8192),
    ):
        limits.clear()
        monkeypatch.setattr(resource, "getrlimit", lambda _, before=before: before)
        assert records._max_open_files.__wrapped__() == found
        assert limits.get("now") == raised


def test_preparing_twice_gives_the_same_bytes(photos, tmp_path):
    """In processes of their own, where the order of a map's entries is another one."""
    program = (
        "import sys; from simplest_vit.data.prepare import describe, prepare\n"
        "print(describe(prepare('image_folder', sys.argv[1], sys.argv[2])))"
    )
    root, sums = pathlib.Path(__file__).parents[2], set()
    for seed in ("1", "2"):
        command = [sys.executable, "-c", program, str(tmp_path / seed), str(photos)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=root, env=environment)
        sums.add(tuple(line for line in done.stdout.splitlines() if "sha256" in line))
    assert len(sums) == 1
    assert len(next(iter(sums))) == 2


# Tars.

WNIDS = ("n01440764", "n01443537")


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """Writes ImageNet's tars, of two classes and a validation image, given the inner tar of the first class."""
    monkeypatch.setattr(imagenet, "CLASSES", 2)
    monkeypatch.setattr(imagenet, "VALIDATION", 1)
    (tmp_path / "tars").mkdir()
    good = tar_of({"a.JPEG": jpeg(smooth_image(0, 16, 16))})
    validation = tar_of({"ILSVRC2012_val_00000001.JPEG": jpeg(smooth_image(1, 16, 16))})

    def write(inner=good, names=tuple(f"{wnid}.tar" for wnid in WNIDS), outer=None):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name, content in zip(names, (inner, *[good] * 9), strict=False):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        (tmp_path / "tars/ILSVRC2012_img_train.tar").write_bytes(buffer.getvalue() if outer is None else outer)
        (tmp_path / "tars/ILSVRC2012_img_val.tar").write_bytes(validation)
        return lambda **options: prepare("imagenet", tmp_path / "tfds", tmp_path / "tars", **options)

    return write


def with_header(content, at=0, **fields):
    """Returns a tar with fields of the header at a position changed, and its checksum right."""
    places = {"name": (0, 100), "size": (124, 12), "type": (156, 1)}
    header = bytearray(content[at : at + 512])
    for field, value in fields.items():
        start, length = places[field]
        header[start : start + length] = value.ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return content[:at] + bytes(header) + content[at + 512 :]


NEGATIVE = b"\xff" * 11 + b"\x00"  # -256 in base 256
ONE = tar_of({"a.JPEG": jpeg(smooth_image(0, 16, 16))})
TWO = tar_of({"a.JPEG": jpeg(smooth_image(0, 16, 16)), "b.JPEG": jpeg(smooth_image(1, 16, 16))})
SECOND = TWO.index(b"b.JPEG")


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (with_header(ONE, size=NEGATIVE), "n01440764.tar: not a complete tar"),
        (with_header(TWO, SECOND, size=NEGATIVE), "n01440764.tar: not a complete tar"),
        (with_header(TWO, SECOND, size=NEGATIVE, type=b"L"), "n01440764.tar: not a complete tar"),
        (with_header(TWO, SECOND, size=NEGATIVE, type=b"x"), "n01440764.tar: not a complete tar"),
        (with_header(TWO, SECOND, size=b"77777777777\0"), "n01440764.tar: not a complete tar"),
        (ONE[:700], "n01440764.tar: not a complete tar"),
        (b"", "n01440764.tar: not a complete tar"),
        (tar_of({}), "n01440764.tar: holds no image"),
    ],
)
def test_a_damaged_inner_tar_is_one_line(tars, inner, message):
    with pytest.raises(UserError, match=message) as error:
        tars(inner)()
    assert "\n" not in str(error.value)


def test_names_that_are_no_text_and_entries_that_are_no_files_are_taken_as_they_are(tars):
    folder = with_header(tar_of({"./": b""}), type=b"5")[:512]
    prepared = tars(folder + with_header(TWO, name=b"caf\xe9.JPEG"))()
    assert prepared.info.splits["train"].num_examples == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["n01440764.tar", "n01440764.tar"], "holds 'n01440764.tar', expected WNID.tar once"),
        (["n01440764.tar"], "1 classes, expected 2; download it again, or unpack it and prepare"),
        (["n01440764.tar", "n01443537"], "holds 'n01443537', expected WNID.tar"),
        (["n01440764.tar", "n01443537.tar", "caf\udce9.tar"], "holds 'caf.udce9.tar', expected"),
    ],
)
def test_a_tar_of_other_classes_is_refused(tars, names, message):
    with pytest.raises(UserError, match=message) as error:
        tars(names=names)()
    assert str(error.value).isprintable()


def test_missing_images_are_counted(tars, capfd):
    tars()()
    assert "train: 2 images; the published set has 1,281,167" in capfd.readouterr().err


def test_mutated_tars_are_an_error_of_one_line_or_read(tars, tmp_path):
    """Seeded; a loop without end, or memory without bound, would be noticed."""
    tars()
    path = tmp_path / "tars/ILSVRC2012_img_train.tar"
    whole = path.read_bytes()
    headers = [at for at in range(0, len(whole), 512) if whole[at + 257 : at + 262] == b"ustar"]
    rng, outcomes = np.random.default_rng(0), []
    for i in range(400):
        content, at = bytearray(whole), int(rng.choice(headers))
        for where in rng.integers(0, 512, rng.integers(1, 4)):
            content[at + where] = rng.integers(0, 256)
        content = with_header(bytes(content), at)  # else the checksum tells
        path.write_bytes(content[: rng.integers(0, len(content))] if i % 4 == 0 else content)
        try:
            shards = imagenet._train_shards(path, set(WNIDS))
            outcomes.append(len([example.image() for shard in shards for example in shard.examples()]))
        except UserError as error:
            outcomes.append(str(error))
    assert 2 in outcomes
    assert len({outcome for outcome in outcomes if isinstance(outcome, str)}) > 10
    assert not any("\n" in str(outcome) for outcome in outcomes)
