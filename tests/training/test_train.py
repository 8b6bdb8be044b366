import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import logging
import os
import pathlib
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from simplest_vit import preemption
from simplest_vit.data import input_pipeline
from simplest_vit.errors import CheckpointError, Interrupted, TrainingError, UserError
from simplest_vit.training import evaluate, train
from simplest_vit.training import run as run_module
from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.evaluate import restore_best
from simplest_vit.training.run import build
from simplest_vit.training.sharding import create_mesh
from simplest_vit.training.state import read_record, rewrite_progress
from simplest_vit.training.workdir import read_metrics, read_run
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("two_devices")
RESULT_KEYS = {
    "validation_accuracy",
    "validation_loss",
    "best_validation_accuracy",
    "train_loss",
    "steps",
    "step_time_median_s",
    "images_per_second",
    "wall_time_s",
    "seed",
    "config",
    "device",
    "versions",
    "commit",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir):
    """A run that was never interrupted: its folder and results."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train.train(tiny_config(data__dir=data_dir, ema__decay=0.9), str(workdir))


BUILT, TRAIN_STEPS, make_eval_step = {}, {}, functools.cache(run_module.make_eval_step)


@pytest.fixture
def built_once(monkeypatch):
    """Let the runs of one config share what is compiled, which takes most of their time.

    In `test_an_interrupted_run_ends_bit_equal` each run compiles its own, as in processes of their own.
    """
    make_train_step = run_module.make_train_step

    def build_once(config, data, mesh):
        key = str(config), data, mesh
        if key not in BUILT:
            BUILT[key] = build(config, data, mesh)
        return dataclasses.replace(BUILT[key])  # whose steps are made when they are asked for

    def make_once(graphdef, tx, **named):
        if tx not in TRAIN_STEPS:
            TRAIN_STEPS[tx] = make_train_step(graphdef, tx, **named)
        return TRAIN_STEPS[tx]

    monkeypatch.setattr(train, "build", build_once)
    monkeypatch.setattr(run_module, "make_train_step", make_once)
    monkeypatch.setattr(run_module, "make_eval_step", make_eval_step)


share_programs = pytest.mark.usefixtures("built_once")


def build_from(workdir):
    _, config, data = read_run(str(workdir))
    return build(config, data)


@functools.cache
def finished_arrays(workdir):
    abstract = build_from(workdir).abstract
    return abstract, *final_arrays(workdir, abstract)


def final_arrays(workdir, abstract):
    with Checkpoints(pathlib.Path(workdir), create=False) as checkpoints:
        state, progress = checkpoints.restore(abstract, checkpoints.newest())
    return jax.tree.map(np.asarray, state), progress


def test_a_run_leaves_results_checkpoints_and_events(finished):
    workdir, outcome = finished
    assert outcome.keys() >= RESULT_KEYS
    assert json.loads((workdir / "results.json").read_text()) == json.loads(json.dumps(outcome))
    assert outcome["steps"] == 6
    assert outcome["config"]["model"]["depth"] == 2
    assert outcome["best_validation_accuracy"] >= outcome["validation_accuracy"] > 0
    assert (workdir / "checkpoints" / "6").is_dir()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6]
    assert ["accuracy/validation" in line for line in lines] == [False, True, False, True]
    for tag, name in (
        ("loss/train", "train_loss"),
        ("loss/validation", "validation_loss"),
        ("accuracy/train", "train_accuracy"),
        ("accuracy/validation", "validation_accuracy"),
        ("accuracy/best_validation", "best_validation_accuracy"),
    ):
        assert lines[-1][tag] == outcome[name]
    assert lines[-1]["epoch"] == pytest.approx(6 / (1437 // 64))
    events = EventAccumulator(str(workdir))
    events.Reload()
    assert events.Scalars("loss/train")[1].value == pytest.approx(lines[1]["loss/train"])
    assert [event.step for event in events.Scalars("loss/train")] == [2, 3, 4, 6]
    assert [event.step for event in events.Scalars("accuracy/validation")] == [3, 6]
    assert events.Images("train_images")[0].width > 8 * 8


def test_tensorboard_shows_grouped_curves_and_final_metrics_beside_hyperparameters(finished):
    workdir, outcome = finished
    multiplexer = EventMultiplexer()
    multiplexer.AddRun(str(workdir), "run").Reload()
    tags = set(multiplexer.PluginRunToTagToContent("scalars")["run"])
    assert tags == {
        *("loss/train", "loss/validation", "accuracy/train", "accuracy/validation", "accuracy/best_validation"),
        *("speed/step_time", "speed/steps_per_second", "speed/images_per_second"),
        *("optimizer/grad_norm", "optimizer/skipped_steps", "learning_rate", "epoch"),
    }
    provider = MultiplexerDataProvider(multiplexer, str(workdir))
    plugin = backend_context.Context(TBContext(data_provider=provider, multiplexer=multiplexer, logdir=str(workdir)))
    request = api_pb2.ListSessionGroupsRequest(slice_size=10, allowed_statuses=api_pb2.Status.values())
    (session,) = list_session_groups.Handler(RequestContext(), plugin, "", request).run().session_groups
    assert session.hparams["optimizer.name"].string_value == "adam"
    shown = {value.name.tag: value.value for value in session.metric_values}
    assert shown.keys() == tags
    assert shown["accuracy/best_validation"] == pytest.approx(outcome["best_validation_accuracy"])
    assert shown["loss/validation"] == pytest.approx(outcome["validation_loss"])


def test_evaluation_repeats_what_training_found(finished, data_dir, monkeypatch):
    """From any directory, in a folder that may only be read."""
    workdir, outcome = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    monkeypatch.chdir(workdir.parent)
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK)
    evaluated = evaluate.evaluate(workdir.name)
    summary = evaluated["latest"].summary()
    lowest = summary.pop("lowest_class_accuracies")
    by_class = evaluated["latest"].class_accuracy
    assert lowest == {str(digit): by_class[digit] for digit in range(10)}
    assert list(lowest.values()) == sorted(by_class)
    assert summary == {
        "step": 6,
        "validation_loss": pytest.approx(outcome["validation_loss"]),
        "validation_accuracy": outcome["validation_accuracy"],
        "top5_accuracy": evaluated["latest"].top5_accuracy,
        "calibration_error": evaluated["latest"].calibration_error,
    }
    assert outcome["validation_accuracy"] <= summary["top5_accuracy"] <= 1
    assert evaluated["latest"].confusion.sum() == 360
    assert evaluated["latest"].accuracy == outcome["validation_accuracy"]
    assert evaluated["best"].accuracy == outcome["best_validation_accuracy"]
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}, "evaluation wrote to the workdir"


def test_evaluation_takes_another_split_or_folder_of_the_same_classes(finished, tmp_path, monkeypatch):
    """Of the size of its training images, and normalized as these were, whatever its own statistics are."""
    workdir, outcome = finished
    load, sizes = input_pipeline.load, []

    def odd(data, **named):
        sizes.append(data.image_size)
        return dataclasses.replace(load(data, **named), mean=(0.9,), std=(0.1,))

    monkeypatch.setattr(input_pipeline, "load", odd)
    same, other = (
        evaluate.evaluate(str(workdir), other_data={"validation_split": split})["latest"].accuracy
        for split in ("validation", "validation[:100]")
    )
    assert same == outcome["validation_accuracy"]
    assert other * 100 == pytest.approx(round(other * 100)), "of a hundred images"
    for split, label in itertools.product(("train", "val"), "0123456789"):
        (tmp_path / split / label).mkdir(parents=True)
        Image.new("L", (8, 8), 20).save(tmp_path / split / label / "a.png")
    with pytest.raises(UserError, match=r"has images of 3 channels, the run in .* expects 1; give matching"):
        evaluate.evaluate(str(workdir), other_data={"name": "image_folder", "manual_dir": str(tmp_path)})
    assert sizes == [8, 8, 8]
    for names, message in (
        ("012345678", "9; unknown: none"),
        ("abcdefghij", "0, 1, 2, ...; unknown: a, b, c, ..."),
        ("9876543210", "the same in another order"),
    ):
        monkeypatch.setattr(
            input_pipeline,
            "load",
            lambda data, names=names, **named: dataclasses.replace(load(data, **named), class_names=tuple(names)),
        )
        with pytest.raises(UserError, match=rf"has other classes than the run in .*{message}\); give the same"):
            evaluate.evaluate(str(workdir), other_data={"validation_split": "validation"})


def test_another_split_is_one_of_the_data_that_the_run_was_trained_on(finished, monkeypatch):
    load = input_pipeline.load
    changed = {"fingerprint": "changed"}
    monkeypatch.setattr(
        input_pipeline, "load", lambda data, **named: dataclasses.replace(load(data, **named), **changed)
    )
    with pytest.raises(UserError, match=r"was started with other data: their fingerprint was .*, now 'changed'"):
        evaluate.evaluate(str(finished[0]), other_data={"validation_split": "train"})


def test_what_is_evaluated_is_the_average_where_there_is_one(finished):
    """By hand: the parameters of the whole state, the images of the whole split at once."""
    workdir, outcome = finished
    _, state, _ = finished_arrays(workdir)
    run = build_from(workdir)
    dataset = input_pipeline.load(run.config.data)
    image = (np.asarray(dataset.validation.images) / 255 - run.data.mean) / run.data.std

    def accuracy(params):
        logits = nnx.merge(run.graphdef, params, state.constants)(jnp.asarray(image, jnp.float32))
        return np.mean(np.argmax(logits, axis=-1) == dataset.validation.labels)

    assert accuracy(state.ema_params) == pytest.approx(outcome["validation_accuracy"])
    assert accuracy(state.params) != pytest.approx(outcome["validation_accuracy"])
    run, restored, _ = restore_best(str(workdir))
    jax.tree.map(
        np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(run.model(restored), nnx.Param)), state.ema_params
    )


def test_a_profile_is_written_also_where_the_run_ends_within_it(data_dir, tmp_path):
    config = tiny_config(data__dir=data_dir, steps=2, profile__first_step=1, profile__num_steps=3)
    train.train(config, str(tmp_path))
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_evaluation_needs_the_devices_of_the_attention_kernel(finished, data_dir, monkeypatch):
    config = tiny_config(data__dir=data_dir, ema__decay=0.9, model__attention_kernel="fused")
    with pytest.raises(UserError, match=r"^config.model.attention_kernel='fused' needs a head width from 16 to 128"):
        evaluate.evaluate(str(finished[0]), config)
    monkeypatch.setattr("simplest_vit.models.fused_attention.check_sizes", lambda *_: None)
    with pytest.raises(UserError, match=r"'fused' needs NVIDIA GPUs .* not cpu; choose xla"):
        evaluate.evaluate(str(finished[0]), config)


def test_evaluation_by_the_folder_alone_takes_the_devices_at_hand(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "simplest_vit.models.fused_attention.check_sizes", lambda *_: None
    )  # heads of 8 are too small for it
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    record = json.loads((workdir / "config.json").read_text())
    record["config"] |= {"fsdp": 16}
    record["config"]["model"] |= {"attention_kernel": "fused"}
    (workdir / "config.json").write_text(json.dumps(record))
    evaluated = evaluate.evaluate(str(workdir))
    assert evaluated["latest"].accuracy == finished[1]["validation_accuracy"]


def test_training_needs_float32(tmp_path):
    jax.config.update("jax_enable_x64", True)  # as JAX_ENABLE_X64=1 does
    try:
        with pytest.raises(UserError, match=r"^JAX_ENABLE_X64 is set, and training needs float32; unset it$"):
            train.train(tiny_config(data__dir=str(tmp_path / "data")), str(tmp_path / "run"))
    finally:
        jax.config.update("jax_enable_x64", False)
    assert not [*tmp_path.iterdir()]


def test_evaluation_takes_devices_that_do_not_divide_the_batch(finished, data_dir, tmp_path, monkeypatch):
    for module in (evaluate, train):
        monkeypatch.setattr(module, "create_mesh", lambda fsdp: create_mesh(fsdp, jax.devices()[:3]))
    evaluated = evaluate.evaluate(str(finished[0]), tiny_config(data__dir=data_dir, ema__decay=0.9))
    assert evaluated["latest"].accuracy == finished[1]["validation_accuracy"]
    assert evaluated["latest"].loss == pytest.approx(finished[1]["validation_loss"])
    with pytest.raises(UserError, match=r"config.batch_size=64 cannot be split over 3 devices; .* that divides it"):
        train.train(tiny_config(data__dir=str(tmp_path / "data")), str(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == [], "told before data are prepared"


def test_an_interrupted_run_ends_bit_equal(finished, data_dir, tmp_path, monkeypatch):
    config = tiny_config(data__dir=data_dir, ema__decay=0.9)
    validate, progress_bar = train.validate, train.progress_bar
    calls, bars = [], []

    def interrupted(run, dataset, state):
        calls.append(int(state.step))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return validate(run, dataset, state)

    monkeypatch.setattr(train, "validate", interrupted)
    monkeypatch.setattr(train, "progress_bar", lambda *a, **b: [bars.append(a), progress_bar(*a, **b)][1])
    with pytest.raises(KeyboardInterrupt):
        train.train(config, str(tmp_path))
    assert not (tmp_path / "results.json").exists()
    folder = tmp_path / "checkpoints" / "3"
    rewrite_progress(folder, read_record(folder)["progress"] | {"wall_time_s": 1000.0})
    assert train.train(config, str(tmp_path))["wall_time_s"] > 1000, "with the time before"
    assert calls == [3, 6, 6], "the second call must go on from step 3"
    assert bars == [(0, 6), (3, 6)]
    assert_same_end(tmp_path, finished)


def assert_same_end(workdir, finished):
    """Two runs end with the same state and, times aside, the same progress and results."""
    abstract, expected, expected_progress = finished_arrays(finished[0])
    actual, progress = final_arrays(workdir, abstract)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert timeless(read_metrics(workdir)) == timeless(read_metrics(finished[0]))
    assert dataclasses.replace(progress, wall_time_s=0) == dataclasses.replace(expected_progress, wall_time_s=0)
    results = json.loads((workdir / "results.json").read_text())
    times = {"wall_time_s", "step_time_median_s", "images_per_second"}
    assert {k: v for k, v in results.items() if k not in times} == {
        k: v for k, v in json.loads(json.dumps(finished[1])).items() if k not in times
    }


def timeless(lines):
    """Metrics without times."""
    return [{tag: value for tag, value in line.items() if not tag.startswith("speed/")} for line in lines]


@share_programs
@pytest.mark.parametrize(
    ("when", "number"),
    [
        ("start", signal.SIGTERM),
        ("step 1", signal.SIGINT),
        ("step 5", signal.SIGUSR1),
        ("evaluation 3", signal.SIGTERM),
        ("evaluation 6", signal.SIGTERM),
    ],
)
def test_a_signal_saves_the_step_reached_and_the_run_ends_bit_equal(
    finished, data_dir, tmp_path, monkeypatch, when, number
):
    config = tiny_config(data__dir=data_dir, ema__decay=0.9)
    kind, step = (when + " 0").split()[:2]
    make_train_step, validate = run_module.make_train_step, train.validate

    def signalled(make):
        def step_then_signal(state, batch):
            state, metrics = train_step(state, batch)
            if int(state.step) == int(step):
                send()
            return state, metrics

        train_step = make
        return step_then_signal

    def send():
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while not preemption.received() and time.monotonic() < deadline:
            time.sleep(0.001)

    def validate_and_signal(run, dataset, state):
        if kind == "evaluation" and int(state.step) == int(step):
            send()
        return validate(run, dataset, state)

    handlers = [signal.getsignal(number) for number in preemption.SIGNALS]
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", validate_and_signal)
        if kind == "start":
            patch.setattr(train, "memory_line", lambda state: send())
        if kind == "step":
            patch.setattr(run_module, "make_train_step", lambda *a, **b: signalled(make_train_step(*a, **b)))
        reached = f"step {step} of 6 is saved" if int(step) else "no step was made"
        with pytest.raises(Interrupted, match=f"{reached}; rerun the command"):
            train.train(config, str(tmp_path))
    assert handlers == [signal.getsignal(number) for number in preemption.SIGNALS]
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.steps()[-1:] == [int(step)][: int(step)]
        if when == "evaluation 6":
            assert checkpoints.best() == 3, "what is not evaluated is not the best"
    train.train(config, str(tmp_path))
    assert_same_end(tmp_path, finished)
    with Checkpoints(tmp_path, create=False) as checkpoints, Checkpoints(finished[0], create=False) as expected:
        assert checkpoints.best() == expected.best()


@share_programs
def test_a_kill_while_the_interrupted_evaluation_is_saved_loses_nothing(finished, data_dir, tmp_path, monkeypatch):
    config = tiny_config(data__dir=data_dir, ema__decay=0.9)

    def terminated(*_):
        return None  # as if a signal came meanwhile

    def kill_in_checkpoint(source, target):
        if pathlib.Path(target).name == "record.json":
            raise KeyboardInterrupt
        replace(source, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", terminated)
        with pytest.raises(Interrupted, match="step 3 of 6 is saved"):
            train.train(config, str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill_in_checkpoint)
        with pytest.raises(KeyboardInterrupt):
            train.train(config, str(tmp_path))
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.newest() == 3
    train.train(config, str(tmp_path))
    assert_same_end(tmp_path, finished)


@share_programs
def test_a_save_that_fails_while_a_signal_comes_is_not_told_as_saved(data_dir, tmp_path, monkeypatch):
    failing, save = threading.Event(), Checkpoints.save
    monkeypatch.setattr(train.distributed, "interruption", lambda: contextlib.nullcontext(failing.is_set))

    def save_on_a_full_disk(self, *arguments):
        self._manager._finalize_checkpoint = lambda step: write_nothing()
        failing.set()
        save(self, *arguments)

    def write_nothing():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", save_on_a_full_disk)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No space left on device\)"):
        train.train(tiny_config(data__dir=data_dir), str(tmp_path))


@share_programs
def test_the_weights_of_the_best_validation_are_kept(data_dir, tmp_path, monkeypatch):
    """The last of equals, also one between two checkpoints, and after a resume."""
    accuracies = {1: 0.9, 2: 0.9, 3: 0.6, 4: 0.8, 5: 0.7, 6: 0.5}
    config = tiny_config(data__dir=data_dir, eval_every=1)

    def validate(run, dataset, state):
        return {"validation_loss": 1.0, "validation_accuracy": accuracies[int(state.step)]}

    with monkeypatch.context() as patch:
        patch.setattr(train, "validate", validate)
        outcome = train.train(config, str(tmp_path))
        evaluated = evaluate.evaluate(str(tmp_path), config)
    assert outcome["best_validation_accuracy"] == 0.9
    assert (evaluated["latest"].step, evaluated["best"].step) == (6, 2)
    assert restore_best(str(tmp_path))[1].step == 2


@share_programs
@pytest.mark.parametrize("killed_at", [3, 4, 5])
def test_patience_ends_at_the_same_step_wherever_the_run_was_killed(data_dir, tmp_path, monkeypatch, killed_at):
    """In the evaluation after that step, or after step 5, its last one, before the results were written."""
    accuracies = {1: 0.2, 2: 0.9, 3: 0.6, 4: 0.8, 5: 0.7}
    config = tiny_config(data__dir=data_dir, eval_every=1, checkpoint_every=4, patience=3)
    killed = []

    def validate(run, dataset, state):
        if state.step == killed_at and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        return {"validation_loss": 1.0, "validation_accuracy": accuracies[int(state.step)]}

    monkeypatch.setattr(train, "validate", validate)
    with pytest.raises(KeyboardInterrupt):
        train.train(config, str(tmp_path))
    for _ in range(2):
        outcome = train.train(config, str(tmp_path))
        assert (outcome["steps"], outcome["stopped_early"], outcome["best_validation_accuracy"]) == (5, True, 0.9)
        with Checkpoints(tmp_path, create=False) as checkpoints:
            assert checkpoints.newest() == 5
        (tmp_path / "results.json").unlink()
        monkeypatch.setattr(run_module, "make_train_step", lambda *_, **__: lambda *_: pytest.fail("trained on"))


def test_a_finished_run_is_not_trained_again(finished, data_dir, monkeypatch):
    workdir, outcome = finished
    monkeypatch.setattr(run_module, "make_train_step", lambda *_, **__: pytest.fail("trained again"))
    again = train.train(tiny_config(data__dir=data_dir, ema__decay=0.9), str(workdir))
    assert again == json.loads(json.dumps(outcome))


def poison(monkeypatch, is_bad):
    """Make the images of some training batches NaN."""
    train_batches = train.input_pipeline.train_batches

    def poisoned(*args, start_step, **kwargs):
        for step, batch in enumerate(train_batches(*args, start_step=start_step, **kwargs), start_step):
            yield batch | {"image": batch["image"] * np.nan} if is_bad(step) else batch

    monkeypatch.setattr(train.input_pipeline, "train_batches", poisoned)


@share_programs
def test_a_batch_that_is_not_finite_is_skipped_and_told(data_dir, tmp_path, monkeypatch):
    poison(monkeypatch, lambda step: step in (1, 4))
    outcome = train.train(tiny_config(data__dir=data_dir, log_every=1), str(tmp_path))
    assert all(np.isfinite(outcome[name]) for name in ("train_loss", "validation_loss"))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.value for event in events.Scalars("optimizer/skipped_steps")] == [0, 1, 1, 1, 2, 2]
    assert [event.step for event in events.Scalars("loss/train")] == [1, 3, 4, 6]
    schedule = [event.value for event in events.Scalars("learning_rate")]
    assert schedule[1] == schedule[0], "a skipped step must not advance the schedule"
    assert schedule[2] > schedule[1]


def test_too_many_skipped_steps_stop_the_run_and_keep_the_checkpoint(data_dir, tmp_path, monkeypatch):
    config = tiny_config(data__dir=data_dir, max_skipped_steps=2)
    poison(monkeypatch, lambda step: step >= 4)
    with pytest.raises(TrainingError, match=r"2 steps in a row up to step 6 were skipped.*last checkpoint is intact"):
        train.train(config, str(tmp_path))
    with Checkpoints(tmp_path, create=False) as checkpoints:
        assert checkpoints.steps() == [3]
        state, _ = checkpoints.restore(build_from(tmp_path).abstract, 3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_another_config_is_refused(finished, data_dir):
    with pytest.raises(UserError, match=r"holds another run: its config.seed is 3407, now 1"):
        train.train(tiny_config(data__dir=data_dir, ema__decay=0.9, seed=1), str(finished[0]))


def test_evaluation_needs_a_checkpoint(data_dir, tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        evaluate.evaluate(str(tmp_path), tiny_config(data__dir=data_dir))


def test_nothing_is_written_for_a_config_that_cannot_run(data_dir, tmp_path):
    with pytest.raises(UserError, match=r"patch_size=3 does not divide"):
        train.train(tiny_config(data__dir=data_dir, model__patch_size=3), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@share_programs
def test_results_name_the_code_that_ran_not_what_is_on_the_disk_at_the_end(data_dir, tmp_path, monkeypatch):
    on_disk, load = ["old"], input_pipeline.load
    monkeypatch.setattr(train, "environment", lambda: {"commit": on_disk[-1]})
    monkeypatch.setattr(input_pipeline, "load", lambda data, **named: on_disk.append("new") or load(data, **named))
    assert train.train(tiny_config(data__dir=data_dir, steps=1), str(tmp_path))["commit"] == "old"


@share_programs
def test_a_run_that_is_resumed_with_other_code_names_both(data_dir, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "simplest_vit")
    config, asked = tiny_config(data__dir=data_dir, profile__first_step=2, profile__num_steps=1), itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(train, "environment", lambda: {"commit": "old"})
        patch.setattr(train.distributed, "interruption", lambda: contextlib.nullcontext(lambda: next(asked) == 3))
        with pytest.raises(Interrupted, match="step 3 of 6 is saved"):
            train.train(config, str(tmp_path))
    monkeypatch.setattr(train, "environment", lambda: {"commit": "new"})
    outcome = train.train(config, str(tmp_path))
    assert (outcome["commit"], outcome["commits"]) == ("new", ["old", "new"])
    assert "the code has changed: old made step 3, now new" in caplog.messages
    assert "config.profile.first_step=2 has passed: no profile" in caplog.messages


def test_a_finished_run_stays_finished_whatever_becomes_of_the_data(finished, tmp_path):
    """Also where they are gone: the image folder that it was trained on may have been mended, or deleted."""
    config = tiny_config(data__dir=str(tmp_path / "nothing"), ema__decay=0.9)
    assert train.train(config, str(finished[0])) == json.loads(json.dumps(finished[1]))
    assert not (tmp_path / "nothing").exists()


def test_neither_training_nor_evaluation_takes_other_data(data_dir, tmp_path):
    config = tiny_config(data__dir=data_dir, steps=1)
    train.train(config, str(tmp_path))
    (tmp_path / "results.json").unlink()
    record = json.loads((tmp_path / "dataset.json").read_text())
    assert record["train_size"] == 1437
    (tmp_path / "dataset.json").write_text(json.dumps(record | {"train_size": 1443}))
    for program in (lambda: train.train(config, str(tmp_path)), lambda: evaluate.evaluate(str(tmp_path))):
        with pytest.raises(UserError, match=r"was started with other data: their train_size was 1443, now 1437"):
            program()


@share_programs
def test_a_folder_with_the_signs_of_a_pattern_is_a_folder(data_dir, tmp_path):
    workdir = tmp_path / "lr=[1] *?" / "{seed}"
    config = tiny_config(data__dir=data_dir, steps=3)
    outcome = train.train(config, str(workdir))
    assert evaluate.evaluate(str(workdir), config)["best"].accuracy == outcome["validation_accuracy"]


@pytest.mark.parametrize(
    ("backend", "wanted", "named", "used"),
    [
        ("gpu", True, None, "{home}/.cache/simplest_vit"),
        ("gpu", True, "{home}/mine", "{home}/mine"),
        ("gpu", False, None, None),
        ("cpu", True, None, None),
    ],
)
def test_what_is_compiled_for_an_accelerator_is_kept(
    monkeypatch, caplog, data_dir, tmp_path, backend, wanted, named, used
):
    def place(path):
        return path and path.replace("{home}", str(tmp_path))

    class Reached(Exception):
        pass

    def stop(*_, **__):
        raise Reached

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(train.input_pipeline, "load", stop)
    monkeypatch.setattr(train.log, "propagate", True)
    caplog.set_level("INFO")
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", place(named))
    try:
        with pytest.raises(Reached):
            train.train(tiny_config(compilation_cache=wanted), str(tmp_path / "run"))
        assert jax.config.jax_compilation_cache_dir == place(used)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert ("compiled programs are kept in" in caplog.text) == (used is not None)
