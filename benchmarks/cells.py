"""Records as cells of tables: means over seeds, and differences with 95 % intervals."""

import dataclasses
import math
import statistics
from collections.abc import Collection, Iterable

from benchmarks import intervals, records
from benchmarks.protocols import HOLD_OUT, NETWORKS, TABLES, Network
from benchmarks.records import Record


@dataclasses.dataclass(frozen=True)
class Cell:
    """Runs that differ only in their seed, with their lines in the file of records."""

    runs: dict[int, Record]

    @property
    def values(self) -> dict[int, float]:
        """Accuracies in % by seed."""
        return {run.seed or 0: round(100 * run.validation_accuracy, 6) for run in self.runs.values()}

    @property
    def mean(self) -> float:
        """Mean accuracy in %."""
        return statistics.fmean(self.values.values())

    @property
    def basis(self) -> tuple[bool, bool]:
        """True if runs come from an old page, and if they are on the hold-out; compared cells agree in both."""
        first = next(iter(self.runs.values()))
        return first.from_page, first.on_hold_out

    def text(self, page: str) -> str:
        """Mean, deviation and number of seeds, with a link to the records."""
        values = list(self.values.values())
        spread = f"±{statistics.stdev(values):.1f} ({len(values)})" if len(values) > 1 else ""
        old = "†" if self.basis[0] else ""
        return link(f"{self.mean + 1e-9:.1f}{spread}{old}", page, "runs.csv", self.runs)


def link(text: str, page: str, file: str, lines: Collection[int]) -> str:
    """Return a link from a page to lines of a file in results/."""
    first, last = min(lines), max(lines)
    end = f"-L{last}" if last > first else ""
    return f"[{text}]({'../' * page.count('/')}results/{file}?plain=1#L{first}{end})"


class Results:
    """The records, as cells of tables."""

    def __init__(self, found: Iterable[Record]) -> None:
        """Group records that differ only in the seed; leave out those on other images than the tables'."""
        self.cells: dict[tuple, Cell] = {}
        for line, record in enumerate(found, start=2):
            if (record.train_split, record.validation_split) not in (("train", ""), tuple(HOLD_OUT.values())):
                continue
            self.cells.setdefault(record.setting, Cell({})).runs[line] = record

    def find(
        self,
        network: Network,
        *,
        data: str = "cifar10",
        optimizer: str = "soap",
        steps: int = 1500,
        protocol: str = "small",
        like: Cell | None = None,
        hold_out: bool = False,
    ) -> Cell | None:
        """Find the runs of a network: recorded runs before those of an old page, then most seeds, then the best rate.

        Args:
          network: One of `NETWORKS`.
          data: Data set.
          optimizer: Its name.
          steps: Number of steps of the run.
          protocol: One of `PROTOCOLS`.
          like: Prefer runs that may be compared with these.
          hold_out: Take runs on the hold-out; `like` decides if it is given.

        Returns:
          The cell, or None if there is no run.
        """
        changes = records.changes_text(network.fields)
        wanted = (protocol, data, network.preset, changes, optimizer, steps)
        found = []
        for cell in self.cells.values():
            run = next(iter(cell.runs.values()))
            own = (run.protocol, run.data, run.network, run.changes, run.optimizer, run.steps)
            if own == wanted and cell.basis[1] == (like.basis[1] if like else hold_out):
                found.append(cell)
        comparable = [cell for cell in found if like and cell.basis == like.basis]
        return _best(comparable or found)

    def in_equal_time(self, row: str, data: str = "cifar10") -> Cell | None:
        """Find the runs of a row of the table `equal_time`, in its own number of steps; None for any other row."""
        table = TABLES["equal_time"]
        return self.find(NETWORKS[row], data=data, steps=table.row_steps(row)) if row in table.rows else None

    def of_recipe(self, preset: str, data: str, optimizer: str, protocol: str, steps: int) -> Cell | None:
        """Find the best runs of the recipe, whatever else they change."""
        wanted = (preset, data, optimizer, protocol, steps, False)
        found = []
        for cell in self.cells.values():
            run = next(iter(cell.runs.values()))
            if (run.network, run.data, run.optimizer, run.protocol, run.steps, run.on_hold_out) == wanted:
                found.append(cell)
        return _best(found)


def _best(cells: list[Cell]) -> Cell | None:
    return max(cells, key=lambda cell: (not cell.basis[0], len(cell.runs), cell.mean), default=None)


def compare(first: Cell | None, second: Cell | None) -> tuple[float, list[intervals.Difference]] | None:
    """Compare two cells: over common seeds if there are any, otherwise by their means.

    Returns:
      The difference in points with its intervals (paired by seed, Welch) as far as there are seeds for them; None if
      one cell was not run, or they may not be compared: see `Cell.basis`.
    """
    if first is None or second is None or first.basis != second.basis:
        return None
    a, b = first.values, second.values
    common = sorted(a.keys() & b.keys())
    mean = statistics.fmean(a[seed] - b[seed] for seed in common) if common else first.mean - second.mean
    paired = intervals.paired([a[seed] for seed in common], [b[seed] for seed in common])
    found = [paired, intervals.welch(list(a.values()), list(b.values()))]
    return mean, [difference for difference in found if difference]


def difference_text(first: Cell | None, second: Cell | None) -> str:
    """Return a difference in points with its wider 95 % interval."""
    found = compare(first, second)
    if not found:
        return ""
    mean, differences = found
    widest = max((difference.half_width for difference in differences), default=math.inf)
    mean = round(mean, 1) + 0.0  # never -0.0
    return f"{mean:+.1f}" + (f"±{widest:.1f}" if math.isfinite(widest) else "")
