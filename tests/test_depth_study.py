"""The plan and the picture of the depth study, and a small one that is stopped and goes on."""

import contextlib
import csv
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import depth_study
from simplest_vit.errors import CheckpointError, DivergenceError, UserError
from tests.tiny import tiny_config


def test_the_plan_changes_depth_shaping_and_learning_rate():
    config = tiny_config(model__c_val_0_target=0.9, optimizer__learning_rate=0.01)
    planned = depth_study.configs(config, [8, 64], 100, exponent=1.5)
    assert list(planned) == [(method, depth) for method in depth_study.METHODS for depth in (8, 64)]
    assert planned["E-SPA + TAT", 64].model.attention == "espa"
    assert planned["isometric", 64].model.mlp == "mirrored"
    assert planned["vanilla, unshaped", 8].model.activation == "relu"
    assert {run.steps for run in planned.values()} == {100}
    assert {run.model.width for run in planned.values()} == {16}
    assert depth_study.effective_depth(64) == 194
    rates = {method: planned[method, 64].optimizer.learning_rate for method in depth_study.METHODS}
    assert rates.pop("SimpleViT") == 0.01
    assert list(rates.values()) == pytest.approx([0.01 * (2 / 64) ** 1.5] * 3)
    assert (config.model.depth, config.optimizer.learning_rate) == (2, 0.01)


def test_too_shallow_for_eta_is_told_before_anything_is_trained(tmp_path):
    config = tiny_config(model__depth=8, model__c_val_0_target=0.9, data__dir=str(tmp_path / "tfds"))
    with pytest.raises(UserError, match="out of reach for depth 6"):
        depth_study.depth_study(config, str(tmp_path / "study"), [8, 6], 2)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(("error", "begun"), [(DivergenceError, len(depth_study.METHODS)), (CheckpointError, 1)])
def test_a_study_goes_on_behind_a_run_that_diverges_but_not_on_a_full_disk(tmp_path, monkeypatch, error, begun):
    folders = []

    def train(run, workdir):
        folders.append(workdir)
        raise error("line")

    monkeypatch.setattr(depth_study.loop, "train_and_evaluate", train)
    monkeypatch.setattr(depth_study, "read_curves", lambda _: dict.fromkeys(depth_study.PANELS, (np.arange(3),) * 2))
    (tmp_path / "study").mkdir()
    ends_with = contextlib.nullcontext() if error is DivergenceError else pytest.raises(error)
    with ends_with:
        depth_study.depth_study(tiny_config(), str(tmp_path / "study"), [4], 2)
    assert len(folders) == begun


def test_the_figure_shows_what_it_is_given():
    steps = np.arange(3)
    curves = {
        (method, depth): dict.fromkeys(depth_study.PANELS, (steps, steps + depth + (method == "isometric")))
        for method in depth_study.METHODS
        for depth in (8, 64)
    }
    figure = depth_study.draw(curves, "title")
    assert [axis.get_title() for axis in figure.axes] == [title for title, _ in depth_study.PANELS.values()]
    for axis in figure.axes:
        assert [line.get_linestyle() for line in axis.lines] == ["-", "-", "--", "--", "-.", "-.", ":", ":"]
        np.testing.assert_array_equal(axis.lines[1].get_ydata(), steps + 65)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["depth 8 (26 layers)", "depth 64 (194 layers)", *depth_study.METHODS]


@pytest.mark.slow
def test_a_small_study_quick(tmp_path):
    """Two depths of four steps through the program; the second time nothing is trained."""
    command = [
        *(sys.executable, "-m", "benchmarks.depth_study", "--config", "configs/digits.py"),
        *(f"--workdir={tmp_path}/study", f"--config.data.dir={tmp_path}", "--config.model.width=16", "--steps=4"),
        *("--config.model.num_heads=2", "--config.model.mlp_dim=32", "--config.model.c_val_0_target=0.3"),
        "--depths=2,3",
    ]
    first, second = (subprocess.run(command, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("validation accuracy") == 8
    assert first.stdout.endswith(second.stdout)
    assert second.stderr.count("has finished") == 8
    with (tmp_path / "study" / "depth_study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["effective_depth"] for row in rows} == {"8", "11"}
    assert (tmp_path / "study" / "depth_study.png").stat().st_size > 10_000
