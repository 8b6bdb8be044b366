"""Estimate the minimum time of a program that XLA compiled for a GPU from its optimized HLO.

The time of a kernel is its FLOPs over the rate of the unit that computes them, or its bytes (each operand read once,
each result written once) over the memory bandwidth, whichever is longer. Launches, tails and waits are not included.
The rates are those that large products and copies reach, not the data sheet's, which nothing reaches.
"""

import collections
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params

# For an H200: bfloat16 and bandwidth were measured on such a chip, TF32 is half of the former, and float32 is 10 %
# below the data sheet's.
FLOPS_PER_S = {"bf16": 790e12, "tf32": 395e12, "f32": 60e12}
BYTES_PER_S = 4.3e12

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "add-dependency"}
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%([\w.\-]+)")


class Instruction(NamedTuple):
    """A line of HLO; `shapes` are (dtype, dimensions) of its results."""

    name: str
    op: str
    shapes: list[tuple[str, tuple[int, ...]]]
    operands: list[str]
    line: str

    @property
    def bytes(self) -> int:
        """Size of the results."""
        return sum(_BYTES.get(dtype, 0) * math.prod(shape) for dtype, shape in self.shapes)

    @property
    def size(self) -> int:
        """Numbers in the results."""
        return sum(math.prod(shape) for _, shape in self.shapes)

    @property
    def called(self) -> list[str]:
        """Computations that it runs."""
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.line)
        return _CALLED.findall(self.line) + (re.findall(r"%([\w.\-]+)", branches[1]) if branches else [])


class Kernel(NamedTuple):
    """A launch.

    Attributes:
      instruction: Its line.
      kind: The kind of a fusion, or the target of a custom call.
      times: Number of runs, from the trip counts of the loops around it.
      flops: By unit, of the matrix products.
      bytes: Read and written.
    """

    instruction: Instruction
    kind: str
    times: int
    flops: dict[str, float]
    bytes: float

    @property
    def seconds(self) -> float:
        """The minimum time of all its runs."""
        compute = sum(flops / FLOPS_PER_S[unit] for unit, flops in self.flops.items())
        return self.times * max(compute, self.bytes / BYTES_PER_S)


class Program(NamedTuple):
    """The kernels of a program, and how often a GPU waits for its host: conditionals, and loops of unknown length."""

    kernels: list[Kernel]
    host_waits: int


def read(text: str, flops_of_calls: dict[str, dict[str, float]] | None = None) -> Program:
    """Read optimized HLO.

    Args:
      text: `compiled.as_text()`.
      flops_of_calls: From `pallas_flops`, for kernels that are not HLO, by name.

    Returns:
      The program.
    """
    computations, entry = _parse(text)
    waits = 0

    def visit(name: str, times: int) -> Iterator[Kernel]:
        nonlocal waits
        computation = computations[name]
        for i in computation.values():
            if i.op in _FREE or i.op.endswith("-done"):
                continue
            if i.op == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.line)
                waits += trips is None
                body = re.search(r"body=%([\w.\-]+)", i.line)
                yield from visit(body[1] if body else "", times * int(trips[1] if trips else 1))
            elif i.op in ("conditional", "call", "async-start"):
                waits += i.op == "conditional"
                for called in i.called:
                    yield from visit(called, times)
            else:
                yield _kernel(i, times, computation, computations, flops_of_calls or {})

    return Program(list(visit(entry, 1)), waits)


def pallas_flops(jaxpr: Any) -> dict[str, dict[str, float]]:
    """Count FLOPs by unit of the matrix products in each Pallas kernel of a jaxpr, padding included, by kernel name."""
    found: dict[str, dict[str, float]] = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            grid = math.prod(equation.params["grid_mapping"].grid)
            kernel = equation.params["jaxpr"]
            name = kernel.debug_info.func_name
            found[name] = {unit: grid * flops for unit, flops in _dot_flops(kernel).items()}
        else:
            for inner in jaxprs_in_params(equation.params):
                found |= pallas_flops(inner)
    return found


def _dot_flops(jaxpr: Any) -> collections.Counter:
    total: collections.Counter = collections.Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            lhs = equation.invars[0].aval
            ((contracted,), _), _ = equation.params["dimension_numbers"]
            flops = 2 * math.prod(equation.outvars[0].aval.shape) * lhs.shape[contracted]
            # Float32 operands are split into three bfloat16 parts each; six of the nine products are computed.
            total["bf16"] += flops * (6 if lhs.dtype == jax.numpy.float32 else 1)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            for unit, flops in _dot_flops(inner).items():
                total[unit] += times * flops
    return total


def _kernel(
    i: Instruction, times: int, computation: dict[str, Instruction], computations: Any, flops_of_calls: Any
) -> Kernel:
    """Describe what an instruction launches."""
    kind = i.op
    flops: collections.Counter = collections.Counter()
    if i.op == "custom-call":
        target = re.search(r'custom_call_target="([^"]+)"', i.line)
        kind = target[1] if target else kind
        if "triton" in kind:
            name = re.search(r'name = "(\w+)"', i.line)
            kind = name[1] if name else kind
            flops.update(flops_of_calls.get(kind, {}))
    if i.op == "dot" or "gemm" in kind or "matmul" in kind:
        flops.update(_product(i, computation))
    if i.op == "fusion":
        backend = re.search(r'"kind":"(__\w+)', i.line)
        hlo_kind = re.search(r"kind=(\w+)", i.line)
        kind = backend[1].strip("_") if backend else hlo_kind[1] if hlo_kind else kind
        waiting = list(i.called)
        while waiting:
            body = computations[waiting.pop()]
            for j in body.values():
                waiting += j.called if j.op == "fusion" else []
                flops.update(_product(j, body) if j.op == "dot" else {})
    return Kernel(i, kind, times, dict(flops), _traffic(i, computation, computations))


def _product(i: Instruction, computation: dict[str, Instruction]) -> dict[str, float]:
    """Count the FLOPs of a matrix product by unit."""
    dtype, lhs = computation[i.operands[0]].shapes[0]
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.line) or re.search(
        r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.line
    )
    contracted = math.prod(lhs[int(d)] for d in re.findall(r"\d+", dims[1])) if dims else 1
    highest = re.search(r'operand_precision=\{highest|"operand_precision":\["HIGHEST', i.line)
    unit = "bf16" if dtype in ("bf16", "f16") else "f32" if highest else "tf32"
    return {unit: 2.0 * math.prod(i.shapes[0][1]) * contracted}


def _traffic(i: Instruction, computation: dict[str, Instruction], computations: Any) -> float:
    """Count bytes read and written: for a slice or gather, its result; for an update in place, the update."""
    written = float(i.bytes)
    if i.op in _SLICES:
        return 2 * written
    if i.op in _UPDATES:
        return 2.0 * computation[_update(i)].bytes
    if i.op != "fusion":
        return sum(computation[o].bytes for o in i.operands if o in computation) + written
    body = computations[i.called[0]]
    needed = _needed(body)
    read = sum(j.bytes * needed[j.name] for j in body.values() if j.op == "parameter")
    for j in body.values():
        if j.op in _UPDATES and j.bytes <= written:
            written -= j.bytes - body[_update(j)].bytes
    return read + written


def _update(i: Instruction) -> str:
    """Return the operand that holds the written values."""
    return i.operands[1] if i.op == "dynamic-update-slice" else i.operands[-1]


def _needed(body: dict[str, Instruction]) -> dict[str, float]:
    """Return, by name, the part in [0, 1] of each instruction of a fusion that its results need.

    The part of an elementwise chain that a slice leaves out is neither computed nor read.
    """
    numbers: collections.defaultdict[str, float] = collections.defaultdict(float)
    parts = {}
    for j in reversed(body.values()):
        part = 1.0 if "ROOT %" in j.line else min(numbers[j.name] / max(j.size, 1), 1.0)
        parts[j.name] = part
        for k, operand in enumerate(j.operands):
            whole = body[operand].size
            if k == 0 and j.op in _UPDATES:
                continue  # in place
            if (k == 0 and j.op in _SLICES) or whole == j.size:
                numbers[operand] += part * j.size
            elif part:
                numbers[operand] += whole
    return parts


def _parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Return computations by name, and the name of the first to run."""
    computations: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif match := re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line):
            kind, rest = _split_type(re.sub(r"/\*index=\d+\*/", "", match[2]))
            if op := re.match(r"([a-z][\w\-]*)\(", rest):
                shapes = [
                    (dtype, tuple(map(int, dims.split(","))) if dims else ())
                    for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", kind)
                ]
                operands = re.findall(r"%([\w.\-]+)", rest[: _closing(rest, len(op[1]))])
                current[match[1]] = Instruction(match[1], op[1], shapes, operands, line)
    return computations, entry


def _split_type(text: str) -> tuple[str, str]:
    """Split `(f32[2], s32[]) fusion(...)` after the type."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    return text[:end], text[end:].lstrip()


def _closing(text: str, start: int) -> int:
    """Return the position after the parenthesis that opens at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "(") - (text[position] == ")")
        if depth == 0:
            return position + 1
    return len(text)
