"""Every builder, from files in the original formats to what TFDS reads back, and what is wrong with bad files."""

import dataclasses
import errno
import functools
import hashlib
import http.client
import io
import os
import pathlib
import shutil
import tarfile
import urllib.error

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from conftest import jpeg, smooth_image, tar_of, write_cifar, write_zip
from PIL import Image

import input_pipeline
from simplest_vit.data.builders import BUILDERS, cifar, imagenet
from simplest_vit.data.builders.base import Archive
from simplest_vit.data.prepare import describe, prepare
from simplest_vit.errors import UserError


def read(builder, split, **decoders):
    return list(builder.builder.as_data_source(split, decoders=decoders or None))


def folders(path):
    """Returns what is in a data directory, but for the downloads."""
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


# CIFAR.


def test_cifar10_reads_back_as_written(cifar10, tmp_path):
    folder, content = cifar10
    builder = prepare("cifar10", tmp_path / "tfds", folder)
    assert builder.info.full_name == "cifar10/3.0.2"
    assert builder.info.features["label"].names == [f"label{i}" for i in range(10)]
    for split, (images, labels) in content.items():
        examples = read(builder, split)
        np.testing.assert_array_equal([e["image"] for e in examples], images)
        np.testing.assert_array_equal([e["label"] for e in examples], labels["label"])
        assert examples[3]["id"] == f"{split}_00003".encode()


def test_cifar100_has_fine_and_coarse_labels(cifar100, tmp_path, make_config):
    folder, content = cifar100
    config = make_config("cifar100", dir=tmp_path / "tfds", manual_dir=str(folder))
    fine = input_pipeline.load(config.data)
    config.data.label = "coarse_label"
    coarse = input_pipeline.load(config.data)
    assert (fine.num_classes, coarse.num_classes) == (100, 20)
    assert fine.std == (0.2675, 0.2565, 0.2761), "not CIFAR-10's"
    np.testing.assert_array_equal(fine.train.labels, content["train"][1]["label"])
    np.testing.assert_array_equal(coarse.train.labels, content["train"][1]["coarse_label"])
    np.testing.assert_array_equal(fine.validation.images, content["test"][0])


def test_features_equal_those_of_tfds(tmp_path, monkeypatch, tars):
    """TFDS's own builders describe the same features, so that data sets prepared by either are alike."""
    for name in ("cifar10", "cifar100", "imagenet"):
        originals = tars if name == "imagenet" else tmp_path / name
        if name != "imagenet":
            write_cifar(originals, monkeypatch, name)
        ours = prepare(name, tmp_path / "tfds", originals)
        ours = ours.builder
        theirs = tfds.builder_cls(ours.name)(data_dir=tmp_path)
        assert ours.info.features.keys() == theirs.info.features.keys()
        for key, feature in theirs.info.features.items():
            assert repr(ours.info.features[key]) == repr(feature)
        assert ours.version == theirs.version
        assert ours.info.full_name == theirs.info.full_name


def test_a_packed_archive_is_read_and_checked(cifar10, tmp_path, monkeypatch):
    folder, content = cifar10
    original = BUILDERS["cifar10"].archive
    packed = tmp_path / "packed"
    packed.mkdir()
    path = packed / original.file_name
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder / original.folder, original.folder)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()

    def expect(sha256):
        archive = dataclasses.replace(original, size=path.stat().st_size, sha256=sha256)
        read = functools.partial(cifar._read, *BUILDERS["cifar10"].read.args[:2], archive)
        monkeypatch.setitem(BUILDERS, "cifar10", dataclasses.replace(BUILDERS["cifar10"], read=read))

    expect(digest)
    images = [e["image"] for e in read(prepare("cifar10", tmp_path / "tfds", packed), "test")]
    np.testing.assert_array_equal(images, content["test"][0])

    expect("0" * 64)
    with pytest.raises(UserError, match=rf"{path}: SHA-256 {digest}, expected 0000"):
        prepare("cifar10", tmp_path / "other", packed)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"bytes, expected"):
        prepare("cifar10", tmp_path / "other", packed)
    assert folders(tmp_path / "other") == []


@pytest.mark.parametrize(
    ("error", "told"),
    [(urllib.error.URLError("no route to host"), "no route"), (http.client.BadStatusLine("<html>\r\n"), "<html>")],
)
def test_without_a_network_the_remedy_is_told(tmp_path, monkeypatch, error, told):
    def fail(*_):
        raise error

    monkeypatch.setattr("urllib.request.urlretrieve", fail)
    with pytest.raises(
        UserError, match=rf"cannot download .*cifar-10-binary.tar.gz .*{told}.*data.manual_dir"
    ) as caught:
        prepare("cifar10", tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_is_not_the_archive_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlretrieve", lambda url, path, _: path.write_bytes(b"<html>"))
    with pytest.raises(UserError, match=r"cannot download .* \(6 bytes, expected 170,052,171\)"):
        prepare("cifar10", tmp_path)
    assert folders(tmp_path) == []


def test_a_download_tells_how_far_it_is_where_results_are_not(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("simplest_vit.data.records._REPORT_EVERY", -1)
    content = np.random.default_rng(0).bytes(40_000_000)
    (tmp_path / "published.tar").write_bytes(content)
    archive = Archive(
        (tmp_path / "published.tar").as_uri(), len(content), hashlib.sha256(content).hexdigest(), "folder"
    )
    archive.download(tmp_path / "downloads")
    assert (tmp_path / "downloads/published.tar").read_bytes() == content
    assert folders(tmp_path / "downloads") == ["published.tar"]
    out, err = capfd.readouterr()
    first, *lines = err.splitlines()
    assert first == f"downloading {archive.url} (40 MB) to {tmp_path}/downloads/published.tar"
    assert lines[0].startswith("downloading published.tar: 0 MB, 0%, ")
    assert lines[len(lines) // 2].startswith("downloading published.tar: 20 MB, 50%, ")
    assert lines[-1].startswith("downloading published.tar: 40 MB, 100%, ")
    assert out == ""


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "test_batch.bin").unlink(), "neither cifar-10-binary.tar.gz nor"),
        (lambda f: (f / "data_batch_2.bin").unlink(), "data_batch_2.bin: missing"),
        (lambda f: (f / "data_batch_2.bin").write_bytes(b"short"), "data_batch_2.bin: 5 bytes, expected 24,584"),
        (
            lambda f: (f / "test_batch.bin").write_bytes(b"\xff" * 3073 * 16),
            "test_batch.bin: label 255 is not below 10",
        ),
        (lambda f: (f / "batches.meta.txt").write_text("cat\ndog\n"), "batches.meta.txt: 2 class names, expected 10"),
    ],
)
def test_damaged_cifar_is_told_and_nothing_is_left(cifar10, tmp_path, damage, message):
    folder, _ = cifar10
    damage(folder / "cifar-10-batches-bin")
    with pytest.raises(UserError, match=message) as error:
        prepare("cifar10", tmp_path / "tfds", folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "tfds").exists()


def test_a_missing_imagenet_leaves_nothing(tmp_path):
    for manual_dir in (tmp_path, None):
        (tmp_path / "other").touch()
        with pytest.raises(UserError, match=r"ILSVRC2012_img_train.tar: missing"):
            prepare("imagenet", tmp_path / "new/tfds", manual_dir)
    assert os.listdir(tmp_path) == ["other"]


def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    class Writer(ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device; writing x; at byte 303104")  # as it says

    monkeypatch.setattr("array_record.python.array_record_module.ArrayRecordWriter", Writer)
    with pytest.raises(UserError, match=r"cannot prepare digits there \(No space left on device\); free some space"):
        prepare("digits", tmp_path)
    assert folders(tmp_path) == []


def test_what_a_killed_process_left_is_removed(tmp_path):
    left = tmp_path / "digits/1.0.0.unfinished0123"
    left.mkdir(parents=True)
    (left / "digits-train.array_record-00000-of-00001").write_bytes(b"half")
    builder = prepare("digits", tmp_path)
    assert os.listdir(tmp_path / "digits") == ["1.0.0"]
    assert len(read(builder, "train")) == 1437


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.dir=.*file: cannot prepare digits there"):
        prepare("digits", tmp_path / "file")


def test_a_set_prepared_as_tfrecord_says_how_to_convert(tmp_path, make_config):
    builder = prepare("digits", tmp_path)
    for path in builder.folder.glob("*.array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    info = builder.folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"prepared as tfrecord, expected array_record.*tfds convert_format"):
        input_pipeline.load(make_config("digits", dir=tmp_path).data)


def test_describe_names_splits_classes_and_checksums(tmp_path):
    prepared = prepare("digits", tmp_path)
    pixels = np.stack([example["image"] for example in read(prepared, "train")]) / 255
    assert (round(pixels.mean(), 4), round(pixels.std(), 4)) == (0.3058, 0.3761)
    text = describe(prepared)
    assert "train: 1,437 examples" in text
    assert "label: 10 classes: 0, 1, 2" in text
    assert "mean (0.3058,), deviation (0.3761,)" in text
    path = tmp_path / "digits/1.0.0/digits-train.array_record-00000-of-00001"
    assert f"sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in text


def test_what_is_prepared_needs_its_originals_no_more(cifar10, tmp_path):
    folder, content = cifar10
    prepare("cifar10", tmp_path / "tfds", folder)
    shutil.rmtree(folder)
    images = [example["image"] for example in read(prepare("cifar10", tmp_path / "tfds", folder), "test")]
    np.testing.assert_array_equal(images, content["test"][0])
    with pytest.raises(UserError, match=r"data.manual_dir=.*: no such folder"):
        prepare("cifar10", tmp_path / "other", folder)


# TinyImageNet.


@pytest.fixture
def tiny_imagenet():
    """The members of a small TinyImageNet zip."""
    wnids = [f"n{i:08d}" for i in range(200)]
    members = {"tiny-imagenet-200/wnids.txt": "\n".join(wnids)}
    for i, wnid in enumerate(wnids):
        mode = "L" if i == 7 else "RGB"
        members[f"tiny-imagenet-200/train/{wnid}/images/{wnid}_0.JPEG"] = jpeg(smooth_image(i, 64, 64), mode)
    lines = []
    for i in range(10):
        members[f"tiny-imagenet-200/val/images/val_{i}.JPEG"] = jpeg(smooth_image(1000 + i, 64, 64))
        lines.append(f"val_{i}.JPEG\t{wnids[19 * i]}\t0\t0\t63\t63\n")
    members["tiny-imagenet-200/val/val_annotations.txt"] = "".join(lines)
    return members


def test_tiny_imagenet(tiny_imagenet, tmp_path):
    write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_imagenet)
    builder = prepare("tiny_imagenet", tmp_path / "tfds", tmp_path)
    skip = tfds.decode.SkipDecoding()
    train = read(builder, "train", image=skip)
    assert [e["label"] for e in train] == list(range(200))
    assert train[3]["image"] == tiny_imagenet["tiny-imagenet-200/train/n00000003/images/n00000003_0.JPEG"]
    grey = read(builder, "train")[7]["image"]
    assert grey.shape == (64, 64, 3)
    assert np.all(grey == grey[..., :1])
    validation = read(builder, "validation", image=skip)
    assert [e["id"] for e in validation] == [f"val_{i}.JPEG".encode() for i in range(10)]
    assert [e["label"] for e in validation] == [19 * i for i in range(10)]


@pytest.mark.parametrize(
    ("member", "change", "message"),
    [
        (
            "val/val_annotations.txt",
            lambda t: t.split("\n", 1)[1],
            r"9 lines for 10 images in val/images; .*val_0.JPEG: ''",
        ),
        (
            "val/val_annotations.txt",
            lambda t: t.replace("n00000019", "n99999999"),
            r"class of .*val_1.JPEG: 'n99999999'",
        ),
        ("val/val_annotations.txt", None, r"val_annotations.txt: missing"),
        ("wnids.txt", lambda t: t[:-10], r"199 classes, expected 200"),
        ("train/n00000005/images/n00000005_0.JPEG", None, r"no images in train/n00000005/images"),
        ("train/n00000005/images/n00000005_0.JPEG", lambda c: c[:-40], r"unreadable images, listed above: 1;"),
    ],
)
def test_damaged_tiny_imagenet_is_told(tiny_imagenet, tmp_path, member, change, message, capfd):
    content = tiny_imagenet.pop(f"tiny-imagenet-200/{member}")
    if change is not None:
        tiny_imagenet[f"tiny-imagenet-200/{member}"] = change(content)
    path = tmp_path / "tiny-imagenet-200.zip"
    write_zip(path, tiny_imagenet)
    with pytest.raises(UserError, match=message) as error:
        prepare("tiny_imagenet", tmp_path / "tfds", tmp_path)
    assert "\n" not in str(error.value)
    assert folders(tmp_path / "tfds") == []
    if "unreadable" in message:
        assert (
            f"unreadable image {path}:tiny-imagenet-200/{member}: not a complete image (the JPEG is truncated)"
            in capfd.readouterr().err
        )
        builder = prepare("tiny_imagenet", tmp_path / "tfds", tmp_path, skip_corrupt=True)
        assert len(read(builder, "train")) == 199
        assert "skipped unreadable images, listed above: 1" in capfd.readouterr().err


def test_a_truncated_zip(tiny_imagenet, tmp_path):
    path = tmp_path / "tiny-imagenet-200.zip"
    write_zip(path, tiny_imagenet)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"tiny-imagenet-200.zip: not a complete zip"):
        prepare("tiny_imagenet", tmp_path / "tfds", tmp_path)


@pytest.mark.parametrize("skip_corrupt", [False, True])
def test_a_split_without_a_sound_image(photos, tiny_imagenet, tars, tmp_path, skip_corrupt):
    (photos / "val/cat/0.jpg").write_bytes(b"no image")
    (photos / "val/dog/0.jpg").write_bytes(b"no image")
    for member in tiny_imagenet:
        if "val/images" in member:
            tiny_imagenet[member] = b"no image"
    write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_imagenet)
    names = [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)]
    (tars / "ILSVRC2012_img_val.tar").write_bytes(tar_of(dict.fromkeys(names, b"no image")))
    for name, originals in (("image_folder", photos), ("tiny_imagenet", tmp_path), ("imagenet", tars)):
        message = r"^validation: all images are unreadable" if skip_corrupt else r"^unreadable images"
        with pytest.raises(UserError, match=message):
            prepare(name, tmp_path / "tfds", originals, skip_corrupt=skip_corrupt)
        assert not [path for path in folders(tmp_path / "tfds") if "dataset_info" in path]


def test_originals_that_cannot_be_read_are_not_blamed_on_data_dir(cifar10, tmp_path, monkeypatch):
    folder, _ = cifar10

    def read_bytes(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    with pytest.raises(UserError, match=rf"^{folder}/.*/test_batch.bin: cannot be read \(Permission denied\)"):
        prepare("cifar10", tmp_path / "tfds", folder)


def test_preparing_tells_how_far_it_is(tiny_imagenet, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("simplest_vit.data.records._REPORT_EVERY", -1)
    write_zip(tmp_path / "tiny-imagenet-200.zip", tiny_imagenet)
    prepare("tiny_imagenet", tmp_path / "tfds", tmp_path)
    out, err = capfd.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("preparing train: ")]
    assert len(lines) == 200
    assert lines[-1].startswith("preparing train: 200 images, 100%, ")
    assert out == ""  # which is for results


# ImageNet.

WNIDS = ("n01440764", "n01443537", "n15075141")


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """A folder with ImageNet's two tars, of three classes and three validation images; one is CMYK, one a PNG."""
    png = io.BytesIO()
    Image.fromarray(smooth_image(99)).save(png, "PNG")
    train = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": jpeg(smooth_image(10 * k + i)) for i in range(4)})
        for k, wnid in enumerate(WNIDS[:2])
    }
    odd = {"n15075141_1.JPEG": jpeg(smooth_image(50), "CMYK"), "n15075141_2.JPEG": png.getvalue()}
    train[f"{WNIDS[2]}.tar"] = tar_of(odd)
    validation = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(smooth_image(100 + i)) for i in (3, 1, 2)}
    monkeypatch.setattr(imagenet, "CLASSES", 3)
    monkeypatch.setattr(imagenet, "VALIDATION", 3)
    folder = tmp_path / "tars"
    folder.mkdir()
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(train))
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(validation))
    return folder


def test_imagenet(tars, tmp_path):
    builder = prepare("imagenet", tmp_path / "tfds", tars)
    assert builder.info.full_name == "imagenet2012/5.1.0"
    assert prepare("imagenet2012", tmp_path / "tfds", tars).mean == builder.mean, "by TFDS's name as well"
    names = builder.info.features["label"].names
    train = read(builder, "train", image=tfds.decode.SkipDecoding())
    assert [names[e["label"]] for e in train] == [WNIDS[0]] * 4 + [WNIDS[1]] * 4 + [WNIDS[2]] * 2
    assert train[5]["image"] == jpeg(smooth_image(11))
    assert train[5]["file_name"] == b"n01443537_1.JPEG"
    for example, seed in zip(read(builder, "train")[8:], (50, 99), strict=True):
        assert np.abs(example["image"].astype(int) - smooth_image(seed)).mean() < 4
    validation = read(builder, "validation", image=tfds.decode.SkipDecoding())
    assert [e["file_name"][-6:] for e in validation] == [b"1.JPEG", b"2.JPEG", b"3.JPEG"]
    truth = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    assert [names[e["label"]] for e in validation] == truth[:3]
    again = tfds.builder_from_directory(builder.folder)  # as anyone would read it, without this project
    assert again.info.splits["train"].num_examples == 10


def test_imagenet_goes_on_where_it_stopped(tars, tmp_path, monkeypatch):
    written = []
    original = imagenet._examples_of_class

    def interrupted(path, member):
        written.append(member.name)
        if len(written) == 2:
            yield next(original(path, member))
            raise KeyboardInterrupt
        yield from original(path, member)

    monkeypatch.setattr(imagenet, "_examples_of_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare("imagenet", tmp_path / "tfds", tars)
    assert not (tmp_path / "tfds/imagenet2012/5.1.0").exists()
    builder = prepare("imagenet", tmp_path / "tfds", tars)
    assert written == ["n01440764.tar", "n01443537.tar", "n01443537.tar", "n15075141.tar"]
    assert len(read(builder, "train")) == 10
    assert not [name for name in folders(tmp_path / "tfds") if "partial" in name or "unfinished" in name]


def test_damaged_imagenet_is_told(tars, tmp_path, capfd):
    train, validation = tars / "ILSVRC2012_img_train.tar", tars / "ILSVRC2012_img_val.tar"
    good = validation.read_bytes()

    def fails(message):
        with pytest.raises(UserError, match=message):
            prepare("imagenet", tmp_path / "tfds", tars)
        assert not (tmp_path / "tfds/imagenet2012/5.1.0").exists()

    validation.unlink()
    fails(r"ILSVRC2012_img_val.tar: missing; download it")
    validation.write_bytes(good[:3000])
    fails(r"ILSVRC2012_img_val.tar: not a complete tar")
    validation.write_bytes(tar_of({"cat.JPEG": b""}))
    fails(r"holds 'cat.JPEG', expected ILSVRC2012_val_00000001.JPEG")
    validation.write_bytes(tar_of({"ILSVRC2012_val_00050001.JPEG": b""}))
    fails(r"holds 'ILSVRC2012_val_00050001.JPEG', expected")
    validation.write_bytes(good)
    bad = {f"ILSVRC2012_val_{i:08d}.JPEG": jpeg(smooth_image(100 + i))[: -50 if i > 1 else None] for i in (1, 2, 3)}
    validation.write_bytes(tar_of(bad))
    fails(r"unreadable images, listed above: 2;")
    assert "val_00000003.JPEG: not a complete image (the JPEG is truncated)" in capfd.readouterr().err
    builder = prepare("imagenet", tmp_path / "tfds", tars, skip_corrupt=True)
    assert len(read(builder, "validation")) == 1
    shutil.rmtree(tmp_path / "tfds")
    inner = tar_of({f"{WNIDS[0]}_1.JPEG": jpeg(smooth_image(1))})
    train.write_bytes(tar_of({f"{WNIDS[0]}.tar": inner[:700]} | {f"{wnid}.tar": inner for wnid in WNIDS[1:]}))
    fails(r"ILSVRC2012_img_train.tar:n01440764.tar: not a complete tar")
    train.write_bytes(tar_of({"images.tar": b""}))
    fails(r"holds 'images.tar', expected WNID.tar")
