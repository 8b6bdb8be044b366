"""Predictions from image files against the model on the validation split."""

import csv
import errno
import itertools
import json
import os
import pathlib
import shutil
import types

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import input_pipeline
from simplest_vit import predict as predict_module
from simplest_vit.commands.import_reference import import_reference
from simplest_vit.errors import UserError
from simplest_vit.predict import as_text, find_images, predict
from simplest_vit.training.evaluate import restore_best
from tests.tiny import tiny_config

CHECKPOINT = pathlib.Path(__file__).parent / "interop" / "fixtures" / "simplest_vit.pth"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint, eight images of its validation split as files, and their logits."""
    folder = tmp_path_factory.mktemp("predict")
    config = tiny_config(data__dir=str(folder / "tfds"))
    import_reference(config, str(folder / "run"), str(CHECKPOINT))
    dataset = input_pipeline.load(config.data)
    batch = next(input_pipeline.eval_batches(dataset, batch_size=8, sharding=None))
    best, state, _ = restore_best(str(folder / "run"))
    model = best.model(state)
    shutil.rmtree(folder / "tfds")  # the run remembers what it needs
    (folder / "images").mkdir()
    for i, pixels in enumerate(np.asarray(dataset.validation.images[:8])):
        Image.fromarray(pixels[..., 0]).save(folder / "images" / f"{i}.png")
    return types.SimpleNamespace(
        workdir=str(folder / "run"),
        images=folder / "images",
        logits=np.asarray(model(batch["image"])),
    )


def test_predictions_are_those_of_the_validation_split(run):
    predictions = list(predict(run.workdir, [str(run.images)]))
    probability = np.exp(run.logits) / np.exp(run.logits).sum(axis=1, keepdims=True)
    assert [pathlib.Path(p["image"]).name for p in predictions] == [f"{i}.png" for i in range(8)]
    for prediction, expected in zip(predictions, probability, strict=True):
        order = np.argsort(-expected)[:5]
        assert [best["class"] for best in prediction["top"]] == [str(k) for k in order]
        np.testing.assert_allclose([best["probability"] for best in prediction["top"]], expected[order], rtol=1e-4)
    assert f"{predictions[0]['top'][0]['probability']:.1%}" in as_text(predictions[0])
    assert json.loads(json.dumps(predictions[0])) == predictions[0]


def test_a_run_that_was_never_evaluated_says_which_step_is_used(run, caplog, monkeypatch):
    monkeypatch.setattr("simplest_vit.training.evaluate.log.propagate", True)
    assert repr(predict_module.load(run.workdir)).endswith("images 8x8x1, step 1, not evaluated)")
    (record,) = caplog.records
    assert record.message == f"{run.workdir}: no checkpoint was evaluated yet; using the latest, step 1"


def test_predictions_are_saved_as_csv_whatever_the_files_are_named(run, tmp_path):
    folder, table = tmp_path / 'a, "b"', tmp_path / "predictions.csv"
    folder.mkdir()
    for i, name in enumerate(("0,1.png", 'say "2".png', "a\nb.png", os.fsdecode(b"caf\xe9.png"), "ü.png")):
        shutil.copy(run.images / f"{i}.png", folder / name)
    (folder / "bad.jpg").write_bytes(b"no image")
    passed_on = []
    with pytest.raises(UserError, match="1 of 6 cannot be read"):
        passed_on.extend(predict(run.workdir, [str(folder)], str(table)))
    with table.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "class", "probability"]
    assert len(rows) == 5
    for row, prediction in zip(
        rows, predict(run.workdir, [str(p) for p in find_images([str(folder)]) if p.suffix == ".png"]), strict=True
    ):
        best = prediction["top"][0]
        assert row[0] == prediction["image"].replace("\udce9", "\\udce9")
        assert (row[1], float(row[2])) == (best["class"], pytest.approx(best["probability"], abs=1e-6))
    assert {file.name for file in tmp_path.iterdir()} == {folder.name, table.name}
    before = table.read_bytes()
    for images, path in (
        (tmp_path / "nothing", table),
        (run.images, folder),
        (run.images, tmp_path / "x/y.csv"),
    ):
        with pytest.raises(UserError):
            list(predict(run.workdir, [str(images)], str(path)))
    stopped = predict(run.workdir, [str(folder)], str(table))
    next(stopped)
    stopped.close()  # as after `| head` or a signal
    assert table.read_bytes() == before, "not all images, nothing written"
    with pytest.raises(UserError, match="1 of 1 cannot be read"):
        list(predict(run.workdir, [str(folder / "bad.jpg")], str(table)))
    assert table.read_text() == "file,class,probability\n", "rows of other images are not kept"


@pytest.mark.parametrize("name", ["a.jpg", "A.HEIC", "photo"])
def test_a_table_never_replaces_a_photo(tmp_path, monkeypatch, name):
    """As in `--csv *.jpg`, which takes the first photo as the table."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("a photo")
    with pytest.raises(UserError, match=f"^--csv={tmp_path}/{name} is an image; expected a table"):
        next(predict("nowhere", ["photo"], str(tmp_path / name)))


def test_an_image_of_another_size_and_mode_is_converted(run, tmp_path):
    Image.new("RGBA", (31, 20), (200, 10, 10, 255)).save(tmp_path / "colour.png")
    (prediction,) = predict(run.workdir, [str(tmp_path / "colour.png")])
    assert sum(best["probability"] for best in prediction["top"]) <= 1 + 1e-6


def test_photos_are_resized_as_for_validation_and_computed_in_float32(run, tmp_path):
    """Whatever the run was trained with: here in bfloat16, with images cropped from nine pixels."""
    workdir = shutil.copytree(run.workdir, tmp_path / "run")
    for name, old, new in (("config", '"float32"', '"bfloat16"'), ("dataset", '"eval_resize": 8', '"eval_resize": 9')):
        content = (workdir / f"{name}.json").read_text()
        assert old in content
        (workdir / f"{name}.json").write_text(content.replace(old, new))
    predictor = predict_module.load(workdir)
    pixels = np.stack([np.asarray(Image.open(run.images / f"{i}.png"))[..., None] for i in range(8)])
    probability = np.exp(run.logits) / np.exp(run.logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predictor.probabilities(pixels), probability, rtol=1e-4)
    Image.fromarray(np.arange(81, dtype=np.uint8).reshape(9, 9)).save(tmp_path / "nine.png")
    read = predictor.read(tmp_path / "nine.png")[..., 0]
    assert np.all(np.diff(read.astype(int)) == 1), "cropped, not resized"


def test_a_photo_is_turned_as_in_training(run, tmp_path):
    upright = Image.open(run.images / "3.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by the reader
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned, expected = predict(run.workdir, [str(tmp_path / "turned.png"), str(run.images / "3.png")])
    assert turned["top"] == expected["top"]


def test_mistakes_are_one_line(run, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    cases = {
        "1 of 1 cannot be read, the first of them " + str(tmp_path / "text.jpg: not a complete image"): [
            str(tmp_path / "text.jpg")
        ],
        "does not exist": [str(tmp_path / "none.png")],
        "e" * 300: [str(tmp_path / ("e" * 300))],  # "File name too long"
        "has no images": [str(tmp_path / "empty")],
        "--images is missing": [],
    }
    for message, images in cases.items():
        with pytest.raises(UserError) as caught:
            list(predict(run.workdir, images))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="holds no checkpoint"):
        list(predict(str(tmp_path / "fresh"), [str(run.images)]))
    assert not (tmp_path / "fresh").exists()


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=rf"^--images: {tmp_path} cannot be read \(Permission denied\)"):
        find_images([str(tmp_path)])


def test_what_cannot_be_read_is_told_and_the_others_are_predicted(run, tmp_path, monkeypatch, caplog):
    folder = shutil.copytree(run.images, tmp_path / "images")
    (folder / "0.png").write_text("no image")
    (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:-50])
    (folder / "7.png").unlink()
    (folder / "7.png").symlink_to(folder / "nowhere.png")
    monkeypatch.setattr(predict_module, "_BATCH", 2)
    predictions = predict(run.workdir, [str(folder)])
    found = {pathlib.Path(p["image"]).name: p["top"][0]["probability"] for p in itertools.islice(predictions, 5)}
    probability = np.exp(run.logits) / np.exp(run.logits).sum(axis=1, keepdims=True)
    expected = {f"{i}.png": probability[i].max() for i in (1, 2, 3, 4, 6)}
    assert found.keys() == expected.keys()
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)
    with pytest.raises(UserError, match=rf"^--images: 3 of 8 cannot be read, the first of them {folder}/0.png: not a "):
        next(predictions)
    told = [record.getMessage() for record in caplog.records if "--images" in record.getMessage()]
    assert [line.split(": ")[1] for line in told] == [str(folder / name) for name in ("0.png", "5.png", "7.png")]
    assert told[2].endswith("7.png: No such file or directory")


def test_files_and_folders_may_be_mixed(tmp_path, capfd, monkeypatch):
    (tmp_path / "folder").mkdir()
    for name in ("b.png", "folder/z.JPG", "folder/a.png", "folder/notes.txt", "folder/._a.png"):
        (tmp_path / name).touch()
    found = find_images([str(tmp_path / "b.png"), str(tmp_path / "folder")])
    assert [file.name for file in found] == ["b.png", "a.png", "z.JPG"]
    assert capfd.readouterr().err == "skipped unused files: 1 .txt\n"
    monkeypatch.chdir(tmp_path / "folder")
    assert list(map(str, find_images(["."]))) == ["a.png", "z.JPG"]
    assert capfd.readouterr().err == "skipped unused files: 1 .txt\n"


def test_many_images_are_read_a_batch_at_a_time(run, tmp_path, monkeypatch):
    """All take the memory of a few, and the first are told while the last are not read yet."""
    read, decoded = [], predict_module.eval_image
    monkeypatch.setattr(predict_module, "eval_image", lambda *a: [read.append(a), decoded(*a)][1])
    (tmp_path / "images").mkdir()
    monkeypatch.setattr(predict_module, "_BATCH", 2)
    for i in range(5):
        shutil.copy(run.images / f"{i % 4}.png", tmp_path / "images" / f"{i:03d}.png")
    predictions = predict(run.workdir, [str(tmp_path / "images")])
    first = next(predictions)
    assert len(read) == 2
    rest = [first, *predictions]
    assert len(rest) == len(read) == 5
    for i, prediction in enumerate(rest):
        for best, expected in zip(prediction["top"], rest[i % 4]["top"], strict=True):
            np.testing.assert_allclose(best["probability"], expected["probability"], rtol=1e-4)


def test_a_last_batch_of_fewer_images_is_not_compiled_anew(run, monkeypatch):
    traced, merge = [], nnx.merge
    monkeypatch.setattr(nnx, "merge", lambda *a: [traced.append(a), merge(*a)][1])
    list(predict(run.workdir, [str(run.images)]))
    of_one_batch = len(traced)
    traced.clear()
    monkeypatch.setattr(predict_module, "_BATCH", 3)  # of eight images
    list(predict(run.workdir, [str(run.images)]))
    assert len(traced) == of_one_batch


def test_nothing_is_written_to_a_run_that_may_only_be_read(run, monkeypatch):
    allows = lambda path, mode: not mode & os.W_OK  # noqa: E731
    monkeypatch.setattr(os, "access", allows)
    before = {path: path.stat().st_mtime_ns for path in pathlib.Path(run.workdir).rglob("*")}
    assert len(list(predict(run.workdir, [str(run.images)]))) == 8
    assert before == {path: path.stat().st_mtime_ns for path in pathlib.Path(run.workdir).rglob("*")}
