"""Signal propagation, theory beside measurement, for a config and the contrasts that explain the method.

    python -m simplest_vit.analysis.signal_propagation --config configs/cifar10.py --workdir runs/cifar10

Writes to WORKDIR/signal_propagation: signal_propagation (all panels) and overview (three of them), both as PNG and SVG;
signal_propagation.csv and jacobian.csv with all numbers; and a folder of TensorBoard scalars for each model, whose step
is the block.
"""

import csv
import logging
import math
import pathlib
from typing import Any

import jax
from absl import flags

from simplest_vit import cli
from simplest_vit.analysis import figures
from simplest_vit.analysis.contrasts import CONTRASTS, name_of, with_contrast
from simplest_vit.analysis.propagation import Propagation, analyse, initial_models
from simplest_vit.analysis.signal_figure import draw, draw_overview
from simplest_vit.data import input_pipeline
from simplest_vit.errors import UserError
from simplest_vit.models import model_arguments
from simplest_vit.training.evaluate import restore_best
from simplest_vit.training.workdir import check_workdir
from simplest_vit.training.writers import SummaryWriter

NUM_IMAGES = 16
# The reference's bias would hide E-SPA, and the others explain less.
_OVERVIEW = ("E-SPA + TAT", "vanilla, unshaped", "E-SPA, ReLU", "isometric", "SimpleViT")

log = logging.getLogger("simplest_vit")


def signal_propagation(
    config: Any, workdir: str, *, trained: bool = False, inputs: str = "images", seeds: int = 1
) -> list[Propagation]:
    """Analyse the model of a config, and the contrasts at initialization; write figure, table and scalars.

    Args:
      config: The run's config.
      workdir: The run's folder, which may be missing; results go to its subfolder `signal_propagation`.
      trained: Analyse the best checkpoint of the run instead of its initialization.
      inputs: `images` of the validation split, or `gaussian` noise of their shape with random labels.
      seeds: Number of initializations to average over.

    Returns:
      The curves of all models, that of the config first.

    Raises:
      UserError: If the config does not fit, or `trained` finds no checkpoint.
    """
    if seeds < 1:
        raise UserError(f"--seeds={seeds} must be at least 1")
    path = check_workdir(workdir, config.to_dict())
    dataset = input_pipeline.load(config.data)
    batch = next(input_pipeline.eval_batches(dataset, batch_size=NUM_IMAGES, sharding=None))
    image, label = batch["image"], batch["label"]
    if inputs == "gaussian":
        image_key, label_key = jax.random.split(jax.random.key(config.seed))
        image = jax.random.normal(image_key, image.shape)
        label = jax.nn.one_hot(
            jax.random.randint(label_key, (NUM_IMAGES,), 0, dataset.num_classes), dataset.num_classes
        )

    own = name_of(config.model)
    variants = {own: config} | {name: with_contrast(config, name) for name in CONTRASTS if name != own}
    for name, variant in variants.items():
        try:
            sizes = model_arguments(**variant.model, image_shape=dataset.image_shape)
        except UserError as error:
            raise UserError(f"{name}, which it is compared with: {error}" if name != own else str(error)) from error
    results = []
    if trained:
        run, state = restore_best(workdir, config)
        results.append(analyse(f"{own}, trained", [run.model(state)], image, label))
    for name, variant in variants.items():
        log.info("signal propagation: %s", name)
        models = initial_models(variant, dataset.info, seeds)
        results.append(analyse(name, models, image, label))
    data = f"images of {dataset.name}" if inputs == "images" else "Gaussian images"
    title = f"depth {sizes['depth']}, width {sizes['width']}, {NUM_IMAGES} {data}, initializations: {seeds}"
    write(results, path / "signal_propagation", title)
    return results


def write(results: list[Propagation], folder: pathlib.Path, title: str) -> None:
    """Write figures, tables and scalars to a folder.

    Raises:
      UserError: If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with figures.style():
            figures.save(draw(results, title), folder / "signal_propagation")
            figures.save(draw_overview([r for r in results if r.name in _OVERVIEW], title), folder / "overview")
        with (folder / "signal_propagation.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["model", "block", "quantity", "measured", "theory"])
            table.writerows(rows(results))
        with (folder / "jacobian.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["model", "singular_value", "share"])
            table.writerows((r.name, *pair) for r in results for pair in zip(*r.jacobian, strict=True))
        for result in results:
            _write_scalars(result, folder / result.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); choose another --workdir") from error


def rows(results: list[Propagation]) -> list[tuple[str, int, str, float | None, float | None]]:
    """List rows of model, block, quantity, measured and theory; None if there is no value."""
    table = []
    for result in results:
        for quantity in dict.fromkeys([*result.measured, *result.theory]):
            pair = [result.measured.get(quantity), result.theory.get(quantity)]
            for block in range(len(result.token_rows)):
                measured, theory = (None if x is None or math.isnan(x[block]) else float(x[block]) for x in pair)
                if (measured, theory) != (None, None):
                    table.append((result.name, block, quantity, measured, theory))
    return table


def _write_scalars(result: Propagation, folder: pathlib.Path) -> None:
    """Write one TensorBoard run for each model, so that TensorBoard overlays them."""
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(folder))
    for _, block, quantity, measured, theory in rows([result]):
        pair = {f"{quantity}/measured": measured, f"{quantity}/theory": theory}
        writer.write_scalars(block, {tag: value for tag, value in pair.items() if value is not None})
    writer.close()


def main() -> None:
    """Run as a program."""
    trained = flags.DEFINE_bool("trained", False, "Analyse the best checkpoint in --workdir, not the initialization.")
    inputs = flags.DEFINE_enum("inputs", "images", ["images", "gaussian"], "Validation images, or Gaussian noise.")
    seeds = flags.DEFINE_integer("seeds", 1, "Number of initializations to average over.")

    def program(arguments: list[str]) -> None:
        del arguments
        config, workdir = cli.CONFIG.value, str(cli.WORKDIR.value)
        signal_propagation(config, workdir, trained=trained.value, inputs=inputs.value, seeds=seeds.value)
        print(pathlib.Path(workdir, "signal_propagation", "signal_propagation.png"))

    cli.run(program, usage="python -m simplest_vit.analysis.signal_propagation --config FILE --workdir FOLDER")


if __name__ == "__main__":
    main()
