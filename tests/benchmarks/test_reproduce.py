"""The runs that a table is made of, and the choice of their rates."""

import json
import math
import pathlib
import re
import subprocess

import pytest

from benchmarks import ideas, records, reproduce
from benchmarks.cells import Results
from benchmarks.protocols import HOLD_OUT, NETWORKS, RECIPE_NETWORKS, TABLES
from simplest_vit import cli
from simplest_vit.commands.sweep import check_points
from simplest_vit.errors import TrainingError, UserError
from simplest_vit.models.attention_kinds import KINDS
from simplest_vit.optimizers.factory import optimizers
from simplest_vit.training.metrics import Meter, check_finite

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'

ROWS = ("isometric", "SimpleViT", "E-SPA + TAT, 24 blocks")
TABLE = TABLES["headline"]._replace(rows=ROWS, learning_rates={"soap": (1e-3, 2e-3)}, data=("cifar10",), seeds=(11, 12))


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for table, found in ((KINDS, ideas.KINDS), (optimizers(), ideas.OPTIMIZERS)):
        for name, idea in found.items():
            monkeypatch.setitem(table, name, idea)


def config(point, run=0):
    """The config of a run, as the command line gives it."""
    command = point.commands[run]
    return cli.load_config(command[command.index("train") + 1 : -1])


def test_rates_are_chosen_on_the_hold_out_and_each_row_may_have_its_own(tmp_path):
    found = reproduce.choices(TABLE, str(tmp_path), {"data.dir": "/data"}, check=False)
    assert list(found) == [("cifar10", "soap", row) for row in ROWS]
    rates = [[config(point).optimizer.learning_rate for point in points] for points in found.values()]
    assert rates == [[1e-3, 2e-3], [1e-3, 2e-3], [5e-4, 1e-3, 2e-3]]
    run = config(found["cifar10", "soap", "isometric"][0])
    assert (run.data.train_split, run.data.validation_split) == tuple(HOLD_OUT.values())
    assert (run.seed, run.steps, run.warmup_steps, run.batch_size, run.data.dir) == (1, 1500, 75, 64, "/data")
    assert (run.model.num_heads, run.model.width) == (8, 64)


def test_fresh_seeds_train_on_everything_and_read_the_test_images_once(tmp_path):
    chosen = {key: 2e-3 for key, _ in reproduce.cells(TABLE)}
    points = reproduce.reported(TABLE, chosen, str(tmp_path), {})
    assert len(points) == len(ROWS)
    runs = [config(points[0], run) for run in (0, 1)]
    assert [run.seed for run in runs] == [11, 12]
    assert runs[0].data.train_split == "train"
    assert runs[0].data.validation_split is None
    assert runs[0].steps == 1500
    assert runs[0].eval_every == runs[0].steps
    chosen_in = [
        point for tries in reproduce.choices(TABLE, str(tmp_path), {}, check=False).values() for point in tries
    ]
    folders = [folder for point in (*points, *chosen_in) for folder in point.workdirs]
    assert len(set(folders)) == len(folders) == 2 * len(ROWS) + 7


def test_in_equal_time_a_cheaper_network_is_chosen_and_reported_in_more_steps(tmp_path):
    table = TABLES["equal_time"]._replace(learning_rates={"soap": (1e-3,)})
    chosen = [points[0] for points in reproduce.choices(table, str(tmp_path), {}, check=False).values()]
    reported = reproduce.reported(table, {key: 1e-3 for key, _ in reproduce.cells(table)}, str(tmp_path), {})
    for points in (chosen, reported):
        steps = {point.values["row"]: config(point).steps for point in points}
        assert steps == {row: table.steps_of.get(row, 1500) for row in table.rows}
    assert config(reported[1]).eval_every == 2700


def test_a_long_run_has_strong_augmentation(tmp_path):
    for name, num_ops, steps in (("headline", 0, 1500), ("long", 2, 7812)):
        key = ("cifar10", "soap", "isometric")
        run = config(reproduce.choices(TABLES[name], str(tmp_path), {}, check=False)[key][0])
        assert (run.data.rand_augment.num_ops, run.data.mixup_alpha > 0, run.steps) == (num_ops, num_ops > 0, steps)


def test_a_recipe_is_chosen_by_a_third_of_its_epochs(tmp_path):
    key = ("cifar10", "soap", "isometric")
    run = config(reproduce.choices(TABLES["s4"], str(tmp_path), {}, check=False)[key][0])
    assert (run.epochs, run.steps, run.batch_size, run.model.num_heads) == (30, None, 2048, None)
    chosen = {key: 1e-3 for key, _ in reproduce.cells(TABLES["s4"])}
    assert config(reproduce.reported(TABLES["s4"], chosen, str(tmp_path), {})[0]).epochs == 90


def test_the_best_rate_is_that_of_the_hold_out_and_a_row_without_a_run_is_named(tmp_path, capsys):
    found = reproduce.choices(TABLE, str(tmp_path), {}, check=False)
    for points in found.values():
        for point, accuracy in zip(points, (0.5, 0.7, 0.6), strict=False):
            point.workdirs[0].mkdir(parents=True)
            (point.workdirs[0] / "results.json").write_text(json.dumps({"validation_accuracy": accuracy}))
    several = found["cifar10", "soap", "isometric"][1]
    several.workdirs.append(tmp_path / "another seed")
    several.workdirs[1].mkdir()
    (several.workdirs[1] / "results.json").write_text(json.dumps({"validation_accuracy": 0.2}))
    assert [*reproduce.best_rates({"row": [found["cifar10", "soap", "isometric"][0], several]}).values()] == [1e-3]
    several.workdirs.pop()
    assert set(reproduce.best_rates(found).values()) == {2e-3, 1e-3}
    assert "0.0005: 50.00%, 0.001: 70.00%, 0.002: 60.00%; chosen 0.001" in capsys.readouterr().out
    for point in found["cifar10", "soap", "SimpleViT"]:
        (point.workdirs[0] / "results.json").unlink()
        (point.workdirs[0] / "log.txt").write_text("error: validation_loss is not finite at step 5: the run stops")
    with pytest.raises(TrainingError, match="no run of cifar10, soap, SimpleViT finished"):
        reproduce.best_rates(found)


def test_nothing_is_chosen_without_a_run_that_failed_unless_its_loss_was_not_finite(tmp_path):
    points = next(iter(reproduce.choices(TABLE, str(tmp_path), {}, check=False).values()))
    failed, finished = (point.workdirs[0] for point in points)
    for folder in (failed, finished):
        folder.mkdir(parents=True)
    (finished / "results.json").write_text('{"validation_accuracy": 0.1}')
    meter = Meter(batch_size=1, max_skipped_steps=1)
    meter.add(dict.fromkeys(("loss", "correct", "count"), 0.0) | {"skipped_steps": 1, "skipped_in_a_row": 1})
    for stop in (lambda: check_finite({"validation_loss": math.nan}, 5), lambda: meter.report(5)):
        with pytest.raises(TrainingError) as stopped:
            stop()
        meant = f"step 5\nerror: {stopped.value}\n"
        (failed / "log.txt").write_text(meant)
        assert reproduce.best_rates({"row": points}) == {"row": 2e-3}
        for text in ("", meant + "error: the disk is full\n"):
            (failed / "log.txt").write_text(text)
            with pytest.raises(TrainingError, match=f"^no rate is chosen yet: .*{failed}/log.txt reports and rerun"):
                reproduce.best_rates({"row": points})


def test_ideas_are_compared_over_three_seeds_on_the_hold_out(tmp_path):
    for name, optimizer in (("ideas", "soap"), ("adam", "adam_by_shape"), ("near_isometry", "soap_near_isometry")):
        for tries in reproduce.choices(TABLES[name], str(tmp_path), {}, check=False).values():
            assert [config(tries[0], run).seed for run in range(3)] == [1, 2, 3]
        assert config(tries[0]).optimizer.name == optimizer
        assert not TABLES[name].seeds


@pytest.mark.parametrize("name", TABLES)
def test_the_smallest_version_of_a_table_is_two_steps_of_each_row(name, tmp_path):
    table = reproduce.smallest(TABLES[name])
    points = list(reproduce.choices(table, str(tmp_path), {}, check=True).values())
    assert {len(tries) for tries in points} == {1}
    assert len(points) == len(table.rows) * len(table.learning_rates)
    run = config(points[0][0])
    assert run.steps == run.eval_every == table.steps == 2
    assert run.data.validation_split == "train[45000:45100]"
    chosen = {key: 1e-3 for key, _ in reproduce.cells(table)}
    last = reproduce.reported(table, chosen, str(tmp_path), {}, check=True)
    assert config(last[0], 0).data.validation_split == "test[:100]" if table.seeds else not last[0].commands


def test_a_part_of_a_table_is_chosen_and_a_mistyped_name_is_told_the_near_ones():
    table = TABLES["headline"]
    few = reproduce.part(table, data=["cifar100"], optimizer=["soap"], row=["SimpleViT", "isometric"])
    assert [key for key, _ in reproduce.cells(few)] == [("cifar100", "soap", row) for row in ("isometric", "SimpleViT")]
    assert few.learning_rates == {"soap": table.learning_rates["soap"]}
    assert reproduce.part(table, data=[], optimizer=[], row=[]) == table
    with pytest.raises(UserError, match=r"^--row=isometrc is not in this table; did you mean 'isometric'\?$"):
        reproduce.part(table, data=[], optimizer=[], row=["isometric", "isometrc"])
    with pytest.raises(UserError, match=r"^--optimizer=sgd is .*; expected one of soap, muon, adam$"):
        reproduce.part(table, data=[], optimizer=["sgd"], row=[])


def test_every_row_of_every_table_is_a_network_of_its_own():
    for table in TABLES.values():
        assert set(table.rows) <= set(reproduce.networks(table.protocol))
        check_points(
            [reproduce.point(table, *cell, 1e-3, (1,), stage="", root="", fields={}) for cell in reproduce.cells(table)]
        )
    settings = [(network.preset, str(sorted(network.fields.items()))) for network in NETWORKS.values()]
    assert len(set(settings)) == len(settings)
    assert set(RECIPE_NETWORKS) <= set(NETWORKS)


def test_the_readme_says_how_many_runs_its_comparisons_take(tmp_path):
    counts = []
    for name in ("headline", "equal_time"):
        table = reproduce.part(TABLES[name], data=["cifar10"], optimizer=["soap"], row=[])
        found = reproduce.choices(table, str(tmp_path), {}, check=False)
        points = [point for points in found.values() for point in points]
        points += reproduce.reported(table, dict.fromkeys(found, 1e-3), str(tmp_path), {})
        counts.append(sum(len(point.commands) for point in points))
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    assert f"({counts[0]} and {counts[1]} runs of " in readme


def test_the_first_cifar_command_of_the_readme_is_a_run_of_its_headline():
    readme = (pathlib.Path(__file__).parents[2] / "README.md").read_text()
    command = re.search(r"python main.py (--config configs/cifar10.*?)\n```", readme, re.DOTALL)[1]
    given, _, overrides = command.replace("\\\n", "").partition("--workdir runs/shift")
    row = "shift MLP"
    (rate,) = {run.learning_rate for run in Results(records.read()).in_equal_time(row, "cifar10").runs.values()}
    run = {"stage": "", "root": "", "fields": {}}
    point = reproduce.point(TABLES["equal_time"], ("cifar10", "soap", row), NETWORKS[row], rate, (1,), **run)
    found, expected = cli.load_config([*given.split(), *overrides.split()]), config(point)
    for field in ("seed", "eval_every", "checkpoint_every", "log_every"):
        found[field] = expected[field]
    assert found.to_dict() == expected.to_dict()


def test_the_processes_of_a_table_know_its_kinds_of_attention():
    row = "isometric, shift_late"
    key, network = ("cifar10", "soap", row), NETWORKS[row]
    point = reproduce.point(TABLES["attention"], key, network, 1e-3, (1,), stage="", root="", fields={})
    done = subprocess.run([*point.commands[0], "--print_config"], capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["model"]["attention"] == "shift_late", done.stderr
