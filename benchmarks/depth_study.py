"""Trains networks of growing depth by each method, and draws their curves in one figure.

    python -m benchmarks.depth_study --config configs/digits.py --workdir runs/depth

A block has one attention and two dense layers, embedding and head add two: depth 64 is 194 layers. Stopped, the same
command goes on where it was. Writes depth_study.png (and SVG) and depth_study.csv to --workdir.
"""

import csv
import logging
import pathlib
from typing import Any

from absl import flags
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from simplest_vit import cli
from simplest_vit.analysis import figures
from simplest_vit.analysis.contrasts import with_contrast
from simplest_vit.analysis.runs import Curve, read_curves
from simplest_vit.config import check
from simplest_vit.errors import DivergenceError, UserError
from simplest_vit.models.factory import VARIANTS
from simplest_vit.training import loop
from simplest_vit.training.workdir import check_workdir

DEPTHS = ("8", "12", "24", "64")
STEPS = 200
# Contrast -> how its lines look.
METHODS: dict[str, Any] = {
    "isometric": "-",
    "E-SPA + TAT": "--",
    "SimpleViT": "-.",
    "vanilla, unshaped": ":",
}
PANELS = {
    "train_loss": ("Training loss", "nats"),
    "train_accuracy": ("Training accuracy", "top-1"),
    "validation_loss": ("Validation loss", "nats"),
    "validation_accuracy": ("Validation accuracy", "top-1"),
}

# By method and depth.
Curves = dict[tuple[str, int], dict[str, Curve]]

log = logging.getLogger("simplest_vit")


def effective_depth(depth: int) -> int:
    """Layers with parameters on a path through the network: three a block, embedding and head."""
    return 3 * depth + 2


def configs(config: Any, depths: list[int], steps: int, exponent: float) -> dict[tuple[str, int], Any]:
    """The config of each run: `steps` steps, evaluated twenty times.

    Beyond the depth of the config the learning rate of a network without skips falls as depth^-exponent: all blocks
    move at once, and without normalization nothing bounds what their changes do together.

    Args:
      config: Gives data, sizes and optimizer.
      depths: Numbers of blocks.
      steps: Steps of each run.
      exponent: How the learning rate falls.

    Returns:
      Configs by method (`METHODS`) and depth.
    """
    base_depth = config.model.depth or VARIANTS[config.model.variant]["depth"]
    result = {}
    for method in METHODS:
        for depth in depths:
            run = with_contrast(config, method)
            run.model.depth = depth
            if method != "SimpleViT":
                run.optimizer.learning_rate *= min(1.0, (base_depth / depth) ** exponent)
            run.steps = steps
            run.log_every = run.eval_every = max(steps // 20, 1)
            run.checkpoint_every = max(steps // 4, 1)
            result[method, depth] = run
    return result


def depth_study(config: Any, workdir: str, depths: list[int], steps: int, exponent: float = 1.0) -> Curves:
    """Train all runs, or go on with them, and write figure and table.

    Args:
      config: Gives data, sizes and optimizer.
      workdir: Folder of the study; each run has its own in it.
      depths: Numbers of blocks.
      steps: Steps of each run.
      exponent: See `configs`.

    Returns:
      The training curves.

    Raises:
      UserError: If the config does not fit one of the depths; nothing is trained then.
    """
    folder = pathlib.Path(workdir)
    planned = configs(config, depths, steps, exponent)
    paths = {(method, depth): folder / f"{method}, depth {depth}" for method, depth in planned}
    for key, run in planned.items():
        check(run)
        check_workdir(str(paths[key]), run.to_dict())
    curves = {}
    for key, run in planned.items():
        log.info("depth study: %s, depth %d", *key)
        try:
            loop.train_and_evaluate(run, str(paths[key]))
        except DivergenceError as error:  # what a network without shaping may well do
            log.warning("%s, depth %d: %s", *key, error)
        curves[key] = read_curves(paths[key])
    try:
        with figures.style():
            title = f"{config.data.name}, {config.optimizer.name}, {steps} steps"
            figures.save(draw(curves, title), folder / "depth_study")
        with (folder / "depth_study.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["method", "depth", "effective_depth", "tag", "step", "value"])
            for (method, depth), tags in curves.items():
                for tag, (at, values) in tags.items():
                    for step, value in zip(at, values, strict=True):
                        table.writerow([method, depth, effective_depth(depth), tag, step, value])
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({error.strerror}); choose another") from error
    return curves


def draw(curves: Curves, title: str) -> Figure:
    """Draw all runs: a colour for each depth, a kind of line for each method.

    Args:
      curves: From `depth_study`.
      title: What was trained on what.

    Returns:
      A figure with the axes of `PANELS`, in that order.
    """
    depths = sorted({depth for _, depth in curves})
    style = {depth: (color, marker) for depth, color, marker in figures.styled(depths)}
    figure = figures.create(height=6.4)
    for axis, (tag, (panel, unit)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for (method, depth), tags in curves.items():
            if tag in tags:
                color, marker = style[depth]
                axis.plot(*tags[tag], color=color, marker=marker, linestyle=METHODS[method], markevery=4)
        axis.set(title=panel, xlabel="step", ylabel=unit)
        if "loss" in tag:
            axis.set_yscale("log")
    handles = [
        Line2D([], [], color=color, marker=marker, label=f"depth {depth} ({effective_depth(depth)} layers)")
        for depth, (color, marker) in style.items()
    ]
    for method in dict.fromkeys(method for method, _ in curves):
        handles.append(Line2D([], [], color="black", linestyle=METHODS[method], label=method))
    figure.legend(handles=handles, loc="outside upper center", ncols=4, title=title, title_fontproperties={"size": 11})
    return figure


def summary(curves: Curves) -> str:
    """Last training loss and validation accuracy of each run, one a line."""
    lines = []
    for (method, depth), tags in curves.items():
        last = {tag: values[-1] for tag, (_, values) in tags.items() if len(values)}
        lines.append(
            f"{method:<17}  depth {depth:>3} ({effective_depth(depth)} layers)  "
            f"training loss {last.get('train_loss', float('nan')):.4f}  "
            f"validation accuracy {last.get('validation_accuracy', float('nan')):.2%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run as a program."""
    depths = flags.DEFINE_list("depths", list(DEPTHS), "Numbers of blocks.")
    steps = flags.DEFINE_integer("steps", STEPS, "Steps of each run.", lower_bound=1)
    exponent = flags.DEFINE_float("exponent", 1.0, "The learning rate falls as depth^-exponent.", lower_bound=0.0)

    def program(arguments: list[str]) -> None:
        del arguments
        if not all(depth.isdecimal() and int(depth) for depth in depths.value):
            raise UserError(f"--depths={','.join(depths.value)}: expected positive integers such as {','.join(DEPTHS)}")
        blocks = [int(depth) for depth in depths.value]
        print(summary(depth_study(cli.CONFIG.value, str(cli.WORKDIR.value), blocks, steps.value, exponent.value)))

    cli.run(program, usage="python -m benchmarks.depth_study --config FILE --workdir FOLDER")


if __name__ == "__main__":
    main()
