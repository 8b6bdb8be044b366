"""Fine-tuning: a run starts from the weights of another run (`config.init_from`)."""

import logging
from typing import Any

from simplest_vit.errors import UserError
from simplest_vit.models import model_arguments
from simplest_vit.models.layers import token_grid
from simplest_vit.training.evaluate import restore_best
from simplest_vit.training.run import Run

log = logging.getLogger("simplest_vit")

# Fields in which two models that can share weights may differ.
_MAY_DIFFER = ("attention_kernel", "dropout", "init", "remat")


def load_initial_params(run: Run, folder: str) -> dict[str, Any]:
    """Load parameters from the best checkpoint of another run, in `folder`. Writes nothing.

    Loads all parameters except the head, which is reinitialized unless the classes match. Constants (E-SPA's matrices,
    the position embedding) depend on the token grid and are those of the new run. The result is for `Run.create_state`.

    Raises:
      UserError: If there is no checkpoint, or it holds another model.
    """
    try:
        source, state, _ = restore_best(folder, mesh=run.mesh)
    except UserError as error:
        reason = str(error).replace("--workdir=", "").replace("another --workdir", "another run")
        raise UserError(f"config.init_from={folder}: {reason}") from error
    there, here = (_function(each) for each in (source, run))
    for name in there | here:
        if there.get(name) != here.get(name):
            raise UserError(
                f"config.init_from={folder} holds another model: its config.model.{name} is {there.get(name)!r}, here "
                f"{here.get(name)!r}; set it to that, or choose another run"
            )
    channels, expected = source.data.image_shape[2], run.data.image_shape[2]
    if channels != expected:
        raise UserError(
            f"config.init_from={folder} was trained on images of {channels} channels, expected {expected} as in "
            f"{run.data.name}; choose another run"
        )
    params = dict(state.params)
    head = "too"
    if source.data.class_names != run.data.class_names:
        del params["head"]
        numbers = f"{run.data.num_classes} here, {source.data.num_classes} there"
        head = f"reinitialized: other classes or another order of them ({numbers})"
    loaded = ", ".join(name for name in params if name != "head")
    log.info("starting from step %d of %s: %s loaded, the head %s", state.step, folder, loaded, head)
    log.info("attention and positions are for %s tokens; the loaded run has %s", _grid(run), _grid(source))
    then, now = ((each.data.mean, each.data.std) for each in (source, run))
    if then != now:
        log.info("images are normalized by mean %s and deviation %s; the loaded run's were %s and %s", *now, *then)
    return params


def _function(run: Run) -> dict[str, Any]:
    """Return the settings that determine the function from parameters and images to logits."""
    arguments = model_arguments(**run.config.model, image_shape=run.data.image_shape)
    return {"name": run.config.model.name} | {k: v for k, v in arguments.items() if k not in _MAY_DIFFER}


def _grid(run: Run) -> str:
    return "{}x{}".format(*token_grid(run.data.image_shape, run.config.model.patch_size))
