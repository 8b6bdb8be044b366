"""Measures of a classifier, against scikit-learn and definitions written out in NumPy."""

import csv
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from PIL import ImageFont
from sklearn.metrics import confusion_matrix, top_k_accuracy_score

from simplest_vit.analysis import figures
from simplest_vit.analysis.classification_files import write_classification
from simplest_vit.errors import UserError
from simplest_vit.training.evaluate import Evaluation
from simplest_vit.training.step import BINS, classification_sums, confusion_sums


@pytest.fixture(scope="module")
def split():
    """200 logits and classes of 8, of which class 7 has no image."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 7, 200)
    logits = rng.normal(size=(200, 8)).astype(np.float32) + 1.5 * np.eye(8, dtype=np.float32)[target]
    return logits, target


def evaluation(batches, names):
    """Evaluate batches of logits, targets and weights."""
    batches = [(jnp.asarray(x), jax.nn.one_hot(target, len(names)), jnp.asarray(w)) for x, target, w in batches]
    return Evaluation.of(3, tuple(names), [classification_sums(*b) | confusion_sums(*b) for b in batches])


@pytest.fixture(scope="module")
def result(split):
    """The same in batches of 64, the last one padded by copies that have no weight."""
    logits, target = split
    index = np.resize(np.arange(200), 256)
    weight = (np.arange(256) < 200).astype(np.float32)
    parts = zip(index.reshape(4, 64), weight.reshape(4, 64), strict=True)
    return evaluation(
        [(logits[part], target[part], w) for part, w in parts], [f"class {k}" for k in range(7)] + ["$none$"]
    )


def test_accuracy_confusion_and_top5_are_scikit_learns(split, result):
    logits, target = split
    np.testing.assert_array_equal(result.confusion, confusion_matrix(target, logits.argmax(axis=1), labels=range(8)))
    assert result.accuracy == pytest.approx((logits.argmax(axis=1) == target).mean())
    assert result.top5_accuracy == pytest.approx(top_k_accuracy_score(target, logits, k=5, labels=range(8)))
    by_class = [(logits[target == k].argmax(axis=1) == k).mean() for k in range(7)]
    np.testing.assert_allclose(result.class_accuracy[:7], by_class)
    assert np.isnan(result.class_accuracy[7])


def test_calibration_error_is_its_definition(split, result):
    logits, target = split
    probability = np.exp(logits.astype(np.float64))
    probability /= probability.sum(axis=1, keepdims=True)
    confidence, correct = probability.max(axis=1), probability.argmax(axis=1) == target
    error = 0.0
    for b in range(BINS):
        inside = (confidence > b / BINS) & (confidence <= (b + 1) / BINS)
        if inside.any():
            error += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert result.calibration_error == pytest.approx(error, abs=1e-6)
    assert error > 0.02


def test_a_tie_with_the_true_class_is_among_the_five():
    tied = jnp.asarray([[1.0, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6]])
    assert evaluation([(tied, jnp.asarray([0, 0]), np.ones(2))], "abcdef").top5_accuracy == 0.5


def test_files_hold_what_was_computed(split, result, tmp_path, monkeypatch):
    drawn, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: [drawn.append(figure), save(figure, path)])
    names = list(result.class_names)
    write_classification(result, str(tmp_path / "new"))
    with (tmp_path / "new" / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == names
    assert [int(row["images"]) for row in rows] == np.bincount(split[1], minlength=8).tolist()
    assert float(rows[3]["accuracy"]) == pytest.approx(result.class_accuracy[3], abs=1e-4)
    assert rows[7]["accuracy"] == ""
    with (tmp_path / "new" / "confusion.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header[1:] == [row[0] for row in rows] == names
    np.testing.assert_array_equal([[int(value) for value in row[1:]] for row in rows], result.confusion)
    assert (tmp_path / "new" / "confusion.png").stat().st_size > 10_000
    shares = drawn[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(shares.diagonal(), np.nan_to_num(result.class_accuracy))
    written = [float(text.get_text()) for text in drawn[0].axes[0].texts]
    np.testing.assert_array_equal(np.reshape(written, (8, 8)), result.confusion)


def test_a_picture_takes_the_font_that_has_the_letters_of_a_name(monkeypatch, caplog):
    serif = ImageFont.truetype(str(pathlib.Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSerif.ttf")))
    find = figures.find_font
    monkeypatch.setattr(figures, "find_font", lambda text: serif if text == "Äpfel" else find(text))
    with figures.style(["Äpfel", "a", "\U000f0000"]):  # the last is in no font
        assert matplotlib.rcParams["font.family"] == ["DejaVu Sans", "DejaVu Serif"]
        figure = figures.create(height=1)
        figure.text(0, 0, "\U000f0000")
        figure.draw_without_rendering()  # a warning would be an error
    assert [record.getMessage() for record in caplog.records] == [
        "no installed font has all letters of \U000f0000; the picture shows boxes instead"
    ]


def test_a_folder_that_cannot_be_written_is_named(result, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output=.*file cannot be written \(File exists\)"):
        write_classification(result, str(tmp_path / "file"))
