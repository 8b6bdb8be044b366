"""The report from made-up results, whose numbers are known."""

import json

import pytest

from configs import digits
from simplest_vit.analysis import report
from simplest_vit.errors import UserError


def finish(
    folder,
    accuracy=0.97,
    *,
    seed=0,
    rate=1e-2,
    fingerprint="abcdef0123",
    validation_split="validation",
    config=None,
    **fields,
):
    """A folder as a finished run leaves it."""
    config = config or digits.get_config()
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
    data = {"fingerprint": fingerprint, "validation_split": validation_split, "validation_size": 360}
    (folder / "dataset.json").write_text(json.dumps({"name": "digits"} | data))
    (folder / "results.json").write_text(json.dumps(results))


def reported(folder):
    """The rows of a report, its lines above them, and what it does not include."""
    lines = report.report([str(folder)]).splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    rows = [dict(zip(table[0], row, strict=True)) for row in table[2:]]
    above = [line for line in lines if line.startswith(("## ", "All: "))]
    return rows, above, [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def change_results(folder, **values):
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_only_what_differs_is_a_column_and_seeds_are_averaged(tmp_path):
    for seed, accuracy in enumerate((0.79, 0.80, 0.81)):
        finish(tmp_path / f"run{seed}", accuracy, seed=seed, log_every=seed + 1)
    finish(tmp_path / "other", 0.9, rate=1e-3)
    rows, above, problems = reported(tmp_path)
    assert rows == [
        {
            "learning_rate": "0.001",
            "accuracy": "90.00 (1)",
            "best": "91.00 (1)",
            "seconds": "100",
            "best run": str(tmp_path / "other"),
        },
        {
            "learning_rate": "0.01",
            "accuracy": "80.00 ± 1.00 (3)",
            "best": "81.00 ± 1.00 (3)",
            "seconds": "101",
            "best run": str(tmp_path / "run2"),
        },
    ]
    assert above == [
        "## digits (abcdef01), 360 images of validation",
        "All: network isometric_vit, optimizer muon, steps 462, device 1 x H200, commit 0123456789.",
    ]
    assert problems == []


def test_the_intervals_between_evaluations_are_settings(tmp_path):
    """They decide which step is the best, and with patience where a run ends."""
    for folder, intervals in (("a", (10, 20)), ("b", (5, 20)), ("c", (10, 10))):
        finish(tmp_path / folder, eval_every=intervals[0], checkpoint_every=intervals[1])
    rows, _, problems = reported(tmp_path)
    found = {(row["eval_every"], row["checkpoint_every"]) for row in rows}
    assert found == {("10", "20"), ("5", "20"), ("10", "10")}
    assert problems == []


def test_the_text_is_aligned(tmp_path):
    finish(tmp_path / "a", 0.5)
    finish(tmp_path / "bcd", 0.7, seed=1, rate=1e-3)
    lines = [line for line in report.report([str(tmp_path)]).splitlines() if line.startswith("|")]
    assert len({tuple(i for i, letter in enumerate(line) if letter == "|") for line in lines}) == 1


def test_an_optimizer_s_own_settings_are_compared_within_it(tmp_path):
    """Adam's b1 is 0.9 and SOAP's 0.95, which their names say; a second b1 of Adam is a difference."""
    for name in ("adam", "soap"):
        finish(tmp_path / name, config=digits.get_config(f"optimizer={name}"), rate=1e-3)
    assert {*reported(tmp_path)[0][0]} == {"optimizer", "accuracy", "best", "seconds", "best run"}
    config = digits.get_config("optimizer=adam")
    config.optimizer.b1, config.weight_decay = 0.8, 1e-4
    finish(tmp_path / "other", config=config, rate=1e-3)
    rows = {
        row["best run"].rsplit("/")[-1]: (row["optimizer"], row["b1"], row["weight_decay"])
        for row in reported(tmp_path)[0]
    }
    assert rows == {"adam": ("adam", "0.9", "0.0"), "soap": ("soap", "0.95", "0.0"), "other": ("adam", "0.8", "0.0001")}


def test_a_row_names_the_steps_device_and_commit_of_each_of_its_runs(tmp_path):
    for seed, (steps, device, commit) in enumerate(
        [(462, "1 x H200", "ab"), (300, "1 x H200", "cd"), (462, "cpu", "ab")]
    ):
        finish(tmp_path / f"run{seed}", seed=seed)
        change_results(tmp_path / f"run{seed}", steps=steps, device=device, commit=commit)
    _, above, _ = reported(tmp_path)
    assert above[1].endswith("steps 462 / 300, device 1 x H200 / cpu, commit ab / cd.")
    change_results(tmp_path / "run0", commits=["01", "ab"])  # it was resumed with other code
    assert reported(tmp_path)[1][1].endswith("commit 01 / ab / cd.")
    change_results(tmp_path / "run0", commits=[])
    finish(tmp_path / "run3", seed=3, rate=1e-3)
    rows, _, _ = reported(tmp_path)
    assert {row["commit"] for row in rows} == {"ab / cd", "0123456789"}


def test_each_data_set_has_its_table_and_a_copy_does_not_count(tmp_path):
    finish(tmp_path / "a", 0.5)
    finish(tmp_path / "b", 0.7, fingerprint="0123456789")
    finish(tmp_path / "c", 0.6, validation_split="train[90%:]")
    finish(tmp_path / "copy", 0.5)
    _, above, problems = reported(tmp_path)
    assert [line for line in above if line.startswith("##")] == [
        "## digits (01234567), 360 images of validation",
        "## digits (abcdef01), 360 images of train[90%:]",
        "## digits (abcdef01), 360 images of validation",
    ]
    assert problems == [f"{tmp_path / 'copy'}: repeats seed 0 of {tmp_path / 'a'}, which counts"]


def test_a_run_from_before_a_field_was_added_has_its_default(tmp_path):
    finish(tmp_path / "old", 0.5)
    config = json.loads((tmp_path / "old" / "results.json").read_text())["config"]
    del config["patience"]
    change_results(tmp_path / "old", config=config)
    finish(tmp_path / "new", 0.7, seed=1)
    (row,), _, _ = reported(tmp_path)
    assert row["accuracy"] == "60.00 ± 14.14 (2)"


def test_runs_that_cannot_be_used_are_named(tmp_path):
    finish(tmp_path / "good")
    finish(tmp_path / "broken")
    (tmp_path / "broken" / "results.json").write_text("{")
    finish(tmp_path / "old")
    (tmp_path / "old" / "results.json").write_text(json.dumps({"accuracy": 0.9}))
    finish(tmp_path / "unfinished")
    (tmp_path / "unfinished" / "results.json").unlink()
    rows, _, problems = reported(tmp_path)
    assert len(rows) == 1
    assert "results.json cannot be read" in problems[0]
    assert "of another version, its results.json lacks validation_accuracy" in problems[1]
    assert "unfinished" in problems[2]


def test_an_empty_folder_gives_a_report_that_says_so(tmp_path):
    assert report.report([str(tmp_path)]) == f"no finished run\n\nNot included:\n\n- {tmp_path}: no runs"
    with pytest.raises(UserError, match="is not a folder"):
        report.report([str(tmp_path / "none")])
