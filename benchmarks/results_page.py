"""Fill the tables of the pages from results/runs.csv and results/speed.csv.

    python -m benchmarks.results_page          # rewrite the blocks
    python -m benchmarks.results_page --check  # fail if a page is out of date

`<!-- results: NAME -->` and `<!-- results: end -->` enclose a block; `BLOCKS` has the names. `<!-- speed: TABLE -->`
and `<!-- speed: end -->` enclose a table of results/speed.csv. Measured numbers appear only in blocks, so that all of
them have records, and in code, as the output of a command.
"""

import argparse
import json
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from benchmarks import intervals, records, speed, verdict
from benchmarks.cells import Cell, Results, compare, difference_text, link
from benchmarks.protocols import AT_ONCE, NETWORKS, RECIPE_NETWORKS, TABLES
from benchmarks.verdict import DATA
from simplest_vit.errors import UserError, print_error
from simplest_vit.files import write_file

ROOT = pathlib.Path(__file__).parent.parent
PAGES = tuple(
    str(path.relative_to(ROOT)) for folder in ("", "docs/", "benchmarks/") for path in ROOT.glob(f"{folder}*.md")
)
OPTIMIZERS = {"soap": "SOAP", "muon": "Muon", "adam": "Adam", "shampoo": "Shampoo@25"}
OPTIMIZERS |= {"soap_near_isometry": "SOAP, pulled", "adam_by_shape": "Adam, scaled"}  # benchmarks/ideas.py
_BLOCK = re.compile(r"(<!-- (results|speed): (?!end)([\w-]+) -->\n).*?(<!-- \2: end -->)", re.DOTALL)
_CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
_NUMBER = re.compile(r"\d[\d,.]*\s?(?:%|(?:points|times|launches|images/s|ms|s|MB|GB|MiB|GiB)\b)")
NOT_RUN = "not run"
RECIPE_STEPS = {"cifar10": 2160, "cifar100": 2160, "tiny_imagenet": 4320}  # 90 epochs of batches of 2,048


def table(header: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("|" + "|".join(line) + "|" for line in [header, ["---"] * len(header), *body])


def _text(cell: Cell | None, page: str) -> str:
    return cell.text(page) if cell else NOT_RUN


ISOMETRIC, FROZEN, SIMPLE_VIT = (NETWORKS[row] for row in TABLES["headline"].rows)


def headline(results: Results, page: str) -> str:
    """Compare the isometric network with SimpleViT and with its frozen attention, by data and optimizer."""
    rows, tests = [], []
    for data in DATA:
        for optimizer in ("soap", "muon", "adam"):
            ours = results.find(ISOMETRIC, data=data, optimizer=optimizer)
            frozen, theirs = (
                results.find(network, data=data, optimizer=optimizer, like=ours) for network in (FROZEN, SIMPLE_VIT)
            )
            if not ours and not theirs:
                continue
            found = compare(ours, theirs)
            tests.append(max((test.p for test in found[1]), default=math.nan) if found else math.nan)
            cells = [_text(cell, page) for cell in (ours, frozen, theirs)]
            differences = [difference_text(ours, theirs), difference_text(ours, frozen)]
            rows.append([f"{DATA[data]}, {OPTIMIZERS[optimizer]}", *cells, *differences])
    known = [p for p in tests if not math.isnan(p)]
    adjusted = iter(intervals.holm(known))
    for row, p in zip(rows, tests, strict=True):
        row.append("" if math.isnan(p) else _p_text(next(adjusted)))
    header = ["", "isometric", "attention frozen", "SimpleViT", "over SimpleViT", "over frozen", "p (Holm)"]
    return table(header, rows)


def _p_text(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def controls(results: Results, page: str) -> str:
    """List every control, including those not run, with its difference to the isometric network."""
    rows = []
    for row in TABLES["controls"].rows:
        line = [row]
        for data in DATA:
            ours = results.find(ISOMETRIC, data=data)
            cell = results.find(NETWORKS[row], data=data, like=ours)
            line += [_text(cell, page), "" if row == "isometric" else difference_text(cell, ours)]
        rows.append(line)
    return table(["SOAP", *(text for name in DATA.values() for text in (name, "to isometric"))], rows)


def summary(results: Results, page: str) -> str:
    """Give the accuracy of the main networks in equal time."""
    plan = TABLES["equal_time"]
    rows = [
        [row, f"{plan.row_steps(row):,}", *(_text(results.in_equal_time(row, data), page) for data in plan.data)]
        for row in ("shift MLP", "SimpleViT, constant shifts", "SimpleViT")
    ]
    return table(["SOAP, equal time", "steps", *(DATA[data] for data in plan.data)], rows)


def equal_time(results: Results, page: str) -> str:
    """Compare networks with SimpleViT in as many steps as take the same time."""
    plan = TABLES["equal_time"]
    rows = []
    for row in plan.rows:
        line = [row, f"{plan.row_steps(row):,}"]
        for data in plan.data:
            cell, base = (results.in_equal_time(name, data) for name in (row, "SimpleViT"))
            line += [_text(cell, page), "" if row == "SimpleViT" else difference_text(cell, base)]
        rows.append(line)
    return table(["SOAP", "steps", *(text for data in plan.data for text in (DATA[data], "over SimpleViT"))], rows)


def replaced(results: Results, page: str) -> str:
    """Compare networks with one thing replaced, after 500 steps of SOAP."""
    names = ("controls", "ablation", "heads", "baseline", "ideas", "near_isometry")
    optimizers = {row: next(iter(TABLES[name].learning_rates)) for name in names for row in TABLES[name].rows}
    optimizers |= {row: "soap" for row in NETWORKS if "uniform fraction" in row or row.endswith(AT_ONCE)}
    rows = []
    for row, optimizer in optimizers.items():
        cells = [
            results.find(NETWORKS[row], optimizer=optimizer, steps=500, hold_out=hold_out) for hold_out in (True, False)
        ]
        if compared := cells[0] or cells[1]:
            base = "isometric" + AT_ONCE * row.endswith(AT_ONCE)
            ours = results.find(NETWORKS[base], steps=500, like=compared)
            difference = "" if row == base else difference_text(compared, ours)
            rows.append([row, *(cell.text(page) if cell else "" for cell in cells), difference])
    return table(["500 steps of SOAP, CIFAR-10", "hold-out", "test images", "to isometric"], rows)


def attention(results: Results, page: str) -> str:
    """Compare networks whose attention might gain something with frozen attention."""
    hold_out, tests = (500, 1500, 4500), TABLES["headline"].data
    rows = []
    for row in TABLES["attention"].rows:
        cells = [results.find(NETWORKS[row], steps=steps, hold_out=True) for steps in hold_out]
        line = [cell.text(page) if cell else "" for cell in cells]
        for data in tests:
            cell, base = (results.find(network, data=data) for network in (NETWORKS[row], FROZEN))
            cells.append(cell)
            line += [cell.text(page) if cell else "", "" if cell is base else difference_text(cell, base)]
        if any(cells):
            rows.append([row, *line])
    columns = [f"{steps:,} steps" for steps in hold_out]
    columns += [text for data in tests for text in (f"{DATA[data]}, test images", "to frozen")]
    return table(["SOAP", *columns], rows)


def start(results: Results, page: str) -> str:
    """Compare SOAP from its first step with SOAP after ten steps of Adam, each at its best rate."""
    rows = [
        [row, *(_text(results.find(NETWORKS[row], hold_out=hold_out), page) for hold_out in (True, False))]
        for row in TABLES["start"].rows
    ]
    return table(["1,500 steps of SOAP", "CIFAR-10, hold-out", "CIFAR-10, test images"], rows)


def depth(results: Results, page: str) -> str:
    """List 12, 24 and 64 blocks on CIFAR-10."""
    rows = []
    for row in ("isometric", "shift MLP", "SimpleViT", "E-SPA + TAT"):
        networks = [NETWORKS[row], *(NETWORKS[f"{row}, {blocks} blocks"] for blocks in (24, 64))]
        rows.append([row, *(_text(results.find(network, steps=500), page) for network in networks)])
    small = [NETWORKS[f"isometric{blocks}, uniform fraction 0.002"] for blocks in ("", ", 64 blocks")]
    first, last = (_text(results.find(network, steps=500), page) for network in small)
    rows.insert(1, ["isometric, uniform fraction 0.002", first, NOT_RUN, last])
    return table(["500 steps of SOAP", "12 blocks", "24 blocks", "64 blocks"], rows)


def width(results: Results, page: str) -> str:
    """List width 128 after 500 steps and after ten epochs."""
    rows = []
    for row in ("isometric", "shift MLP", "SimpleViT"):
        network = NETWORKS[f"{row}, width 128"]
        rows.append([row, *(_text(results.find(network, steps=steps), page) for steps in (500, 7812))])
    return table(["width 128, SOAP", "500 steps", "7,812 steps"], rows)


def long(results: Results, page: str) -> str:
    """Compare networks after ten epochs with RandAugment and mixup."""
    plan, rows = TABLES["long"], []
    for row in plan.rows:
        cell, base = (
            results.find(NETWORKS[name], steps=plan.steps or 0, protocol="small, strong augmentation")
            for name in (row, "SimpleViT")
        )
        rows.append([row, _text(cell, page), "" if row == "SimpleViT" else difference_text(cell, base)])
    return table(["7,812 steps of SOAP, RandAugment and mixup", "CIFAR-10", "over SimpleViT"], rows)


def depth_equal_time(results: Results, page: str) -> str:
    """Compare 64 blocks in equal time."""
    plan = TABLES["depth_equal_time"]
    rows = []
    for row in plan.rows:
        steps = plan.row_steps(row) or 0
        cells = (results.find(NETWORKS[row], steps=steps, hold_out=hold_out) for hold_out in (True, False))
        rows.append([row, f"{steps:,}", *(_text(cell, page) for cell in cells)])
    return table(["SOAP", "steps", "CIFAR-10, hold-out", "CIFAR-10, test images"], rows)


def choosing(results: Results, page: str) -> str:
    """List the rates that were tried on the hold-out, except single runs of 500 steps, which are in other tables."""
    lines: dict[tuple, dict[float, Cell]] = {}
    names = {(network.preset, records.changes_text(network.fields)): row for row, network in reversed(NETWORKS.items())}
    for cell in results.cells.values():
        run = next(iter(cell.runs.values()))
        row = names.get((run.network, run.changes))
        if run.on_hold_out and run.protocol == "small" and row:
            key = (run.data, row, run.optimizer, run.steps)
            lines.setdefault(key, {})[run.learning_rate or 0] = cell
    body = [
        [
            *(row, DATA[data], OPTIMIZERS[optimizer], f"{steps:,}"),
            ", ".join(f"{rate:g}: {cell.text(page)}" for rate, cell in sorted(cells.items())),
        ]
        for (data, row, optimizer, steps), cells in sorted(lines.items())
        if len(cells) > 1 or steps > 500
    ]
    return table(["", "data", "optimizer", "steps", "learning rate: accuracy on the hold-out"], body)


def reference(results: Results, page: str) -> str:
    """Compare single runs of the PyTorch reference's recipe with its published results."""
    published = json.loads((ROOT / "results" / "reference.json").read_text())
    rows = []
    for augmentation, setup in (("basic", "tat"), ("strong", "simple_vit")):
        protocol = "recipe" + ", strong augmentation" * (augmentation == "strong")
        methods = [*published["small_data"][setup], "isometric_vit/soap", "simple_vit/soap"]
        for method in methods:
            preset, optimizer = method.removesuffix("25").split("/")
            row = next(name for name, network in RECIPE_NETWORKS.items() if network.preset == preset)
            theirs = published["small_data"][setup].get(method, {})
            line = [f"{augmentation}: {row}, {OPTIMIZERS[optimizer]}"]
            ran = False
            for data in ("cifar10", "cifar100", "tiny_imagenet"):
                ours = results.of_recipe(preset, data, optimizer, protocol, RECIPE_STEPS[data])
                ran |= ours is not None
                value = f"{100 * theirs[data]:.1f}" if data in theirs else "-"
                line.append(f"{value} / {ours.text(page) if ours else '-'}")
            if ran or theirs:
                rows.append(line)
    imagenet = published["imagenet"]["simplest_vit/shampoo25"]
    text = table(["reference / ours", "CIFAR-10", "CIFAR-100", "TinyImageNet"], rows)
    return (
        f"{text}\n\nImageNet-1k, S/16, Shampoo@25: the reference has {100 * imagenet['tat']:.1f} (basic) and "
        f"{100 * imagenet['simple_vit']:.1f} (strong); ours was not run."
    )


def judged(results: Results, page: str) -> str:
    """Return the verdict in one sentence."""
    del page
    return verdict.sentence(verdict.criteria(results))


def criteria(results: Results, page: str) -> str:
    """List the criteria of the verdict, with what was measured."""
    del page
    found = verdict.criteria(results)
    body = [[criterion.text, criterion.effect, criterion.found, criterion.state] for criterion in found]
    return table(
        ["criterion (SOAP, 1,500 steps or equal time)", "if it holds, it", "measured difference, points", ""], body
    )


BLOCKS: dict[str, Callable[[Results, str], str]] = {
    "verdict": judged,
    "criteria": criteria,
    "summary": summary,
    "headline": headline,
    "controls": controls,
    "equal_time": equal_time,
    "start": start,
    "replaced": replaced,
    "attention": attention,
    "depth": depth,
    "depth_equal_time": depth_equal_time,
    "long": long,
    "width": width,
    "choosing": choosing,
    "reference": reference,
}


def measured(numbers: dict[int, speed.Number], page: str) -> str:
    """Return a table of results/speed.csv, given by its lines; the origins are in the first cell or a last column."""
    columns = list(dict.fromkeys((number.column, number.unit) for number in numbers.values()))
    origins = {number.row: number.origin for number in numbers.values()}
    cells = {(number.row, number.column, number.unit): number.text for number in numbers.values()}
    common = len(set(origins.values())) == 1
    header = [link(common * next(iter(origins.values())) or "records", page, "speed.csv", numbers)]
    header += [", ".join(filter(None, column)) for column in columns] + ["device"] * (not common)
    body = [
        [row, *(cells.get((row, *column), "") for column in columns), *[origin] * (not common)]
        for row, origin in origins.items()
    ]
    return table(header, body)


def fill(text: str, results: Results, page: str, numbers: Sequence[speed.Number] = ()) -> str:
    """Return a page with its blocks regenerated.

    Raises:
      UserError: If a block is unknown, or the page has a measured number outside its blocks and code.
    """
    tables: dict[str, dict[int, speed.Number]] = {}
    for line, number in enumerate(numbers, start=2):
        tables.setdefault(number.table, {})[line] = number

    def block(match: re.Match[str]) -> str:
        start, kind, name, end = match.groups()
        known = BLOCKS if kind == "results" else tables
        if name not in known:
            raise UserError(f"{page}: unknown block {name}; expected one of {', '.join(known)}")
        text = BLOCKS[name](results, page) if kind == "results" else measured(tables[name], page)
        return f"{start}{text}\n{end}"

    if number := _NUMBER.search(_CODE.sub("", _BLOCK.sub("", text))):
        raise UserError(f"{page}: {number[0]!r} is outside the generated blocks; move it into one, or remove it")
    return _BLOCK.sub(block, text)


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    options = parser.parse_args()
    try:
        results, numbers = Results(records.read()), speed.read()
        for page in PAGES:
            path = ROOT / page
            old = path.read_text()
            new = fill(old, results, page, numbers)
            if new != old and options.check:
                raise UserError(f"{page} does not match results/*.csv; run python -m benchmarks.results_page")
            if new != old:
                write_file(path, new.encode())
    except UserError as error:
        sys.exit(print_error(error))


if __name__ == "__main__":
    main()
