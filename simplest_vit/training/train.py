"""Training on one page: set up; then, for each batch, step, log, evaluate and save.

A run that is interrupted anywhere and resumed ends bit-identically to an uninterrupted one.
"""

import contextlib
import os
import time
from collections.abc import Collection
from typing import Any, NoReturn

import jax
from clu import parameter_overview
from ml_collections import ConfigDict

from simplest_vit.config import flatten
from simplest_vit.data import input_pipeline
from simplest_vit.data.preview import image_grid
from simplest_vit.errors import Interrupted, UserError
from simplest_vit.files import read_json
from simplest_vit.models import fused_attention
from simplest_vit.primary import broadcast_from_primary, is_primary, require_same
from simplest_vit.training import distributed
from simplest_vit.training.checkpoint import Checkpoints, has_checkpoint
from simplest_vit.training.evaluate import validate
from simplest_vit.training.fine_tuning import load_initial_params
from simplest_vit.training.metrics import Meter, check_finite, progress_bar, tagged, validation_line
from simplest_vit.training.run import build
from simplest_vit.training.sharding import batch_sharding, check_batch_size, create_mesh, memory_line
from simplest_vit.training.state import RunProgress
from simplest_vit.training.workdir import (
    RESULTS,
    check_data,
    check_workdir,
    environment,
    lock_workdir,
    names_other_originals,
    with_absolute_folders,
    write_results,
)
from simplest_vit.training.writers import create_writer, import_wandb, log

# Fields that may differ between the processes of a run.
_OF_A_PROCESS = ("compilation_cache", "data.dir", "data.manual_dir", "data.num_workers")


def train(config: ConfigDict, workdir: str, *, given: Collection[str] = ()) -> dict[str, Any]:
    """Train as a checked config describes; log which of the `given` fields have no effect. See `api.train`.

    Raises:
      UserError: If the config, the data and the folder do not match.
      TrainingError: If too many steps in a row were skipped because their loss or gradient is not finite, if the
        validation loss is not finite, or if the disk is full; the last checkpoint is intact.
      Interrupted: If a signal was received; the step reached is saved.
    """
    start_time, settings = time.monotonic(), config.to_dict()
    this = environment()  # now, because the code and the libraries on disk may change while the run lasts
    _enable_compilation_cache(config.compilation_cache)

    # 1. Devices and folder are checked first, so that mistakes in them are found before the data are prepared.
    if jax.config.values["jax_enable_x64"]:  # augmentation would draw other numbers
        raise UserError("JAX_ENABLE_X64 is set, and training needs float32; unset it")
    mesh = create_mesh(config.fsdp)
    check_batch_size(config.batch_size, config.accumulation_steps, mesh)
    fused_attention.check_devices(config.model.attention_kernel, jax.devices())
    if config.wandb:
        import_wandb()
    shared = {f"config.{name}": value for name, value in flatten(settings).items() if name not in _OF_A_PROCESS}
    require_same({"--workdir": os.fspath(workdir)} | shared)
    path = check_workdir(workdir, settings)
    if broadcast_from_primary((path / RESULTS).exists):  # even if the data no longer exist
        if names_other_originals(path, settings):
            check_data(path, input_pipeline.load(config.data).info)
        log.info("%s has finished; this is its %s (other data or settings need another folder)", path, RESULTS)
        return broadcast_from_primary(lambda: read_json(path / RESULTS))

    # 2. Data, model, optimizer and schedule; no step is computed, and nothing is written to the folder yet.
    dataset = input_pipeline.load(config.data, mesh=mesh)
    run = build(config, dataset.info, mesh)
    for remark in (*run.remarks(config), *run.without_effect(config, given, dataset)):
        log.info(remark)
    check_batch_size(run.config.batch_size, config.accumulation_steps, mesh)  # now fitted to the training split
    initial_params = None
    if config.init_from and not broadcast_from_primary(lambda: has_checkpoint(path)):
        initial_params = load_initial_params(run, config.init_from)

    with contextlib.ExitStack() as stack:
        # 3. The state, from the newest checkpoint or at step 0.
        lock = lock_workdir(path, settings, run.data)
        broadcast_from_primary(lambda: stack.enter_context(lock))
        must_stop = stack.enter_context(distributed.interruption())
        checkpoints = stack.enter_context(Checkpoints(path, create=True))
        first_step = checkpoints.newest() or 0
        if first_step:
            state, progress = checkpoints.restore(run.abstract, first_step)
            log.info("resuming at step %d of %d in %s", first_step, run.total_steps, path)
            if 0 < config.profile.first_step <= first_step:
                log.info("config.profile.first_step=%d has passed: no profile", config.profile.first_step)
        else:
            state, progress = run.create_state(initial_params), RunProgress()
        last_commit, commit = progress.commits[-1] if progress.commits else None, this["commit"]
        if commit and commit != last_commit:
            if last_commit:
                log.info("the code has changed: %s made step %d, now %s", last_commit, first_step, commit)
            progress.commits = [*progress.commits, commit]
        writer = create_writer(path, first_step, config.wandb)
        stack.callback(writer.close)
        writer.write_hparams(flatten(config.to_dict()))  # for a resumed run, too, which may not have used W&B before
        log.info(memory_line(run.abstract))
        log.info("parameters\n%s", parameter_overview.get_parameter_overview(run.abstract.params, include_stats=False))
        meter = Meter(run.config.batch_size, config.max_skipped_steps, progress.pending_sums)
        earlier_wall_time_s, saved_step, saved_time = progress.wall_time_s, first_step, time.monotonic()

        def evaluate(step: int) -> bool:
            """Evaluate, and return whether to save these weights; the best ones so far are always saved."""
            result = validate(run, dataset, state.model_state)
            if result is None:
                stop(step)
            check_finite(result, step)
            is_best = progress.record_evaluation(step, result)
            log.info(validation_line(step, result, progress.best_validation_accuracy))
            best = {"best_validation_accuracy": progress.best_validation_accuracy}
            writer.write_scalars(step, tagged(result | best))
            return is_best or run.should_save(step) or out_of_patience()

        def out_of_patience() -> bool:
            return 0 < config.patience <= progress.evaluations_without_gain

        def save(step: int) -> None:
            nonlocal saved_step, saved_time
            progress.pending_sums = meter.pending_sums()
            progress.wall_time_s = earlier_wall_time_s + time.monotonic() - start_time
            checkpoints.save(state, progress, step)
            saved_step, saved_time = step, time.monotonic()

        def overdue() -> bool:
            if not (minutes := config.checkpoint_minutes):
                return False
            return broadcast_from_primary(lambda: time.monotonic() - saved_time > 60 * minutes)

        def stop(step: int) -> NoReturn:
            if step > saved_step:
                save(step)
            checkpoints.wait()
            reached = f"step {step} of {run.total_steps} is saved" if step else "no step was made"
            raise Interrupted(f"{reached}; rerun the command to resume")

        # 4. Train, after catching up on an evaluation that was interrupted.
        if must_stop():
            stop(first_step)
        if run.should_evaluate(first_step) and progress.last_evaluation < first_step and evaluate(first_step):
            save(first_step)
        profile = stack.enter_context(contextlib.ExitStack())  # an unfinished profile is also written
        learning_rate = jax.jit(run.learning_rate)  # else each of its operations is compiled
        batches = input_pipeline.train_batches(
            dataset,
            config.data,
            batch_size=run.config.batch_size,
            seed=config.seed,
            start_step=first_step,
            sharding=batch_sharding(mesh),
        )
        bar = stack.enter_context(progress_bar(first_step, run.total_steps))
        for step, batch in zip(range(first_step + 1, run.total_steps + 1), batches, strict=False):
            if out_of_patience():
                log.info(
                    "stopped at step %d of %d: %d evaluations without a better validation accuracy (config.patience)",
                    *(progress.last_evaluation, run.total_steps, progress.evaluations_without_gain),
                )
                break
            if step == first_step + 1:
                log.info("compiling the training step, which may take minutes")
            if step == 1:
                writer.write_images(0, {"train_images": image_grid(dataset, batch)})
            state, metrics = run.train_step(state, batch)
            meter.add(metrics)
            bar.update()
            if step == config.profile.first_step:
                profile.enter_context(jax.profiler.trace(path))
            elif step == config.profile.first_step + config.profile.num_steps:
                profile.close()
            stopped = must_stop()
            if run.should_log(step):
                scalars = meter.report(step) | {"epoch": step / run.steps_per_epoch}
                # A skipped step does not advance the schedule.
                scalars["learning_rate"] = float(learning_rate(step - 1 - scalars["skipped_steps"]))
                progress.record_training(scalars)
                bar.report(step, scalars)
                writer.write_scalars(step, tagged(scalars))
            if stopped:
                stop(step)
            if run.should_log(step):
                due = evaluate(step) if run.should_evaluate(step) else False
                if due or overdue():
                    save(step)
                meter.start()
        checkpoints.wait()

        # 5. The results.
        outcome = {
            **progress.results(),
            "steps": progress.last_evaluation,
            "stopped_early": progress.last_evaluation < run.total_steps,
            "step_time_median_s": meter.step_time_median,
            "images_per_second": run.config.batch_size / meter.step_time_median if meter.step_time_median else None,
            "seed": config.seed,
            "config": with_absolute_folders(run.config.to_dict()),
            **this,
        }
        if is_primary():
            write_results(path, outcome)
    return outcome


def _enable_compilation_cache(wanted: bool) -> None:
    """Cache compiled accelerator programs on disk, including the kernels that XLA chose by timing them."""
    if wanted and jax.default_backend() != "cpu":
        if not jax.config.values["jax_compilation_cache_dir"]:
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/simplest_vit"))
        log.info("compiled programs are kept in %s", jax.config.values["jax_compilation_cache_dir"])
