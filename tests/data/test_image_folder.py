"""Folders of one's own images: what is found, what is split, what is another data set, and what is wrong."""

import contextlib
import errno
import io
import os
import pathlib
import re
import shutil
import socket

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import jpeg, smooth_image
from PIL import Image

import input_pipeline
from simplest_vit.data import decode
from simplest_vit.data.builders import image_folder
from simplest_vit.data.builders.image_folder import image_files
from simplest_vit.data.decode import decode_image, eval_image, image_size
from simplest_vit.data.prepare import describe, prepare
from simplest_vit.errors import UserError
from simplest_vit.training.train import train
from simplest_vit.training.workdir import lock_workdir


def originals(prepared, split):
    """Returns {name: the file's bytes} of a split, by TFDS's own reader."""
    examples = prepared.builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    return {os.fsdecode(example["image/filename"]): example["image"] for example in examples}


def test_image_folder(photos, tmp_path, make_config):
    (photos / "train/cat/grey.jpg").write_bytes(jpeg(smooth_image(1), "L"))
    prepared = prepare("image_folder", tmp_path / "tfds", photos)
    found = originals(prepared, "train")
    assert prepared.info.features["label"].names == ["cat", "dog"]
    assert {name: (photos / name).read_bytes() for name in found} == found  # none is re-encoded
    assert len(found) == 10
    assert decode_image(found["train/dog/turned.jpeg"], 3).shape == (64, 48, 3)
    config = make_config("image_folder", dir=tmp_path / "tfds", manual_dir=str(photos), image_size=32, batch_size=4)
    dataset = input_pipeline.load(config.data)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.images.shape == (10, 32, 32, 3)
    with Image.open(photos / "train/cat/1.jpg") as image:
        expected = np.asarray(image.resize((42, 32), Image.Resampling.BILINEAR))[:, 5:37].astype(int)
    place = [*found].index("train/cat/1.jpg")
    assert np.abs(np.asarray(dataset.train.images)[place] - expected).max() <= 3


def test_the_preferred_validation_folder_is_val(photos, tmp_path):
    shutil.copytree(photos / "val", photos / "test")
    (photos / "test/cat/0.jpg").rename(photos / "test/cat/other.jpg")
    shutil.copytree(photos / "test", photos / "valid")
    validation = originals(prepare("image_folder", tmp_path / "tfds", photos), "validation")
    assert sorted(validation) == ["val/cat/0.jpg", "val/dog/0.jpg"]
    shutil.rmtree(photos / "val")
    assert "valid/cat/other.jpg" in originals(prepare("image_folder", tmp_path / "tfds", photos), "validation")


def test_a_flat_folder_is_split_80_to_20_in_each_class_and_says_so(tmp_path, make_config, caplog):
    for name, count in (("bee", 2), ("cat", 10), ("dog", 7), ("eel", 1)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "photos" / name / f"{i}.jpg").write_bytes(jpeg(smooth_image(i, 16, 16)))
    config = make_config("image_folder", dir=tmp_path / "tfds", manual_dir=str(tmp_path / "photos"), image_size=16)
    with caplog.at_level("INFO"):
        dataset = input_pipeline.load(config.data)
    np.testing.assert_array_equal(np.bincount(dataset.train.labels), [1, 8, 6, 1])
    np.testing.assert_array_equal(np.bincount(dataset.validation.labels), [1, 2, 1])
    assert "80 % of each class for training, 20 % for validation" in dataset.info.to_json()["description"]
    assert len(set(np.asarray(dataset.train.labels[:8]))) > 1, "the classes are mixed"
    assert caplog.text.count("for training, 20 % for validation") == 1
    assert "label: 4 classes: bee, cat, dog, eel" in caplog.text
    config.seed = 5  # has no part in it
    prepared = prepare("image_folder", tmp_path / "tfds", tmp_path / "photos")
    assert "for training, 20 % for validation" in describe(prepared)
    before = set(originals(prepared, "validation"))
    (tmp_path / "photos/cat/new.jpg").write_bytes(jpeg(smooth_image(50, 16, 16)))
    after = set(originals(prepare("image_folder", tmp_path / "tfds", tmp_path / "photos"), "validation"))
    assert len(before - after) <= 1  # a new file moves at most one of the others
    for name in ("bee", "cat", "dog"):
        shutil.rmtree(tmp_path / "photos" / name)
    with pytest.raises(UserError, match=r"no class has a second image, which validation needs; add images, or"):
        input_pipeline.load(config.data)
    config.data.validation_split = "all"  # as `evaluate --image_folder` sets it
    assert input_pipeline.load(config.data, only_validation=True).validation_size == 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["Train", "Test"], "Test and Train"),
        (["training", "validation", "meta"], ": training and validation"),
        (["val"], "val"),
        (["val", "cat", "dog"], "val"),
    ],
)
def test_splits_of_other_names_are_not_classes(photos, tmp_path, names, expected):
    """Before, the folders' names became the classes."""
    for name in names:
        shutil.copytree(photos / "train", tmp_path / "odd" / name)
    with pytest.raises(UserError, match=rf"{expected} are names of splits.* train/ and val/"):
        prepare("image_folder", tmp_path / "tfds", tmp_path / "odd")


def test_one_class_may_be_named_as_a_split(photos, tmp_path):
    for name in ("Train", "bus"):
        shutil.copytree(photos / "train/cat", tmp_path / "vehicles" / name)
    prepared = prepare("image_folder", tmp_path / "tfds", tmp_path / "vehicles")
    assert prepared.info.features["label"].names == ["Train", "bus"]


def test_a_class_named_train_is_not_taken_for_a_split_in_silence(photos, tmp_path, capfd):
    remedy = "train/ is the training split; if it is a class, rename it"
    for name in ("plane", "car"):
        shutil.copytree(photos / "train/cat", photos / name)
    prepared = prepare("image_folder", tmp_path / "tfds", photos)
    assert prepared.info.features["label"].names == ["cat", "dog"]
    assert capfd.readouterr().err.splitlines().count(f"folders beside train/ are not used, such as car/; {remedy}") == 1
    shutil.rmtree(photos / "train"), shutil.copytree(photos / "car", photos / "train")
    with pytest.raises(UserError, match=rf"no class folders in {photos}/train; expected CLASS/\*.jpg in it; {remedy}$"):
        prepare("image_folder", tmp_path / "tfds", photos)


def test_folders_within_a_class_are_searched_and_what_is_passed_over_is_counted(photos, tmp_path, capfd):
    deep = photos / "train/cat/more/and more"
    deep.mkdir(parents=True)
    (deep / "back").symlink_to(photos / "train/cat")  # without end
    for suffix in ("jpg", "jfif", "jpe", "JPG", "pgm", "avif"):
        Image.fromarray(smooth_image(1)).convert("L" if suffix == "pgm" else "RGB").save(deep / f"deep.{suffix}")
    for name in ("a.MOV", "b.mov", "c.txt", "README", ".hidden.jpg", "Thumbs.db"):
        (deep / name).write_bytes(b"x")
    os.mkfifo(deep / "pipe.jpg")  # reading it would wait forever
    with socket.socket(socket.AF_UNIX) as listening, contextlib.chdir(deep):  # a path of a socket has 107 bytes
        listening.bind("socket.png")
    for hidden in (deep / ".thumbnails", photos / "train/.thumbnails"):
        shutil.copytree(photos / "val", hidden)
    shutil.copytree(photos / "val", photos / "test")
    (photos / "loose.jpg").write_bytes(jpeg(smooth_image(1)))
    found = originals(prepare("image_folder", tmp_path / "tfds", photos), "train")
    assert len([name for name in found if name.startswith("train/cat/more/and more/deep.")]) == 6
    said = capfd.readouterr().err
    kinds = "1 .db, 2 .mov, 1 .txt, 3 images in no class folder, 2 pipes, sockets or devices, 1 without a suffix"
    assert f"skipped unused files: {kinds}\n" in said
    assert len(image_files(photos)) == 6 + 9 + 2 + 3  # as predict lists a folder


def test_a_changed_folder_is_another_data_set_with_another_fingerprint(photos, tmp_path, capfd):
    """Of the same counts, names and sizes: only the time of a change, or the content, tells."""

    def state():
        prepared = prepare("image_folder", tmp_path / "tfds", photos)
        return prepared.info.full_name, prepared.fingerprint, originals(prepared, "train")

    cat, dog = photos / "train/cat/0.jpg", photos / "train/dog/0.jpg"
    for path in (cat, dog):
        path.write_bytes(path.read_bytes().ljust(4000, b"\0"))
        os.utime(path, ns=(0, 0))
    states = [state()]
    assert state() == states[0]
    cat.rename(photos / "x"), dog.rename(cat), (photos / "x").rename(dog)  # equal names, sizes and times
    states.append(state())
    for name in ("cat", "dog"):
        (photos / "train" / name).rename(photos / "train" / f"{name}.")
    (photos / "train/cat.").rename(photos / "train/dog"), (photos / "train/dog.").rename(photos / "train/cat")
    states.append(state())
    (photos / "train/cat/9.jpg").write_bytes(jpeg(smooth_image(77)))
    states.append(state())
    for part in (0, 1):
        assert len({state[part] for state in states}) == 4
    assert states[3][2]["train/cat/9.jpg"] == jpeg(smooth_image(77))
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if "3 older prepared copies take" in line]
    named = line.split("rm -r ")[1].split()
    assert len(named) == 3
    assert all((pathlib.Path(path) / "3.0.0").is_dir() for path in named)


def test_a_finished_run_is_not_taken_for_one_on_other_photos(photos, tmp_path, make_config):
    moved, other = shutil.copytree(photos, tmp_path / "moved"), shutil.copytree(photos, tmp_path / "other")
    (other / "train/cat/9.jpg").write_bytes(jpeg(smooth_image(77)))
    configs = [make_config("image_folder", dir=tmp_path / "tfds", manual_dir=str(f)) for f in (photos, moved, other)]
    for config in configs:
        config.data.image_size, config.batch_size = 32, 8
    with lock_workdir(tmp_path / "run", configs[0].to_dict(), input_pipeline.load(configs[0].data).info):
        (tmp_path / "run" / "results.json").write_text('{"steps": 1}')
    for config in configs[:2]:
        assert train(config, str(tmp_path / "run")) == {"steps": 1}
    with pytest.raises(UserError, match=r"was started with other data: their train_size was 9, now 10"):
        train(configs[2], str(tmp_path / "run"))


def test_a_copy_in_another_place_has_the_same_fingerprint(photos, tmp_path, monkeypatch):
    shutil.copytree(photos, tmp_path / "copy")
    first, second = (prepare("image_folder", tmp_path / "tfds", folder) for folder in (photos, tmp_path / "copy"))
    assert first.info.full_name != second.info.full_name
    assert first.fingerprint == second.fingerprint
    monkeypatch.chdir(photos)
    assert prepare("image_folder", tmp_path / "tfds", ".").folder == first.folder


def test_a_flat_folder_may_be_split_by_the_config(tmp_path, make_config):
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "photos" / name / f"{i}.jpg").write_bytes(jpeg(smooth_image(i, 16, 16)))
    folders = {"dir": tmp_path / "tfds", "manual_dir": str(tmp_path / "photos")}
    splits = {"train_split": "train[:75%]", "validation_split": "train[75%:]+validation"}
    dataset = input_pipeline.load(make_config("image_folder", **folders, **splits, image_size=16).data)
    assert (dataset.train_size, dataset.validation_size) == (24, 16)
    assert {*np.asarray(dataset.train.labels)} == {*np.asarray(dataset.validation.labels[:8])} == {0, 1}


def heic(pixels):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(pixels).save(buffer, "HEIF", quality=95, exif=exif.tobytes())
    return buffer.getvalue()


def test_heic_is_read_upright_and_without_its_extra_named_with_the_remedy(photos, tmp_path, monkeypatch, capfd):
    (photos / "train/cat/IMG_1.HEIC").write_bytes(content := heic(smooth_image(3)))
    (photos / "train/cat/IMG_2.heif").write_bytes(content)
    found = originals(prepare("image_folder", tmp_path / "tfds", photos), "train")
    assert found["train/cat/IMG_1.HEIC"] == found["train/cat/IMG_2.heif"] == content
    expected = np.rot90(smooth_image(3), -1).astype(int)
    for pixels in (decode_image(content, 3), eval_image(content, (48, 48, 3), 48)):
        middle = expected[(64 - len(pixels)) // 2 :][: len(pixels)]
        assert np.abs(pixels - middle).mean() < 4  # HEIC keeps colours at half the resolution
    assert image_size(content) == (64, 48)
    capfd.readouterr()
    monkeypatch.setattr(decode, "pillow_heif", None)
    monkeypatch.setattr(decode, "_FORMATS", tuple(f for f in decode._FORMATS if f != "HEIF"))
    monkeypatch.setattr(image_folder, "SUFFIXES", (".jpg", ".jpeg", ".png", ".gif"))
    assert len(originals(prepare("image_folder", tmp_path / "other", photos), "train")) == 9
    remedy = 'HEIC photos need pip install "simplest-vit[heic]"'
    assert f"skipped unused files: 1 .heic, 1 .heif; {remedy}\n" in capfd.readouterr().err
    for read in (lambda: decode_image(content, 3), lambda: image_size(content)):
        with pytest.raises(UserError, match=re.escape(f"({remedy})")):
            read()


def test_bad_image_folders_are_told(photos, tmp_path, capfd):
    def fails(message):
        with pytest.raises(UserError, match=message) as error:
            prepare("image_folder", tmp_path / "tfds", photos)
        assert "\n" not in str(error.value)

    (photos / "val/bird").mkdir()
    (photos / "val/bird/1.cr2").touch()
    fails(r"val/bird: a class folder without images.* or move it away$")  # it may be a run, or photos of another kind
    assert "skipped unused files: 1 .cr2" in capfd.readouterr().err
    shutil.copy(photos / "train/cat/0.jpg", photos / "val/bird")
    fails(r"val/bird: no such class in .*train; add")
    shutil.rmtree(photos / "val/bird")
    for name, content in (("a.jpg", b"no image"), ("b.jpg", jpeg(smooth_image(1))[:-30])):
        (photos / "train/dog" / name).write_bytes(content)
    fails(rf"unreadable images, listed above: 2; repair them, move.* --skip_corrupt .* --data_dir={tmp_path}/tfds$")
    errors = capfd.readouterr().err
    assert "unreadable image train/dog/a.jpg: not a complete image (unknown format)" in errors
    assert "unreadable image train/dog/b.jpg: not a complete image (the JPEG is truncated)" in errors
    shutil.rmtree(photos / "val")
    fails(r"no class folders in .*val; expected CLASS/\*.jpg in it")


def test_odd_things_in_an_image_folder(photos, tmp_path, capfd):
    """Each is listed, and may be skipped; nothing but images is looked at."""
    cat = photos / "train/cat"
    (cat / "._0.jpg").write_bytes(b"macOS's own")
    (cat / "link.jpg").symlink_to(photos / "nowhere.jpg")
    (cat / "loop.jpg").symlink_to(cat / "loop.jpg")
    (cat / "folder.jpg").mkdir()
    Image.fromarray(smooth_image(8)).save(cat / "plain.ppm")
    latin = os.fsencode(cat) + b"/caf\xe9.jpg"
    pathlib.Path(os.fsdecode(latin)).write_bytes(jpeg(smooth_image(3)))
    with pytest.raises(UserError, match=r"^unreadable images, listed above: 2;"):
        prepare("image_folder", tmp_path / "tfds", photos)
    told = capfd.readouterr().err
    assert "unreadable image train/cat/link.jpg: No such file or directory" in told
    assert "unreadable image train/cat/loop.jpg: " in told
    found = originals(prepare("image_folder", tmp_path / "tfds", photos, skip_corrupt=True), "train")
    names = sorted(name.removeprefix("train/cat/") for name in found if "cat" in name)
    assert names == ["0.jpg", "1.jpg", "2.jpg", "caf\udce9.jpg", "palette.gif", "palette.png", "plain.ppm"]


@pytest.mark.parametrize("name", [b"cat ", b" cat", b"cat\ndog", b"caf\xe9", b"\x1b[31m", "a\u2028".encode()])
def test_a_class_name_that_cannot_be_kept_is_told(photos, tmp_path, name):
    for split in ("train", "val"):
        (photos / split / "cat").rename(os.fsdecode(os.fsencode(photos / split) + b"/" + name))
    with pytest.raises(UserError, match=r"train/.*: a class name that TFDS cannot store .*; rename") as error:
        prepare("image_folder", tmp_path / "tfds", photos)
    assert str(error.value).isprintable()
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize("name", ["a:b|c*", "line\nbreak", "Ünïcode dir"])
def test_a_folder_may_have_any_name(photos, tmp_path, name):
    builder = prepare("image_folder", tmp_path / "tfds", photos.rename(tmp_path / name))
    assert builder.info.splits["validation"].num_examples == 2


def test_a_class_folder_that_cannot_be_read_is_not_called_empty(photos, tmp_path, monkeypatch):
    def scandir(path):
        if os.fspath(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return original(path)

    original = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=rf"^{photos}/train/dog: cannot be read \(Permission denied\)"):
        prepare("image_folder", tmp_path / "tfds", photos)


def test_a_folder_that_holds_no_class_need_not_be_readable(photos, tmp_path, monkeypatch):
    def scandir(path):
        if os.fspath(path).endswith("lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return original(path)

    (photos / "lost+found").mkdir()
    original = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    assert prepare("image_folder", tmp_path / "tfds", photos).info.splits["validation"].num_examples == 2


def test_class_names_may_hold_joiners_and_hard_spaces(photos, tmp_path):
    name = "a\u200db\u200cc\u00a0d"
    for split in ("train", "val"):
        (photos / split / "cat").rename(photos / split / name)
    assert prepare("image_folder", tmp_path / "tfds", photos).info.features["label"].names == [name, "dog"]
