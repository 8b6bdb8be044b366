"""The report from made-up results, whose numbers are known."""

import json

import pytest

from configs import digits
from simplest_vit.analysis import report
from simplest_vit.errors import UserError


def finish(folder, accuracy=0.97, *, seed=0, rate=1e-2, fingerprint="abcdef0123", **fields):
    """A folder as a finished run leaves it."""
    config = digits.get_config()
    config.seed, config.optimizer.learning_rate = seed, rate
    config.update(fields)
    results = {
        "validation_accuracy": accuracy,
        "best_validation_accuracy": accuracy + 0.01,
        "steps": 462,
        "seed": seed,
        "config": config.to_dict(),
        "wall_time_s": 100.0 + seed,
        "device": "1 x H200",
        "commit": "0123456789abcdef",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "dataset.json").write_text(json.dumps({"name": "digits", "fingerprint": fingerprint}))
    (folder / "results.json").write_text(json.dumps(results))


def reported(folder):
    """The cells of the rows of a report, and what is not in its table."""
    found, problems = report.find_runs([str(folder)])
    groups, repeated = report.group_runs(found)
    lines = report.markdown(groups, problems + repeated).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return rows[2:], [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def test_a_row_says_what_differs_and_averages_seeds(tmp_path):
    for seed, accuracy in enumerate((0.79, 0.80, 0.81)):
        finish(tmp_path / f"run{seed}", accuracy, seed=seed, log_every=seed + 1)
    finish(tmp_path / "other", 0.9, rate=1e-3)
    (best, other), problems = reported(tmp_path)
    name = other[0]
    assert name.endswith(", muon")
    assert best == [
        *(name, "optimizer.learning_rate=0.001", "0.9000 (n = 1)", "0.9100 (n = 1)"),
        *("462", "100 s", "1 x H200", "0123456789"),
    ]
    assert other[1:6] == [
        *("optimizer.learning_rate=0.01", "0.8000 ± 0.0100 (n = 3)", "0.8100 ± 0.0100 (n = 3)"),
        *("462", "101 s"),
    ]
    assert problems == []


def test_a_row_names_the_steps_device_and_commit_of_each_of_its_runs(tmp_path):
    for seed, (steps, device, commit) in enumerate(
        [(462, "1 x H200", "ab"), (300, "1 x H200", "cd"), (462, "cpu", "ab")]
    ):
        finish(tmp_path / f"run{seed}", seed=seed)
        path = tmp_path / f"run{seed}" / "results.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"steps": steps, "device": device, "commit": commit}))
    (row,), _ = reported(tmp_path)
    assert row[4:] == ["462 / 300", "101 s", "1 x H200 / cpu", "ab / cd"]


def test_runs_on_other_images_are_another_row_and_a_copy_does_not_count(tmp_path):
    finish(tmp_path / "a", 0.5)
    finish(tmp_path / "b", 0.7, fingerprint="0123456789")
    finish(tmp_path / "copy", 0.5)
    rows, problems = reported(tmp_path)
    assert [(row[1], row[2]) for row in rows] == [
        ("data=digits (01234567)", "0.7000 (n = 1)"),
        ("data=digits (abcdef01)", "0.5000 (n = 1)"),
    ]
    assert problems == [f"{tmp_path / 'copy'}: repeats seed 0 of {tmp_path / 'a'}, which counts"]


def test_a_run_from_before_a_field_was_added_has_its_default(tmp_path):
    finish(tmp_path / "old", 0.5)
    results = json.loads((tmp_path / "old" / "results.json").read_text())
    del results["config"]["patience"]
    (tmp_path / "old" / "results.json").write_text(json.dumps(results))
    finish(tmp_path / "new", 0.7, seed=1)
    ((_, own, accuracy, *_),), _ = reported(tmp_path)
    assert (own, accuracy) == ("-", "0.6000 ± 0.1414 (n = 2)")


def test_runs_that_cannot_be_used_are_named(tmp_path):
    finish(tmp_path / "good")
    finish(tmp_path / "broken")
    (tmp_path / "broken" / "results.json").write_text("{")
    finish(tmp_path / "old")
    (tmp_path / "old" / "results.json").write_text(json.dumps({"accuracy": 0.9}))
    finish(tmp_path / "unfinished")
    (tmp_path / "unfinished" / "results.json").unlink()
    rows, problems = reported(tmp_path)
    assert len(rows) == 1
    assert "results.json cannot be read" in problems[0]
    assert "of another version, its results.json lacks validation_accuracy" in problems[1]
    assert "unfinished" in problems[2]


def test_an_empty_folder_gives_a_report_that_says_so(tmp_path):
    _, problems = report.find_runs([str(tmp_path)])
    assert problems == [f"{tmp_path}: no runs"]
    assert report.markdown([], problems).startswith("no finished run\n")
    with pytest.raises(UserError, match="is not a folder"):
        report.find_runs([str(tmp_path / "none")])
