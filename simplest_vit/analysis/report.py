"""A table of the finished runs below some folders: the settings that differ, and the accuracy over seeds."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

from simplest_vit.config import FIELDS, flatten
from simplest_vit.errors import UserError
from simplest_vit.files import read_json
from simplest_vit.training.workdir import CONFIG, DATASET, RESULTS, is_resumable

# What a report needs from `results.json`; runs of other versions are listed, not guessed at.
_NEEDED = ("validation_accuracy", "best_validation_accuracy", "steps", "seed", "config")


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A finished run: its folder and the content of its `results.json`."""

    path: pathlib.Path
    results: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The run's config, by dotted name."""
        return flatten(self.results["config"])

    @property
    def settings(self) -> dict[str, Any]:
        """The part of the config that decides the result, without the seed; fields newer than the run are defaults."""
        config = {name: field.default for name, field in FIELDS.items()} | self.config
        return {name: value for name, value in config.items() if name != "seed" and not is_resumable(name)}

    @property
    def data(self) -> str:
        """The data set by its content, such as `cifar10 (d2fbfae3)`."""
        try:
            info = read_json(self.path / DATASET)
            return f"{info['name']} ({info['fingerprint'][:8]})"
        except (UserError, TypeError, KeyError):
            return str(self.config.get("data.name"))


def mean(runs: list[FinishedRun], name: str = "validation_accuracy") -> float:
    """Compute the mean of a result over seeds."""
    return statistics.fmean(run.results[name] for run in runs)


def summary(runs: list[FinishedRun], name: str = "validation_accuracy") -> str:
    """Format mean, sample standard deviation and number of seeds, such as `0.9741 ± 0.0021 (n = 3)`."""
    spread = f" ± {statistics.stdev(run.results[name] for run in runs):.4f}" if len(runs) > 1 else ""
    return f"{mean(runs, name):.4f}{spread} (n = {len(runs)})"


def find_runs(folders: Iterable[str]) -> tuple[list[FinishedRun], list[str]]:
    """Find the finished runs in folders and their subfolders, and make a line for each run that cannot be used.

    Raises:
      UserError: If a folder does not exist.
    """
    runs, problems = [], []
    for folder in folders:
        root = pathlib.Path(folder)
        if not root.is_dir():
            raise UserError(f"{folder} is not a folder; give folders with runs")
        found = sorted({path.parent for name in (CONFIG, RESULTS) for path in root.rglob(name)})
        if not found:
            problems.append(f"{folder}: no runs")
        for path in found:
            if not (path / RESULTS).exists():
                problems.append(f"{path}: unfinished, it has no {RESULTS}; rerun its command to resume")
                continue
            try:
                results = read_json(path / RESULTS)
            except UserError as error:
                problems.append(str(error))
                continue
            if missing := [name for name in _NEEDED if name not in results]:
                problems.append(f"{path}: of another version, its {RESULTS} lacks {', '.join(missing)}")
            else:
                runs.append(FinishedRun(path, results))
    return runs, problems


def group_runs(runs: Iterable[FinishedRun]) -> tuple[list[list[FinishedRun]], list[str]]:
    """Group runs of the same data set and config that differ only in their seed, in their order of appearance.

    A seed counts once in a group; there is a line for each run that repeats one.
    """
    groups: dict[str, dict[int, FinishedRun]] = {}
    repeated = []
    for run in runs:
        members = groups.setdefault(json.dumps([run.data, run.settings], sort_keys=True), {})
        first = members.setdefault(run.results["seed"], run)
        if first is not run:
            repeated.append(f"{run.path}: repeats seed {run.results['seed']} of {first.path}, which counts")
    return [list(members.values()) for members in groups.values()], repeated


def table(header: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _each(values: Iterable[Any]) -> str:
    """Format each value once: 462, 462, 300 -> "462 / 300"."""
    return " / ".join(dict.fromkeys(map(str, values)))


def differences(groups: list[list[FinishedRun]]) -> list[dict[str, Any]]:
    """Return, for each group, the fields that are not the same in all groups, by dotted name.

    Two seeds of each of two rates: `[{"optimizer.learning_rate": 1e-3}, {"optimizer.learning_rate": 2e-3}]`.
    """
    configs = [{"data": group[0].data} | group[0].settings for group in groups]
    names = sorted({name for config in configs for name in config})
    varying = [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]
    return [{name: config[name] for name in varying if name in config} for config in configs]


def markdown(groups: list[list[FinishedRun]], problems: list[str]) -> str:
    """Return the report: a row for each group, the best first, and a line for each run that is not in it."""
    header = ["network, optimizer", "differs in", "accuracy", "best", "steps", "time", "device", "commit"]
    rows = []
    for group, own in sorted(zip(groups, differences(groups), strict=True), key=lambda pair: -mean(pair[0])):
        config = group[0].config
        seconds = [run.results["wall_time_s"] for run in group if run.results.get("wall_time_s") is not None]
        cells = [
            f"{config.get('model.name')}, {config.get('optimizer.name')}",
            ", ".join(f"{name}={value}" for name, value in own.items()) or "-",
            summary(group),
            summary(group, "best_validation_accuracy"),
            _each(run.results["steps"] for run in group),
            f"{statistics.fmean(seconds):.0f} s" if seconds else "-",
            _each(run.results.get("device", "-") for run in group),
            _each(str(run.results.get("commit") or "-")[:10] for run in group),
        ]
        rows.append(cells)
    parts = [table(header, rows) if rows else "no finished run"]
    if problems:
        parts.append("Not in the table:\n\n" + "\n".join(f"- {problem}" for problem in problems))
    return "\n\n".join(parts)
