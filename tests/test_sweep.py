"""The plan of a sweep, its table, and small sweeps through real processes."""

import itertools
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

from simplest_vit import cli
from simplest_vit.commands import sweep
from simplest_vit.errors import UserError
from simplest_vit.training.workdir import lock_workdir
from tests.tiny import DIGITS, tiny_config

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def test_the_plan_is_the_product_of_the_grid_and_the_seeds(tmp_path):
    axes = ["config.optimizer.learning_rate=5e-4,3e-4", "config.weight_decay=0,5e-5"]
    grid = sweep.parse_grid(axes, tiny_config())
    points = sweep.plan(grid, 3, 7, str(tmp_path), ["--config=configs/digits.py"])
    assert [list(point.values.values()) for point in points] == [
        ["5e-4", "0"],
        ["5e-4", "5e-5"],
        ["3e-4", "0"],
        ["3e-4", "5e-5"],
    ]
    assert points[1].commands[2][1:] == [
        *("-m", "simplest_vit", "train"),
        "--config=configs/digits.py",
        "--config.optimizer.learning_rate=5e-4",
        "--config.weight_decay=5e-5",
        "--config.seed=9",
        f"--workdir={tmp_path}/learning_rate=5e-4,weight_decay=5e-5/seed=9",
    ]
    folders = [folder for point in points for folder in point.workdirs]
    assert len(set(folders)) == 12


def test_values_with_slashes_have_folders_of_their_own(tmp_path):
    grid = {"data.dir": ["/data/a_b", "/data/a/b", "/data_a/b"]}
    folders = [point.workdirs[0] for point in sweep.plan(grid, 1, 0, str(tmp_path), [])]
    assert len(set(folders)) == 3
    assert {folder.parents[1] for folder in folders} == {tmp_path}


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ("config.learning_rate=1", "no field 'learning_rate'"),
        ("optimizer.learning_rate=1", "expected config.FIELD="),
        ("config.weight_decay", "expected config.FIELD="),
        ("config.weight_decay=1,,2", "expected config.FIELD="),
        ("config.seed=1,2", "no field 'seed' to vary"),
        ("config.epochs=5", "is repeated"),
    ],
)
def test_a_wrong_grid_is_one_line(axis, message):
    with pytest.raises(UserError) as caught:
        sweep.parse_grid(["config.epochs=3,4", axis], tiny_config())
    assert message in str(caught.value)


@pytest.mark.parametrize("values", ["1,2,1", "1e-3,0.001"])
def test_a_point_that_is_there_twice_is_one_line(tmp_path, values):
    points = sweep.plan({"weight_decay": values.split(",")}, 1, 0, str(tmp_path), ["--config=digits"])
    first, *_, last = (f"config.weight_decay={value}" for value in values.split(","))
    with pytest.raises(UserError, match=f"^--grid: {last} is the same run as {first}; name each value once$"):
        sweep.check_points(points)


def test_a_run_uses_the_code_of_its_sweep_not_another_copy_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "simplest_vit").mkdir()
    (tmp_path / "simplest_vit" / "__init__.py").write_text("raise SystemExit('another copy')")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "simplest_vit", "--version"]
    assert sweep.execute([sweep.Point({}, [tmp_path / "run"], [command])], [{}]) == 0
    assert (tmp_path / "run" / "log.txt").read_text().startswith("simplest-vit ")


def test_failures_are_counted_and_the_sweep_goes_on_behind_them(tmp_path, capsys):
    fails = [sys.executable, "-c", "print('first'); raise SystemExit('last')"]
    works = [sys.executable, "-c", f"open({str(tmp_path / 'made')!r}, 'w')"]
    folders = [tmp_path / "fails", tmp_path / "works"]
    assert sweep.execute([sweep.Point({}, folders, [fails, works])], [{}]) == 1
    assert (tmp_path / "made").exists()
    assert sorted((folders[0] / "log.txt").read_text().split()) == ["first", "last"]
    assert f"failed: {folders[0]}/log.txt: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_leaves_no_run_behind(tmp_path, monkeypatch):
    started, start = [], sweep._start
    monkeypatch.setattr(sweep, "_start", lambda *arguments: started.append(start(*arguments)) or started[-1])
    (tmp_path / "file").touch()
    sleeps = [sys.executable, "-c", "import time; time.sleep(300)"]
    folders = [tmp_path / "sleeps", tmp_path / "file" / "run"]
    with pytest.raises(UserError, match=r"^--workdir=.*/file/run cannot be written"):
        sweep.execute([sweep.Point({}, folders, [sleeps, sleeps])], [{}, {}])
    assert [process.poll() for process in started] == [-signal.SIGTERM]


def test_the_lines_of_a_rerun_follow_those_before(tmp_path):
    talks = [sys.executable, "-c", "import sys; print(300_000 * 'x'); print('end', file=sys.stderr)"]
    for _ in range(2):
        assert sweep.execute([sweep.Point({}, [tmp_path], [talks])], [{}]) == 0
    assert (tmp_path / "log.txt").read_text().count("end") == 2


def test_a_folder_s_name_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"has 307 characters, at most 255 are possible"):
        sweep.plan({"data.dir": [303 * "x"]}, 1, 0, str(tmp_path), [])


def test_a_folder_of_another_run_is_refused_before_any_starts(tmp_path):
    arguments, grid = ["--config=digits"], {"weight_decay": ["0", "1"]}
    points = sweep.plan(grid, 2, 7, str(tmp_path), arguments)
    settings = cli.load_config([*arguments, "--config.weight_decay=1", "--config.seed=8"]).to_dict()
    with lock_workdir(points[1].workdirs[1], settings, DIGITS):
        pass
    sweep.check_points(points)
    with pytest.raises(UserError, match=r"weight_decay=1/seed=8 holds another run: its config.epochs is 42.*, now 3"):
        sweep.check_points(sweep.plan(grid, 2, 7, str(tmp_path), [*arguments, "--config.epochs=3"]))


# Writes when it begins and ends, and on which device it is; ends when so many have begun as there are devices.
TELLS = """
import os, pathlib, sys, time
begin, number = pathlib.Path(sys.argv[1] + ".begin"), int(sys.argv[2])
print(time.monotonic(), file=begin.open("w"))
print("on", os.environ.get("JAX_CUDA_VISIBLE_DEVICES"), file=sys.stderr)
deadline = time.monotonic() + 30
while len(list(begin.parent.glob("*.begin"))) < number and time.monotonic() < deadline:
    time.sleep(0.05)
print(time.monotonic(), file=open(sys.argv[1] + ".end", "w"))
"""


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_each_gpu_has_one_run_at_a_time(tmp_path, gpus):
    folders = [tmp_path / "point" / f"seed={seed}" for seed in range(4)]
    (tmp_path / "point").mkdir()
    commands = [[sys.executable, "-c", TELLS, str(folder), str(gpus)] for folder in folders]
    environments = sweep.share_devices("gpu", list(range(gpus)), None)
    assert sweep.execute([sweep.Point({}, folders, commands)], environments) == 0
    on = {seed: int((folder / "log.txt").read_text().removeprefix("on ")) for seed, folder in enumerate(folders)}
    assert set(on.values()) == set(range(gpus))
    times = {
        seed: [float((tmp_path / "point" / f"seed={seed}.{which}").read_text()) for which in ("begin", "end")]
        for seed in on
    }
    for gpu in range(gpus):
        begins_and_ends = sorted(times[seed] for seed in on if on[seed] == gpu)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(begins_and_ends))
    at_work = max(sum(begin <= moment < end for begin, end in times.values()) for moment, _ in times.values())
    assert at_work == gpus


@pytest.mark.parametrize(
    ("platform", "devices", "at_once", "expected"),
    [
        ("cpu", [0], None, [None]),
        ("cpu", [0, 1, 2], 2, [None, None]),
        ("gpu", [2, 5], None, ["2", "5"]),  # of those that JAX_CUDA_VISIBLE_DEVICES leaves
        ("gpu", [0, 1, 2, 3], 1, ["0,1,2,3"]),
        ("gpu", [0, 1, 2, 3], 2, ["0,1", "2,3"]),
        ("gpu", [0, 1, 2, 3], 3, ["0", "1", "2"]),
        ("gpu", [0, 1], 3, ["0", "1", "0"]),
    ],
)
def test_runs_share_the_gpus(platform, devices, at_once, expected):
    found = sweep.share_devices(platform, devices, at_once)
    assert [environment.get("JAX_CUDA_VISIBLE_DEVICES") for environment in found] == expected
    for share in found:  # of a GPU's memory, for all that are on it together
        together = sum(other == share for other in found) if platform == "gpu" else 1
        assert float(share.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75)) * together < 1


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
def test_each_run_gets_the_flags_of_the_config(tmp_path):
    """Those in a flag file, too."""
    (tmp_path / "flags.txt").write_text("--config.label_smoothing=0.25\n")
    given = ["--config", "configs/digits.py", "--noconfig.data.flip", "--config.weight_decay", "1e-5"]
    given += ["-config.epochs=3", "--config.data.flip", "--config.log_every=2 epochs", "--config.steps=None"]
    arguments = ["--seeds", "1", "--print_commands", "--workdir", str(tmp_path / "sweep"), "--grid", "config.sam.rho=0"]
    command = [sys.executable, "-m", "simplest_vit", "sweep", *given, f"--flagfile={tmp_path}/flags.txt", *arguments]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    words = shlex.split(printed)
    expected = ["data.flip=True", "weight_decay=1e-05", "epochs=3.0", "log_every=2 epochs", "steps=None"]
    expected += ["label_smoothing=0.25", "sam.rho=0", "seed=3407"]
    assert words[words.index("train") + 1 : -1] == [
        "--config=configs/digits.py",
        *(f"--config.{assignment}" for assignment in expected),
    ]
    assert cli.load_config(words[words.index("train") + 1 : -1]).steps is None


def test_jax_tells_its_devices():
    assert sweep.find_devices() == ("cpu", list(range(8)))


def test_where_jax_finds_none_is_one_line(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    with pytest.raises(UserError, match=r"^JAX finds no device: .*Unable to initialize backend 'nonsense'.*$"):
        sweep.find_devices()


def command(tmp_path, *arguments):
    return [
        *(sys.executable, "-m", "simplest_vit", "sweep", f"--config={ROOT}/configs/digits.py", "--workdir=sweep"),
        *(f"--config.data.dir={tmp_path}", "--config.model.depth=2", "--config.model.width=16"),
        *("--config.model.num_heads=2", "--config.model.mlp_dim=32", "--config.model.c_val_0_target=0.3"),
        *arguments,
    ]


@pytest.mark.slow
def test_a_small_sweep_from_any_directory_quick(tmp_path):
    """Two points of a few steps at once; then the same command finds them finished."""
    line = command(tmp_path, "--config.steps=2", "--grid", "config.weight_decay=0,5e-5", "--at_once=2")
    first, second = (
        subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True) for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    rows = [line for line in first.stdout.splitlines() if line.count("(1)") == 2]
    assert sorted(line.split()[1] for line in rows) == ["0.0", "5e-05"]
    assert second.stdout == first.stdout
    logs = "".join(path.read_text() for path in tmp_path.glob("sweep/*/*/log.txt"))
    assert logs.count("has finished; this is its results.json") == 2
    line[line.index("--config.model.depth=2")] = "--config.model.depth=1"
    other = subprocess.run(line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert other.returncode != 0
    assert "holds another run: its config.model.depth is 2, now 1" in other.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM, signal.SIGTERM]])
def test_a_sweep_that_is_stopped_has_its_runs_save_their_step(tmp_path, signals):
    line = command(tmp_path, "--config.steps=100000", "--config.checkpoint_every=100000", "--config.log_every=10")
    line += ["--seeds=2", "--at_once=2"]
    with subprocess.Popen(
        line, cwd=tmp_path, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        logs = [tmp_path / "sweep" / "config" / f"seed={seed}" / "log.txt" for seed in (3407, 3408)]
        while process.poll() is None and not all(log.exists() and "step 10/" in log.read_text() for log in logs):
            time.sleep(0.1)
        for number in signals:  # to all processes, as a terminal and a scheduler do; the sweep hands on its own
            os.killpg(process.pid, number)
            time.sleep(0.05)
        said = process.stderr.read()
    assert process.returncode == os.EX_TEMPFAIL
    assert said.endswith("\ninterrupted: rerun the command to resume unfinished runs\n")
    for log in logs:
        (step,) = re.findall(r"^interrupted: step (\d+) of 100000 is saved", log.read_text(), re.MULTILINE)
        assert (log.parent / "checkpoints" / step / "record.json").exists()
