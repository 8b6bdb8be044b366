"""Records of made-up runs, whose numbers are known."""

import csv
import dataclasses
import json

import pytest

from benchmarks import protocols, records
from simplest_vit.analysis.report import find_runs
from simplest_vit.errors import UserError
from simplest_vit.training.writers import MetricsWriter

STEPS = (500, 1000, 1500)


def small_config(row="isometric", **fields):
    """The config of a run by the small protocol, with fields as `model__depth`."""
    network = protocols.NETWORKS[row]
    config = protocols.recipe("cifar10", network.preset, "soap")
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    for name, value in (protocols.SMALL | network.fields | changes).items():
        *sections, last = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        section[last] = value
    return config


def finish(folder, config, accuracy=0.7, seed=11, evaluations=STEPS, **changes):
    """A folder as a finished run leaves it."""
    config.seed, config.steps, config.optimizer.learning_rate = seed, 1500, 2e-3
    results = {
        "validation_accuracy": accuracy,
        "best_validation_accuracy": accuracy,
        "train_loss": 1.25,
        "steps": 1500,
        "seed": seed,
        "config": config.to_dict(),
        "wall_time_s": 750.0,
        "step_time_median_s": 0.5,
        "device": "1 x H200",
        "commit": "0123456789abcdef",
    } | changes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "results.json").write_text(json.dumps(results))
    writer = MetricsWriter(folder, 0)
    for step in (50, *evaluations):
        writer.write_scalars(step, {"loss/train": 1000 / step})
        if step in evaluations:
            writer.write_scalars(step, {"accuracy/validation": accuracy * step / 1500})
    writer.close()


def recorded(folder, selected_on="hold-out"):
    runs, problems = find_runs([str(folder)])
    assert not problems
    return [records.from_run(run, selected_on) for run in runs]


def test_a_run_is_described_by_what_differs_from_protocol_and_preset(tmp_path):
    finish(tmp_path / "run", small_config(model__depth=24, grad_clip=0.5, eval_every=7, data__dir="/data"))
    (record,) = recorded(tmp_path)
    assert (record.protocol, record.data, record.network) == ("small", "cifar10", "isometric_vit")
    assert record.changes == "grad_clip=0.5; model.depth=24; model.num_heads=8"
    assert (record.optimizer, record.learning_rate, record.seed, record.steps) == ("soap", 2e-3, 11, 1500)
    assert record.accuracy_at == pytest.approx({step: 0.7 * step / 1500 for step in STEPS})
    assert record.train_loss_at == pytest.approx({step: 1000 / step for step in STEPS})
    assert (record.validation_accuracy, record.train_loss, record.step_time_s) == (0.7, 1.25, 0.5)
    assert (record.device, record.commit, record.source) == ("1 x H200", "0123456", str(tmp_path / "run"))
    assert (record.selected_on, record.on_hold_out) == ("hold-out", False)


@pytest.mark.parametrize("row", ["isometric", "isometric, attention frozen", "SimpleViT", "E-SPA + TAT"])
def test_a_row_of_a_table_finds_its_runs(tmp_path, row):
    finish(tmp_path / "run", small_config(row))
    (record,) = recorded(tmp_path)
    network = protocols.NETWORKS[row]
    assert (record.network, record.changes) == (network.preset, records.changes_text(network.fields))


def test_of_many_evaluations_six_are_kept_with_the_first_and_the_last(tmp_path):
    finish(tmp_path / "run", small_config(), evaluations=range(100, 1501, 100))
    (record,) = recorded(tmp_path)
    assert list(record.accuracy_at) == [100, 400, 700, 900, 1200, 1500]


def test_a_run_without_a_training_loss_has_none_in_its_record(tmp_path):
    finish(tmp_path / "run", small_config())
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1500, "loss/train": null, "accuracy/validation": 0.7}\n')
    (record,) = recorded(tmp_path)
    assert (record.accuracy_at, record.train_loss_at) == ({1500: 0.7}, {})


def test_a_run_on_the_hold_out_says_so(tmp_path):
    hold_out = {name.replace(".", "__"): value for name, value in protocols.HOLD_OUT.items()}
    finish(tmp_path / "run", small_config(**hold_out))
    (record,) = recorded(tmp_path, selected_on="test")
    assert (record.train_split, record.validation_split) == ("train[:45000]", "train[45000:]")
    assert (record.selected_on, record.on_hold_out) == ("hold-out", True)


def test_the_recipe_itself_differs_in_nothing(tmp_path):
    finish(tmp_path / "basic", protocols.recipe("cifar100", "simple_vit", "soap"))
    finish(tmp_path / "strong", protocols.recipe("cifar100", "simple_vit", "soap", "strong"))
    found = [(record.protocol, record.changes) for record in recorded(tmp_path)]
    assert found == [("recipe", ""), ("recipe, strong augmentation", "")]


def test_seeds_stand_together_and_a_run_counts_once(tmp_path):
    for seed in (13, 11, 12):
        finish(tmp_path / f"{seed}", small_config(), accuracy=seed / 100, seed=seed)
    finish(tmp_path / "other", small_config("SimpleViT"), seed=11)
    old = recorded(tmp_path)
    again = [dataclasses.replace(old[0], validation_accuracy=0.5, commit="7654321")]
    path = tmp_path / "results" / "runs.csv"
    records.write(records.merge(old, again), path)
    found = records.read(path)
    assert [(record.network, record.seed) for record in found] == [
        ("isometric_vit", 11),
        ("isometric_vit", 12),
        ("isometric_vit", 13),
        ("simple_vit", 11),
    ]
    assert [record.validation_accuracy for record in found[:3]] == [0.5, 0.12, 0.13]
    assert len({record.setting for record in found}) == 2
    again = tmp_path / "again.csv"
    records.write(found, again)
    assert again.read_text() == path.read_text()


def test_numbers_of_an_old_page_are_not_runs_of_the_same_setting(tmp_path):
    finish(tmp_path / "run", small_config())
    (run,) = recorded(tmp_path)
    page = dataclasses.replace(run, source="RESULTS.md@884f800: Vanilla against skips")
    assert page.setting != run.setting
    assert len(records.merge([page], [run])) == 2


def test_runs_on_other_images_are_not_runs_of_the_same_setting(tmp_path):
    finish(tmp_path / "run", small_config())
    (run,) = recorded(tmp_path)
    others = ({"train_split": "train[:45000]"}, {"validation_split": "test[:100]"}, {"validation_split": "train[:100]"})
    runs = [run, *(dataclasses.replace(run, **splits) for splits in others)]
    runs.append(dataclasses.replace(runs[-1], validation_split="train[45000:]"))
    assert len(records.merge([], runs)) == len({each.setting for each in runs}) == 5


def spoil(path, **values):
    """Change the columns of the first row."""
    rows = list(csv.DictReader(path.read_text().splitlines()))
    rows[0] |= values
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "2"}, "line 2: written by a newer program .format 2, this one has 1.; update"),
        ({"steps": "many"}, "line 2: no record .*many"),
        ({"validation_accuracy": ""}, "line 2: no record .*is empty"),
        ({"accuracy_at": "500"}, "line 2: no record"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(tmp_path, values, message):
    finish(tmp_path / "run", small_config())
    path = tmp_path / "runs.csv"
    records.write(recorded(tmp_path), path)
    spoil(path, **values)
    with pytest.raises(UserError, match=message):
        records.read(path)


def test_the_program_refuses_what_is_no_record_and_keeps_the_rest(tmp_path, monkeypatch, capsys):
    finish(tmp_path / "good", small_config())
    finish(tmp_path / "dirty", small_config(), commit="0123456789abcdef+")
    finish(tmp_path / "partly", small_config(), commits=["0123456789abcdef+", "0123456789abcdef"])  # until resumed
    finish(tmp_path / "unfinished", small_config())
    (tmp_path / "unfinished" / "results.json").unlink()
    path = tmp_path / "runs.csv"

    def program(folder):
        monkeypatch.setattr("sys.argv", ["records", str(tmp_path / folder), "--output", str(path)])
        records.main()
        return capsys.readouterr()

    with pytest.raises(SystemExit, match="2"):
        program("dirty")
    assert not path.exists()
    assert "made by uncommitted code (commit 0123456789abcdef+); commit it" in capsys.readouterr().err
    done = program(".")
    assert "1 runs recorded, 3 refused" in done.out
    assert done.err.count("refused: ") == 3
    assert len(records.read(path)) == 1


def test_the_records_of_the_repository_are_whole(tmp_path):
    found = records.read()
    records.write(found, tmp_path / "runs.csv")
    assert (tmp_path / "runs.csv").read_text() == records.PATH.read_text()
    assert len(records.merge([], found)) == len(found)


def test_curves_are_read_as_they_were_written(tmp_path):
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "accuracy": 0.5}, {"step": 3, "loss": 1}]
    text = "\n".join([*map(json.dumps, lines), '{"step": 4, "lo'])  # a line that a full disk cut off
    (tmp_path / "metrics.jsonl").write_text(text)
    curves = {tag: [list(part) for part in curve] for tag, curve in records.read_curves(tmp_path).items()}
    assert curves == {"loss": [[1, 3], [2, 1]], "accuracy": [[2], [0.5]]}
    with pytest.raises(UserError, match=r"has no curves in metrics.jsonl; a run of an older version is read by"):
        records.read_curves(tmp_path / "none")
