"""A run, from a config and a folder: train, evaluate, checkpoint, report."""

import contextlib
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from clu import parameter_overview

from simplest_vit.config import flatten
from simplest_vit.data import input_pipeline
from simplest_vit.data.dataset import Dataset
from simplest_vit.data.preview import image_grid
from simplest_vit.errors import Interrupted
from simplest_vit.models import attention
from simplest_vit.training import distributed
from simplest_vit.training.checkpoint import AT_THE_START, Checkpoints, has_checkpoint
from simplest_vit.training.fine_tuning import weights_to_start_from
from simplest_vit.training.interrupt import Interruption
from simplest_vit.training.metrics import Meter, Sums, check_finite, mean_metrics, train_line, validation_line
from simplest_vit.training.run import Run, build, restore_model
from simplest_vit.training.sharding import batch_sharding, check_batch_size, create_mesh, memory_line
from simplest_vit.training.state import ModelState
from simplest_vit.training.workdir import (
    RESULTS,
    check_data,
    check_workdir,
    claim_workdir,
    environment,
    read_json,
    read_run,
    write_results,
)
from simplest_vit.training.writers import log, metric_writers

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
      config: The run's config, checked.
      workdir: Folder for checkpoints, TensorBoard files and `results.json`.

    Returns:
      The content of `results.json`.

    Raises:
      UserError: If the config, the data or the folder does not fit.
      TrainingError: If too many steps in a row were skipped, for their loss or gradient is not finite, or the
        validation loss is not, or if the disk is full; the last checkpoint is intact.
      Interrupted: By SIGTERM or SIGINT; the step reached is saved.
    """
    start = time.monotonic()
    _keep_compiled(config)
    mesh = create_mesh(config.fsdp)
    check_batch_size(config.batch_size, config.accumulation_steps, mesh)
    attention.check_devices(config.model.attention_kernel, jax.devices())
    path = check_workdir(workdir, config.to_dict())
    if distributed.broadcast_from_primary((path / RESULTS).exists):  # whatever has become of the data since
        log.info("%s has finished: its %s is repeated here", path, RESULTS)
        return distributed.broadcast_from_primary(lambda: read_json(path / RESULTS))
    dataset = input_pipeline.load(config.data)
    run = build(config, dataset.info, mesh)
    weights = None
    if config.init_from and not distributed.broadcast_from_primary(lambda: has_checkpoint(path)):
        weights = weights_to_start_from(run)

    with contextlib.ExitStack() as stack:
        distributed.broadcast_from_primary(lambda: stack.enter_context(claim_workdir(path, config.to_dict(), run.data)))
        interruption = stack.enter_context(Interruption())
        checkpoints = stack.enter_context(Checkpoints(path, create=True))
        writer = metric_writers.create_default_writer(path, just_logging=not distributed.is_primary())
        stack.callback(writer.close)
        step = checkpoints.newest() or 0
        if step:
            state, progress = checkpoints.restore(run.abstract, step)
            log.info("going on from step %d of %d in %s", step, run.total_steps, path)
        else:
            state, progress = run.create_state(weights), dict(AT_THE_START)
            writer.write_hparams(flatten(config.to_dict()))
        log.info(memory_line(run.abstract))
        log.info("parameters\n%s", parameter_overview.get_parameter_overview(run.abstract.params, include_stats=False))
        train_step = run.train_step
        batches = input_pipeline.train_batches(
            dataset,
            config.data,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=step,
            sharding=batch_sharding(mesh),
        )
        profile = stack.enter_context(_profile(config, path))
        meter = Meter(config.batch_size, config.max_skipped_steps, progress["unreported"])
        earlier_wall_time, saved_step, saved_time, stopped = progress["wall_time_s"], step, time.monotonic(), False

        while True:
            # The events after a step; an evaluation that was interrupted is made up for here.
            evaluated = None
            if run.is_evaluated(step) and progress["evaluated_step"] < step:
                evaluated = validate(run, dataset, state.model_state, interruption)
                stopped = evaluated is None
            if evaluated is not None:
                check_finite(evaluated, step)
                progress |= {**evaluated, "evaluated_step": step}
                if run.is_saved(step):
                    best = max(progress["best_validation_accuracy"], evaluated["validation_accuracy"])
                    progress |= {"best_validation_accuracy": best, "ranked_step": step}
                log.info(validation_line(step, progress))
                writer.write_scalars(step, evaluated)
            is_due = run.is_saved(step) if evaluated is not None else stopped and step > saved_step
            if is_due or (step > saved_step and _overdue(config, saved_time)):
                progress |= {
                    "unreported": meter.unreported(),
                    "wall_time_s": earlier_wall_time + time.monotonic() - start,
                }
                checkpoints.save(state, progress, step)
                saved_step, saved_time = step, time.monotonic()
            if stopped:
                checkpoints.wait()
                reached = f"step {step} of {run.total_steps} is saved" if step else "no step was made"
                raise Interrupted(f"{reached}; the same command goes on from there")
            if step >= run.total_steps:
                break

            # The steps up to the next event.
            meter.start()
            until = run.next_event(step)
            while step < until and not (stopped := interruption.reached()):
                batch = next(batches)
                if step == 0:
                    writer.write_images(0, {"train_images": image_grid(dataset, batch)})
                state, metrics = train_step(state, batch)
                meter.add(metrics)
                step += 1
                profile(step)
            if step == until:
                scalars = _report(run, meter, step)
                log.info(train_line(step, run.total_steps, scalars))
                writer.write_scalars(step, scalars)
                progress |= {name: scalars[name] for name in ("train_loss", "train_accuracy") if name in scalars}

        checkpoints.wait()
        outcome = {
            **{name: progress.get(name) for name in _RESULTS},
            "steps": run.total_steps,
            "step_time_median_s": meter.step_time_median,
            "images_per_second": config.batch_size / meter.step_time_median if meter.step_time_median else None,
            "seed": config.seed,
            "config": config.to_dict(),
            **environment(),
        }
        if distributed.is_primary():
            write_results(path, outcome)
    return outcome


def evaluate(workdir: str, config: Any = None) -> dict[str, dict[str, float]]:
    """Evaluate the checkpoints of the run in `workdir` on the validation split.

    Args:
      workdir: The run's folder; nothing is written to it.
      config: None for the run's own, on the devices at hand; another is refused, but for where its data are and how it
        is computed.

    Returns:
      For `latest` and `best`: `step`, `validation_accuracy` and `validation_loss`.

    Raises:
      UserError: If the folder holds no checkpoint, or one of another config or other data.
    """
    is_own = config is None
    path, config, data = read_run(workdir, config)
    if is_own:
        config.fsdp, config.model.attention_kernel = 1, "auto"
    dataset = input_pipeline.load(config.data)
    check_data(path, dataset.info)
    attention.check_devices(config.model.attention_kernel, jax.devices())
    run = build(config, data, create_mesh(config.fsdp))
    outcome = {}
    with Checkpoints(path, create=False) as checkpoints:
        steps = {"latest": checkpoints.newest() or 0, "best": checkpoints.best() or 0}
        for step in set(steps.values()):
            outcome[step] = {"step": step, **(validate(run, dataset, restore_model(run, checkpoints, step)) or {})}
    return {name: outcome[step] for name, step in steps.items()}


def validate(
    run: Run, dataset: Dataset, state: ModelState, interruption: Interruption | None = None
) -> dict[str, float] | None:
    """Validation loss and accuracy, where every example counts once; None if it was interrupted."""
    part = run.config.batch_size / run.config.accumulation_steps  # what is in memory at once
    batch_size = math.ceil(part / run.mesh.size) * run.mesh.size
    batches = input_pipeline.eval_batches(dataset, batch_size=batch_size, sharding=batch_sharding(run.mesh))
    sums: list[Sums] = []
    for batch in batches:
        if interruption and interruption.pending:
            return None
        sums.append(run.eval_step(state.params, state.constants, batch))
        jax.block_until_ready(sums[-2:-1])  # one batch waits while one is computed, not all of them
    mean = mean_metrics(jax.device_get(sums))
    return {"validation_loss": mean["loss"], "validation_accuracy": mean["accuracy"]}


def _keep_compiled(config: Any) -> None:
    """Keep what is compiled for accelerators for the next start, with the kernels that XLA chose by timing them."""
    if config.compilation_cache and jax.default_backend() != "cpu":
        if not jax.config.values["jax_compilation_cache_dir"]:
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/simplest_vit"))
        log.info("compiled programs are kept in %s", jax.config.values["jax_compilation_cache_dir"])


def _report(run: Run, meter: Meter, step: int) -> dict[str, float]:
    """What is told of the steps since the last report."""
    scalars = {
        "epoch": step / input_pipeline.steps_per_epoch(run.data.train_size, run.config.batch_size),
        **meter.report(step),
    }
    # A skipped step does not count for the schedule.
    scalars["learning_rate"] = float(run.learning_rate(step - 1 - scalars["skipped_steps"]))
    return scalars


def _overdue(config: Any, saved_time: float) -> bool:
    """Whether it is time for a checkpoint out of turn; all processes decide alike."""
    minutes = config.checkpoint_minutes
    return bool(minutes) and distributed.broadcast_from_primary(lambda: time.monotonic() - saved_time > 60 * minutes)


@contextlib.contextmanager
def _profile(config: Any, path: pathlib.Path) -> Iterator[Callable[[int], None]]:
    """Profile the steps that the config names, by a function to call after each; what has begun is always written."""
    first, number = config.profile.first_step, config.profile.num_steps
    running = False

    def after(step: int) -> None:
        nonlocal running
        if running and step == first + number:
            jax.profiler.stop_trace()
            running = False
        if step == first:
            jax.profiler.start_trace(path)
            running = True

    try:
        yield after
    finally:
        if running:
            jax.profiler.stop_trace()
