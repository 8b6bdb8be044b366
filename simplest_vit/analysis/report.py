"""Tables of the finished runs below some folders, one for each data set: the settings that differ, and the accuracy."""

import dataclasses
import itertools
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
_NEEDED = ("validation_accuracy", "best_validation_accuracy", "steps", "seed", "config", "wall_time_s")
# The first columns, and results that are also columns; above the table if they are the same in all of its rows.
_FIRST = ("model.name", "optimizer.name", "optimizer.learning_rate")
_RECORDED = ("steps", "device", "commit")
_EXPLANATION = (
    "Validation accuracy in percent after the last step and at the best evaluation: mean ± standard deviation (seeds)."
)


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
        ignored = {name for name in config if is_resumable(name)} - {"eval_every", "checkpoint_every"} | {"seed"}
        return {name: value for name, value in config.items() if name not in ignored}

    @property
    def data(self) -> str:
        """The data set by its content and the images evaluated: `cifar10 (d2fbfae3), 10000 images of test`."""
        try:
            info = read_json(self.path / DATASET)
            return "{name} ({fingerprint:.8}), {validation_size} images of {validation_split}".format(**info)
        except (UserError, TypeError, KeyError):
            return str(self.config.get("data.name"))


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


def report(folders: Iterable[str]) -> str:
    """Return a Markdown table for each data set, and a line for each run that is in none.

    Runs that differ only in their seed share a row, in which each seed counts once.

    Raises:
      UserError: If a folder does not exist.
    """
    runs, problems = find_runs(folders)
    groups: dict[str, dict[str, dict[int, FinishedRun]]] = {}
    for run in runs:
        seeds = groups.setdefault(run.data, {}).setdefault(json.dumps(run.settings, sort_keys=True), {})
        first = seeds.setdefault(run.results["seed"], run)
        if first is not run:
            problems.append(f"{run.path}: repeats seed {run.results['seed']} of {first.path}, which counts")
    tables = [
        f"## {data}\n\n{_table([[*seeds.values()] for seeds in rows.values()])}"
        for data, rows in sorted(groups.items())
    ]
    parts = [_EXPLANATION, *tables] if tables else ["no finished run"]
    if problems:
        parts.append("Not included:\n\n" + "\n".join(f"- {problem}" for problem in problems))
    return "\n\n".join(parts)


def _table(groups: list[list[FinishedRun]]) -> str:
    """Return what all rows have in common, and a table with a row for each group of seeds, the best first."""
    groups = sorted(groups, key=lambda group: -_mean(group, "validation_accuracy"))
    facts = [group[0].settings | {name: _each(group, name) for name in _RECORDED} for group in groups]
    names = [name for name in dict.fromkeys((*_FIRST, *itertools.chain(*facts))) if _varies(name, facts)]
    rows = [
        {_short(name): "-" if own.get(name) is None else str(own[name]) for name in names}
        | {
            "accuracy": _over_seeds(group, "validation_accuracy"),
            "best": _over_seeds(group, "best_validation_accuracy"),
            "seconds": f"{_mean(group, 'wall_time_s'):.0f}",
            "best run": str(max(group, key=lambda run: run.results["best_validation_accuracy"]).path),
        }
        for group, own in zip(groups, facts, strict=True)
    ]
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    common = [f"{_short(name)} {facts[0][name]}" for name in (*_FIRST, *_RECORDED) if name not in names]
    table = ("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
    return "\n".join((*([f"All: {', '.join(common)}.\n"] if common else []), *table))


def _varies(name: str, facts: list[dict[str, Any]]) -> bool:
    """Return whether a setting differs; an optimizer's own setting, between rows of that optimizer."""
    shared = name in FIELDS or name in _RECORDED
    values = {(not shared and own["optimizer.name"], str(own[name])) for own in facts if name in own}
    return len(values) > len({optimizer for optimizer, _ in values})


def _short(name: str) -> str:
    """Shorten a field for a heading: model.name -> network, optimizer.learning_rate -> learning_rate."""
    section, _, rest = name.partition(".")
    short = rest if section in ("model", "optimizer", "data") and rest not in FIELDS else name
    return {"model.name": "network", "optimizer.name": "optimizer"}.get(name, short)


def _each(group: list[FinishedRun], name: str) -> str:
    """Format each value of a result once: 462, 462, 300 -> "462 / 300"; commits are shortened."""
    if name == "commit":  # a run may have been resumed with other code
        commits = itertools.chain(*(run.results.get("commits") or [run.results.get(name)] for run in group))
        return " / ".join(dict.fromkeys((commit or "-")[:10] for commit in commits))
    return " / ".join(dict.fromkeys(str(run.results.get(name) or "-") for run in group))


def _mean(group: list[FinishedRun], name: str) -> float:
    return statistics.fmean(run.results[name] for run in group)


def _over_seeds(group: list[FinishedRun], name: str) -> str:
    """Format an accuracy in percent, such as `97.41 ± 0.21 (3)`."""
    spread = f" ± {100 * statistics.stdev(run.results[name] for run in group):.2f}" if len(group) > 1 else ""
    return f"{100 * _mean(group, name):.2f}{spread} ({len(group)})"
