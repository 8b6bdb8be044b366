"""Time of a training step beside another config's and plain PyTorch's, by turns in one run: the ratio is the figure.

python -m benchmarks.train_step --config configs/cifar10.py --config.batch_size=64 --config.compute_dtype=float32
python -m benchmarks.train_step --config configs/cifar10.py --against configs/cifar10.py:method=isometric --notorch

The batch is noise on the device, so that no data is needed: what is timed is forward, backward and optimizer. Ours is
the train step of `main.py` with every setting of the config. The peer (`tests/torch_reference.py`) has the config's
model, gradient clipping and weight decay, and always PyTorch's fused Adam: a config with another optimizer is compared
with that.
"""

import math
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves PyTorch its part of a GPU's memory

import jax
import numpy as np
from absl import flags

from benchmarks import noise
from simplest_vit import cli
from simplest_vit.models import attention
from simplest_vit.models.factory import model_arguments
from simplest_vit.models.layers import token_grid
from simplest_vit.training.run import build

_ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed steps of each program.", lower_bound=1)
_TORCH = flags.DEFINE_bool("torch", True, "Time PyTorch too.")
_AGAINST = cli.define_config("against", "Another config, to compare with.")


class Program(NamedTuple):
    """Something to time.

    Attributes:
      name: For the table.
      step: Makes one training step and waits for its end.
      compile_s: Seconds until the first step was possible.
      memory: Bytes at the peak, or None where they cannot be told.
      images: Images of a step.
      flops: Model FLOPs of a step.
    """

    name: str
    step: Callable[[], None]
    compile_s: float
    memory: Callable[[], int | None]
    images: int
    flops: int


def ours(name: str, options: Any) -> Program:
    """The train step of `main.py` by a config, compiled."""
    data = noise.info_of(options)
    batch = noise.batch(data, options.batch_size)
    if options.model.attention_kernel == "fused":
        attention.check_devices(jax.devices())
    run = build(options, data)
    state = run.create_state()
    start = time.perf_counter()
    compiled = run.train_step.lower(state, batch).compile()
    compile_s = time.perf_counter() - start

    def step() -> None:
        nonlocal state
        state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    plan = compiled.memory_analysis()
    memory = (
        plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    )
    return Program(name, step, compile_s, lambda: memory, options.batch_size, step_flops(options))


def pytorch(options: Any, compiled: bool) -> Program:
    """The plain PyTorch peer with Adam, eager or by `torch.compile`."""
    import torch

    from tests import torch_reference

    batch = noise.batch(noise.info_of(options), options.batch_size)
    image, label = np.asarray(batch["image"]), np.asarray(batch["label"])
    torch.set_float32_matmul_precision("high")  # on a GPU TF32, as JAX's default is
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    arguments = model_arguments(options.model, image.shape[1:])
    known = ("patch_size", "depth", "width", "num_heads", "mlp_dim", "gamma_max_depth", "c_val_0_target")
    model = torch_reference.ViT(
        options.model.name,
        image_shape=image.shape[1:],
        num_classes=label.shape[1],
        **{name: arguments[name] for name in known if name in arguments},
    ).to(device)
    optimizer = torch.optim.Adam(
        model.parameters(), options.optimizer.learning_rate, weight_decay=options.weight_decay, fused=True
    )
    images = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.from_numpy(label).to(device)
    forward = torch.compile(model) if compiled else model
    dtype = getattr(torch, options.compute_dtype)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = forward(images)
        torch_reference.loss(logits.float(), labels, options.label_smoothing).backward()
        if options.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), options.grad_clip)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    step()
    compile_s = time.perf_counter() - start
    return Program(
        "torch.compile" if compiled else "PyTorch eager",
        step,
        compile_s,
        lambda: torch.cuda.max_memory_allocated() if device == "cuda" else None,
        options.batch_size,
        step_flops(options),
    )


def model_flops(options: Any, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """FLOPs of the matrix products for one image, forward and backward (three times forward)."""
    sizes = model_arguments(options.model, image_shape)
    width, tokens = sizes["width"], math.prod(token_grid(image_shape, sizes["patch_size"]))
    projections = 3 if options.model.name == "simplest_vit" else 4
    block = projections * width**2 + 2 * width * sizes["mlp_dim"] + 2 * tokens * width
    patches = sizes["patch_size"] ** 2 * image_shape[2] * width
    return 3 * 2 * (tokens * (sizes["depth"] * block + patches) + width * num_classes)


def step_flops(options: Any) -> int:
    """The same for a step by a config."""
    data = noise.info_of(options)
    return model_flops(options, data.image_shape, data.num_classes) * options.batch_size


def _main(_: list[str]) -> None:
    options = cli.CONFIG.value
    programs = [ours("this", options)]
    if flags.FLAGS["against"].present:
        programs.append(ours("against", _AGAINST.value))
    own = len(programs)
    for compiled in (False, True) if _TORCH.value else ():
        try:
            programs.append(pytorch(options, compiled))
        except (ImportError, RuntimeError) as error:
            print(f"without {'torch.compile' if compiled else 'PyTorch'}: {str(error).splitlines()[0]}")
    for program in programs:
        program.step()
    seconds = np.empty((_ROUNDS.value, len(programs)))
    for row in seconds:
        for column, program in enumerate(programs):
            start = time.perf_counter()
            program.step()
            row[column] = time.perf_counter() - start

    device = jax.devices()[0]
    print(f"{options.model.name}, batch {options.batch_size}, {options.compute_dtype}, {device.device_kind}")
    print(f"{'':14} compile s   step s (quartiles)         images/s  model GFLOP/s  peak GB")
    for program, times in zip(programs, seconds.T, strict=True):
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
        memory = program.memory()
        print(
            f"{program.name:14} {program.compile_s:9.1f}   {median:7.4f} ({low:.4f} to {high:.4f})"
            f"{program.images / median:11.1f} {program.flops / median / 1e9:14.1f}"
            f"  {'' if memory is None else f'{memory / 1e9:7.2f}'}"
        )
    peers = list(range(1, own))
    if len(programs) > own:
        peers.append(own + int(np.argmin(np.median(seconds, axis=0)[own:])))  # PyTorch's faster form
    for peer in peers:
        low, median, high = np.quantile(seconds[:, 0] / seconds[:, peer], (0.25, 0.5, 0.75))
        print(f"ratio of this to {programs[peer].name}: {median:.3f} ({low:.3f} to {high:.3f}), round by round")


if __name__ == "__main__":
    cli.run(_main, usage="python -m benchmarks.train_step --config configs/cifar10.py", required=("config",))
