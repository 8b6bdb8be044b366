"""Estimate a training step on an H200 from what XLA compiles for it, without a GPU: nothing is run or timed.

python -m benchmarks.compiled --config configs/cifar10.py
python -m benchmarks.compiled --config configs/cifar10.py --against configs/cifar10.py:model=simple_vit

A row has the estimated minimum time of a step (`roofline.py`), model FLOPs over the data sheet's peak in that time,
launches, bytes moved, temporaries, waits for the host and custom calls. The costliest kernels follow. This needs the
CUDA plugin in jaxlib's version in a separate folder (docs/gpu.md).
"""

import collections
import functools
import importlib.metadata
import os
import pathlib
import re
import time
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin finds no GPU

import jax
from absl import flags
from jax.experimental import topologies

from benchmarks import fake_data, roofline, speed
from benchmarks.flops import step_flops
from simplest_vit import cli
from simplest_vit.errors import UserError, first_line
from simplest_vit.training.run import build
from simplest_vit.training.sharding import create_mesh

_AGAINST = cli.define_config("against", "Another config, to compare with.")
_OPTIONS = flags.DEFINE_multi_string("xla", [], "Flags for XLA, e.g. xla_gpu_enable_triton_gemm=false.")
_TOP = flags.DEFINE_integer("top", 10, "Number of kernels to list; those of the same shape count once.", lower_bound=0)
flags.adopt_module_key_flags(speed)

DATA_SHEET = 989e12  # bfloat16 FLOP/s, dense
_HERE = pathlib.Path(__file__).parent


@functools.cache  # programs compiled together must be for the same device
def target() -> jax.Device:
    """Return the chip to compile for.

    Raises:
      UserError: If JAX lacks the plugin.
    """
    try:
        importlib.metadata.version("jax-cuda13-pjrt")
    except importlib.metadata.PackageNotFoundError as error:
        version = importlib.metadata.version("jaxlib")
        raise UserError(
            "compiling for a GPU needs JAX's CUDA plugin; install it in a separate folder and add that to PYTHONPATH: "
            f"pip install --no-deps --target .venv/gpu jax-cuda13-pjrt=={version} jax-cuda13-plugin=={version}"
        ) from error
    description = (_HERE / "h200.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=description, topology="1x1x1").devices[0]


def compile_for(device: jax.Device, function: Any, *arguments: Any, options: dict[str, Any] | None = None) -> Any:
    """Compile a jitted function for a device that need not exist.

    Args:
      device: From `target`.
      function: From `jax.jit`.
      *arguments: Trees of anything with a shape and a dtype.
      options: XLA's flags.

    Returns:
      The compiled program, and its kernels (`roofline.Program`).

    Raises:
      UserError: If XLA fails.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)
    traced = function.trace(*placed)
    try:
        compiled = traced.lower().compile(options or {})
    except jax.errors.JaxRuntimeError as error:  # such as an unknown flag of XLA
        raise UserError(f"XLA cannot compile this: {first_line(error)}") from error
    return compiled, roofline.read(compiled.as_text(), roofline.pallas_flops(traced.jaxpr.jaxpr))


def describe(settings: Any, options: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Return a row of the table and the kernels of the step of `simplest-vit train`."""
    run = build(settings, fake_data.info_of(settings), create_mesh(devices=[target()]))
    batch = fake_data.abstract_batch(run.data, settings.batch_size)
    start = time.perf_counter()
    compiled, program = compile_for(target(), run.train_step, run.abstract, batch, options=options)
    seconds = sum(kernel.seconds for kernel in program.kernels)
    calls = collections.Counter(k.kind for k in program.kernels if k.instruction.op == "custom-call")
    row = {
        "least_ms": 1e3 * seconds,
        "mfu": step_flops(run) / seconds / DATA_SHEET,
        "launches": sum(kernel.times for kernel in program.kernels),
        "gigabytes": sum(kernel.times * kernel.bytes for kernel in program.kernels) / 1e9,
        "temporary_gigabytes": compiled.memory_analysis().temp_size_in_bytes / 1e9,
        "host_waits": program.host_waits,
        "custom_calls": dict(calls),
        "compile_s": time.perf_counter() - start,
    }
    return row, program.kernels


def costliest(kernels: list[roofline.Kernel], top: int) -> list[str]:
    """Describe the costliest kernels, with one line for those of the same kind, shape and origin."""
    groups: dict[Any, list[roofline.Kernel]] = collections.defaultdict(list)
    for kernel in kernels:
        origin = re.search(r'op_name="([^"]*)"', kernel.instruction.line)
        key = kernel.kind, str(kernel.instruction.shapes[:2]), re.sub(r"\d+", "", origin[1]) if origin else ""
        groups[key].append(kernel)
    ordered = sorted(groups.items(), key=lambda item: -sum(kernel.seconds for kernel in item[1]))
    lines = []
    for (kind, _, origin), group in ordered[:top]:
        shapes = " ".join(f"{dtype}{list(shape)}" for dtype, shape in group[0].instruction.shapes[:2])
        seconds, times = sum(k.seconds for k in group), sum(k.times for k in group)
        lines.append(f"{1e3 * seconds:8.3f} ms  x{times:<4} {kind:28.28} {shapes:44.44} {origin[-44:]}")
    return lines


def _main() -> None:
    options = dict(_parse_option(text) for text in _OPTIONS.value)
    target()
    record = speed.Recorder(speed.RECORD.value, one_row=True, device="NVIDIA H200, not run")
    row, kernels = describe(cli.CONFIG.value, options)
    rows = {"this": row}
    if _AGAINST.present:
        rows["against"] = describe(_AGAINST.value, options)[0]
    print(f"batch {cli.CONFIG.value.batch_size}, compiled for an H200, not run: estimates")
    print(f"{'':12} least ms   MFU  launches      GB  temporaries GB  host waits  custom calls")
    for name, r in rows.items():
        calls = " ".join(f"{kind} x{count}" for kind, count in sorted(r["custom_calls"].items())) or "none"
        print(
            f"{name:12.12} {r['least_ms']:8.2f} {r['mfu']:5.1%} {r['launches']:9} {r['gigabytes']:7.1f} "
            f"{r['temporary_gigabytes']:15.2f} {r['host_waits']:11}  {calls}"
        )
    print("\n".join(costliest(kernels, _TOP.value)))
    record.add("estimate", row["least_ms"], "ms")
    record.add("launches", row["launches"])
    record.add("moved", row["gigabytes"], "GB")
    record.add("temporaries", row["temporary_gigabytes"], "GB")
    record.write()


def _parse_option(text: str) -> tuple[str, Any]:
    """Parse a flag of XLA as its compiler expects it."""
    name, _, value = text.lstrip("-").partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    return name, int(value) if value.lstrip("-").isdigit() else value


if __name__ == "__main__":
    speed.run(_main, usage="python -m benchmarks.compiled --config configs/cifar10.py", required=("config",))
