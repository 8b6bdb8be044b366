"""Add finished runs to results/runs.csv, from which the tables of RESULTS.md, README.md and docs/ are generated.

    python -m benchmarks.records runs/headline --selected_on hold-out

Adds a row for each run below the folders, or updates the row of the same run. A run that is unfinished, or was made
by uncommitted code, is refused. The columns:

  protocol ... seed        What was run: `changes` are the fields that differ from the protocol and the preset
  steps                    Steps of the run
  train_split, validation_split
                           In TFDS's syntax; an empty validation split is the data set's own (of CIFAR the test images)
  selected_on              The images by which the learning rate and the network were chosen
  validation_accuracy      At the end
  train_loss               At the end, the mean since the previous report
  accuracy_at, train_loss_at
                           `STEP:VALUE ...`, at the evaluations of the run, at most six
  step_time_s              Median seconds of a step, whatever else ran on the device
  device, commit, source   `source` is the run's folder on the machine that made it, or for numbers of an earlier page
                           PAGE@COMMIT: SECTION; evidence.md are unpublished notes, whose runs have no known commit
"""

import argparse
import csv
import dataclasses
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks import ideas, protocols
from simplest_vit.analysis.report import FinishedRun, find_runs
from simplest_vit.config import flatten
from simplest_vit.errors import UserError, print_error
from simplest_vit.files import write_csv, writing
from simplest_vit.training.workdir import METRICS, is_resumable, read_metrics

PATH = pathlib.Path(__file__).parent.parent / "results" / "runs.csv"
FORMAT = 1
_MARKS = 6
# Fields that have their own columns, and the seed.
_COLUMNS_OF_FIELDS = (
    *("seed", "steps", "epochs", "data.name", "data.train_split", "data.validation_split"),
    *("model.name", "optimizer.name", "optimizer.learning_rate"),
)


@dataclasses.dataclass(frozen=True)
class Record:
    """A row; None for an unknown value."""

    protocol: str
    data: str
    network: str
    changes: str
    optimizer: str
    learning_rate: float | None
    seed: int | None
    steps: int
    train_split: str
    validation_split: str
    selected_on: str
    validation_accuracy: float
    train_loss: float | None
    accuracy_at: dict[int, float]
    train_loss_at: dict[int, float]
    step_time_s: float | None
    device: str
    commit: str
    source: str
    format: int = FORMAT

    @property
    def setting(self) -> tuple[Any, ...]:
        """The settings that runs differing only in their seed share; rows of an old page stay apart from runs."""
        own = (self.network, self.changes, self.optimizer, self.learning_rate, self.steps)
        return (self.protocol, self.data, self.train_split, self.validation_split, *own, self.from_page)

    @property
    def from_page(self) -> bool:
        """True if the numbers were taken from a page, before runs were recorded."""
        return ".md" in self.source.partition(":")[0]

    @property
    def on_hold_out(self) -> bool:
        """True if the accuracy was measured on a part of the training images."""
        return self.validation_split.startswith("train")


FIELDS = tuple(field.name for field in dataclasses.fields(Record))


def read_curves(path: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Read the curves of a run: for each tag in its `metrics.jsonl`, the steps and the finite values.

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


def from_run(run: FinishedRun, selected_on: str) -> Record:
    """Describe a finished run.

    Args:
      run: From `find_runs`.
      selected_on: The images by which its settings were chosen; for a run on the hold-out, the hold-out itself.

    Returns:
      The row.

    Raises:
      UserError: If the code of the run was not committed, or its data set has no recipe.
    """
    results, curves = run.results, read_curves(run.path)
    *_, commit = (committed(each, run.path) for each in results.get("commits") or [results.get("commit")])
    flat = run.config
    protocol, changes = describe(flat)
    none = np.array([]), np.array([])
    accuracy = curves.get("accuracy/validation", none)
    marks = [int(step) for step in accuracy[0]]
    if len(marks) > _MARKS:
        marks = [marks[round(i)] for i in np.linspace(0, len(marks) - 1, _MARKS)]
    validation_split = flat.get("data.validation_split") or ""
    return Record(
        protocol=protocol,
        data=flat["data.name"],
        network=flat["model.name"],
        changes=changes_text(changes),
        optimizer=flat["optimizer.name"],
        learning_rate=flat["optimizer.learning_rate"],
        seed=results["seed"],
        steps=results["steps"],
        train_split=flat.get("data.train_split") or "train",
        validation_split=validation_split,
        selected_on="hold-out" if validation_split.startswith("train") else selected_on,
        validation_accuracy=results["validation_accuracy"],
        train_loss=results.get("train_loss"),
        accuracy_at=_at(accuracy, marks),
        train_loss_at=_at(curves.get("loss/train", none), marks),
        step_time_s=results.get("step_time_median_s"),
        device=str(results.get("device", "")),
        commit=commit,
        source=str(run.path),
    )


def committed(commit: str | None, what: object) -> str:
    """Return a commit in short, or raise a UserError if the code that made `what` was not committed."""
    if not commit or commit.endswith("+"):
        raise UserError(f"{what}: made by uncommitted code (commit {commit or 'unknown'}); commit it and rerun")
    return commit[:7]


def describe(flat: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name the protocol closest to a config, and the fields that differ from it.

    Args:
      flat: The config by dotted names.

    Returns:
      The protocol, with ", strong augmentation" where that is used, and the other fields that differ.

    Raises:
      UserError: If `configs/` has no recipe for the data set.
    """
    augmentation = "strong" if flat.get("data.rand_augment.num_ops") else "basic"
    choice = flat["data.name"], flat["model.name"], flat["optimizer.name"], augmentation
    try:
        base = flatten(protocols.recipe(*choice).to_dict())
    except ModuleNotFoundError as error:
        raise UserError(f"data.name={flat['data.name']} has no recipe in configs/, so no record either") from error
    found = {}
    for name, fields in protocols.PROTOCOLS.items():
        expected = base | fields
        found[name] = {
            field: value
            for field, value in flat.items()
            if field not in _COLUMNS_OF_FIELDS
            and not is_resumable(field)
            and value != expected.get(field)
            and not (value is None and field not in expected)
        }
    protocol = min(found, key=lambda name: len(found[name]))
    return protocol + ", strong augmentation" * (augmentation == "strong"), found[protocol]


def _at(curve: tuple[np.ndarray, np.ndarray], marks: Iterable[int]) -> dict[int, float]:
    values = dict(zip(map(int, curve[0]), map(float, curve[1]), strict=True))
    return {mark: values[mark] for mark in marks if mark in values}


def changes_text(fields: dict[str, Any]) -> str:
    """Return fields as the column `changes` has them."""
    return "; ".join(f"{name}={_text(fields[name])}" for name in sorted(fields))


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, dict):
        return " ".join(f"{step}:{number:.4g}" for step, number in value.items())
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read(path: pathlib.Path = PATH) -> list[Record]:
    """Read the records.

    Raises:
      UserError: If a row cannot be read, or was written by a newer program.
    """
    return [_parse(row, f"{path}, line {line}") for line, row in enumerate(read_rows(path), start=2)]


def read_rows(path: pathlib.Path) -> list[dict[str, str]]:
    """Read a file of records: its rows by column."""
    try:
        return list(csv.DictReader(path.read_text().splitlines()))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def _parse(row: dict[str, str], place: str) -> Record:
    try:
        if int(row["format"]) > FORMAT:
            raise UserError(
                f"{place}: written by a newer program (format {row['format']}, this one has {FORMAT}); update it"
            )
        values: dict[str, Any] = {name: row[name] for name in FIELDS}
        for name in ("seed", "steps", "format"):
            values[name] = int(row[name]) if row[name] else None
        for name in ("learning_rate", "validation_accuracy", "train_loss", "step_time_s"):
            values[name] = float(row[name]) if row[name] else None
        for name in ("accuracy_at", "train_loss_at"):
            pairs = (pair.split(":") for pair in row[name].split())
            values[name] = {int(step): float(number) for step, number in pairs}
        if values["steps"] is None or values["validation_accuracy"] is None:
            raise ValueError("steps or validation_accuracy is empty")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place}: no record ({error}); restore it from git") from error
    return Record(**values)


def _order(record: Record) -> tuple[Any, ...]:
    return (*(-1 if value is None else value for value in record.setting), -1 if record.seed is None else record.seed)


def merge(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """Return the records with the new ones in place of those of the same setting and seed."""
    return list({(record.setting, record.seed): record for record in (*old, *new)}.values())


def write(records: Iterable[Record], path: pathlib.Path = PATH) -> None:
    """Write the file atomically, sorted so that seeds are adjacent and a new run adds one line to a diff."""
    rows = ([_text(getattr(record, name)) for name in FIELDS] for record in sorted(records, key=_order))
    with writing(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(path, [FIELDS, *rows])


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", help="folders with runs")
    parser.add_argument("--selected_on", default="", help="images that chose rate and network: hold-out or test")
    parser.add_argument("--output", type=pathlib.Path, default=PATH, help="the file of the records")
    options = parser.parse_args()
    ideas.register()
    try:
        old = read(options.output) if options.output.exists() else []
        runs, problems = find_runs(options.folders)
        new = []
        for run in runs:
            try:
                new.append(from_run(run, options.selected_on))
            except UserError as error:
                problems.append(str(error))
        for problem in problems:
            print(f"refused: {problem}", file=sys.stderr)
        if not new:
            raise UserError(f"no finished run in {' '.join(options.folders)}")
        write(merge(old, new), options.output)
        print(f"{options.output}: {len(new)} runs recorded, {len(problems)} refused")
    except UserError as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main()
