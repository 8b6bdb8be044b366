"""Sets that TFDS has prepared, by their name; splits in its syntax; what is measured once and kept."""

import itertools
import json
import os
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from conftest import jpeg, smooth_image, train_batches

import input_pipeline
from simplest_vit.data import prepared as prepared_module
from simplest_vit.data.dataset import image_shape
from simplest_vit.data.decode import encode_png
from simplest_vit.data.prepare import prepare
from simplest_vit.errors import UserError
from simplest_vit.training.evaluate import evaluate
from simplest_vit.training.workdir import lock_workdir, read_run


def write_set(data_dir, name, features, splits):
    """Writes a set as TFDS does, by TFDS's own classes; splits are {name: examples}."""
    folder = data_dir / name / "1.0.0"
    folder.mkdir(parents=True, exist_ok=True)
    features = tfds.features.FeaturesDict(features)
    template = tfds.core.ShardedFileTemplate(folder, dataset_name=name.split("/")[0], filetype_suffix="array_record")
    infos = []
    for split, examples in splits.items():
        file = folder / f"{name.split('/')[0]}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for example in examples:
            writer.write(features.serialize_example(features.encode_example(example)))
        writer.close()
        infos.append(tfds.core.SplitInfo(split, [len(examples)], file.stat().st_size, template.replace(split=split)))
    identity = tfds.core.DatasetIdentity(
        name=name.split("/")[0], version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=identity, description="Shapes.\nMore.", features=features)
    info.set_file_format("array_record")
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(folder)
    return folder


RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (60, 12, 10, 3)).astype(np.uint8)
PNGS = [encode_png(pixels) for pixels in PIXELS]
IMAGE, TWO = tfds.features.Image(), tfds.features.ClassLabel(num_classes=2)
NAMES = ["round", "square", "starry"]


def shapes(data_dir):
    """Writes a set of an image, two class labels and things that are of no use; of one size."""
    features = {
        "picture": tfds.features.Image(shape=(12, 10, 3)),
        "label": tfds.features.ClassLabel(names=NAMES),
        "shade": tfds.features.ClassLabel(names=["red", "blue"]),
        "box": tfds.features.BBoxFeature(),
        "words": tfds.features.Sequence(tfds.features.Text()),
    }
    examples = [
        {
            "picture": PNGS[i],
            "label": i % 3,
            "shade": i // 30,
            "box": tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
            "words": ["a"] * (i % 3),
        }
        for i in range(60)
    ]
    return write_set(data_dir, "shapes", features, {"train": examples[:45], "test": examples[45:]})


def test_any_set_that_tfds_has_prepared_is_found_by_its_name(tmp_path, make_config):
    folder = shapes(tmp_path)
    config = make_config("shapes", dir=tmp_path, batch_size=15)
    assert image_shape(config.data) == (10, 10, 3)
    dataset = input_pipeline.load(config.data)
    assert (dataset.train_size, dataset.validation_size, dataset.class_names) == (45, 15, tuple(NAMES))
    assert (dataset.image_shape, dataset.description, dataset.version) == ((10, 10, 3), "Shapes.", "1.0.0")
    pixels = PIXELS[:45].reshape(-1, 3) / 255
    np.testing.assert_allclose([dataset.mean, dataset.std], [pixels.mean(0), pixels.std(0)], atol=6e-5)
    np.testing.assert_array_equal(dataset.train.images, PIXELS[:45, 1:11])
    np.testing.assert_array_equal(dataset.validation.labels, np.arange(45, 60) % 3)
    config.data.label, config.data.train_split = "shade", "train[20:40]"
    other = input_pipeline.load(config.data)
    assert other.class_names == ("red", "blue")
    np.testing.assert_array_equal(other.train.labels, np.arange(20, 40) // 30)
    config.data.device_budget_bytes = 0
    config.data.num_workers = 0
    streamed = input_pipeline.load(config.data)
    assert isinstance(streamed.train, input_pipeline.DiskSplit)
    config.batch_size = 10
    for ours, theirs in zip(*(itertools.islice(train_batches(d, config), 3) for d in (streamed, other)), strict=True):
        np.testing.assert_allclose(ours["image"], theirs["image"], atol=1e-6)
        np.testing.assert_array_equal(ours["label"], theirs["label"])
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def test_images_of_many_sizes_are_measured_and_cropped_to_224(tmp_path, make_config):
    features = {
        "image": IMAGE,
        "mask": IMAGE,
        "kind": TWO,
    }
    contents = [jpeg(smooth_image(i, 80 + i, 90)) for i in range(6)]
    examples = [{"image": content, "mask": contents[0], "kind": i % 2} for i, content in enumerate(contents)]
    write_set(tmp_path, "photos", features, {"train": examples[:4], "test": examples[:1], "validation": examples[4:]})
    config = make_config("photos", dir=tmp_path, image_size=None, batch_size=2)
    dataset = input_pipeline.load(config.data)
    assert (dataset.image_shape, dataset.validation_split) == ((224, 224, 3), "validation")
    means = np.mean([smooth_image(i, 80 + i, 90).mean((0, 1)) / 255 for i in range(4)], 0)
    np.testing.assert_allclose(dataset.mean, means, atol=0.01)
    again = prepared_module.Prepared(tfds.builder_from_directory(tmp_path / "photos/1.0.0"))
    (tmp_path / "photos/1.0.0/simplest_vit.npz").unlink()
    assert (again.mean, again.std, again.fingerprint) == (dataset.mean, dataset.std, dataset.fingerprint)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"image": tfds.features.Image(shape=(8, 8, 4)), "label": TWO}, "4 channels"),
        ({"image": tfds.features.Image(shape=(8, 8, 1), dtype=np.float32), "label": TWO}, "images of float32"),
        ({"label": TWO}, "0 images and 1 class labels in an example .label.; expected"),
        ({"a": IMAGE, "b": IMAGE, "label": TWO}, "2 images"),
        ({"image": IMAGE, "text": tfds.features.Text()}, "1 images and 0 class labels"),
    ],
)  # fmt: skip
def test_what_is_no_image_classification_set_is_refused(tmp_path, make_config, features, message):
    write_set(tmp_path, "odd", features, {"train": []})
    with pytest.raises(UserError, match=message):
        image_shape(make_config("odd", dir=tmp_path).data)


@pytest.mark.parametrize("name", ["mnist", "../x", "a b", "", "shapes:9.9.9"])
def test_an_unknown_set_says_how_tfds_prepares_it(tmp_path, make_config, name):
    shapes(tmp_path)
    with pytest.raises(
        UserError,
        match=rf"^config.data.name={name}: no such data set in {tmp_path}; .*tfds build .* --file_format=array_record$",
    ):
        input_pipeline.load(make_config(name, dir=tmp_path).data)


def test_a_damaged_set_that_only_tfds_can_prepare_is_not_to_be_removed(tmp_path, make_config):
    path = shapes(tmp_path) / "shapes-train.array_record-00000-of-00001"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=rf"^{path}: damaged \(.*\); restore it from a copy or with TFDS$"):
        input_pipeline.load(make_config("shapes", dir=tmp_path).data)


def test_a_run_is_read_without_its_set_and_a_set_that_is_gone_is_named(tmp_path, make_config):
    folder = shapes(tmp_path)
    config = make_config("shapes", dir=tmp_path)
    config.model.patch_size = 5
    with lock_workdir(tmp_path / "run", config.to_dict(), input_pipeline.load(config.data).info):
        shutil.rmtree(folder)
    assert read_run(str(tmp_path / "run"))[1].to_dict() == config.to_dict()
    with pytest.raises(UserError, match=rf"^config.data.name=shapes: no such data set in {tmp_path}; expected"):
        evaluate(str(tmp_path / "run"))


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (
            "tain",
            None,
            r"^config.data.train_split=tain: Unknown split 'tain'. Expected a part of train \(45 examples\),",
        ),
        ("train", "train[", r"^config.data.validation_split=train\[: Unrecognized split format: 'train\['. Expected"),
        ("train[:300%]", None, r"^config.data.train_split=train\[:300%\]: When unit=%, .* Expected a part of"),
        ("train[:99]", None, r"incompatible with 45 examples. Expected a part of"),
        ("train[:0]", None, r"^config.data.train_split=train\[:0\]: no examples; choose a larger part of train, test"),
        ("train[9:3]", None, r"no examples"),
        ("train[45:]", None, r"no examples"),
        ("train", "test[15:]", r"^config.data.validation_split=test\[15:\]: no examples"),
        ("train[:40]", "train[39:]", r"=train\[:40\] and .*=train\[39:\] share 1 examples; choose parts that do not"),
        ("train+test", None, r"share 15 examples"),
        (
            "train[:2]",
            None,
            r"^config.data.train_split=train\[:2\] has no example of 1 of the 3 classes \(starry\); ",
        ),
    ],
)
def test_a_wrong_split_is_told_in_one_line(tmp_path, make_config, train, validation, message):
    shapes(tmp_path)
    config = make_config("shapes", dir=tmp_path, train_split=train)
    config.data.update({"validation_split": validation})
    with pytest.raises(UserError, match=message) as error:
        input_pipeline.load(config.data)
    assert "\n" not in str(error.value)


def test_splits_are_kept_with_what_a_run_knows(tmp_path, make_config):
    shapes(tmp_path)
    config = make_config("shapes", dir=tmp_path, train_split="train[:80%]", validation_split="train[80%:]+test[:3]")
    dataset = input_pipeline.load(config.data)
    assert dataset.info.to_json()["train_split"] == "train[:80%]"
    assert (dataset.train_size, dataset.validation_size) == (36, 12)
    np.testing.assert_array_equal(dataset.validation.images, PIXELS[36:48, 1:11])
    split = prepare("shapes", tmp_path).split("config.data.validation_split", "test[:3]+train[36:]", "label")
    np.testing.assert_array_equal(split.pixels(), np.concatenate([PIXELS[45:48], PIXELS[36:45]]))
    np.testing.assert_array_equal(split.labels, np.concatenate([np.arange(45, 48), np.arange(36, 45)]) % 3)


@pytest.mark.parametrize(
    ("label", "labels", "message"),
    [
        ("shade", ["label", "colour"], r"^config.data.label=shade: .* has colour, label; choose one of them"),
        (None, ["kind", "colour"], r"has several labels; choose: --config.data.label=colour\|kind$"),
    ],
)
def test_the_label_is_chosen(tmp_path, make_config, label, labels, message):
    features = dict.fromkeys(labels, TWO)
    example = {"image": PNGS[0], **dict.fromkeys(labels, 0)}
    write_set(tmp_path, "two", {"image": IMAGE, **features}, {"train": [example], "test": [example]})
    config = make_config("two", dir=tmp_path)
    config.data.update({"label": label})
    with pytest.raises(UserError, match=message):
        input_pipeline.load(config.data)


def test_a_split_without_labels_is_told(tmp_path, make_config):
    features = {"image": IMAGE, "label": TWO}
    train = [{"image": PNGS[i], "label": i} for i in (0, 1)]
    write_set(tmp_path, "secret", features, {"train": train, "test": [{"image": PNGS[3], "label": -1}]})
    with pytest.raises(UserError, match=r"^config.data.validation_split=test: examples without a label; choose"):
        input_pipeline.load(make_config("secret", dir=tmp_path).data)


# What is measured.


def test_the_sidecar_is_read_not_made_again_and_made_again_only_where_it_does_not_fit(tmp_path, monkeypatch, caplog):
    folder = shapes(tmp_path)
    measured = []
    original = prepared_module.Prepared._measure
    monkeypatch.setattr(prepared_module.Prepared, "_measure", lambda self: [measured.append(1), original(self)][1])
    first = prepare("shapes", tmp_path)
    assert prepare("shapes", tmp_path).fingerprint == first.fingerprint
    assert len(measured) == 1
    sidecar = folder / "simplest_vit.npz"
    content = bytearray(sidecar.read_bytes())
    sidecar.write_bytes(content[:300])
    assert prepare("shapes", tmp_path).fingerprint == first.fingerprint
    assert "simplest_vit.npz is damaged; recreating it" in caplog.text
    assert len(measured) == 2
    names = folder / "label.labels.txt"
    names.write_text(names.read_text().replace("round", "oval"))
    assert prepare("shapes", tmp_path).fingerprint != first.fingerprint
    assert len(measured) == 3


def test_a_set_of_a_builder_may_be_opened_by_tfds_s_name_for_it(tmp_path, make_config):
    """Then its mean is measured, which the builder knows, so that its sidecar lacks it."""
    known, measured = (input_pipeline.load(make_config(n, dir=tmp_path).data) for n in ("digits", "digits:1.0.0"))
    assert (known.fingerprint, known.image_shape) == (measured.fingerprint, measured.image_shape)
    np.testing.assert_allclose([measured.mean, measured.std], [known.mean, known.std], atol=1e-4)


def test_a_set_with_a_split_of_no_examples_is_read(tmp_path, make_config):
    features = {"image": tfds.features.Image(shape=(12, 10, 3)), "label": tfds.features.ClassLabel(names=["a", "b"])}
    examples = [{"image": PNGS[i], "label": i % 2} for i in range(6)]
    write_set(tmp_path, "odd", features, {"train": examples[:4], "test": examples[4:], "unsupervised": []})
    dataset = input_pipeline.load(make_config("odd", dir=tmp_path).data)
    assert (dataset.train_size, dataset.validation_size) == (4, 2)


def test_a_set_that_tfds_has_converted_in_its_place_is_read(tmp_path, make_config):
    path = shapes(tmp_path) / "dataset_info.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"fileFormat": "tfrecord"}))
    config = make_config("shapes", dir=tmp_path)
    with pytest.raises(UserError, match=rf"convert it: tfds convert_format --dataset_version_dir={path.parent} --out"):
        input_pipeline.load(config.data)
    path.write_text(json.dumps(facts | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}))
    np.testing.assert_array_equal(input_pipeline.load(config.data).validation.labels, np.arange(45, 60) % 3)


def test_originals_that_are_not_read_are_named(tmp_path, make_config, capfd):
    """As in --config cifar10 with a folder of photos and without config.data.name=image_folder."""
    for manual_dir in (None, "photos"):
        input_pipeline.load(make_config("digits", dir=tmp_path, manual_dir=manual_dir).data)
    assert capfd.readouterr().err.endswith(f"{tmp_path}/digits/1.0.0 is prepared already; photos is not read\n")


def test_a_set_that_was_made_again_with_other_labels_is_measured_again(tmp_path, make_config):
    features, labels = {"image": IMAGE, "label": TWO}, []
    for time, label in ((1000, 0), (2000, 1)):  # files of the same size
        examples = [{"image": PNGS[i], "label": (i + label) % 2} for i in range(4)]
        folder = write_set(tmp_path, "set", features, {"train": examples, "test": examples})
        for path in folder.glob("*.array_record*"):
            os.utime(path, (time, time))
        labels.append(input_pipeline.load(make_config("set", dir=tmp_path).data).train.labels.tolist())
    assert labels == [[0, 1, 0, 1], [1, 0, 1, 0]]


def test_damage_of_decoded_images_is_noticed_by_their_checksum(tmp_path, make_config):
    folder = shapes(tmp_path)
    config = make_config("shapes", dir=tmp_path, image_size=10)
    config.data.train_split = "train[:44]"
    input_pipeline.load(config.data)
    sidecar = folder / "simplest_vit.npz"
    content = bytearray(sidecar.read_bytes())
    at = content.index(PIXELS[5].tobytes())
    content[at] ^= 1
    sidecar.write_bytes(content)
    loaded = prepare("shapes", tmp_path).split("config.data.train_split", "train", "label")
    with pytest.raises(UserError, match=r"simplest_vit.npz: damaged \(Bad CRC-32.*remove this file to recreate it"):
        loaded.pixels()


def test_a_folder_that_cannot_be_written_is_measured_at_every_start(tmp_path, make_config, monkeypatch, caplog):
    shapes(tmp_path)

    def savez(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(np, "savez", savez)
    dataset = input_pipeline.load(make_config("shapes", dir=tmp_path).data)
    np.testing.assert_array_equal(dataset.train.images, PIXELS[:45, 1:11])
    assert "cannot be written (Read-only file system); the data set is measured at every start" in caplog.text


def test_the_fingerprint_is_of_each_label_and_each_byte_of_an_image(tmp_path):
    features = {"image": IMAGE, "label": TWO}
    examples = [{"image": PNGS[i], "label": i % 2} for i in range(4)]
    changes = {
        "same": examples,
        "label": [examples[0] | {"label": 1}, *examples[1:]],
        "exchanged": [examples[0] | {"image": PNGS[1]}, examples[1] | {"image": PNGS[0]}, *examples[2:]],
        "order": examples[::-1],
        "byte": [examples[0] | {"image": PNGS[9]}, *examples[1:]],
    }  # fmt: skip
    prints = {}
    for name, changed in changes.items():
        write_set(tmp_path / name, "set", features, {"train": changed, "test": examples})
        prints[name] = prepare("set", tmp_path / name).fingerprint
    write_set(tmp_path / "again", "set", features, {"train": examples, "test": examples})
    assert prepare("set", tmp_path / "again").fingerprint == prints["same"]
    assert len(set(prints.values())) == len(prints)


def test_images_of_another_split_that_are_in_train_are_counted(tmp_path, caplog):
    examples = [{"image": png, "label": i % 2} for i, png in enumerate(PNGS[:9])]
    other_label = examples[0] | {"label": 1}
    splits = {"train": examples[:4], "test": [*examples[3:5], other_label], "validation": examples[4:6]}
    write_set(tmp_path, "set", {"image": IMAGE, "label": TWO}, splits)
    prepare("set", tmp_path)
    assert [record.message for record in caplog.records if "also in" in record.message] == [
        "2 of the 3 images of test are also in train"
    ]
