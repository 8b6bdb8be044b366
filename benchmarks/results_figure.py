"""Draw docs/results.png from results/runs.csv: equal time and the headline with their seeds, and accuracy by depth.

python -m benchmarks.results_figure
"""

import argparse
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import records
from benchmarks.cells import Cell, Results
from benchmarks.protocols import NETWORKS
from benchmarks.results_page import OPTIMIZERS, ROOT
from benchmarks.verdict import DATA
from simplest_vit.analysis import figures

ROWS = ("isometric", "shift MLP", "SimpleViT", "SimpleViT, constant shifts")
DEEP_ROWS = ("isometric", "shift MLP", "SimpleViT", "E-SPA + TAT")
BLOCKS = (12, 24, 64)


def draw(results: Results) -> Figure:
    """Draw two panels: every seed in equal time and in equal steps; and mean accuracy after 500 steps, by depth.

    Points of an old page are hollow.
    """
    figure = figures.create(height=3.4)
    seeds, depth = figure.subplots(1, 2, width_ratios=(3, 2))
    every = [(data, optimizer) for data in DATA for optimizer in ("soap", "muon", "adam")]
    found = {pair: results.find(NETWORKS[ROWS[0]], data=pair[0], optimizer=pair[1]) for pair in every}
    settings = {pair: cell for pair, cell in found.items() if cell}
    equal_time = [data for data in DATA if results.in_equal_time(ROWS[1], data)]
    handles = []
    for row, color, marker in figures.styled(dict.fromkeys((*ROWS, *DEEP_ROWS))):
        style: dict[str, Any] = {"color": color, "marker": marker, "linestyle": "none", "markersize": 5}
        fill = {True: "white", False: color}
        handles.append(Line2D([], [], label=row, **style))
        cells: list[Cell | None] = []
        if row in ROWS:
            cells += [results.in_equal_time(row, data) for data in equal_time]
            cells += [
                results.find(NETWORKS[row], data=data, optimizer=optimizer, like=ours)
                for (data, optimizer), ours in settings.items()
            ]
        for at, cell in enumerate(cells):
            if cell:
                values = list(cell.values.values())
                places = [at + 0.16 * (ROWS.index(row) - 1.5)] * len(values)
                seeds.plot(places, values, alpha=0.8, markerfacecolor=fill[cell.basis[0]], **style)
        if row in DEEP_ROWS:
            deep = [NETWORKS[row if blocks == BLOCKS[0] else f"{row}, {blocks} blocks"] for blocks in BLOCKS]
            means = [(blocks, results.find(network, steps=500)) for blocks, network in zip(BLOCKS, deep, strict=True)]
            points = [(blocks, cell.mean, fill[cell.basis[0]]) for blocks, cell in means if cell]
            depth.plot([x for x, _, _ in points], [y for _, y, _ in points], color=color)
            for x, y, face in points:
                depth.plot(x, y, markerfacecolor=face, **style)
    names = [f"{DATA[data]}\n{OPTIMIZERS[optimizer]}" for data, optimizer in settings]
    ticks = [*(f"{DATA[data]}\nSOAP,\nequal time" for data in equal_time), *names]
    seeds.set_xticks(range(len(ticks)), ticks, fontsize=7.5)
    seeds.set(title="Each point is a seed", ylabel="test accuracy (%)")
    depth.set_xscale("log")
    depth.set_xticks(BLOCKS, [str(blocks) for blocks in BLOCKS])
    depth.minorticks_off()
    depth.set(title="CIFAR-10, SOAP, after 500 steps", xlabel="blocks", ylabel="test accuracy (%)")
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def main() -> None:
    """Run as a program."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    with figures.style():
        draw(Results(records.read())).savefig(ROOT / "docs" / "results.png")


if __name__ == "__main__":
    main()
