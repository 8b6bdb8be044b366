"""The program of signal propagation: what it writes is what was computed."""

import csv
import math
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from simplest_vit.analysis import figures, propagation, signal_figure
from simplest_vit.commands import signal_propagation
from simplest_vit.commands.import_reference import import_reference
from simplest_vit.errors import UserError
from simplest_vit.training.run import build
from tests.tiny import DIGITS, tiny_config

CHECKPOINT = pathlib.Path(__file__).parents[1] / "interop" / "fixtures" / "simplest_vit.pth"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """A trained run, analysed beside its initialization."""
    folder = tmp_path_factory.mktemp("signals")
    config = tiny_config(data__dir=str(folder / "tfds"), eval_every="1 epoch", log_every="0.5 epochs")  # as in recipes
    import_reference(config, str(folder / "run"), str(CHECKPOINT))
    spectrum = np.geomspace(1e-5, 2.0, 8), np.full(8, 1 / 8)  # test_jacobian.py has the real ones
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propagation, "jacobian_spectrum", lambda model, image: spectrum)
        patch.setattr(signal_propagation, "CONTRASTS", {"E-SPA + TAT": {"name": "simplest_vit"}})
        results = signal_propagation.signal_propagation(config, str(folder / "run"), trained=True)
    return folder / "run" / "signal_propagation", results


def test_the_models_are_the_trained_one_and_its_initialization(analysed):
    _, (trained, initial) = analysed
    assert [trained.name, initial.name] == ["E-SPA + TAT, trained", "E-SPA + TAT"]
    assert np.nanmax(initial.measured["attention_distance"]) < 1e-5 < np.nanmax(trained.measured["attention_distance"])
    for result in (trained, initial):
        assert result.measured["mean_square"].shape == (3,)
        assert np.isfinite(result.measured["token_gradient"]).all()


def test_the_table_holds_the_curves(analysed):
    folder, results = analysed
    with (folder / "signal_propagation.csv").open() as file:
        table = list(csv.DictReader(file))
    for result in results:
        for quantity, values in result.measured.items():
            rows = [row for row in table if (row["model"], row["quantity"]) == (result.name, quantity)]
            known = values[~np.isnan(values)]
            np.testing.assert_array_equal([float(row["measured"]) for row in rows], known)
        for quantity, values in result.theory.items():
            rows = [row for row in table if (row["model"], row["quantity"]) == (result.name, quantity)]
            np.testing.assert_array_equal([float(row["theory"]) for row in rows], values)


def test_every_panel_has_title_labels_and_the_data(analysed):
    folder, results = analysed
    figure = signal_figure.draw(results, "title")
    assert len(figure.axes) == 1 + len(signal_figure.PANELS) + 1
    for axis, (quantity, (title, label, logarithmic)) in zip(
        figure.axes[1:-1], signal_figure.PANELS.items(), strict=True
    ):
        assert (axis.get_title(loc="left") or axis.get_title()) == title
        assert axis.get_ylabel() == label
        assert axis.get_xlabel() == "block (0: embedding)"
        assert axis.get_yscale() == ("log" if logarithmic else "linear")
        drawn = [line.get_ydata() for line in axis.lines]
        for result in results:
            if quantity in result.measured:
                expected = signal_figure.plotted_values(quantity, result.measured[quantity])
                assert any(np.array_equal(y, expected, equal_nan=True) for y in drawn)
            if quantity in result.theory:
                expected = signal_figure.plotted_values(quantity, result.theory[quantity])
                dashed = [line.get_ydata() for line in axis.lines if line.get_linestyle() == "--"]
                assert any(np.array_equal(y, expected) for y in dashed)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[:2] == [result.name for result in results]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), results[0].token_rows[0])
    np.testing.assert_array_equal(figure.axes[0].lines[1].get_ydata(), results[0].theory_rows[0])
    values, weights = results[1].jacobian
    lines = [line.get_xydata() for line in figure.axes[-1].lines]
    drawn = np.where(values < 3e-4 * values[-1], np.nan, values)
    assert any(
        np.allclose(line[1:, 0], np.cumsum(weights)) and np.allclose(line[1:, 1], drawn, equal_nan=True)
        for line in lines
    )
    with (folder / "jacobian.csv").open() as file:
        table = [row for row in csv.DictReader(file) if row["model"] == results[1].name]
    np.testing.assert_array_equal([float(row["singular_value"]) for row in table], values)
    for name in ("signal_propagation", "overview"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
        assert (folder / f"{name}.svg").read_text().startswith("<?xml")


def test_contrasts_that_do_not_fit_are_told_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(signal_propagation, "analyse", lambda *_: pytest.fail("analysed"))
    config = tiny_config("model=simple_vit", model__width=16, model__mlp_dim=16)
    with pytest.raises(UserError, match=r"^isometric, which it is compared with: config\.model\.mlp_dim=16 must"):
        signal_propagation.signal_propagation(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_validation_split_of_few_images_is_not_filled_up(tmp_path, monkeypatch):
    shapes, titles = [], []
    monkeypatch.setattr(signal_propagation, "CONTRASTS", {"E-SPA + TAT": {"name": "simplest_vit"}})
    monkeypatch.setattr(signal_propagation, "analyse", lambda name, models, image, label: shapes.append(image.shape))
    monkeypatch.setattr(signal_propagation, "write", lambda results, folder, title: titles.append(title))
    config = tiny_config(data__dir=str(tmp_path / "tfds"), data__validation_split="validation[:5]")
    signal_propagation.signal_propagation(config, str(tmp_path / "run"))
    assert shapes == [(5, 8, 8, 1)]
    assert "5 images of digits" in titles[0]


def test_the_initializations_are_those_of_runs_from_the_config_s_seed_on(tmp_path, monkeypatch):
    found, titles = [], []
    monkeypatch.setattr(signal_propagation, "CONTRASTS", {"E-SPA + TAT": {"name": "simplest_vit"}})
    monkeypatch.setattr(signal_propagation, "analyse", lambda name, models, *_: found.extend(models))
    monkeypatch.setattr(signal_propagation, "write", lambda results, folder, title: titles.append(title))
    config = tiny_config(data__dir=str(tmp_path / "tfds"), seed=7, compute_dtype="bfloat16")
    signal_propagation.signal_propagation(config, str(tmp_path / "run"), seeds=2)
    assert titles[0].endswith("initializations: 2")
    assert [model.dtype for model in found] == [np.float32] * 2
    expected = build(tiny_config(seed=8), DIGITS).create_state().params
    params = nnx.to_pure_dict(nnx.state(found[1], nnx.Param))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, expected)


def test_what_is_shown_of_a_cosine_is_its_distance_from_one():
    shown = signal_figure.plotted_values("token_cosine", np.array([0.75, 1.0, math.nan]))
    np.testing.assert_array_equal(shown[:2], [0.25, 1e-7])
    assert math.isnan(shown[2])


def test_contrasts_are_known_by_name():
    config = tiny_config()
    for name in signal_propagation.CONTRASTS:
        assert signal_propagation.name_of(signal_propagation.with_contrast(config, name).model) == name
    config.model.attention = "espa_2d"
    assert signal_propagation.name_of(config.model) == "simplest_vit, espa_2d"


def test_a_folder_without_checkpoint_is_told_and_left_alone(tmp_path):
    config = tiny_config(data__dir=str(tmp_path / "tfds"))
    with pytest.raises(UserError, match="holds no checkpoint"):
        signal_propagation.signal_propagation(config, str(tmp_path / "run"), trained=True)
    assert not (tmp_path / "run").exists()


def test_the_ninth_item_has_the_style_of_the_first():
    items, colors, markers = zip(*figures.styled(range(9)), strict=True)
    assert items == tuple(range(9))
    assert len(set(zip(colors[:8], markers[:8], strict=True))) == 8
    assert (colors[8], markers[8]) == (colors[0], markers[0])
