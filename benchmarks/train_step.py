"""Time a training step, another config's and plain PyTorch's, alternating in one run, and print ratios.

python -m benchmarks.train_step --config configs/cifar10.py --config.batch_size=64 --config.compute_dtype=float32
python -m benchmarks.train_step --config configs/cifar10.py --against configs/cifar10.py:model=isometric_vit --notorch

The batch is fake data on the device; forward, backward and optimizer are timed. Ours is the training step of `main.py`
with every setting of the config. The peer (`tests/torch_reference.py`) covers E-SPA + TAT, the isometric network and
SimpleViT, with the config's sizes, gradient clipping and weight decay. It always uses PyTorch's fused Adam, even if the
config has another optimizer.
"""

import os
import time
from collections.abc import Callable
from typing import NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory for PyTorch

import jax
import numpy as np
from absl import flags

from benchmarks import fake_data, speed
from benchmarks.flops import step_flops
from simplest_vit import cli
from simplest_vit.models import fused_attention, model_arguments
from simplest_vit.training.run import Run, build

_ROUNDS = flags.DEFINE_integer("rounds", 10, "Timed steps of each program.", lower_bound=1)
_TORCH = flags.DEFINE_bool("torch", True, "Time PyTorch, too.")
_AGAINST = cli.define_config("against", "Another config, to compare with.")
flags.adopt_module_key_flags(speed)


class Program(NamedTuple):
    """A program to time.

    Attributes:
      name: Name in the table.
      step: Makes one training step and waits for its end.
      compile_s: Seconds until the first step can start.
      memory: Bytes at the peak, or None if unknown.
      images: Images of a step.
      flops: Model FLOPs of a step.
    """

    name: str
    step: Callable[[], None]
    compile_s: float
    memory: Callable[[], int | None]
    images: int
    flops: float


def ours(name: str, run: Run) -> Program:
    """Compile the training step of `main.py`."""
    batch = fake_data.batch(run.data, run.config.batch_size)
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
    return Program(name, step, compile_s, lambda: memory, run.config.batch_size, step_flops(run))


def pytorch(run: Run, compiled: bool) -> Program:
    """Build the plain PyTorch peer with Adam, eager or by `torch.compile`."""
    import torch

    from tests import torch_reference

    options = run.config
    batch = fake_data.batch(run.data, options.batch_size)
    image, label = np.array(batch["image"]), np.array(batch["label"])  # copies, because PyTorch needs writable arrays
    torch.set_float32_matmul_precision("high")  # on a GPU TF32, as JAX's default is
    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    arguments = model_arguments(**options.model, image_shape=image.shape[1:])
    is_isometric = options.model.name == "isometric_vit"
    bias = run.create_state().constants["blocks"]["attention"]["attention_bias"] if is_isometric else None
    known = ("patch_size", "depth", "width", "num_heads", "mlp_dim", "gamma_max_depth", "c_val_0_target")
    model = torch_reference.ViT(
        options.model.name,
        image_shape=image.shape[1:],
        num_classes=label.shape[1],
        **{name: arguments[name] for name in known if name in arguments},
        attention_bias=None if bias is None else torch.from_numpy(np.array(bias)),
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
        step_flops(run),
    )


def _main() -> None:
    record = speed.Recorder(speed.RECORD.value, one_row=True)
    configs = {"this": cli.CONFIG.value}
    if _AGAINST.present:
        configs["against"] = _AGAINST.value
    for options in configs.values():
        fused_attention.check_devices(options.model.attention_kernel, jax.devices())
    runs = {name: build(options, fake_data.info_of(options)) for name, options in configs.items()}
    programs = [ours(*item) for item in runs.items()]
    own = len(programs)
    model = configs["this"].model
    changed = [
        field for field in ("attention", "mlp", "activation", "init", "norm", "skip") if model[field] is not None
    ]
    has_peer = model.name in ("simplest_vit", "isometric_vit", "simple_vit") and not changed
    if _TORCH.value and not has_peer:
        print(f"without PyTorch, which has no {', '.join([model.name, *(model[field] for field in changed)])}")
    for compiled in (False, True) if _TORCH.value and has_peer else ():
        try:
            programs.append(pytorch(runs["this"], compiled))
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
    options = configs["this"]
    print(f"{options.model.name}, batch {options.batch_size}, {options.compute_dtype}, {device.device_kind}")
    print(f"{'':14} compile s   step s (quartiles)         images/s  model GFLOP/s  peak GB")
    for program, times in zip(programs, seconds.T, strict=True):
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
        memory = program.memory()
        if device.platform != "cpu":  # absolute times of a CPU depend on what else it does
            row = record.row if program is programs[0] else program.name
            record.add("step", 1e3 * median, "ms", row=row, spread=(1e3 * low, 1e3 * high))
            record.add("images/s", program.images / median, row=row)
            if memory is not None:
                record.add("peak", memory / 1e9, "GB", row=row)
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
        name = configs["against"].model.name if peer < own else programs[peer].name
        record.add("ratio", median, row=f"{record.row} / {name}", spread=(low, high))
    record.write()


if __name__ == "__main__":
    speed.run(_main, usage="python -m benchmarks.train_step --config configs/cifar10.py", required=("config",))
