"""Measured numbers of speed, memory and steps: results/speed.csv, from which results_page.py generates tables.

A benchmark takes `--record TABLE`, or `--record TABLE:ROW` if it measures one row. Its rows replace those of the same
name; uncommitted code is refused. A page has the table between `<!-- speed: TABLE -->` and `<!-- speed: end -->`. The
columns of the file:

  table, row, column, unit
                         Where the number stands
  value                  As it is printed; `> 300` is a bound; empty for a range
  low, high              Quartiles, or the ends of a range
  note                   What else stands in brackets, such as the best learning rate
  device, command, commit
                         The command is empty if there is none
  source                 `run`, or PAGE@COMMIT for a converted number, which was on a page before numbers were recorded
"""

import dataclasses
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from benchmarks import records
from simplest_vit import cli, commands
from simplest_vit.errors import UserError
from simplest_vit.files import write_csv, writing
from simplest_vit.training.workdir import environment

PATH = records.PATH.with_name("speed.csv")
HELP = "Record the numbers in results/speed.csv under TABLE, or TABLE:ROW for one row."
RECORD = flags.DEFINE_string("record", None, HELP)


@dataclasses.dataclass(frozen=True)
class Number:
    """A row of the file."""

    table: str
    row: str
    column: str
    value: str
    low: str
    high: str
    note: str
    unit: str
    device: str
    command: str
    commit: str
    source: str

    @property
    def text(self) -> str:
        """The number in a table: `1.108 (1.067 to 1.191)`, `0.72 to 0.86`, `31 (0.03)`."""
        value = f"{int(self.value):,}" if self.value.isdigit() else self.value
        spread = f"{self.low} to {self.high}" if self.low else ""
        first, *rest = (part for part in (value, spread, self.note) if part)
        return f"{first} ({', '.join(rest)})" if rest else first

    @property
    def origin(self) -> str:
        """The device; `converted` if no run has recorded the number."""
        return self.device + ", converted" * (self.source != "run")


FIELDS = tuple(field.name for field in dataclasses.fields(Number))


def run(program: Callable[..., None], usage: str, **options: Any) -> None:
    """Run a benchmark as `cli.run` does, with the environment of the commands, whose speed is measured."""
    commands.restart()
    cli.run(program, usage, **options)


class Recorder:
    """The numbers of a benchmark; without `--record` they are ignored."""

    def __init__(self, record: str | None, *, one_row: bool = False, device: str | None = None) -> None:
        """Check the flag before anything is measured.

        Args:
          record: Its value.
          one_row: Whether the flag names the row.
          device: What the numbers are for, if not for this machine.

        Raises:
          UserError: If the value has another form, or the code is not committed.
        """
        self.numbers: list[Number] = []
        self.table, _, self.row = (record or "").partition(":")
        if record is None:
            return
        if not re.fullmatch(r"[\w-]+:.+" if one_row else r"[\w-]+", record):
            raise UserError(f"--record={record}: expected --record={'TABLE:ROW' if one_row else 'TABLE'}")
        self._origin = {
            "device": _device() if device is None else device,
            "command": shlex.join(["python", "-m", f"benchmarks.{pathlib.Path(sys.argv[0]).stem}", *sys.argv[1:]]),
            "commit": records.committed(_commit(), f"--record={record}"),
            "source": "run",
        }

    def add(
        self, column: str, value: float | str, unit: str = "", *, row: str = "", spread: Any = ("", ""), note: str = ""
    ) -> None:
        """Add a number with its `spread` (low, high) to a row, by default to that of the flag."""
        if self.table:
            place = self.table, row or self.row, column
            texts = *map(_digits, (value, *spread)), note, unit
            self.numbers.append(Number(*place, *texts, **self._origin))

    def write(self, path: pathlib.Path = PATH) -> None:
        """Put the rows into the file."""
        if self.table:
            write(merge(read(path) if path.exists() else [], self.numbers), path)
            print(f"{path}: {len(self.numbers)} numbers recorded; python -m benchmarks.results_page updates the pages")


def _digits(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _commit() -> str | None:
    commit = environment()["commit"]
    code = ["git", "diff", "--quiet", "HEAD", "--", ":!results", ":!*.md"]  # rows recorded before are no code
    if commit and subprocess.run(code, cwd=PATH.parent.parent, check=False).returncode == 0:
        return commit.removesuffix("+")
    return commit


def _device() -> str:
    """Describe the accelerator, or the processor and how many of its cores this process may use."""
    if jax.default_backend() != "cpu":
        return environment()["device"]
    names = re.findall(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
    return f"{len(os.sched_getaffinity(0))} x {names[0] if names else platform.machine()} core"


def read(path: pathlib.Path = PATH) -> list[Number]:
    """Read the file; a UserError names a row that is no record."""
    found = []
    for line, row in enumerate(records.read_rows(path), start=2):
        try:
            found.append(Number(**row))
            for text in (row["value"].lstrip("<> ") or row["low"], row["low"] or "0", row["high"] or "0"):
                float(text)
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path}, line {line}: no record ({error}); restore it from git") from error
    return found


def merge(old: Sequence[Number], new: Sequence[Number]) -> list[Number]:
    """Return the numbers by table, with new rows in the places of old rows of the same name."""
    rows = list(dict.fromkeys((number.table, number.row) for number in (*old, *new)))
    replaced = {(number.table, number.row) for number in new}
    kept = [number for number in old if (number.table, number.row) not in replaced]
    return sorted((*kept, *new), key=lambda number: (number.table, rows.index((number.table, number.row))))


def write(numbers: Sequence[Number], path: pathlib.Path = PATH) -> None:
    """Write the file atomically."""
    with writing(str(path)):
        write_csv(path, [FIELDS, *map(dataclasses.astuple, numbers)])
