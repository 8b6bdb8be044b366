"""The claim, judged by criteria that were set before the runs.

The claim: a vision transformer without normalization and skip connections, initialized as an isometry, trains better
than SimpleViT with the same optimizer, in equal steps and in equal time.
"""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.cells import Cell, Results, compare
from benchmarks.protocols import NETWORKS, TABLES

DATA = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
ADD_BACK = tuple(row for row in TABLES["controls"].rows if row.startswith("isometric + "))
SEEDS, ENOUGH = 5, 3  # needed for a lead, and for a refutation
# Steps, whether on the hold-out, and a note. Runs with a note are shown but refute nothing.
RUNS = ((1500, False, ""), (1500, True, ", on the hold-out"), (500, True, ", 500 steps on the hold-out"))

# The effect of a criterion that holds.
REFUTES, NARROWS, SUPPORTS = "refutes the claim", "narrows the claim", "supports the claim"


class Criterion(NamedTuple):
    """A condition and its state.

    Attributes:
      text: The condition.
      effect: Its effect if it holds: `REFUTES`, `NARROWS` or `SUPPORTS`.
      found: The measured differences in points.
      holds: None if it was not measured.
    """

    text: str
    effect: str
    found: str
    holds: bool | None

    @property
    def state(self) -> str:
        """The state, for the table."""
        return {None: "open", True: "holds", False: "does not hold"}[self.holds]


def criteria(results: Results) -> list[Criterion]:
    """Measure every criterion on CIFAR-10 and CIFAR-100. One data set is enough, but support needs both."""

    def measure(row: str, data: str) -> tuple[float, int, str] | None:
        """Return the difference of a row to the isometric network, the seeds of both, and the note on their runs."""
        for steps, hold_out, note in RUNS:
            theirs, ours = (
                results.find(NETWORKS[name], data=data, steps=steps, hold_out=hold_out) for name in (row, "isometric")
            )
            if theirs and ours and (found := compare(theirs, ours)):
                return found[0], min(len(theirs.runs), len(ours.runs)), note
        return None

    def criterion(text: str, effect: str, rows: tuple[str, ...], above: float) -> Criterion:
        """Compare the best of these rows with the isometric network; few seeds are enough to narrow, not to refute."""
        shown, holds = [], []
        for data, name in DATA.items():
            found = [measured for row in rows if (measured := measure(row, data))]
            if found:
                distance, seeds, note = max(found)
                shown.append(f"{distance:+.1f} ({name}, {_seeds(seeds)}{note})")
                is_enough = effect == NARROWS or (seeds >= ENOUGH and not note)
                holds.append(distance >= above if is_enough else None)
        known = True if True in holds else None if None in holds or not holds else False
        return Criterion(text, effect, ", ".join(shown) or "not run", known)

    strong = tuple(row for row in TABLES["baseline"].rows if row != "SimpleViT")
    refuting = [
        criterion("restoring a norm or a skip gains more than 1 point", REFUTES, ADD_BACK, 1.0),
        criterion(
            "SimpleViT with constant shifts comes within 0.5 points", REFUTES, ("SimpleViT, constant shifts",), -0.5
        ),
        criterion("a strengthened SimpleViT comes within 1 point", REFUTES, strong, -1.0),
        criterion("frozen attention comes within 0.5 points", NARROWS, ("isometric, attention frozen",), -0.5),
    ]

    def lead(text: str, find: Callable[[str, str], Cell | None], rows: tuple[str, ...], above: float) -> Criterion:
        """Compare the best isometric network with the best SimpleViT, of which every row must have been run.

        The lead needs five seeds and an interval.
        """
        shown, holds = [], []
        for data, name in DATA.items():
            baseline, isometric = (
                [find(row, data) for row in rows if (NETWORKS[row].preset == "simple_vit") is simple]
                for simple in (True, False)
            )
            theirs, ours = (
                max((cell for cell in cells if cell), key=lambda cell: cell.mean, default=None)
                for cells in (baseline, isometric)
            )
            compared = compare(ours, theirs)
            if compared and ours and theirs:
                mean, differences = compared
                seeds = min(len(ours.runs), len(theirs.runs))
                off_zero = bool(differences) and all(test.mean > test.half_width for test in differences)
                shown.append(f"{mean:+.1f} ({name}, {_seeds(seeds)})")
                holds.append(None if seeds < SEEDS or None in baseline else off_zero and mean > above)
        known = None if not holds or None in holds else len(holds) == len(DATA) and all(holds)
        return Criterion(f"{text}: five fresh seeds, interval above 0", SUPPORTS, ", ".join(shown) or "not run", known)

    return [
        *refuting,
        lead(
            "it leads plain SimpleViT",
            lambda row, data: results.find(NETWORKS[row], data=data),
            ("isometric", "SimpleViT"),
            0.0,
        ),
        lead(
            "in equal time the best isometric network leads the best SimpleViT by more than 1 point",
            results.in_equal_time,
            TABLES["equal_time"].rows,
            1.0,
        ),
    ]


def _seeds(count: int) -> str:
    return f"{count} seed" + "s" * (count > 1)


def sentence(found: list[Criterion]) -> str:
    """Return the verdict in one sentence."""
    holding = [criterion for criterion in found if criterion.holds]
    missing = [criterion for criterion in found if criterion.holds is None]
    if refuted := [criterion.text for criterion in holding if criterion.effect == REFUTES]:
        return f"**Verdict: refuted.** {refuted[0][0].upper()}{refuted[0][1:]}."
    if any(criterion.effect == NARROWS for criterion in holding):
        rest = f"; {len(missing)} of {len(found)} criteria are still open" if missing else ""
        return (
            "**Verdict: narrowed.** The network does as well with its attention frozen: what trains well without "
            f"normalization and skip connections is an isometric shift network, not attention{rest}."
        )
    if missing:
        return f"**Verdict: open.** {len(missing)} of {len(found)} criteria are still open."
    if any(criterion.effect == SUPPORTS for criterion in holding):
        return "**Verdict: proven.** Every criterion is met."
    return "**Verdict: not shown.** No criterion refutes the claim, and its lead is within noise."
