"""Plot signal propagation, in theory and as measured, for a config and the networks that it is compared with.

    simplest-vit signal_propagation --config configs/cifar10.py --workdir runs/cifar10

Writes to WORKDIR/signal_propagation: signal_propagation (all panels) and overview (three of them), both as PNG and SVG;
signal_propagation.csv and jacobian.csv with all numbers.
"""

import copy
import logging
import math
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from simplest_vit import cli
from simplest_vit.analysis import figures
from simplest_vit.analysis.propagation import Propagation, analyse
from simplest_vit.analysis.signal_figure import draw, draw_overview
from simplest_vit.data import input_pipeline
from simplest_vit.data.dataset import DatasetInfo
from simplest_vit.errors import UserError
from simplest_vit.files import write_csv, writing
from simplest_vit.models import ViT, model_arguments
from simplest_vit.training.evaluate import restore_best
from simplest_vit.training.run import build
from simplest_vit.training.workdir import check_data, check_workdir

# The networks that explain the method, each one change away from it: fields of `config.model` by name. Absent fields
# of `_CHOICES` keep the network's own values.
CONTRASTS: dict[str, dict[str, str]] = {
    "E-SPA + TAT": {"name": "simplest_vit"},
    "isometric": {"name": "isometric_vit"},
    "vanilla, unshaped": {"name": "simplest_vit", "attention": "softmax", "activation": "relu"},
    "E-SPA, ReLU": {"name": "simplest_vit", "activation": "relu"},
    "U-SPA + TAT": {"name": "simplest_vit", "attention": "uspa"},
    "Value-SkipInit + TAT": {"name": "simplest_vit", "attention": "value_skipinit"},
    "SimpleViT": {"name": "simple_vit"},
    "reference's bias + TAT": {"name": "simplest_vit", "attention": "espa_reference"},
}
_CHOICES = ("attention", "mlp", "activation", "init", "norm", "skip")
# The reference's bias would cover the curve of E-SPA, and the others explain less.
_OVERVIEW = ("E-SPA + TAT", "vanilla, unshaped", "E-SPA, ReLU", "isometric", "SimpleViT")
NUM_IMAGES = 16

log = logging.getLogger("simplest_vit")


def name_of(model: Any) -> str:
    """Return the name in `CONTRASTS` of a `config.model`, or one made of its fields."""
    chosen = {field: model[field] for field in ("name", *_CHOICES) if model[field] is not None}
    names = [name for name, fields in CONTRASTS.items() if fields == chosen]
    return names[0] if names else ", ".join(chosen.values())


def with_contrast(config: Any, name: str) -> Any:
    """Return a copy of `config` whose network is the contrast `name`, of the same sizes."""
    config = copy.deepcopy(config)
    config.model.update(dict.fromkeys(_CHOICES) | CONTRASTS[name])
    return config


def initial_models(config: Any, data: DatasetInfo, seeds: Iterable[int]) -> Iterator[ViT]:
    """Yield the float32 model of a config at initialization for each seed."""
    config = config.copy_and_resolve_references()
    config.compute_dtype = "float32"
    run = build(config, data)
    initialize = jax.jit(lambda seed: run.initialize(seed=seed).model_state)
    for seed in seeds:
        yield run.model(initialize(np.uint32(seed)))


def signal_propagation(config: Any, workdir: str, *, trained: bool = False, seeds: int = 1) -> list[Propagation]:
    """Analyse the model of a config, and the contrasts at initialization; write figures and tables.

    Args:
      workdir: The run's folder, which may be missing; results go to its subfolder `signal_propagation`.
      trained: Analyse the best checkpoint of the run as well.

    Returns:
      The curves of all models, that of the config first.

    Raises:
      UserError: If the config does not fit, or `trained` finds no checkpoint or one of other data.
    """
    path = check_workdir(workdir, config.to_dict())
    all_seeds = cli.seeds_from(config.seed, seeds)
    dataset = input_pipeline.load(config.data)
    count = min(NUM_IMAGES, dataset.validation_size)  # a larger batch would be padded with copies
    batch = next(input_pipeline.eval_batches(dataset, batch_size=count, sharding=None))
    own = name_of(config.model)
    variants = {own: config} | {name: with_contrast(config, name) for name in CONTRASTS if name != own}
    for name, variant in variants.items():
        try:
            sizes = model_arguments(**variant.model, image_shape=dataset.image_shape)
        except UserError as error:
            raise UserError(f"{name}, which it is compared with: {error}" if name != own else str(error)) from error
    results = []
    if trained:
        run, state, _ = restore_best(workdir)
        check_data(path, dataset.info)
        results.append(analyse(f"{own}, trained", [run.model(state)], batch["image"], batch["label"]))
    for name, variant in variants.items():
        log.info("signal propagation: %s", name)
        models = initial_models(variant, dataset.info, all_seeds)
        results.append(analyse(name, models, batch["image"], batch["label"]))
    images = f"{count} images of {dataset.name}"
    write(
        results,
        path / "signal_propagation",
        f"depth {sizes['depth']}, width {sizes['width']}, {images}, initializations: {seeds}",
    )
    return results


def write(results: list[Propagation], folder: pathlib.Path, title: str) -> None:
    """Write figures and tables to a folder; a UserError if it cannot be written."""
    with writing(str(folder), "choose another --workdir"):
        folder.mkdir(parents=True, exist_ok=True)
        with figures.style():
            figures.save(draw(results, title), folder / "signal_propagation")
            figures.save(draw_overview([r for r in results if r.name in _OVERVIEW], title), folder / "overview")
        header = ("model", "block", "quantity", "measured", "theory")
        write_csv(folder / "signal_propagation.csv", [header, *_rows(results)])
        spectra = ((result.name, *pair) for result in results for pair in zip(*result.jacobian, strict=True))
        write_csv(folder / "jacobian.csv", [("model", "singular_value", "share"), *spectra])


def _rows(results: list[Propagation]) -> Iterator[tuple[str, int, str, float | None, float | None]]:
    """Yield rows of model, block, quantity, measured and theory; None if a value is missing."""
    for result in results:
        for quantity in dict.fromkeys([*result.measured, *result.theory]):
            pair = [result.measured.get(quantity), result.theory.get(quantity)]
            for block in range(len(result.token_rows)):
                measured, theory = (None if x is None or math.isnan(x[block]) else float(x[block]) for x in pair)
                if (measured, theory) != (None, None):
                    yield result.name, block, quantity, measured, theory


def main() -> None:
    """Run the command."""
    trained = flags.DEFINE_bool("trained", False, "Analyse the best checkpoint in --workdir as well.")
    seeds = flags.DEFINE_integer("seeds", 1, "Number of initializations to average over.", lower_bound=1)

    def program() -> None:
        workdir = str(cli.WORKDIR.value)
        signal_propagation(cli.CONFIG.value, workdir, trained=trained.value, seeds=seeds.value)
        print(pathlib.Path(workdir, "signal_propagation", "signal_propagation.png"))

    cli.run(program, usage="simplest-vit signal_propagation --config FILE --workdir FOLDER")
