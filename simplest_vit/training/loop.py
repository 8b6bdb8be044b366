"""A run, from a config and a folder: train, evaluate, checkpoint, report."""

import contextlib
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
from clu import parameter_overview
from flax import nnx

from simplest_vit.config import flatten
from simplest_vit.data import pipeline as input_pipeline
from simplest_vit.data.preview import image_grid
from simplest_vit.errors import Interrupted, UserError
from simplest_vit.models import attention
from simplest_vit.optimizers.factory import create_optimizer
from simplest_vit.optimizers.schedules import warmup_cosine
from simplest_vit.training import distributed, results
from simplest_vit.training.checkpoint import AT_THE_START, Checkpoints
from simplest_vit.training.interrupt import Interruption
from simplest_vit.training.meter import Meter, check_finite
from simplest_vit.training.metrics import Sums, mean_metrics
from simplest_vit.training.progress import log, train_line, validation_line
from simplest_vit.training.sharding import batch_sharding, check_batch_size, create_mesh, memory_line
from simplest_vit.training.state import TrainState, abstract_state, create_state, state_initializer
from simplest_vit.training.step import make_eval_step, make_train_step
from simplest_vit.training.workdir import RESULTS, check_workdir, claim_workdir, read_json, write_results
from simplest_vit.training.writers import metric_writers, periodic_actions

# What `results.json` takes over from the last evaluation.
_RESULTS = (
    "validation_accuracy",
    "validation_loss",
    "best_validation_accuracy",
    "train_loss",
    "train_accuracy",
    "wall_time_s",
)


def train_and_evaluate(config: Any, workdir: str) -> dict[str, Any]:
    """Train as the config says, or go on with the run in `workdir`.

    Args:
      config: The run's config.
      workdir: Folder for checkpoints, TensorBoard files and `results.json`.

    Returns:
      The content of `results.json`.

    Raises:
      UserError: If the config, the data or the folder does not fit.
      TrainingError: If too many steps in a row were skipped, for their loss or gradient is not finite, or the
        validation loss is not, or if the disk is full; the last checkpoint is intact.
      Interrupted: By SIGTERM or SIGINT; the step reached is saved.
    """
    start_time = time.monotonic()
    check_batch_size(config.batch_size, config.accumulation_steps, create_mesh(config.fsdp))
    if config.model.attention_kernel == "fused":
        attention.check_devices(jax.devices())
    run = _Run(config, workdir)
    batches_per_epoch = input_pipeline.steps_per_epoch(run.dataset, config)

    with contextlib.ExitStack() as stack:
        distributed.from_primary(lambda: stack.enter_context(claim_workdir(run.path, config.to_dict())))
        interruption = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(Checkpoints(run.path, create=True))
        step = checkpoints.newest() or 0
        if step == run.total_steps and distributed.from_primary((run.path / RESULTS).exists):
            log.info("%s has finished: its %s is repeated here", run.path, RESULTS)
            return distributed.from_primary(lambda: read_json(run.path / RESULTS))
        writer = metric_writers.create_default_writer(run.path, just_logging=not distributed.is_primary())
        stack.callback(writer.close)
        if step:
            state, progress = checkpoints.restore(run.abstract, step)
            log.info("going on from step %d of %d in %s", step, run.total_steps, run.path)
        else:
            state, progress = create_state(run.initialize, run.abstract), dict(AT_THE_START)
            writer.write_hparams(flatten(config.to_dict()))
        log.info(memory_line(run.abstract))
        log.info("parameters\n%s", parameter_overview.get_parameter_overview(run.abstract.params, include_stats=False))
        train_step = make_train_step(run.graphdef, run.tx, config, run.shardings)
        batches = input_pipeline.train_batches(run.dataset, config, start_step=step, sharding=run.sharding)
        profile = _profile(config, run.path)
        meter = Meter(config.batch_size, config.max_skipped_steps, progress["unreported"])
        saved_step, earlier_wall_time = step, progress["wall_time_s"]

        while True:
            if run.evaluated_behind(step) and progress["evaluated_step"] < step:
                scalars = run.evaluate(state, interruption)
                if scalars:
                    check_finite(scalars, step)
                    best = max(progress["best_validation_accuracy"], scalars["validation_accuracy"])
                    wall_time = earlier_wall_time + time.monotonic() - start_time
                    progress |= {
                        **scalars,
                        "best_validation_accuracy": best,
                        "evaluated_step": step,
                        "wall_time_s": wall_time,
                    }
                    log.info(validation_line(step, progress))
                    writer.write_scalars(step, scalars)
                    if run.saved_behind(step):
                        checkpoints.save(state, progress, saved_step := step)
                meter.start()
            if progress["evaluated_step"] == run.total_steps:
                break
            if interruption.reached():
                if step > saved_step:
                    wall_time = earlier_wall_time + time.monotonic() - start_time
                    progress |= {"unreported": meter.unreported(), "wall_time_s": wall_time}
                    checkpoints.save(state, progress, step)
                checkpoints.wait()
                reached = f"step {step} of {run.total_steps} is saved" if step else "no step was made"
                raise Interrupted(f"{reached}; the same command goes on from there")

            batch = next(batches)
            if step == 0:
                writer.write_images(0, {"train_images": image_grid(run.dataset, batch)})
            state, metrics = train_step(state, batch)
            meter.add(metrics)
            step += 1
            profile(step)
            if run.evaluated_behind(step) or step % config.log_every == 0:
                scalars = {"epoch": step / batches_per_epoch, **meter.report(step)}
                # A skipped step does not count for the schedule.
                scalars["learning_rate"] = float(run.learning_rate(step - 1 - scalars["skipped_steps"]))
                log.info(train_line(step, run.total_steps, scalars))
                writer.write_scalars(step, scalars)
                progress |= {name: scalars[name] for name in ("train_loss", "train_accuracy") if name in scalars}
                progress["unreported"] = []

        checkpoints.wait()
        outcome = {
            **{name: progress.get(name) for name in _RESULTS},
            "steps": run.total_steps,
            "step_time_median_s": meter.step_time_median,
            "images_per_second": config.batch_size / meter.step_time_median if meter.step_time_median else None,
            "seed": config.seed,
            "config": config.to_dict(),
            **results.environment(),
        }
        if distributed.is_primary():
            write_results(run.path, outcome)
    return outcome


def evaluate(config: Any, workdir: str) -> dict[str, dict[str, float]]:
    """Evaluate the checkpoints of the run in `workdir` on the validation split.

    Args:
      config: The run's config.
      workdir: The run's folder; nothing is written to it.

    Returns:
      For `latest` and `best`: `step`, `validation_accuracy` and `validation_loss`.

    Raises:
      UserError: If the folder holds no checkpoint, or one of another config.
    """
    run = _Run(config, workdir)
    if not (run.path / "checkpoints").is_dir():
        raise UserError(f"--workdir={workdir} holds no checkpoint; train there first, or name another folder")
    outcome = {}
    with Checkpoints(run.path, create=False) as checkpoints:
        latest, best = checkpoints.newest(), checkpoints.best()
        if latest is None or best is None:
            raise UserError(f"--workdir={workdir} holds no finished checkpoint; go on training there first")
        steps = {"latest": latest, "best": best}
        for step in set(steps.values()):
            state, _ = checkpoints.restore(run.abstract, step)
            outcome[step] = {"step": step, **run.evaluate(state)}
    return {name: outcome[step] for name, step in steps.items()}


class _Run:
    """What training and evaluation of a checked config share: data, model, optimizer and devices."""

    def __init__(self, config: Any, workdir: str):
        self.mesh = mesh = create_mesh(config.fsdp)
        self.path: pathlib.Path = check_workdir(workdir, config.to_dict())
        self.dataset = input_pipeline.load(config.data)
        self.config = config
        self.total_steps: int = config.steps or max(
            round(config.epochs * input_pipeline.steps_per_epoch(self.dataset, config)), 1
        )
        self.learning_rate = warmup_cosine(config.optimizer.learning_rate, config.warmup_steps, self.total_steps)
        self.tx = create_optimizer(config, self.learning_rate, mesh)
        self.graphdef: nnx.GraphDef
        self.graphdef, self.initialize = state_initializer(
            config, image_shape=self.dataset.image_shape, num_classes=self.dataset.num_classes, tx=self.tx
        )
        self.sharding = batch_sharding(mesh)
        self.abstract: TrainState = abstract_state(self.initialize, mesh)
        self.shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        self._eval_step = make_eval_step(self.graphdef, mesh)

    def saved_behind(self, step: int) -> bool:
        """Whether a checkpoint is due behind this step."""
        return step == self.total_steps or step % self.config.checkpoint_every == 0

    def evaluated_behind(self, step: int) -> bool:
        """Whether an evaluation is due behind this step."""
        return self.saved_behind(step) or step % self.config.eval_every == 0

    def evaluate(self, state: TrainState, interruption: Interruption | None = None) -> dict[str, float]:
        """Validation loss and accuracy, where every example counts once; nothing if it was interrupted."""
        batch_size = math.ceil(self.config.batch_size / self.mesh.size) * self.mesh.size
        batches = input_pipeline.eval_batches(self.dataset, self.config, sharding=self.sharding, batch_size=batch_size)
        sums: list[Sums] = []
        for batch in batches:
            if interruption and interruption.pending:
                return {}
            sums.append(self._eval_step(state.eval_params, state.constants, batch))
            jax.block_until_ready(sums[-2:-1])  # one batch waits while one is computed, not all of them
        mean = mean_metrics(jax.device_get(sums))
        return {"validation_loss": mean["loss"], "validation_accuracy": mean["accuracy"]}


def _profile(config: Any, path: pathlib.Path) -> Callable[[int], Any]:
    """Profile over the steps that the config names (clu); to be called after each step."""
    if not config.profile.first_step:
        return lambda step: None
    return periodic_actions.Profile(
        logdir=path,
        first_profile=config.profile.first_step,
        num_profile_steps=config.profile.num_steps,
        profile_duration_ms=None,
        every_secs=None,
    )
