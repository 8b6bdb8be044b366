"""The program of signal propagation: what it writes is what was computed."""

import csv
import json
import math
import pathlib
import shutil

import numpy as np
import pytest

from simplest_vit.analysis import figures, propagation, signal_figure
from simplest_vit.commands import signal_propagation
from simplest_vit.commands.import_reference import import_reference
from simplest_vit.errors import UserError
from simplest_vit.training.workdir import read_run
from tests.tiny import tiny_config

CHECKPOINT = pathlib.Path(__file__).parents[1] / "interop" / "fixtures" / "simplest_vit.pth"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory, data_dir):
    """A trained run, analysed beside its initialization."""
    folder = tmp_path_factory.mktemp("signals")
    config = tiny_config(data__dir=data_dir, eval_every="1 epoch", log_every="0.5 epochs")  # as in recipes
    import_reference(config, str(folder / "run"), str(CHECKPOINT))
    spectra = (
        (np.geomspace(1e-5, most, 8), np.full(8, 1 / 8)) for most in (2.0, 3.0)
    )  # test_jacobian.py has real ones
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propagation, "jacobian_spectrum", lambda model, image: next(spectra))
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
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()][:2] == [result.name for result in results]
    colors = [handle.get_color() for handle in legend.legend_handles[:2]]
    for axis, (quantity, (title, label, logarithmic)) in zip(
        figure.axes[1:-1], signal_figure.PANELS.items(), strict=True
    ):
        assert (axis.get_title(loc="left") or axis.get_title()) == title
        assert axis.get_ylabel() == label
        assert axis.get_xlabel() == "block (0: embedding)"
        assert axis.get_yscale() == ("log" if logarithmic else "linear")
        drawn = {(line.get_color(), line.get_linestyle()): line.get_ydata() for line in axis.lines}
        expected = {}
        for result, color in zip(results, colors, strict=True):
            curves = {"-": result.measured.get(quantity), "--": result.theory.get(quantity)}
            if result is results[0]:
                curves[":"] = result.theory.get(f"{quantity}_c_map")
            expected |= {(color, style): curve for style, curve in curves.items() if curve is not None}
        assert drawn.keys() == expected.keys()
        for key, curve in expected.items():
            np.testing.assert_array_equal(drawn[key], signal_figure.plotted_values(quantity, curve))
    for block in range(3):
        dots, dashes = figure.axes[0].lines[2 * block : 2 * block + 2]
        np.testing.assert_array_equal(dots.get_ydata(), results[0].token_rows[block])
        np.testing.assert_array_equal(dashes.get_ydata(), results[0].theory_rows[block])
        assert dots.get_label() == f"block {block}"
    drawn = {line.get_color(): line.get_xydata() for line in figure.axes[-1].lines}
    for result, color in zip(results, colors, strict=True):
        values, weights = result.jacobian
        np.testing.assert_allclose(drawn[color][1:, 0], np.cumsum(weights))
        np.testing.assert_allclose(drawn[color][1:, 1], np.where(values < 3e-4 * values[-1], np.nan, values))
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


def test_a_model_for_each_seed_sees_the_images_and_a_split_of_few_is_not_filled_up(tmp_path, data_dir, monkeypatch):
    seen, titles = [], []
    monkeypatch.setattr(signal_propagation, "CONTRASTS", {"E-SPA + TAT": {"name": "simplest_vit"}})
    monkeypatch.setattr(signal_propagation, "initial_models", lambda config, data, seeds: seeds)
    monkeypatch.setattr(
        signal_propagation, "analyse", lambda name, models, image, _: seen.append((models, image.shape))
    )
    monkeypatch.setattr(signal_propagation, "write", lambda results, folder, title: titles.append(title))
    config = tiny_config(data__dir=data_dir, data__validation_split="validation[:5]")
    signal_propagation.signal_propagation(config, str(tmp_path / "run"), seeds=3)
    assert seen == [(range(config.seed, config.seed + 3), (5, 8, 8, 1))]
    assert titles == ["depth 2, width 16, 5 images of digits, initializations: 3"]


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


def test_a_trained_model_is_not_measured_on_other_data(analysed, tmp_path):
    run = shutil.copytree(analysed[0].parent, tmp_path / "run")
    facts = json.loads((run / "dataset.json").read_text())
    (run / "dataset.json").write_text(json.dumps(facts | {"fingerprint": "before"}))
    with pytest.raises(UserError, match="was started with other data: their fingerprint was 'before', now"):
        signal_propagation.signal_propagation(read_run(str(run))[1], str(run), trained=True)


def test_a_network_has_the_same_style_in_every_figure_and_no_other_shares_it():
    for names in (["a", "isometric", "SimpleViT"], ["E-SPA + TAT", "a", "SimpleViT", "b", "c", "isometric", "d", "e"]):
        styles = {name: style for name, *style in figures.styled(iter(names))}
        assert list(styles) == names
        assert styles["isometric"] == [figures.COLORS[0], figures.MARKERS[0]]
        assert styles["SimpleViT"] == [figures.COLORS[2], figures.MARKERS[2]]
        assert styles["a"] == [figures.COLORS[5], figures.MARKERS[5]]  # of no network, not even of an absent one
        assert len(set(map(tuple, styles.values()))) == len(names)


def test_the_ninth_name_has_the_style_of_the_first():
    names, colors, markers = zip(*figures.styled("123456789"), strict=True)
    assert names == tuple("123456789")
    assert len(set(zip(colors[:8], markers[:8], strict=True))) == 8
    assert (colors[8], markers[8]) == (colors[0], markers[0])
