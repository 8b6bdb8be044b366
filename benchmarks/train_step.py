"""Time of a training step beside plain PyTorch in the same run, the two taking turns: the ratio is the figure.

python -m benchmarks.train_step --config configs/cifar10.py --config.batch_size=64 --config.compute_dtype=float32

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
from simplest_vit.data.pipeline import Batch
from simplest_vit.models import attention
from simplest_vit.models.factory import model_arguments
from simplest_vit.models.layers import token_grid
from simplest_vit.training.run import Run, build

_ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed steps of each program.", lower_bound=1)
_TORCH = flags.DEFINE_bool("torch", True, "Time PyTorch too.")
_KERNELS = flags.DEFINE_multi_enum(
    "kernel", [], ["xla", "fused"], "Attention kernel to time, once for each; else that of the config."
)


class Program(NamedTuple):
    """Something to time.

    Attributes:
      name: For the table.
      step: Makes one training step and waits for its end.
      compile_s: Seconds until the first step was possible.
      memory: Bytes at the peak, or None where they cannot be told.
    """

    name: str
    step: Callable[[], None]
    compile_s: float
    memory: Callable[[], int | None]


def ours(name: str, run: Run, batch: Batch) -> Program:
    """The train step of `main.py`, compiled."""
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
    return Program(name, step, compile_s, lambda: memory)


def pytorch(config: Any, image: np.ndarray, label: np.ndarray, compiled: bool) -> Program:
    """The plain PyTorch peer with Adam, eager or by `torch.compile`."""
    import torch

    from tests import torch_reference

    torch.set_float32_matmul_precision("high")  # on a GPU TF32, as JAX's default is
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    arguments = model_arguments(config.model, image.shape[1:])
    known = ("patch_size", "depth", "width", "num_heads", "mlp_dim", "gamma_max_depth", "c_val_0_target")
    model = torch_reference.ViT(
        config.model.name,
        image_shape=image.shape[1:],
        num_classes=label.shape[1],
        **{name: arguments[name] for name in known if name in arguments},
    ).to(device)
    optimizer = torch.optim.Adam(
        model.parameters(), config.optimizer.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    images = torch.from_numpy(image).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.from_numpy(label).to(device)
    forward = torch.compile(model) if compiled else model
    dtype = getattr(torch, config.compute_dtype)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = forward(images)
        torch_reference.loss(logits.float(), labels, config.label_smoothing).backward()
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
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
    )


def model_flops(config: Any, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """FLOPs of the matrix products for one image, forward and backward (three times forward)."""
    sizes = model_arguments(config.model, image_shape)
    width, tokens = sizes["width"], math.prod(token_grid(image_shape, sizes["patch_size"]))
    projections = 3 if config.model.name == "simplest_vit" else 4
    block = projections * width**2 + 2 * width * sizes["mlp_dim"] + 2 * tokens * width
    patches = sizes["patch_size"] ** 2 * image_shape[2] * width
    return 3 * 2 * (tokens * (sizes["depth"] * block + patches) + width * num_classes)


def _main(arguments: list[str]) -> None:
    del arguments
    config = cli.CONFIG.value
    data = noise.info_of(config)
    batch = noise.batch(data, config.batch_size)
    image, label = np.asarray(batch["image"]), np.asarray(batch["label"])

    programs = []
    for kernel in _KERNELS.value or [config.model.attention_kernel]:
        config.model.attention_kernel = kernel
        if kernel == "fused":
            attention.check_devices(jax.devices())
        programs.append(ours(f"this, {kernel}", build(config, data), batch))
    own = len(programs)
    for compiled in (False, True) if _TORCH.value else ():
        try:
            programs.append(pytorch(config, image, label, compiled))
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
    print(f"{config.model.name}, batch {config.batch_size}, {config.compute_dtype}, {device.device_kind}")
    flops = model_flops(config, data.image_shape, data.num_classes) * config.batch_size
    print(f"{'':14} compile s   step s (quartiles)         images/s  model GFLOP/s  peak GB")
    for program, times in zip(programs, seconds.T, strict=True):
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
        memory = program.memory()
        print(
            f"{program.name:14} {program.compile_s:9.1f}   {median:7.4f} ({low:.4f} to {high:.4f})"
            f"{config.batch_size / median:11.1f} {flops / median / 1e9:14.1f}"
            f"  {'' if memory is None else f'{memory / 1e9:7.2f}'}"
        )
    if len(programs) > own:
        medians = np.median(seconds, axis=0)
        best, fastest = int(np.argmin(medians[:own])), own + int(np.argmin(medians[own:]))
        low, median, high = np.quantile(seconds[:, best] / seconds[:, fastest], (0.25, 0.5, 0.75))
        print(
            f"ratio of {programs[best].name} to {programs[fastest].name}: {median:.3f} ({low:.3f} to {high:.3f}), "
            "the fastest of each, round by round"
        )


if __name__ == "__main__":
    cli.run(_main, usage="python -m benchmarks.train_step --config configs/cifar10.py", required=("config",))
