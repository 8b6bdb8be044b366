"""Every config field, but those of model and data, changes what it is documented to change.

Seen through real runs of a linear classifier on digits, whose steps NumPy repeats in float64. A field without a row
here fails the test.
"""

import contextlib
import dataclasses
import itertools
import logging
import math
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simplest_vit.config import FIELDS, check, default
from simplest_vit.data.dataset import InMemorySplit
from simplest_vit.errors import TrainingError, UserError
from simplest_vit.training import metrics
from simplest_vit.training import run as run_module
from simplest_vit.training import train as train_module
from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.evaluate import restore_best
from simplest_vit.training.run import build
from simplest_vit.training.sharding import create_mesh
from simplest_vit.training.workdir import is_resumable
from tests.tiny import DIGITS, tiny_config

pytestmark = pytest.mark.usefixtures("two_devices")
BASE = {
    "steps": 6,
    "batch_size": 64,
    "warmup_steps": 2,
    "eval_every": 3,
    "checkpoint_every": 3,
    "log_every": 2,
    "grad_clip": 0.0,
    "compute_dtype": "float32",
    "model.patch_size": 2,
    "data.crop_padding": 0,
    "data.flip": False,
    "optimizer.learning_rate": 0.1,
}


class Linear(nnx.Module):
    """A classifier with the interface of the models; with dropout its images are multiplied by a random image."""

    drops = False

    def __init__(self, *, image_shape, num_classes, dtype, rngs):
        self.head = nnx.Linear(math.prod(image_shape), num_classes, dtype=dtype, rngs=rngs)

    def __call__(self, image, *, dropout_key=None):
        if self.drops and dropout_key is not None:
            image = image * jax.random.normal(dropout_key, (1, *image.shape[1:]))
        return self.head(image.reshape(len(image), -1)).astype(jnp.float32)


@pytest.fixture(autouse=True)
def linear(monkeypatch):
    """Let every run be of the linear classifier."""
    create = lambda *_, image_shape, num_classes, dtype, rngs, **__: Linear(  # noqa: E731
        image_shape=image_shape, num_classes=num_classes, dtype=dtype, rngs=rngs
    )
    monkeypatch.setattr(run_module, "create_model", create)


def config_of(optimizer="sgd", **overrides):
    config = default(optimizer)
    config.update_from_flattened_dict(BASE | {name.replace("__", "."): value for name, value in overrides.items()})
    check(config)
    return config


def batch_of(seed, size=64):
    rng = np.random.default_rng(seed)
    label = np.eye(10, dtype=np.float32)[rng.integers(10, size=size)]
    image = rng.normal(size=(size, 8, 8, 1)).astype(np.float32)
    return {"image": image, "label": label, "weight": np.ones(size, np.float32)}


def stepped(steps=1, optimizer="sgd", **overrides):
    """The head's kernel and bias before and after some steps at the full learning rate, the state and the metrics."""
    run = build(config_of(optimizer, **{"warmup_steps": 0, "steps": 10**6} | overrides), DIGITS)
    state = run.create_state()
    before = [np.asarray(state.params["head"][name], np.float64) for name in ("kernel", "bias")]
    for step in range(steps):
        state, metrics = run.train_step(state, batch_of(step))
    after = [np.asarray(state.params["head"][name], np.float64) for name in ("kernel", "bias")]
    return before, after, state, metrics


def gradient_of(weights, seed, smoothing=0.0):
    """Mean loss and its gradient, in float64."""
    kernel, bias = weights
    batch = batch_of(seed)
    image, label = batch["image"].reshape(64, -1).astype(np.float64), batch["label"] * (1 - smoothing) + smoothing / 10
    logits = image @ kernel + bias
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    error = (np.exp(log_p) - label) / 64
    return -(label * log_p).sum() / 64, [image.T @ error, error.sum(axis=0)]


def descend(weights, gradient, rate=0.1):
    return [w - rate * g for w, g in zip(weights, gradient, strict=True)]


def norm(gradient):
    return math.sqrt(sum((g**2).sum() for g in gradient))


def assert_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.fixture
def trained(data_dir, tmp_path, monkeypatch):
    """A function that trains: results, TensorBoard's scalars, steps of saves, and the batches' arguments and size."""
    saved, asked, save, train_batches = [], [], Checkpoints.save, train_module.input_pipeline.train_batches
    monkeypatch.setattr(Checkpoints, "save", lambda self, *a: [saved.append(a[2]), save(self, *a)])

    def spy(*arguments, **named):
        for batch in train_batches(*arguments, **named):
            asked.append(named | {"size": len(batch["image"])})
            yield batch

    monkeypatch.setattr(train_module.input_pipeline, "train_batches", spy)

    def run(name="run", **overrides):
        saved.clear(), asked.clear()
        folder = tmp_path / name
        outcome = train_module.train(config_of(data__dir=data_dir, **overrides), str(folder))
        events = EventAccumulator(str(folder))
        events.Reload()
        scalars = {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
        return outcome, scalars, list(saved), list(asked)

    run.folder = tmp_path
    return run


class FakeWandb(types.ModuleType):
    """Weights & Biases as far as training uses it: keeps what it is given."""

    Settings = Image = staticmethod(lambda *arguments, **settings: settings or arguments)

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.config, self.exit_codes = [], [], {}, []

    def init(self, **arguments):
        self.started.append(arguments)
        finish = lambda exit_code: self.exit_codes.append(exit_code)  # noqa: E731
        config = types.SimpleNamespace(update=lambda values, allow_val_change: self.config.update(values))
        return types.SimpleNamespace(
            log=self.logged.append, config=config, finish=finish, define_metric=lambda name, step_metric: None
        )


# Field -> what shows that it acts.


def seed(trained, **_):
    kernel = stepped(seed=1)[0][0]
    assert not np.allclose(kernel, stepped(seed=2)[0][0])
    np.testing.assert_array_equal(kernel, stepped(seed=1)[0][0])
    assert {batch["seed"] for batch in trained(steps=1, seed=7)[3]} == {7}


def epochs(trained, **_):
    assert trained(steps=None, epochs=0.1)[0]["steps"] == round(0.1 * (1437 // 64)) == 2
    assert build(config_of(steps=None, epochs=3), DIGITS).total_steps == 66


def steps(trained, **_):
    outcome, scalars, saved, _ = trained(steps=4)
    assert outcome["steps"] == max(scalars["loss/train"]) == saved[-1] == 4


def min_steps(trained, caplog, **_):
    caplog.set_level(logging.INFO, "simplest_vit")
    assert trained("enough", steps=None, epochs=0.1, min_steps=2)[0]["steps"] == 2
    assert build(config_of(steps=4, min_steps=5), DIGITS).total_steps == 4
    assert "min_steps" not in caplog.text
    assert trained(steps=None, epochs=0.1, min_steps=3)[0]["steps"] == 3
    said = "config.epochs=0.1 makes only 2 steps of the 1437 training examples; training for config.min_steps=3"
    assert caplog.text.count("min_steps") == caplog.text.count(said) == 1


def batch_size(trained, caplog, **_):
    outcome, scalars, _, batches = trained(batch_size=32, steps=4)
    assert {batch["size"] for batch in batches} == {32}
    assert scalars["epoch"][4] == pytest.approx(4 / (1437 // 32))
    assert outcome["images_per_second"] == pytest.approx(32 / outcome["step_time_median_s"])
    caplog.set_level(logging.INFO, "simplest_vit")
    outcome, scalars, _, batches = trained("large", batch_size=2400, accumulation_steps=3, steps=4)
    assert {batch["size"] for batch in batches} == {outcome["config"]["batch_size"]} == {96}  # 3 * 2^5
    assert scalars["epoch"][4] == pytest.approx(4 / (1437 // 96))
    assert outcome["images_per_second"] == pytest.approx(96 / outcome["step_time_median_s"])
    assert scalars["speed/images_per_second"][4] == pytest.approx(96 * scalars["speed/steps_per_second"][4])
    assert caplog.text.count("config.batch_size=2400 exceeds the 1437 training examples; using 96") == 1
    assert trained("large", batch_size=2400, accumulation_steps=3, steps=4)[0] == outcome, "the config is the same"


def warmup_steps(trained, **_):
    _, scalars, _, _ = trained(warmup_steps=4, log_every=1)
    expected = [0.025, 0.05, 0.075, 0.1, 0.1 * (1 + math.cos(math.pi / 2)) / 2, 0.0]
    np.testing.assert_allclose([scalars["learning_rate"][step] for step in range(1, 7)], expected, atol=1e-7)


def grad_clip(**_):
    before, after, _, metrics = stepped(grad_clip=0.01)
    _, gradient = gradient_of(before, 0)
    assert_close(after, descend(before, gradient, 0.1 * 0.01 / norm(gradient)))
    assert metrics["grad_norm"] == pytest.approx(norm(gradient), rel=1e-4), "before clipping"


def weight_decay(**_):
    before, after, _, _ = stepped(weight_decay=0.5)
    _, (kernel, bias) = gradient_of(before, 0)
    assert_close(after, descend(before, [kernel + 0.5 * before[0], bias]))


def decoupled_weight_decay(**_):
    """With SGD the two are the same; Adam's first step is the learning rate times the sign of all it sees."""
    settings = {"optimizer": "adam", "weight_decay": 0.5, "optimizer__learning_rate": 0.1}
    before, after, _, _ = stepped(**settings, decoupled_weight_decay=True)
    _, (kernel, _) = gradient_of(before, 0)
    np.testing.assert_allclose(after[0], before[0] - 0.1 * (np.sign(kernel) + 0.5 * before[0]), atol=1e-3)
    after = stepped(**settings)[1]
    np.testing.assert_allclose(after[0], before[0] - 0.1 * np.sign(kernel + 0.5 * before[0]), atol=1e-3)


def label_smoothing(**_):
    before, after, _, metrics = stepped(label_smoothing=0.2)
    loss, gradient = gradient_of(before, 0, 0.2)
    assert metrics["loss"] / 64 == pytest.approx(loss, rel=1e-5)
    assert_close(after, descend(before, gradient))


def max_skipped_steps(trained, monkeypatch, **_):
    batches = train_module.input_pipeline.train_batches
    nan = lambda *a, **b: (batch | {"weight": batch["weight"] * np.nan} for batch in batches(*a, **b))  # noqa: E731
    monkeypatch.setattr(train_module.input_pipeline, "train_batches", nan)
    with pytest.raises(TrainingError, match=r"^4 steps in a row up to step 4 were skipped"):
        trained("four", max_skipped_steps=4)
    outcome, _, saved, _ = trained("eight", max_skipped_steps=7)
    assert (outcome["train_loss"], saved[-1]) == (None, 6)


def fsdp(trained, caplog, **_):
    caplog.set_level(logging.INFO, "simplest_vit")
    trained(fsdp=2)
    assert "devices: 2 (data 1 x fsdp 2); " in caplog.text


def distributed(monkeypatch, **_):
    from simplest_vit.commands import processes
    from simplest_vit.training import distributed

    asked = []
    monkeypatch.setattr(distributed, "initialize", lambda detect, *_: asked.append(detect))
    for value in ("auto", None):
        config = config_of(distributed=value)
        processes.flags.FLAGS.mark_as_parsed()
        with processes.connected(config):
            pass
    assert asked == [True, False]


def accumulation_steps(trained, monkeypatch, **_):
    """One micro-batch at a time is in memory, also of an evaluation, and the result is that of the whole batch."""
    sizes, eval_batches = [], train_module.input_pipeline.eval_batches
    spy = lambda *a, **named: [sizes.append(named["batch_size"]), eval_batches(*a, **named)][1]  # noqa: E731
    monkeypatch.setattr(train_module.input_pipeline, "eval_batches", spy)
    trained(accumulation_steps=4, steps=1)
    assert sizes == [16]
    before, after, _, _ = stepped(accumulation_steps=4)
    assert_close(after, descend(before, gradient_of(before, 0)[1]))
    run = build(config_of(accumulation_steps=4), DIGITS)
    program = str(jax.make_jaxpr(run.train_step)(run.create_state(), batch_of(0)))
    assert "f32[16,64]" in program, "images of a micro-batch"
    assert "f32[64,64] = reshape" not in program, "images of the whole batch"


def compute_dtype(**_):
    losses = [stepped(compute_dtype=dtype)[3]["loss"] for dtype in ("float32", "bfloat16")]
    exact = 64 * gradient_of(stepped()[0], 0)[0]
    assert losses[0] == pytest.approx(exact, rel=1e-5)
    assert 1e-5 < abs(losses[1] / exact - 1) < 1e-2
    state = stepped(compute_dtype="bfloat16")[2]
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def eval_every(trained, **_):
    _, scalars, _, _ = trained(eval_every=2, checkpoint_every=5)
    assert [*scalars["accuracy/validation"]] == [2, 4, 5, 6]
    _, scalars, _, _ = trained("epochs", eval_every="0.1 epochs", checkpoint_every=5)  # 22 steps per epoch
    assert [*scalars["accuracy/validation"]] == [2, 4, 5, 6]


def checkpoint_every(trained, monkeypatch, **_):
    monkeypatch.setattr(train_module, "validate", lambda *_: {"validation_loss": 1.0, "validation_accuracy": -1.0})
    _, scalars, saved, _ = trained(checkpoint_every=4, eval_every=5)
    assert saved == [4, 6]
    assert [*scalars["loss/validation"]] == [4, 5, 6]
    assert trained("epochs", checkpoint_every="0.18 epochs", eval_every="1 epoch")[2] == [4, 6]


def checkpoint_minutes(trained, monkeypatch, **_):
    monkeypatch.setattr(train_module, "validate", lambda *_: {"validation_loss": 1.0, "validation_accuracy": -1.0})
    assert trained("often", checkpoint_minutes=1e-9, checkpoint_every=100, eval_every=100)[2] == [2, 4, 6]
    assert trained("never", checkpoint_minutes=1e6, checkpoint_every=100, eval_every=100)[2] == [6]
    clock = types.SimpleNamespace(monotonic=itertools.count(step=30).__next__)  # asked once a report, and after a save
    monkeypatch.setattr(train_module, "time", clock)
    assert trained("again", checkpoint_minutes=1.75, checkpoint_every=100, eval_every=100, log_every=1)[2] == [4, 6]


def patience(trained, monkeypatch, caplog, **_):
    accuracies = {1: 0.0, 2: 0.6, 3: 0.6, 4: 0.5, 5: 0.9, 6: 0.7}
    validate = lambda _, __, state: {"validation_loss": 1.0, "validation_accuracy": accuracies[int(state.step)]}  # noqa: E731
    monkeypatch.setattr(train_module, "validate", validate)
    caplog.set_level(logging.INFO, "simplest_vit")
    for patience, steps in ((1, 3), (2, 4), (3, 6), (0, 6)):  # as good is not better, and 0 is better than nothing
        outcome, _, saved, _ = trained(f"{patience}", patience=patience, eval_every=1, checkpoint_every=100)
        assert (outcome["steps"], outcome["stopped_early"], saved[-1]) == (steps, steps < 6, steps)
        said = f"stopped at step {steps} of 6: {patience} evaluations without a better validation accuracy"
        assert caplog.text.count(said) == outcome["stopped_early"]


def log_every(trained, **_):
    assert [*trained(log_every=1)[1]["loss/train"]] == [1, 2, 3, 4, 5, 6]
    assert [*trained("never", log_every=100)[1]["loss/train"]] == [3, 6], "before an evaluation"
    assert [*trained("epochs", log_every="0.05 epochs")[1]["loss/train"]] == [1, 2, 3, 4, 5, 6]
    intervals = {"log_every": "2 epochs", "checkpoint_every": "100 epochs", "eval_every": "0.01 epochs"}
    config = build(config_of(**intervals), DIGITS).config
    assert (config.log_every, config.checkpoint_every, config.eval_every) == (44, 2200, 1), "at least a step"


def _worst(weights, rho):
    _, gradient = gradient_of(weights, 0)
    return [w + rho * g / norm(gradient) for w, g in zip(weights, gradient, strict=True)]


def sam_rho(**_):
    before, after, _, metrics = stepped(sam__rho=0.5)
    assert_close(after, descend(before, gradient_of(_worst(before, 0.5), 0)[1]))
    assert metrics["loss"] / 64 == pytest.approx(gradient_of(before, 0)[0]), "at the plain point"


def sam_every(**_):
    before, after, _, _ = stepped(steps=2, sam__rho=0.5, sam__every=2)
    first = descend(before, gradient_of(_worst(before, 0.5), 0)[1])
    assert_close(after, descend(first, gradient_of(first, 1)[1]))


def _average(state):
    return [np.asarray(state.ema_params["head"][name], np.float64) for name in ("kernel", "bias")]


def ema_decay(**_):
    assert stepped()[2].ema_params is None
    before, after, state, _ = stepped(ema__decay=0.75, ema__every=1)
    expected = [0.75 * a + 0.25 * b for a, b in zip(before, after, strict=True)]
    assert_close(_average(state), expected)
    assert_close([np.asarray(state.model_state.params["head"][n]) for n in ("kernel", "bias")], expected)


def ema_every(**_):
    before, _, state, _ = stepped(steps=2, ema__decay=0.75, ema__every=3)
    assert_close(_average(state), before)
    _, after, state, _ = stepped(steps=3, ema__decay=0.75, ema__every=3)
    third = _average(state)
    assert_close(third, [0.75 * a + 0.25 * b for a, b in zip(before, after, strict=True)])
    _, after, state, _ = stepped(steps=6, ema__decay=0.75, ema__every=3)
    assert_close(_average(state), [0.75 * a + 0.25 * b for a, b in zip(third, after, strict=True)])


def compilation_cache(monkeypatch, **_):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(train_module, "create_mesh", lambda fsdp: pytest.skip("far enough"))
    try:
        for wanted in (False, True):
            jax.config.update("jax_compilation_cache_dir", None)
            with pytest.raises(pytest.skip.Exception):
                train_module.train(config_of(compilation_cache=wanted), "unused")
            assert bool(jax.config.jax_compilation_cache_dir) == wanted
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def wandb(trained, monkeypatch, **_):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    trained("without")
    assert not fake.started
    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "train_step", property(lambda self: lambda state, batch: 1 / 0))
        with pytest.raises(ZeroDivisionError):
            trained(wandb="mine")
    _, scalars, _, _ = trained(wandb="mine")
    assert [(run["project"], run["resume"], run["name"]) for run in fake.started] == 2 * [
        ("mine", "auto", f"{trained.folder.name}/run")
    ]
    assert {run["dir"] for run in fake.started} == {str(trained.folder / "run")}
    assert fake.exit_codes == [1, 0], "only what has failed is resumed"
    assert fake.config["optimizer.learning_rate"] == 0.1
    assert "train_images" in fake.logged[0]
    for tag, curve in scalars.items():
        assert {line["step"]: line[tag] for line in fake.logged if tag in line} == pytest.approx(curve), tag
    fake.config.clear()
    (trained.folder / "without" / "results.json").unlink()
    trained("without", wandb="mine")
    assert fake.config["optimizer.learning_rate"] == 0.1, "it is turned on when the run is resumed"


def _profiled(trained, monkeypatch, name, **overrides):
    """The steps before the one at which a profile starts and stops."""
    calls, made = [], []
    make = run_module.make_train_step

    def counted(*arguments, **named):
        step = make(*arguments, **named)
        return lambda *state_and_batch: [made.append(1), step(*state_and_batch)][1]

    monkeypatch.setattr(run_module, "make_train_step", counted)

    @contextlib.contextmanager
    def trace(path):
        calls.append(("start", len(made)))
        yield
        calls.append(("stop", len(made)))

    monkeypatch.setattr(jax.profiler, "trace", trace)
    trained(name, **overrides)
    return calls


def profile_first_step(trained, monkeypatch, **_):
    calls = _profiled(trained, monkeypatch, "run", profile__first_step=2, profile__num_steps=3)
    assert calls == [("start", 2), ("stop", 5)]


def profile_num_steps(trained, monkeypatch, **_):
    calls = _profiled(trained, monkeypatch, "run", profile__first_step=2, profile__num_steps=1)
    assert calls == [("start", 2), ("stop", 3)]


def init_from(trained, monkeypatch, **_):
    """The weights with the best validation, not the last."""
    accuracy = {3: 0.9, 6: 0.5}
    with monkeypatch.context() as patch:
        result = lambda run, data, state: {"validation_loss": 1.0, "validation_accuracy": accuracy[int(state.step)]}  # noqa: E731
        patch.setattr(train_module, "validate", result)
        trained("source")
    best = restore_best(str(trained.folder / "source"))[1]
    assert best.step == 3
    trained("tuned", init_from=str(trained.folder / "source"), optimizer__learning_rate=1e-9, steps=1)
    tuned = restore_best(str(trained.folder / "tuned"))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), tuned.params, best.params)


def optimizer_name(**_):
    before, after, _, _ = stepped(optimizer="adam")
    _, gradient = gradient_of(before, 0)
    assert_close(after, descend(before, [np.sign(g) * (abs(g) / (abs(g) + 1e-8)) for g in gradient]))
    assert_close(stepped()[1], descend(before, gradient))


def optimizer_learning_rate(**_):
    before, after, _, _ = stepped(optimizer__learning_rate=0.3)
    assert_close(after, descend(before, gradient_of(before, 0)[1], 0.3))


@pytest.mark.parametrize("field", [name for name in FIELDS if not name.startswith(("model.", "data."))])
def test_a_field_changes_what_it_is_documented_to_change(field, request, monkeypatch, caplog):
    name = field.replace(".", "_")
    assert name in globals(), f"config.{field} has no row in this file that shows what it changes"
    row = globals()[name]
    needed = row.__code__.co_varnames[: row.__code__.co_argcount]
    row(**{each: request.getfixturevalue(each) for each in needed})


# Field -> settings with which it has no effect, settings with which it has one, and the logged reason.
SWITCHED_OFF = {
    "epochs": ({"steps": 6}, {"steps": None}, "with config.steps=6"),
    "min_steps": ({"steps": 6}, {"steps": None}, "with config.steps=6"),
    "decoupled_weight_decay": ({}, {"weight_decay": 0.1}, "with config.weight_decay=0.0"),
    "eval_every": ({"eval_every": 6}, {"eval_every": 4}, "with config.checkpoint_every=3, which divides it"),
    "log_every": ({"log_every": "0.1 epochs", "eval_every": 1}, {}, "with config.eval_every=1, which divides it"),
    "sam.every": ({}, {"sam.rho": 0.1}, "with config.sam.rho=0.0"),
    "ema.every": ({}, {"ema.decay": 0.9}, "with config.ema.decay=0.0"),
    "profile.num_steps": ({}, {"profile.first_step": 1}, "with config.profile.first_step=0"),
    "model.attention_kernel": ({"model.name": "shift_mlp"}, {}, "on this shift_mlp (fused: attention of up to 64 "),
    "model.gamma_max_depth": ({"model.attention": "uspa"}, {}, "on this simplest_vit (E-SPA: decay at the last block)"),
    "model.rho_max_depth": ({}, {"model.attention": "uspa"}, "on this simplest_vit (U-SPA: correlation at the last "),
    "model.uniform_fraction": ({}, {"model.name": "shift_mlp"}, "on this simplest_vit (shift attention: weight of"),
    "model.identity_head_fraction": (
        {"model.name": "simple_vit"},
        {"model.name": "isometric_vit"},
        "on this simple_vit (shift attention: share of heads that start unshifted)",
    ),
    "model.c_val_0_target": ({"model.activation": "relu"}, {}, "on this simplest_vit (TAT: eta, the target of the C-"),
    "data.manual_dir": ({"data.name": "mnist"}, {}, "because TFDS has prepared mnist"),
    "data.rand_augment.magnitude": ({}, {"data.rand_augment.num_ops": 2}, "with config.data.rand_augment.num_ops=0"),
    "data.mixup_mode": (
        {},
        {"data.cutmix_alpha": 0.5},
        "with config.data.mixup_alpha=0.0 and config.data.cutmix_alpha=0.0",
    ),
    "data.num_workers": ({}, {"streamed": "validation"}, "because no images are streamed"),
}
ALWAYS_READ = {
    *(
        "seed",
        "steps",
        "batch_size",
        "warmup_steps",
        "grad_clip",
        "weight_decay",
        "label_smoothing",
        "patience",
        "fsdp",
    ),
    *("max_skipped_steps", "distributed", "accumulation_steps", "compute_dtype", "checkpoint_every", "wandb"),
    *("checkpoint_minutes", "sam.rho", "ema.decay", "compilation_cache", "profile.first_step", "init_from"),
    *(f"model.{name}" for name in ("name", "depth", "width", "num_heads", "mlp_dim", "patch_size", "dropout", "remat")),
    *(f"model.{name}" for name in ("attention", "mlp", "activation", "init", "norm", "skip")),
    "model.variant",  # has a remark of its own: test_a_variant_whose_sizes_are_all_set_is_said_to_have_no_effect
    *(f"data.{name}" for name in ("name", "dir", "label", "train_split", "validation_split", "image_size", "flip")),
    *("data.random_resized_crop", "data.crop_padding", "data.rand_augment.num_ops", "data.mixup_alpha"),
    *("data.cutmix_alpha", "data.device_budget_bytes", "optimizer.name", "optimizer.learning_rate"),
}


def without_effect(given, streamed="", **settings):
    config = default("sgd")
    config.update_from_flattened_dict(BASE | settings)
    splits = {name: object() if name == streamed else InMemorySplit(None, None) for name in ("train", "validation")}
    dataset = types.SimpleNamespace(**splits)
    return [*build(config, DIGITS).without_effect(config, given, dataset)]


def test_each_field_is_always_read_or_has_a_case_without_effect():
    assert sorted([*SWITCHED_OFF, *ALWAYS_READ]) == sorted(FIELDS)


@pytest.mark.parametrize("field", SWITCHED_OFF)
def test_a_field_that_nothing_reads_is_said_to_have_no_effect(field):
    """Only if the user has set it: recipes set fields for all their networks."""
    off, on, reason = SWITCHED_OFF[field]
    (line,) = without_effect([field], **off)
    assert re.match(rf"config\.{field}=.* has no effect {re.escape(reason)}", line)
    assert without_effect([field], **on) == without_effect([], **off) == []
    assert not {name for name in ALWAYS_READ if f"config.{name}=" in "".join(without_effect(ALWAYS_READ, **off))}


def test_one_of_two_needs_is_enough():
    assert without_effect(["data.mixup_mode"], **{"data.mixup_alpha": 0.5}) == []
    assert without_effect(["data.num_workers"], streamed="train") == []


def test_equal_intervals_are_not_said_to_have_no_effect():
    assert without_effect(["eval_every", "log_every"], eval_every=3, log_every=3) == []


def test_a_field_without_effect_is_logged(trained, caplog):
    caplog.set_level(logging.INFO, "simplest_vit")
    config = config_of(steps=1, data__dir=str(trained.folder))
    train_module.train(config, str(trained.folder / "run"), given={"ema.every": 5, "data.num_workers": 2})
    assert caplog.text.count("has no effect") == 2
    assert "config.ema.every=5 has no effect with config.ema.decay=0.0\n" in caplog.text
    assert "config.data.num_workers=None has no effect because no images are streamed\n" in caplog.text


def test_only_what_does_not_change_the_results_may_differ_in_a_resume():
    assert {name for name in FIELDS if is_resumable(name)} == {
        *("checkpoint_every", "checkpoint_minutes", "eval_every", "log_every", "max_skipped_steps"),
        *("compilation_cache", "distributed", "fsdp", "model.attention_kernel"),
        *("data.device_budget_bytes", "data.dir", "data.manual_dir", "data.num_workers"),
        *("profile.first_step", "profile.num_steps", "wandb"),
    }


def test_dropout_draws_a_mask_for_each_step_that_is_not_augmentation_s(monkeypatch):
    monkeypatch.setattr(Linear, "drops", True)
    before, _, _, metrics = stepped(steps=1)
    of_augmentation = jax.random.fold_in(jax.random.key(3407), 0)
    mask = np.asarray(jax.random.normal(of_augmentation, (1, 8, 8, 1)))
    batch = batch_of(0)
    logits = (batch["image"] * mask).reshape(64, -1) @ before[0] + before[1]
    wrong = np.log(np.exp(logits).sum(axis=1)).sum() - (logits * batch["label"]).sum()
    assert abs(metrics["loss"] / wrong - 1) > 1e-3
    losses = {float(stepped(steps=1, seed=seed)[3]["loss"]) for seed in (1, 2)}
    assert len(losses) == 2


def test_each_micro_batch_has_a_mask_of_its_own(monkeypatch):
    """One image in all places: the gradient of the kernel has one rank for each mask."""
    monkeypatch.setattr(Linear, "drops", True)
    batch = {name: np.repeat(x[:1], 64, axis=0) for name, x in batch_of(0).items()}
    monkeypatch.setitem(globals(), "batch_of", lambda _: batch)
    before, after, _, _ = stepped(accumulation_steps=4)
    assert np.linalg.matrix_rank(after[0] - before[0], tol=1e-4) == 4


@pytest.mark.parametrize(("size", "is_said"), [(66, True), (64, False)])
def test_a_recipe_for_small_images_says_that_large_ones_are_slow(trained, caplog, size, is_said):
    """As an image folder's 224 pixels are in patches of 4."""
    caplog.set_level(logging.INFO, "simplest_vit")
    trained(data__image_size=size, steps=1, eval_every="2 epochs", checkpoint_every=1)
    assert caplog.text.count("exceeds the run") == 1
    assert "config.eval_every=2 epochs exceeds the run; due only at the end, step 1" in caplog.text
    said = "1089 tokens per image are slow: lower config.data.image_size, here 66, or raise config.model.patch_size=2"
    assert (said in caplog.text) == ("tokens per image" in caplog.text) == is_said


@pytest.mark.parametrize(("warmup_steps", "is_said"), [(2, True), (1, False)])
def test_a_warm_up_that_takes_the_whole_run_is_said(trained, caplog, warmup_steps, is_said):
    caplog.set_level(logging.INFO, "simplest_vit")
    trained(steps=2, warmup_steps=warmup_steps)
    assert (f"config.warmup_steps={warmup_steps} takes all 2 steps of the run" in caplog.text) == is_said
    assert ("or raise config.steps" in caplog.text) == is_said  # `epochs` has no effect beside `steps`


def test_a_batch_made_so_small_that_it_does_not_fit_the_devices_is_explained(trained, caplog, monkeypatch):
    monkeypatch.setattr(train_module, "create_mesh", create_mesh)
    caplog.set_level(logging.INFO, "simplest_vit")
    with pytest.raises(UserError, match=r"^config\.batch_size=4 cannot be split over 8 devices"):
        trained(data__train_split="train[:40]")
    assert "config.batch_size=64 exceeds the 40 training examples; using 4" in caplog.text


def test_the_results_are_those_of_the_last_evaluation_and_report(trained):
    outcome, scalars, _, _ = trained()
    for tag in ("accuracy/validation", "loss/validation", "loss/train", "accuracy/train"):
        kind, split = tag.split("/")
        assert outcome[f"{split}_{kind}"] == pytest.approx(scalars[tag][6]), tag
    assert outcome["best_validation_accuracy"] == pytest.approx(max(scalars["accuracy/validation"].values()))
    assert (outcome["seed"], outcome["wall_time_s"] > 0) == (3407, True)


def test_the_time_of_an_evaluation_is_not_that_of_steps(trained, monkeypatch):
    clock = [0.0]

    def validate(*_):
        clock[0] += 1000
        return {"validation_loss": 1.0, "validation_accuracy": 0.5}

    def monotonic():
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(train_module, "validate", validate)
    monkeypatch.setattr(metrics, "time", types.SimpleNamespace(monotonic=monotonic))
    assert max(trained(eval_every=2, log_every=1)[1]["speed/step_time"].values()) < 100


def test_a_validation_that_is_not_finite_stops_the_run(trained, monkeypatch):
    monkeypatch.setattr(train_module, "validate", lambda *_: {"validation_loss": np.inf, "validation_accuracy": 0.5})
    with pytest.raises(TrainingError, match="validation_loss is not finite at step 3"):
        trained()


@pytest.mark.parametrize(("mlp_dim", "is_said"), [(32, True), (None, False)])
def test_a_variant_whose_sizes_are_all_set_is_said_to_have_no_effect(mlp_dim, is_said):
    config = tiny_config(model__variant="Ti", model__mlp_dim=mlp_dim)
    remarks = "\n".join(build(config, DIGITS).remarks(config))
    said = "config.model.variant=Ti has no effect, because depth, width, num_heads, mlp_dim are set"
    assert (said in remarks) == is_said


def test_one_class_is_refused_because_every_answer_would_be_right():
    """As in the folder above the classes, whose only folder would be the class."""
    with pytest.raises(UserError, match=r"digits has one class \(all\), expected at least two; .*GROUP"):
        build(tiny_config(), dataclasses.replace(DIGITS, class_names=("all",)))
