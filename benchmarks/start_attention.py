"""Evaluate finished runs with their initial attention in place of the trained one.

    python -m benchmarks.start_attention runs/headline/test/cifar10/soap/isometric/0.002/seed=11

With queries at zero, only the constant bias determines where a head looks, as at initialization. The accuracy lost
is what the learned attention contributes. The control "attention frozen", trained without queries and keys, shows
what the network learns without it.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp

from simplest_vit import cli
from simplest_vit.data import input_pipeline
from simplest_vit.errors import UserError
from simplest_vit.training.evaluate import restore_best, validate
from simplest_vit.training.run import Run
from simplest_vit.training.sharding import create_mesh
from simplest_vit.training.state import ModelState
from simplest_vit.training.workdir import check_data


def start_state(run: Run, state: ModelState) -> ModelState:
    """Return a state with the queries of all blocks at zero.

    Raises:
      UserError: If the queries of this network did not start at zero.
    """
    if not run.model(state).blocks.attention.kind.zero_queries:
        raise UserError(f"the queries of {run.config.model.name} do not start at zero; give runs of isometric_vit")
    blocks = state.params["blocks"]
    queries = jax.tree.map(jnp.zeros_like, blocks["attention"]["query"])
    attention = blocks["attention"] | {"query": queries}
    return dataclasses.replace(state, params=state.params | {"blocks": blocks | {"attention": attention}})


def _main(folders: list[str]) -> None:
    if not folders:
        raise UserError("no folder given; usage: python -m benchmarks.start_attention FOLDER...")
    for folder in folders:
        run, state, _ = restore_best(folder, mesh=create_mesh())
        dataset = input_pipeline.load(run.config.data, mesh=run.mesh)
        check_data(pathlib.Path(folder), dataset.info)
        trained, put_back = (validate(run, dataset, each) or {} for each in (state, start_state(run, state)))
        print(
            f"{folder}: trained {trained['validation_accuracy']:.2%} (loss {trained['validation_loss']:.4f}), with the "
            f"initial attention {put_back['validation_accuracy']:.2%} (loss {put_back['validation_loss']:.4f})",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(_main, "python -m benchmarks.start_attention FOLDER...", required=(), positional=True)
