"""The evidence for the isometric network: small ViTs on CIFAR-10 by one protocol, each row with its own learning rates.

    python -m benchmarks.vanilla --workdir runs/vanilla --data_dir ~/tensorflow_datasets \
        --rows isometric SimpleViT --optimizers soap --learning_rates 1e-3,2e-3,4e-3 --seeds 1,2,3

Protocol M: CIFAR-10, depth 12, width 64, MLP 256, patch 4, float32, batches of 64, 1,500 steps (1.9 epochs), warm-up
75, cosine to zero, label smoothing 0.1, crop and flip, L2 5e-5. The same command goes on where it was stopped. Prints a
row for each learning rate of which a run below --workdir is finished: training loss (mean of the 100 steps before) and
validation accuracy at 500 and 1,000 steps and at the end; and draws the curves of the best learning rate of each row.
"""

import argparse
import itertools
import pathlib
import signal
import statistics
import sys
from typing import Any

from simplest_vit import cli, preemption
from simplest_vit.analysis import figures
from simplest_vit.analysis.curve_figure import draw_curves
from simplest_vit.analysis.report import table
from simplest_vit.analysis.runs import Run, find_runs, read_curves
from simplest_vit.commands.sweep import Point, execute, find_devices, share_devices
from simplest_vit.errors import Interrupted, UserError, print_error

PROTOCOL = {
    "batch_size": 64,
    "steps": 1500,
    "warmup_steps": 75,
    "compute_dtype": "float32",
    "eval_every": 500,
    "checkpoint_every": 500,
    "log_every": 100,
    "model.width": 64,
    "model.num_heads": 2,
    "model.mlp_dim": 256,
}
MARKS = (500, 1000, "end")
# Choices are made on images that are neither trained on nor reported.
HOLD_OUT = {"data.train_split": "train[:45000]", "data.validation_split": "train[45000:]"}

# Row -> arguments of the config file, and what differs from the protocol.
_ISOMETRIC = "model=simplest_vit,method=isometric"
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "SimpleViT": ("model=simple_vit", {}),
    "SimpleViT, 8 heads": ("model=simple_vit", {"model.num_heads": 8}),
    "E-SPA + TAT": ("model=simplest_vit", {}),
    "E-SPA + TAT, reference": ("model=simplest_vit", {"model.attention": "espa_reference", "model.init": "reference"}),
    "isometric": (_ISOMETRIC, {"model.num_heads": 8}),
    # The control: the same shifts as constants, without queries and keys.
    "isometric, frozen attention": (_ISOMETRIC, {"model.num_heads": 8, "model.attention": "fixed_shift"}),
    # One step away from the isometric network.
    "isometric, 2 heads": (_ISOMETRIC, {}),
    "isometric, 4 heads": (_ISOMETRIC, {"model.num_heads": 4}),
    "isometric, 1 in place": (_ISOMETRIC, {"model.num_heads": 8, "model.shift_in_place": 0.125}),
    "isometric, 4 in place": (_ISOMETRIC, {"model.num_heads": 8, "model.shift_in_place": 0.5}),
    "isometric, 7 in place": (_ISOMETRIC, {"model.num_heads": 8, "model.shift_in_place": 0.875}),
    "isometric, all in place": (_ISOMETRIC, {"model.num_heads": 8, "model.shift_in_place": 1.0}),
    "isometric, eps 0.05": (_ISOMETRIC, {"model.num_heads": 8, "model.shift_eps": 0.05}),
    "isometric, eps 0.002": (_ISOMETRIC, {"model.num_heads": 8, "model.shift_eps": 0.002}),
    "isometric, ReLU": (_ISOMETRIC, {"model.num_heads": 8, "model.activation": "relu"}),
    "isometric, Gaussian values": (_ISOMETRIC, {"model.num_heads": 8, "model.init": "paper"}),
    "E-SPA + mirrored": (_ISOMETRIC, {"model.num_heads": 8, "model.attention": "espa"}),
    "E-SPA 2-D + mirrored": (_ISOMETRIC, {"model.num_heads": 8, "model.attention": "espa_2d"}),
    "E-SPA (gamma 0.1) + mirrored": (
        _ISOMETRIC,
        {"model.num_heads": 8, "model.attention": "espa", "model.gamma_max_depth": 0.1},
    ),
    "shift + TAT (eta 0.9)": (
        _ISOMETRIC,
        {"model.num_heads": 8, "model.mlp": "shaped", "model.activation": "tailored_relu"},
    ),
    "shift + TAT (eta 0.5)": (
        _ISOMETRIC,
        {
            "model.num_heads": 8,
            "model.mlp": "shaped",
            "model.activation": "tailored_relu",
            "model.c_val_0_target": 0.5,
        },
    ),
    "Value-SkipInit + mirrored": (_ISOMETRIC, {"model.num_heads": 8, "model.attention": "value_skipinit"}),
}
ROWS |= {
    f"{row}, depth {depth}": (ROWS[row][0], ROWS[row][1] | {"model.depth": depth})
    for row in ("SimpleViT", "E-SPA + TAT", "isometric")
    for depth in (24, 64)
}
# At the default eps, 0.01, half of what tells tokens apart is lost in 64 blocks.
ROWS["isometric, depth 64, eps 0.002"] = (
    _ISOMETRIC,
    ROWS["isometric, depth 64"][1] | {"model.shift_eps": 0.002},
)
# Ten epochs of these: --steps 7812.
_WIDER = {"model.width": 128, "model.mlp_dim": 512}
ROWS |= {
    "SimpleViT, width 128": (ROWS["SimpleViT"][0], _WIDER | {"model.num_heads": 4}),
    "isometric, width 128": (_ISOMETRIC, _WIDER | {"model.num_heads": 8}),
}

# Huge pages, kept by the allocator: a step's arrays are touched for the first time in every step, and half of it was
# page faults. No effect where the C library is another; a run is the same with and without.
_ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}


def points(options: argparse.Namespace) -> list[Point]:
    """Lay out the runs that the command line asks for."""
    result = []
    for row, optimizer, rate in itertools.product(options.rows, options.optimizers, options.learning_rates):
        arguments, fields = ROWS[row]
        point = Point({"row": row, "optimizer": optimizer, "learning rate": rate}, [], [])
        for seed in options.seeds:
            folder = pathlib.Path(options.workdir, row, optimizer, rate, f"seed={seed}")
            overrides = (
                PROTOCOL | fields | {"optimizer.learning_rate": rate, "seed": seed, "data.dir": options.data_dir}
            )
            overrides |= {"steps": options.steps} if options.steps else {}
            overrides |= HOLD_OUT if options.hold_out else {}
            point.workdirs.append(folder)
            point.commands.append(
                [
                    *(sys.executable, "-m", "simplest_vit", "train", f"--workdir={folder}"),
                    f"--config={options.config}:augmentation=basic,optimizer={optimizer},{arguments}",
                    *(f"--config.{field}={value}" for field, value in overrides.items()),
                ]
            )
        result.append(point)
    return result


def at(curve: Any, mark: int | str) -> float | None:
    """The value of a curve at a step of `MARKS`, or None."""
    values = dict(zip(*(array.tolist() for array in curve), strict=True))
    return values[max(values)] if mark == "end" else values.get(mark)


def summary(runs: list[Run]) -> tuple[str, dict[str, Any]]:
    """The table of finished runs, and the curves of the best of each row and optimizer."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        row, optimizer, rate = run.path.parts[-4:-1]
        groups.setdefault((row, optimizer, rate), []).append(read_curves(run.path))
    body, best = [], {}
    for key, seeds in sorted(groups.items()):
        cells = []
        for tag, digits, scale in (("train_loss", 3, 1), ("validation_accuracy", 1, 100)):
            for mark in MARKS:
                values = [value * scale for curves in seeds if (value := at(curves[tag], mark)) is not None]
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.{digits}f}{spread}" if values else "-")
        body.append([*key, str(len(seeds)), *cells])
        accuracy = statistics.fmean(curves["validation_accuracy"][1][-1] for curves in seeds)
        if accuracy > best.get(key[:2], (0.0,))[0]:
            best[key[:2]] = accuracy, f"{key[0]}, {key[1]}, {key[2]}", seeds[0]
    header = ["network", "optimizer", "learning rate", "seeds"]
    header += [f"{what}, {mark}" for what in ("training loss", "accuracy, %") for mark in MARKS]
    return table(header, body), {label: curves for _, label, curves in best.values()}


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = {"type": lambda text: text.split(",") if text else []}
    parser.add_argument("--workdir", required=True, help="folder of the runs")
    parser.add_argument("--data_dir", default="~/tensorflow_datasets", help="prepared CIFAR-10")
    parser.add_argument("--config", default="configs/cifar10.py", help="config file")
    parser.add_argument("--rows", default=[], nargs="*", choices=ROWS, metavar="ROW", help="of: " + "; ".join(ROWS))
    parser.add_argument("--optimizers", default=["soap"], **names)
    parser.add_argument("--learning_rates", default=["1e-3", "2e-3", "4e-3"], **names)
    parser.add_argument("--seeds", default=["1"], **names)
    parser.add_argument("--steps", type=int, help="in place of 1,500, for a try")
    parser.add_argument("--hold_out", action="store_true", help="train on 45,000 images, validate on the other 5,000")
    parser.add_argument("--at_once", type=int, default=1, help="runs at the same time")
    options = parser.parse_args()
    preemption.watch((signal.SIGTERM, signal.SIGINT), handler=cli.interrupt)
    try:
        shares = share_devices(*find_devices(), options.at_once)
        failed = execute(points(options), [_ENVIRONMENT | share for share in shares])
        runs, _ = find_runs([options.workdir])
        text, curves = summary(runs)
        print(text)
        if curves:
            with figures.style():
                figure = draw_curves(curves, "CIFAR-10, protocol M, best learning rate")
                figures.save(figure, pathlib.Path(options.workdir, "curves"))
    except (UserError, Interrupted) as error:
        sys.exit(print_error(error))
    sys.exit(3 if failed else 0)


if __name__ == "__main__":
    main()
