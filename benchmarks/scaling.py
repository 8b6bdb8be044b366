"""What a training step computes and communicates on 1 to 1024 devices, and how long it should take.

Prints the tables of docs/scaling.md:

    python -m benchmarks.scaling

Nothing is measured here. Counts come from the real model, the real plan of Shampoo and the real sharding rules, times
from data sheets and the assumptions below.
"""

import dataclasses
import math
from typing import Any

import jax

from benchmarks import noise
from benchmarks.flops import forward_flops
from simplest_vit.config import default
from simplest_vit.models.factory import VARIANTS
from simplest_vit.models.layers import token_grid
from simplest_vit.optimizers import paths
from simplest_vit.optimizers.factory import options_of
from simplest_vit.optimizers.shampoo import shampoo_plan
from simplest_vit.training.run import build
from simplest_vit.training.sharding import bytes_per_device
from simplest_vit.training.state import abstract_state

DEVICES = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
SCHEMES = ("data", "fsdp", "shampoo")
NODE = 8  # devices in a node
IMAGE_SHAPE, NUM_CLASSES = (224, 224, 3), 1000
_FLOAT32 = 4
# Products of a root by the matmul-only iteration (docs/shampoo.md), in float32.
PRODUCTS_PER_ROOT = 36


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A cluster of equal nodes; all rates are of one device and one direction.

    Attributes:
      name: Of the device.
      bfloat16_flops: Peak of dense products, FLOP/s.
      tf32_flops: Likewise; float32 products run at this rate by default.
      float32_flops: Likewise, without tensor cores; roots are computed with these.
      within: Bytes/s to the other devices of the node.
      between: Bytes/s to other nodes.
    """

    name: str
    bfloat16_flops: float
    tf32_flops: float
    float32_flops: float
    within: float
    between: float


# NVIDIA's data sheets of H100 SXM / DGX H100 and A100 SXM 80 GB / DGX A100: dense (not sparse) peaks, NVLink of 900 and
# 600 GB/s in both directions together, one InfiniBand port of 400 and 200 Gbit/s for each GPU.
HARDWARE = (
    Hardware("H100 SXM, 8 a node", 989e12, 495e12, 67e12, 450e9, 50e9),
    Hardware("A100 SXM, 8 a node", 312e12, 156e12, 19.5e12, 300e9, 25e9),
)
# Assumed: part of a peak that products of these sizes reach, part of a link's rate that collectives reach, and
# seconds for each hop of a collective between nodes.
UTILIZATION = 0.35
LINK_EFFICIENCY = 0.8
HOP_LATENCY = 10e-6


@dataclasses.dataclass(frozen=True)
class Cost:
    """One device's part of a step.

    Attributes:
      examples: Of the global batch.
      model_flops: Forward and backward.
      statistics_flops: Shampoo's statistics and preconditioning.
      root_flops: Shampoo's roots, on average over the steps.
      bytes_within: Sent to devices of the same node.
      bytes_between: Sent to other nodes.
      state_bytes: Parameters and optimizer state held.
      hops: Steps of a tree over the nodes, over all collectives.
    """

    examples: float
    model_flops: float
    statistics_flops: float
    root_flops: float
    bytes_within: float
    bytes_between: float
    state_bytes: int
    hops: float


def recipe(variant: str, optimizer: str) -> Any:
    """What counts of a config for ImageNet: batches of 1024, a variant of SimplEsT-ViT, patches of 16 pixels."""
    config = default(optimizer)
    config.batch_size = 1024
    config.model.update(variant=variant, patch_size=16)
    return config


def abstract_mesh(devices: int, fsdp: int) -> jax.sharding.AbstractMesh:
    """A mesh of devices that need not be there."""
    return jax.sharding.AbstractMesh((devices // fsdp, fsdp), ("data", "fsdp"))


def describe(config: Any, mesh: Any) -> Any:
    """Shapes and shardings of the state of a run on a mesh."""
    return abstract_state(build(config, noise.info(IMAGE_SHAPE, NUM_CLASSES)).initialize, mesh)


def collective_bytes(size: float, devices: int) -> tuple[float, float]:
    """Bytes that a device sends in an all-gather, or a reduce-scatter, of `size` bytes: a level for nodes, one within.

    An all-reduce is one of each.
    """
    local = min(devices, NODE)
    nodes = devices / local
    return size * (local - 1) / local, size / local * (nodes - 1) / nodes


def cost(variant: str, scheme: str, devices: int) -> Cost:
    """Count one device's part of a step.

    Args:
      variant: Of `VARIANTS`.
      scheme: `data`: Adam, everything on every device; `fsdp`: Adam, shared by all devices and blocks recomputed in the
        backward pass, so that kernels are gathered twice; `shampoo`: data parallel, stacks shared by all devices.
      devices: Devices of the run.

    Returns:
      The cost.
    """
    config = recipe(variant, "shampoo" if scheme == "shampoo" else "adam")
    state = describe(config, abstract_mesh(devices, devices if scheme == "fsdp" else 1))
    params = jax.tree.leaves(state.params)
    gradient = _FLOAT32 * sum(x.size for x in params)
    split = _FLOAT32 * sum(x.size for x in params if not x.sharding.is_fully_replicated)
    tokens = math.prod(token_grid(IMAGE_SHAPE, config.model.patch_size))
    examples = config.batch_size / devices
    passes = 4 if scheme == "fsdp" else 3  # forward, twice that backward, and forward again where it is recomputed
    layers = VARIANTS[variant]["depth"] + 1
    phases = 2 * layers  # a gather or a scatter of a layer each
    sent = [2 * part for part in collective_bytes(gradient, devices)]
    statistics_flops = root_flops = 0.0
    if scheme == "fsdp":  # once more than the gather and the reduce-scatter that an all-reduce is made of
        sent = [a + b for a, b in zip(sent, collective_bytes(split, devices), strict=True)]
        phases += layers if split else 0
    if scheme == "shampoo":
        plan = shampoo_plan(state.params, stack_axes=paths.stack_axes, **options_of(config.optimizer))
        for stack in plan.stacks:
            local = math.ceil(stack.count / devices)
            size = math.prod(stack.block_shape)
            statistics_flops += sum(4 * local * size * n for n in stack.sizes)
            turns = math.ceil(local / plan.options.precondition_frequency)
            root_flops += 2 * PRODUCTS_PER_ROOT * turns * sum(n**3 for n in stack.sizes)
            if devices > 1:
                gathered = collective_bytes(_FLOAT32 * stack.count * size, devices)
                sent = [a + b for a, b in zip(sent, gathered, strict=True)]
                phases += 1
    return Cost(
        examples=examples,
        model_flops=passes * examples * forward_flops(state.params, tokens),
        statistics_flops=statistics_flops,
        root_flops=root_flops,
        bytes_within=sent[0],
        bytes_between=sent[1],
        state_bytes=bytes_per_device(state),
        hops=phases * math.log2(max(devices / NODE, 1)),
    )


def step_time(part: Cost, hardware: Hardware) -> tuple[float, float]:
    """Seconds of computation and of communication in a step, one after the other."""
    compute = (
        part.model_flops / hardware.bfloat16_flops
        + part.statistics_flops / hardware.tf32_flops
        + part.root_flops / hardware.float32_flops
    ) / UTILIZATION
    links = part.bytes_within / hardware.within + part.bytes_between / hardware.between
    return compute, links / LINK_EFFICIENCY + part.hops * HOP_LATENCY


def counts_table(variant: str) -> str:
    """FLOPs, bytes and memory of a device, in Markdown."""
    lines = [
        "| devices | images | scheme | model GFLOP | Shampoo GFLOP | MB in the node | MB between nodes | state MB |",
        "|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for devices in DEVICES:
        for scheme in SCHEMES:
            part = cost(variant, scheme, devices)
            own = (part.statistics_flops + part.root_flops) / 1e9
            lines.append(
                f"| {devices} | {part.examples:g} | {scheme} | {part.model_flops / 1e9:,.0f} | {own:,.0f} | "
                f"{part.bytes_within / 1e6:,.1f} | {part.bytes_between / 1e6:,.2f} | {part.state_bytes / 1e6:,.1f} |"
            )
    return "\n".join(lines)


def times_table(variant: str, hardware: Hardware) -> str:
    """Expected milliseconds of a step, and the part of perfect scaling that is left, in Markdown."""
    lines = [
        "| devices | " + " | ".join(f"{scheme}: compute + communicate, ms | scaling" for scheme in SCHEMES) + " |",
        "|--:|" + "--:|--:|" * len(SCHEMES),
    ]
    alone = {scheme: sum(step_time(cost(variant, scheme, 1), hardware)) for scheme in SCHEMES}
    for devices in DEVICES:
        cells = []
        for scheme in SCHEMES:
            compute, communicate = step_time(cost(variant, scheme, devices), hardware)
            left = alone[scheme] / devices / (compute + communicate)
            cells.append(f"{1e3 * compute:,.1f} + {1e3 * communicate:,.1f} | {left:.0%}")
        lines.append(f"| {devices} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print all tables."""
    for variant in ("S", "L"):
        params = describe(recipe(variant, "adam"), abstract_mesh(1, 1)).params
        count = sum(x.size for x in jax.tree.leaves(params))
        print(f"### {variant}/16: {count / 1e6:.1f} M parameters\n\n{counts_table(variant)}\n")
        for hardware in HARDWARE:
            print(f"Expected on {hardware.name}:\n\n{times_table(variant, hardware)}\n")


if __name__ == "__main__":
    main()
