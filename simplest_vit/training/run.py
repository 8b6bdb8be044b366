"""A run before its first step: model, optimizer, shapes and shardings, built from a config, data facts and devices."""

import copy
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simplest_vit.config import FIELDS, INTERVALS, flatten, interval_steps
from simplest_vit.data.builders import find_builder
from simplest_vit.data.dataset import Dataset, DatasetInfo, InMemorySplit
from simplest_vit.data.input_pipeline import fit_batch_size, steps_per_epoch
from simplest_vit.errors import UserError
from simplest_vit.models import VARIANTS, ViT, create_model, fused_attention, model_arguments
from simplest_vit.models.layers import token_grid
from simplest_vit.models.reference_layout import pytorch_layout
from simplest_vit.optimizers.factory import WarmupCosine, create_optimizer, decays_itself, settings_without_effect
from simplest_vit.training.sharding import create_mesh, state_shardings
from simplest_vit.training.state import ModelState, TrainState
from simplest_vit.training.step import Batch, Sums, make_eval_step, make_train_step

_MANY_TOKENS = 1024  # four times as many as in an image of 256 pixels with patches of 16


@dataclasses.dataclass(frozen=True)
class Run:
    """The basis of training, evaluation, prediction, interchange, analysis and benchmarks; nothing is computed yet."""

    config: ConfigDict  # its batch size fits the data and its intervals are in steps
    data: DatasetInfo
    mesh: Mesh
    steps_per_epoch: int  # a pass over the training split
    total_steps: int
    learning_rate: optax.Schedule
    tx: optax.GradientTransformation
    graphdef: nnx.GraphDef
    # Pure function that creates the state at step 0. Its optional arguments are parameters by module that replace the
    # model's own, and a seed that replaces the config's.
    initialize: Callable[..., TrainState]
    abstract: TrainState  # shapes, dtypes and shardings

    def create_state(self, initial_params: dict[str, Any] | None = None) -> TrainState:
        """Compute the state at step 0 on the devices; `initial_params` (by module, consumed) replace its parameters."""
        # On a CPU nearly all of the time is spent to compile a program that runs once; level 1 halves it.
        level = "xla_backend_optimization_level"
        fast = self.mesh.devices.flat[0].platform == "cpu" and level not in os.environ.get("XLA_FLAGS", "")
        options = {level: 1} if fast else None
        create = jax.jit(self.initialize, donate_argnums=0, out_shardings=self._shardings, compiler_options=options)
        return create(initial_params)

    @property
    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract)

    @functools.cached_property
    def train_step(self) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
        """The jitted training step: see `make_train_step`."""
        fields = ("seed", "label_smoothing", "accumulation_steps", "sam", "ema")
        settings = {name: self.config[name] for name in fields}
        return make_train_step(self.graphdef, self.tx, shardings=self._shardings, **settings)

    @functools.cached_property
    def eval_step(self) -> Callable[[Any, Any, Batch], Sums]:
        """The jitted evaluation step: see `make_eval_step`."""
        return make_eval_step(self.graphdef, self.mesh)

    def remarks(self, config: ConfigDict) -> Iterator[str]:
        """Yield a line for each field that was adapted to the data or is probably a mistake."""
        if self.config.batch_size != config.batch_size:
            size, used = self.data.train_size, self.config.batch_size
            yield f"config.batch_size={config.batch_size} exceeds the {size} training examples; using {used}"
        of_epochs = round(config.epochs * self.steps_per_epoch)
        if not config.steps and of_epochs < config.min_steps:
            yield (
                f"config.epochs={config.epochs:g} makes only {of_epochs} steps of the {self.data.train_size} training "
                f"examples; training for config.min_steps={config.min_steps}"
            )
        tokens = math.prod(token_grid(self.data.image_shape, config.model.patch_size))
        if tokens > _MANY_TOKENS:
            yield (
                f"{tokens} tokens per image are slow: lower config.data.image_size, here {self.data.image_shape[0]}, "
                f"or raise config.model.patch_size={config.model.patch_size}"
            )
        variant, default = config.model.variant, FIELDS["model.variant"].default
        if variant != default and None not in [config.model[size] for size in VARIANTS[variant]]:
            yield (
                f"config.model.variant={variant} has no effect, because {', '.join(VARIANTS[variant])} are set; set "
                "those that it should determine to None"
            )
        if config.warmup_steps >= self.total_steps:
            yield (
                f"config.warmup_steps={config.warmup_steps} takes all {self.total_steps} steps of the run, so the "
                f"learning rate never decays; lower it, or raise config.{'steps' if config.steps else 'epochs'}"
            )
        if config.weight_decay and config.decoupled_weight_decay and decays_itself(config.optimizer.name):
            yield (
                f"config.decoupled_weight_decay has no effect: {config.optimizer.name} applies the weight decay in its "
                "own way"
            )
        for name in ("eval_every", "checkpoint_every"):
            if self.config[name] > self.total_steps:
                yield f"config.{name}={config[name]} exceeds the run; due only at the end, step {self.total_steps}"

    def without_effect(self, config: ConfigDict, given: Collection[str], dataset: Dataset) -> Iterator[str]:
        """Yield a line for each of the given fields, by dotted name, that nothing in this run reads."""
        flat, reasons = flatten(config.to_dict()), {}
        for name, field in FIELDS.items():
            if field.needs and not any(flat[other] for other in field.needs):
                reasons[name] = "with " + " and ".join(f"config.{other}={flat[other]}" for other in field.needs)
        if config.steps:
            reasons |= dict.fromkeys(("epochs", "min_steps"), f"with config.steps={config.steps}")
        for name, other in (("eval_every", "checkpoint_every"), ("log_every", "eval_every")):
            if self.config[name] > self.config[other] and self.config[name] % self.config[other] == 0:
                reasons[name] = f"with config.{other}={config[other]}, which divides it"
        if isinstance(dataset.train, InMemorySplit) and isinstance(dataset.validation, InMemorySplit):
            reasons["data.num_workers"] = "because no images are streamed"
        if find_builder(config.data.name) is None:
            reasons["data.manual_dir"] = f"because TFDS has prepared {config.data.name}"
        read = {"name", "variant", *model_arguments(**config.model, image_shape=self.data.image_shape)}
        for name in set(config.model) - read:
            reasons[f"model.{name}"] = f"on this {config.model.name} ({FIELDS[f'model.{name}'].meaning})"
        layout = functools.partial(pytorch_layout, patch_size=config.model.patch_size)
        for name in settings_without_effect(config.optimizer, given, self.abstract.params, layout):
            reasons[name] = f"with the other settings of {config.optimizer.name}"
        return (f"config.{name}={flat[name]} has no effect {reasons[name]}" for name in given if name in reasons)

    def model(self, state: ModelState) -> ViT:
        """Build the model with the given arrays."""
        return nnx.merge(self.graphdef, state.params, state.constants)

    def should_save(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step."""
        return step >= self.total_steps or step % self.config.checkpoint_every == 0

    def should_evaluate(self, step: int) -> bool:
        """Return whether an evaluation is due after this step; every scheduled checkpoint is evaluated."""
        return self.should_save(step) or step % self.config.eval_every == 0

    def should_log(self, step: int) -> bool:
        """Return whether a report is due after this step; every evaluation is preceded by one."""
        return self.should_evaluate(step) or step % self.config.log_every == 0


def build(config: ConfigDict, data: DatasetInfo, mesh: Mesh | None = None) -> Run:
    """Build a run; this is the only way to make one.

    The config is a checked one; without a `mesh` there is one device. A UserError if the config does not fit the data.
    """
    if jax.config.values["jax_disable_jit"]:
        raise UserError("JAX_DISABLE_JIT is set, and a run needs jit; unset it")
    if data.num_classes < 2:
        raise UserError(
            f"{data.name} has one class ({data.class_names[0]}), expected at least two; if they are photos in "
            "FOLDER/GROUP/CLASS/*.jpg, name FOLDER/GROUP"
        )
    if (config.optimizer.name, config.model.attention) == ("reference_shampoo", "value_skipinit"):
        raise UserError(
            "config.optimizer.name='reference_shampoo' has no layout for model.attention='value_skipinit'; change "
            "one of them"
        )
    mesh = create_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    config = copy.deepcopy(config)
    config.batch_size = fit_batch_size(config.batch_size, data.train_size, config.accumulation_steps)
    per_epoch = steps_per_epoch(data.train_size, config.batch_size)
    with config.ignore_type():  # once its references are resolved, a config would keep the type of "1 epoch"
        for name in INTERVALS:
            config[name] = interval_steps(config[name], per_epoch)
    total_steps = config.steps or max(round(config.epochs * per_epoch), config.min_steps, 1)
    if config.profile.first_step >= total_steps:
        raise UserError(
            f"config.profile.first_step={config.profile.first_step} must be less than the run's {total_steps} steps"
        )
    for section, is_on in (("ema", config.ema.decay), ("sam", config.sam.rho)):
        if is_on and config[section].every > total_steps:
            raise UserError(
                f"config.{section}.every={config[section].every} exceeds the run's {total_steps} steps; lower it"
            )
    learning_rate = WarmupCosine(config.optimizer.learning_rate, config.warmup_steps, total_steps)
    tx = create_optimizer(
        **{**config.optimizer, "learning_rate": learning_rate},
        grad_clip=config.grad_clip,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=config.decoupled_weight_decay,
        mesh=mesh,
        layout=functools.partial(pytorch_layout, patch_size=config.model.patch_size),
    )
    sizes = model_arguments(**config.model, image_shape=data.image_shape)
    kernel = fused_attention.choose(
        config.model.attention_kernel,
        mesh.devices.flatten().tolist(),
        tokens=math.prod(token_grid(data.image_shape, sizes["patch_size"])),
        head_width=sizes["width"] // sizes["num_heads"],
    )

    def create(seed: Any = config.seed) -> ViT:
        return create_model(
            **{**config.model, "attention_kernel": kernel},
            image_shape=data.image_shape,
            num_classes=data.num_classes,
            dtype=jnp.dtype(config.compute_dtype),
            rngs=nnx.Rngs(jax.random.key(seed)),
        )

    def initialize(initial_params: dict[str, Any] | None = None, seed: Any = config.seed) -> TrainState:
        return TrainState.create(create(seed), tx, initial_params or {}, average=bool(config.ema.decay))

    shapes = jax.eval_shape(initialize)
    return Run(
        config=config,
        data=data,
        mesh=mesh,
        steps_per_epoch=per_epoch,
        total_steps=total_steps,
        learning_rate=learning_rate,
        tx=tx,
        graphdef=nnx.graphdef(nnx.eval_shape(create)),
        initialize=initialize,
        abstract=jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes,
            state_shardings(shapes, mesh),
        ),
    )
