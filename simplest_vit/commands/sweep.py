r"""Train a grid of configs over seeds, and print their report at the end.

    simplest-vit sweep --config my_config.py --workdir runs/sweep --seeds 3 \
        --grid config.optimizer.learning_rate=5e-4,3e-4 --grid config.weight_decay=0,5e-5

Each run is a process with its own folder in --workdir, and its lines are in log.txt there. By default one run per GPU
is active at a time; with --at_once=N, N runs share the GPUs equally. Rerun the command to resume unfinished runs. With
--print_commands the commands are printed instead, for a cluster.
"""

import dataclasses
import itertools
import math
import os
import pathlib
import shlex
import subprocess
import sys
import time
import urllib.parse
from typing import Any

from absl import flags

from simplest_vit import cli, preemption
from simplest_vit.analysis.report import report
from simplest_vit.config import flatten
from simplest_vit.errors import Interrupted, UserError
from simplest_vit.files import writing
from simplest_vit.training.workdir import CONFIG, RESULTS, check_workdir

_LOG = "log.txt"
_LONGEST_NAME = 255  # bytes in the name of a folder
_TRAIN = (sys.executable, "-m", "simplest_vit", "train")


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of the grid: values by field, and a run for each seed."""

    values: dict[str, str]
    workdirs: list[pathlib.Path]
    commands: list[list[str]]


def parse_grid(axes: list[str], config: Any) -> dict[str, list[str]]:
    """Parse texts `config.FIELD=VALUE,VALUE,...` that name fields of a config: values by field, without `config.`.

    Raises:
      UserError: If a text does not have this form, the config has no such field, or a field is repeated.
    """
    fields = flatten(config.to_dict())
    grid: dict[str, list[str]] = {}
    for axis in axes:
        name, equals, values = axis.partition("=")
        field = name.removeprefix("config.")
        if not equals or not name.startswith("config.") or not all(values.split(",")):
            raise UserError(f"--grid={axis}: expected config.FIELD=VALUE,VALUE,...")
        if field not in fields or field == "seed":
            raise UserError(
                f"--grid={axis}: the config has no field {field!r} to vary; its fields are in simplest_vit/config.py"
            )
        if field in grid:
            raise UserError(f"--grid={axis}: the field is repeated; name it once, with all its values")
        grid[field] = values.split(",")
    return grid


def plan(grid: dict[str, list[str]], seeds: int, first_seed: int, workdir: str, arguments: list[str]) -> list[Point]:
    """Lay out all runs below `workdir`, in the order of the grid.

    The seeds of a point's runs count up from `first_seed`; `arguments` are `--config` and overrides.
    """
    points = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        name = ",".join(f"{field.rsplit('.', 1)[-1]}={value}" for field, value in values.items()) or "config"
        name = urllib.parse.quote(name, safe="=,")
        if len(name) > _LONGEST_NAME:
            raise UserError(
                f"--grid: the folder name {name[:40]}... has {len(name)} characters, at most {_LONGEST_NAME} are "
                "possible; vary fewer fields at a time"
            )
        point = Point(values, [], [])
        for seed in cli.seeds_from(first_seed, seeds):
            folder = pathlib.Path(workdir, name, f"seed={seed}")
            overrides = [f"--config.{field}={value}" for field, value in {**values, "seed": str(seed)}.items()]
            point.workdirs.append(folder)
            point.commands.append([*_TRAIN, *arguments, *overrides, f"--workdir={folder}"])
        points.append(point)
    return points


def check_points(points: list[Point]) -> None:
    """Check the config and the folders of every point now, so that none fails hours later.

    Raises:
      UserError: If a point has an error, two points are the same run, or a folder holds the run of another config; the
        message names them.
    """
    configs: dict[str, str] = {}
    for point in points:
        values = " ".join(f"config.{field}={value}" for field, value in point.values.items())
        try:
            config = cli.load_config(point.commands[0][len(_TRAIN) : -1])
        except UserError as error:
            raise UserError(f"--grid: at {values}: {error}") from error
        if same := configs.get(str(config)):
            raise UserError(f"--grid: {values} is the same run as {same}; name each value once")
        configs[str(config)] = values
        for seed, folder in enumerate(point.workdirs, config.seed):
            check_workdir(str(folder), config.to_dict() | {"seed": seed})


def find_devices() -> tuple[str, list[int]]:
    """Return the platform that JAX chooses here and the numbers of its devices; a UserError if there is none."""
    # In a separate process, because a process that has initialized JAX keeps memory of every GPU until it ends.
    program = "import jax; d = jax.local_devices(); print(d[0].platform, *(x.local_hardware_id for x in d))"
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if found.returncode:
        raise UserError(f"JAX finds no device: {(found.stderr.strip().splitlines() or ['it was killed'])[-1]}")
    platform, *numbers = found.stdout.splitlines()[-1].split()
    return platform, [int(number) for number in numbers]


def share_devices(platform: str, devices: list[int], at_once: int | None) -> list[dict[str, str]]:
    """Share the GPUs of this machine evenly among the runs that are active at the same time.

    Args:
      platform: Platform of the devices. Devices other than GPUs are not shared: each run sees all of them.
      at_once: Number of simultaneous runs; None for one per GPU, or one without GPUs. If there are more runs than GPUs,
        several runs share a GPU.

    Returns:
      For each simultaneous run the environment variables that select its devices and, on a shared GPU, its fraction of
      the memory.
    """
    if platform != "gpu":
        return [{}] * (at_once or 1)
    at_once = at_once or len(devices)
    each = max(len(devices) // at_once, 1)
    shares = [[devices[(slot * each + i) % len(devices)] for i in range(each)] for slot in range(at_once)]
    names = ("JAX_CUDA_VISIBLE_DEVICES", "JAX_ROCM_VISIBLE_DEVICES")
    # By default, each run would preallocate three quarters of its GPU's memory.
    together = math.ceil(at_once / len(devices))
    memory = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / together:.3f}"} if together > 1 else {}
    return [dict.fromkeys(names, ",".join(map(str, share))) | memory for share in shares]


def execute(points: list[Point], environments: list[dict[str, str]]) -> int:
    """Run all points, one at a time in each of the environments; return the number of runs that failed.

    The lines of a run go to `log.txt` in its folder, so that no run waits for a reader. The sweep continues after a
    failure of a run. On a signal or an error of its own, the active runs save their step. A run that has already
    finished ends immediately, or fails if its folder holds the run of another config.

    Raises:
      Interrupted: If a signal was received.
      UserError: If the folder of a run cannot be written.
    """
    waiting = [run for point in points for run in zip(point.workdirs, point.commands, strict=True)]
    failed = 0
    running: dict[int, tuple[pathlib.Path, subprocess.Popen]] = {}
    with preemption.deferred():
        try:
            while waiting or running:
                for slot, environment in enumerate(environments):
                    if slot in running and running[slot][1].poll() is not None:
                        folder, process = running.pop(slot)
                        if process.returncode:
                            failed += 1
                            last = (folder / _LOG).read_text(errors="replace").splitlines()[-1:]
                            print(f"failed: {folder / _LOG}: {''.join(last)}", file=sys.stderr, flush=True)
                    if slot not in running and waiting:
                        folder, command = waiting.pop(0)
                        running[slot] = folder, _start(folder, command, environment)
                if preemption.received():
                    raise Interrupted("rerun the command to resume unfinished runs")
                time.sleep(0.1)
        finally:  # after a signal, or an error such as a full disk, no run continues
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.wait()
    return failed


def _start(folder: pathlib.Path, command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    print(f"{folder / _LOG}: {shlex.join(command)}", file=sys.stderr, flush=True)
    with writing(f"--workdir={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOG).open("ab") as log:
            # The run imports what this process does, even if another copy of the package is in the current folder.
            paths = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
            variables = os.environ | paths | environment
            return subprocess.Popen(command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def main() -> None:
    """Run the command."""
    axes = flags.DEFINE_multi_string("grid", [], "config.FIELD=VALUE,VALUE,...; repeat the flag for each field.")
    seeds = flags.DEFINE_integer(
        "seeds", 1, "Number of seeds for each point of the grid, from config.seed up.", lower_bound=1
    )
    at_once = flags.DEFINE_integer(
        "at_once", None, "Number of simultaneous runs (default: one per GPU, or one without GPUs).", lower_bound=1
    )
    printed = flags.DEFINE_bool(
        "print_commands", False, "Print the commands of unfinished runs instead of running them."
    )

    def program() -> None:
        config = cli.CONFIG.value
        if (pathlib.Path(str(cli.WORKDIR.value)) / CONFIG).exists():
            raise UserError(f"--workdir={cli.WORKDIR.value} is the folder of a run; a sweep needs its own folder")
        check_workdir(str(cli.WORKDIR.value), {})
        grid = parse_grid(axes.value, config)
        points = plan(grid, seeds.value, config.seed, str(cli.WORKDIR.value), cli.config_arguments())
        check_points(points)
        if printed.value:
            for point in points:
                for folder, line in zip(point.workdirs, point.commands, strict=True):
                    if not (folder / RESULTS).exists():
                        print(shlex.join(line))
            return
        failed = execute(points, share_devices(*find_devices(), at_once.value))
        print(report(str(folder) for point in points for folder in point.workdirs if folder.is_dir()))
        if failed:
            raise UserError(f"{failed} runs failed, see above; correct what their logs report and rerun the command")

    cli.run(program, "simplest-vit sweep --config FILE --workdir FOLDER --grid config.FIELD=VALUE,VALUE")
