"""The report from made-up results, whose numbers are known."""

import csv
import json
import pathlib

import numpy as np
import pytest

from configs import cifar10, digits, imagenet
from simplest_vit.analysis import report, runs
from simplest_vit.analysis.command import command
from simplest_vit.analysis.curve_figure import draw_curves
from simplest_vit.errors import UserError
from simplest_vit.training.writers import SummaryWriter

DESIGN = pathlib.Path(report.__file__).parent / "reference_results.json"


def finish(folder, config, accuracy, seed=0, **changes):
    """A folder as a finished run leaves it."""
    config.seed = seed
    results = {
        "validation_accuracy": accuracy,
        "best_validation_accuracy": accuracy + 0.01,
        "steps": 2160,
        "seed": seed,
        "config": config.to_dict(),
        "wall_time_s": 100.0,
        "device": "1 x H200",
        "commit": "0123456789abcdef",
    } | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "results.json").write_text(json.dumps(results))
    writer = SummaryWriter(str(folder))
    for step in (1, 2, 3):
        writer.write_scalars(step, {"train_loss": 1 / step, "validation_accuracy": accuracy * step / 3})
    writer.close()


@pytest.fixture
def folder(tmp_path):
    """Three seeds of CIFAR-10 by the recipe, a worse learning rate, ImageNet, digits, and three that cannot be used."""
    for seed, accuracy in enumerate((0.79, 0.80, 0.81)):
        finish(tmp_path / f"cifar{seed}", cifar10.get_config("augmentation=basic,optimizer=adam"), accuracy, seed)
    worse = cifar10.get_config("augmentation=basic,optimizer=adam")
    worse.optimizer.learning_rate = 1e-5
    finish(tmp_path / "worse", worse, 0.5)
    finish(tmp_path / "imagenet", imagenet.get_config("augmentation=strong,optimizer=shampoo"), 0.71)
    finish(tmp_path / "digits", digits.get_config(), 0.97)
    finish(tmp_path / "old", digits.get_config(), 0.97)
    (tmp_path / "old" / "results.json").write_text(json.dumps({"accuracy": 0.9}))
    finish(tmp_path / "unfinished", digits.get_config(), 0.97)
    (tmp_path / "unfinished" / "results.json").unlink()
    finish(tmp_path / "broken", digits.get_config(), 0.97)
    (tmp_path / "broken" / "results.json").write_text("{")
    return tmp_path


def test_cells_have_reference_ours_and_difference(folder):
    found, problems = runs.find_runs([str(folder)])
    text = report.markdown(runs.group_by_config(found), problems)
    assert "0.7936 / 0.8000 ± 0.0100 (n = 3) / +0.0064" in text
    assert "0.8334 / no run" in text
    assert "0.7071 / 0.7100 (n = 1) / +0.0029" in text
    assert "data.name=digits" in text
    assert len(problems) == 3
    assert "results.json cannot be read" in problems[0]
    assert "of another version, its results.json lacks validation_accuracy" in problems[1]
    assert "unfinished" in problems[2]


def test_runs_that_deviate_from_the_recipe_are_not_in_the_tables():
    reference = report.reference_results()
    config = cifar10.get_config("augmentation=basic,optimizer=adam")
    assert report.deviations(runs.flatten(config.to_dict()), reference) == []
    config.batch_size, config.steps, config.model.width = 64, 100, 192
    found = report.deviations(runs.flatten(config.to_dict()), reference)
    assert found == ["steps=100", "batch_size=64", "model.width=192"]


@pytest.mark.parametrize(
    ("arguments", "fields", "method", "expected"),
    [
        ("", {}, "simplest_vit/adam", []),
        ("", {"attention": "espa_reference", "init": "reference"}, "simplest_vit/adam", []),
        ("method=isometric", {"shift_eps": 0.1}, "isometric/adam", []),
        ("method=isometric,model=simple_vit", {}, "simple_vit/adam", []),
        ("", {"attention": "value_skipinit"}, "simplest_vit/adam", ["model.attention=value_skipinit"]),
        ("method=isometric", {"init": "paper"}, "isometric/adam", ["model.init=paper"]),
        (
            "method=isometric",
            {"attention": "espa"},
            "simplest_vit/adam",
            ["model.mlp=mirrored", "model.activation=gelu", "model.init=isometric"],
        ),
    ],
)
def test_networks_that_the_reference_has_not_do_not_pass_for_its_own(arguments, fields, method, expected):
    config = cifar10.get_config(f"optimizer=adam,{arguments}".rstrip(","))
    config.model.update(fields)
    flat = runs.flatten(config.to_dict())
    assert report.method_of(flat) == method
    assert report.deviations(flat, report.reference_results()) == expected


def test_an_empty_folder_gives_a_report_that_says_so(tmp_path):
    (tmp_path / "runs").mkdir()
    found, problems = runs.find_runs([str(tmp_path / "runs")])
    path = report.write(runs.group_by_config(found), problems, str(tmp_path))
    assert problems == [f"{tmp_path / 'runs'}: no runs"]
    assert path.read_text().count("no run") > 20
    with pytest.raises(UserError, match="is no folder"):
        runs.find_runs([str(tmp_path / "none")])


def test_the_rest_of_results_md_stays(folder):
    path = folder / "RESULTS.md"
    path.write_text("# Results\n\nBy hand, above.\n")
    found, problems = runs.find_runs([str(folder)])
    for _ in range(2):
        report.write(runs.group_by_config(found), problems, str(folder))
    path.write_text(path.read_text() + "\nBy hand, below.\n")
    report.write(runs.group_by_config(found), problems, str(folder))
    text = path.read_text()
    assert text.startswith("# Results\n\nBy hand, above.\n")
    assert text.endswith("By hand, below.\n")
    assert text.count(report.BEGIN) == text.count(report.END) == 1
    assert (folder / "docs" / "training_curves.png").stat().st_size > 10_000
    with (folder / "docs" / "results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["validation_accuracy"]) for row in table if row["method"] == "simplest_vit/adam"] == [
        0.79,
        0.80,
        0.81,
        0.5,
    ]


def test_curves_are_read_as_they_were_written_and_drawn_as_they_were_read(folder):
    curves = runs.read_curves(folder / "cifar0")
    np.testing.assert_array_equal(curves["train_loss"][0], [1, 2, 3])
    np.testing.assert_allclose(curves["train_loss"][1], [1, 1 / 2, 1 / 3], rtol=1e-6)
    loss, accuracy = draw_curves({"cifar": curves}, "title").axes
    assert loss.get_title() == "Loss"
    assert accuracy.get_xlabel() == "step"
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), curves["train_loss"][1])
    np.testing.assert_array_equal(accuracy.lines[0].get_ydata(), curves["validation_accuracy"][1])


def test_training_is_dashed_and_validation_is_not():
    values = np.arange(3), np.ones(3)
    figure = draw_curves({"run": {"train_loss": values, "validation_loss": values}}, "title")
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["--", "-"]


def test_a_step_made_twice_counts_once(tmp_path):
    for value in (1.0, 2.0):  # a run that was killed after its checkpoint makes a step again
        writer = SummaryWriter(str(tmp_path))
        writer.write_scalars(5, {"train_loss": value})
        writer.close()
    steps, values = runs.read_curves(tmp_path)["train_loss"]
    assert steps.tolist() == [5]
    assert values.tolist() == [2.0]


def test_the_command_gives_the_config_back():
    config = cifar10.get_config("augmentation=strong,model=simplest_vit,optimizer=shampoo")
    config.weight_decay = 0.0
    line = command(config.to_dict())
    assert line.startswith(
        "python main.py --config configs/cifar10.py:augmentation=strong,model=simplest_vit,optimizer=sh"
    )
    assert line.endswith(" --config.weight_decay=0.0")
    arguments = "model=simplest_vit,optimizer=soap,method=isometric"
    isometric = command(cifar10.get_config(arguments).to_dict())
    assert isometric == f"python main.py --config configs/cifar10.py:{arguments}"
    assert command({"data": {"name": "nothing"}}) == ""


def test_the_reference_results_are_those_of_the_design():
    reference = json.loads(DESIGN.read_text())
    assert reference["small_data"]["tat"]["simplest_vit/shampoo25"]["cifar10"] == 0.8243
    assert reference["imagenet"]["simplest_vit/shampoo25"] == {"tat": 0.7053, "simple_vit": 0.7071}
