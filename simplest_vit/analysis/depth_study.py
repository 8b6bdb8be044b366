"""Trains networks of growing depth, shaped (E-SPA and TAT) and unshaped, and draws their curves in one figure.

    python -m simplest_vit.analysis.depth_study --config configs/digits.py --workdir runs/depth

A block has one attention and two dense layers, embedding and head add two: depth 64 is 194 layers. Stopped, the same
command goes on where it was. Writes depth_study.png (and SVG) and depth_study.csv to --workdir.
"""

import csv
import logging
import pathlib
from typing import Any

from absl import flags

from simplest_vit import cli
from simplest_vit.analysis import figures
from simplest_vit.analysis.contrasts import with_contrast
from simplest_vit.analysis.depth_figure import draw
from simplest_vit.analysis.runs import Curve, read_curves
from simplest_vit.config import check
from simplest_vit.errors import TrainingError, UserError
from simplest_vit.models.factory import VARIANTS
from simplest_vit.training import loop
from simplest_vit.training.workdir import check_workdir

DEPTHS = ("8", "12", "24", "64")
STEPS = 200
# Name in figure, table and folders -> contrast.
SHAPINGS = {"shaped": "E-SPA + TAT", "unshaped": "vanilla, unshaped"}

log = logging.getLogger("simplest_vit")


def effective_depth(depth: int) -> int:
    """Layers with parameters on a path through the network: three a block, embedding and head."""
    return 3 * depth + 2


def configs(config: Any, depths: list[int], steps: int) -> dict[tuple[str, int], Any]:
    """The config of each run: `steps` steps, evaluated twenty times.

    Beyond the depth of the config the learning rate falls as 1 / depth, shaped or not: all blocks move at once, and
    without normalization nothing bounds what their changes do together.

    Args:
      config: Gives data, sizes and optimizer.
      depths: Numbers of blocks.
      steps: Steps of each run.

    Returns:
      Configs by shaping (`SHAPINGS`) and depth.
    """
    base_depth = config.model.depth or VARIANTS[config.model.variant]["depth"]
    result = {}
    for shaping, contrast in SHAPINGS.items():
        for depth in depths:
            run = with_contrast(config, contrast)
            run.model.depth = depth
            run.optimizer.learning_rate *= min(1.0, base_depth / depth)
            run.steps = steps
            run.log_every = run.eval_every = max(steps // 20, 1)
            run.checkpoint_every = max(steps // 4, 1)
            result[shaping, depth] = run
    return result


def depth_study(config: Any, workdir: str, depths: list[int], steps: int) -> dict[tuple[str, int], dict[str, Curve]]:
    """Train all runs, or go on with them, and write figure and table.

    Args:
      config: Gives data, sizes and optimizer.
      workdir: Folder of the study; each run has its own in it.
      depths: Numbers of blocks.
      steps: Steps of each run.

    Returns:
      The training curves by shaping and depth.

    Raises:
      UserError: If the config does not fit one of the depths; nothing is trained then.
    """
    folder = pathlib.Path(workdir)
    planned = configs(config, depths, steps)
    for (shaping, depth), run in planned.items():
        check(run)
        check_workdir(str(folder / f"{shaping}_depth={depth}"), run.to_dict())
    curves = {}
    for (shaping, depth), run in planned.items():
        path = folder / f"{shaping}_depth={depth}"
        log.info("depth study: %s, depth %d", shaping, depth)
        try:
            loop.train_and_evaluate(run, str(path))
        except TrainingError as error:  # what a network without shaping may well do
            log.warning("%s, depth %d: %s", shaping, depth, error)
        curves[shaping, depth] = read_curves(path)
    try:
        with figures.style():
            figures.save(
                draw(curves, f"{config.data.name}, {config.optimizer.name}, {steps} steps"), folder / "depth_study"
            )
        with (folder / "depth_study.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["shaping", "depth", "effective_depth", "tag", "step", "value"])
            for (shaping, depth), tags in curves.items():
                for tag, (at, values) in tags.items():
                    for step, value in zip(at, values, strict=True):
                        table.writerow([shaping, depth, effective_depth(depth), tag, step, value])
    except OSError as error:
        raise UserError(f"--workdir={workdir} cannot be written ({error.strerror}); choose another") from error
    return curves


def summary(curves: dict[tuple[str, int], dict[str, Curve]]) -> str:
    """Last training loss and validation accuracy of each run, one a line."""
    lines = []
    for (shaping, depth), tags in curves.items():
        last = {tag: values[-1] for tag, (_, values) in tags.items() if len(values)}
        lines.append(
            f"{shaping:<8}  depth {depth:>3} ({effective_depth(depth)} layers)  "
            f"training loss {last.get('train_loss', float('nan')):.4f}  "
            f"validation accuracy {last.get('validation_accuracy', float('nan')):.2%}"
        )
    return "\n".join(lines)


def main() -> None:
    """Run as a program."""
    depths = flags.DEFINE_list("depths", list(DEPTHS), "Numbers of blocks.")
    steps = flags.DEFINE_integer("steps", STEPS, "Steps of each run.", lower_bound=1)

    def program(arguments: list[str]) -> None:
        del arguments
        if not all(depth.isdecimal() and int(depth) for depth in depths.value):
            raise UserError(f"--depths={','.join(depths.value)}: expected positive integers such as {','.join(DEPTHS)}")
        blocks = [int(depth) for depth in depths.value]
        print(summary(depth_study(cli.CONFIG.value, str(cli.WORKDIR.value), blocks, steps.value)))

    cli.run(program, usage="python -m simplest_vit.analysis.depth_study --config FILE --workdir FOLDER")


if __name__ == "__main__":
    main()
