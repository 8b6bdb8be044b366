"""Find runs on disk: their results, and their training curves."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np

from simplest_vit.config import flatten
from simplest_vit.errors import UserError
from simplest_vit.training.workdir import CONFIG, DATASET, METRICS, RESULTS, is_resumable, read_metrics

# What a report needs of `results.json`; a run of another version is reported, not guessed at.
_NEEDED = ("validation_accuracy", "best_validation_accuracy", "steps", "seed", "config")

Curve = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its folder and the content of its `results.json`."""

    path: pathlib.Path
    results: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The run's config, by dotted name."""
        return flatten(self.results["config"])

    @property
    def settings(self) -> dict[str, Any]:
        """The part of the config that decides the result, without the seed."""
        return {name: value for name, value in self.config.items() if name != "seed" and not is_resumable(name)}

    @property
    def data(self) -> str:
        """The data set by its content, such as `cifar10 (d2fbfae3)`."""
        try:
            info = json.loads((self.path / DATASET).read_text())
            return f"{info['name']} ({info['fingerprint'][:8]})"
        except (OSError, ValueError, TypeError, KeyError):
            return str(self.config.get("data.name"))


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ only in their seed."""

    runs: list[Run]

    @property
    def config(self) -> dict[str, Any]:
        """The config of the first run, by dotted name."""
        return self.runs[0].config

    @property
    def settings(self) -> dict[str, Any]:
        """What the runs have in common and their result depends on."""
        return self.runs[0].settings

    def mean(self, name: str = "validation_accuracy") -> float:
        """Mean of a result over the seeds."""
        return statistics.fmean(run.results[name] for run in self.runs)

    def summary(self, name: str = "validation_accuracy") -> str:
        """Mean, sample standard deviation and number of seeds, such as `0.9741 ± 0.0021 (n = 3)`."""
        values = [run.results[name] for run in self.runs]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        return f"{self.mean(name):.4f}{spread} (n = {len(self.runs)})"


def find_runs(folders: Iterable[str]) -> tuple[list[Run], list[str]]:
    """Look for runs in folders and everything below.

    Args:
      folders: Paths.

    Returns:
      The finished runs, and one line for each that cannot be used.

    Raises:
      UserError: If a folder does not exist.
    """
    runs, problems = [], []
    for folder in folders:
        root = pathlib.Path(folder)
        if not root.is_dir():
            raise UserError(f"{folder} is no folder; give folders with runs")
        found = sorted({path.parent for name in (CONFIG, RESULTS) for path in root.rglob(name)})
        if not found:
            problems.append(f"{folder}: no runs")
        for path in found:
            if not (path / RESULTS).exists():
                problems.append(f"{path}: unfinished, it has no {RESULTS}; start its command again to go on")
                continue
            try:
                results = json.loads((path / RESULTS).read_text())
                missing = [name for name in _NEEDED if name not in results]
            except (OSError, ValueError, TypeError) as error:
                problems.append(f"{path}: {RESULTS} cannot be read ({error})")
                continue
            if missing:
                problems.append(f"{path}: of another version, its {RESULTS} lacks {', '.join(missing)}")
            else:
                runs.append(Run(path, results))
    return runs, problems


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[str]]:
    """Group runs of one data set and one config that differ only in their seed, in the order in which they come.

    Returns:
      The groups, in which a seed counts once, and one line for each run that repeats a seed.
    """
    groups: dict[str, dict[int, Run]] = {}
    repeated = []
    for run in runs:
        members = groups.setdefault(json.dumps([run.data, run.settings], sort_keys=True), {})
        first = members.setdefault(run.results["seed"], run)
        if first is not run:
            repeated.append(f"{run.path}: repeats seed {run.results['seed']} of {first.path}, which counts")
    return [Group(list(members.values())) for members in groups.values()], repeated


def read_curves(path: pathlib.Path) -> dict[str, Curve]:
    """Read the curves of a run: for each tag of its `metrics.jsonl` steps and values, without those not finite.

    Raises:
      UserError: If it has none.
    """
    points: dict[str, dict[int, float]] = {}
    for line in read_metrics(path):
        for tag, value in line.items():
            if tag != "step" and isinstance(value, int | float):
                points.setdefault(tag, {})[line["step"]] = value
    if not points:
        raise UserError(
            f"{path} has no curves in {METRICS}; a run of an older version is read by the code that made it"
        )
    return {tag: (np.array([*values]), np.array([*values.values()])) for tag, values in points.items()}
