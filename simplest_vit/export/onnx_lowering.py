"""Lower a JAX function of images to an ONNX model, equation by equation of its jaxpr, for any network.

Only the batch size is symbolic. Three ideas keep this short:

- What does not depend on the images is computed by JAX here, and becomes a constant of the graph.
- Calls (`jit`, custom gradients, rematerialization) are inlined, and loops over layers are unrolled.
- A broadcast is not carried out until an operator needs it, because those of ONNX that act elementwise broadcast by
  themselves. A tensor may therefore have size 1 where its variable in the jaxpr has a larger one.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

from simplest_vit.errors import UserError

# With IR version 10, which onnxruntime has supported since 1.18.
_OPSET, _IR_VERSION = 18, 10

_ELEMENTWISE = {
    "abs": "Abs", "add": "Add", "and": "And", "cos": "Cos", "div": "Div", "eq": "Equal", "erf": "Erf", "exp": "Exp",
    "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "log": "Log", "logistic": "Sigmoid", "lt": "Less",
    "max": "Max", "min": "Min", "mul": "Mul", "neg": "Neg", "not": "Not", "or": "Or", "pow": "Pow", "sign": "Sign",
    "sin": "Sin", "sqrt": "Sqrt", "sub": "Sub", "tanh": "Tanh",
}  # fmt: skip
_REDUCTIONS = {"reduce_max": "ReduceMax", "reduce_min": "ReduceMin", "reduce_sum": "ReduceSum"}
_CALLS = ("checkpoint", "closed_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat2")

# Dimensions, of which some are multiples of the batch size.
Shape = tuple[Any, ...]


class Node(NamedTuple):
    """A tensor that depends on the images, and its shape."""

    name: str
    shape: Shape


# Arrays are constants.
Tensor = Node | np.ndarray


def to_onnx(function: Callable[[jax.Array], jax.Array], image_shape: Sequence[int]) -> onnx.ModelProto:
    """Lower a function from images to logits.

    Args:
      function: Maps images, uint8 [B, H, W, C] for any B, to logits, float32 [B, num_classes].
      image_shape: H, W and C.

    Returns:
      A model with the input `images` and the output `logits`, whose first dimension is named `batch`.

    Raises:
      UserError: If the function uses a primitive that is unknown here.
    """
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *image_shape), np.uint8)
    closed = jax.jit(function).trace(images).jaxpr
    graph = _Graph(batch)
    (logits,) = graph.lower(closed.jaxpr, closed.consts, [Node("images", images.shape)])
    (variable,) = closed.jaxpr.outvars
    output = graph.node("Identity", graph.expand(logits, variable.aval.shape), shape=variable.aval.shape)
    graph.nodes[-1].output[0] = "logits"
    assert output.shape == (batch, variable.aval.shape[-1])
    proto = helper.make_graph(
        graph.nodes,
        "classifier",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["batch", *image_shape])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", output.shape[-1]])],
        graph.initializers,
    )
    opsets = [helper.make_opsetid("", _OPSET)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="simplest-vit")


class _Graph:
    """The nodes and constants of an ONNX graph under construction."""

    def __init__(self, batch: Any):
        self.batch = batch
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._names: dict[tuple, str] = {}

    # Nodes and constants.

    def node(self, op: str, *operands: Tensor, shape: Shape, **attributes: Any) -> Node:
        """Append a node with one output of the given shape."""
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self._name(x) for x in operands], [name], name=name, **attributes))
        return Node(name, shape)

    def _name(self, x: Tensor) -> str:
        """Return the name of a tensor; equal constants are stored once."""
        if isinstance(x, Node):
            return x.name
        key = (x.dtype.str, x.shape, x.tobytes())
        if key not in self._names:
            self._names[key] = f"constant_{len(self._names)}"
            self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(x), self._names[key]))
        return self._names[key]

    def _is_static(self, shape: Shape) -> bool:
        return not any(isinstance(n, type(self.batch)) for n in shape)

    def _sizes(self, shape: Shape) -> Tensor:
        """Return a shape as an int64 tensor; sizes that depend on the batch size are computed from it."""
        if self._is_static(shape):
            return np.array(shape, np.int64)
        batch = self.node("Shape", Node("images", ()), shape=(1,), start=0, end=1)
        sizes: list[Tensor] = []
        for n in shape:
            if isinstance(n, int):
                sizes.append(np.array([n], np.int64))
            else:
                sizes.append(self.node("Mul", batch, np.array([n // self.batch], np.int64), shape=(1,)))
        return self.node("Concat", *sizes, shape=(len(shape),), axis=0)

    # Shapes.

    def expand(self, x: Tensor, shape: Shape) -> Tensor:
        """Carry out a broadcast."""
        return x if x.shape == shape else self.node("Expand", x, self._sizes(shape), shape=shape)

    def reshape(self, x: Tensor, shape: Shape) -> Tensor:
        """Reshape; at most one dimension depends on the batch size."""
        if x.shape == shape:
            return x
        if isinstance(x, np.ndarray):
            return x.reshape(shape)
        return self.node("Reshape", x, np.array([n if isinstance(n, int) else -1 for n in shape]), shape=shape)

    def transpose(self, x: Tensor, order: Sequence[int]) -> Tensor:
        """Reorder axes."""
        if tuple(order) == tuple(range(len(order))):
            return x
        if isinstance(x, np.ndarray):
            return x.transpose(order)
        return self.node("Transpose", x, shape=tuple(x.shape[i] for i in order), perm=order)

    # Equations.

    def lower(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Tensor]) -> list[Tensor]:
        """Lower a jaxpr, and return its outputs."""
        tensors: dict[Any, Tensor] = dict(zip(jaxpr.constvars, map(np.asarray, consts), strict=True))
        tensors |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Tensor:
            kind: Any = atom.aval
            return np.asarray(atom.val, kind.dtype) if isinstance(atom, core.Literal) else tensors[atom]

        for equation in jaxpr.eqns:
            outputs = self._equation(equation, [read(atom) for atom in equation.invars])
            tensors |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _equation(self, equation: Any, operands: list[Tensor]) -> list[Tensor]:
        name, params = equation.primitive.name, equation.params
        shapes: list[Shape] = [variable.aval.shape for variable in equation.outvars]
        inputs: list[Shape] = [atom.aval.shape for atom in equation.invars]
        if name in _CALLS:
            called = params.get("call_jaxpr", params.get("jaxpr"))
            return self.lower(getattr(called, "jaxpr", called), getattr(called, "consts", ()), operands)
        if name == "scan":
            return self._scan(params, operands)
        if all(isinstance(x, np.ndarray) for x in operands) and all(map(self._is_static, shapes + inputs)):
            results = equation.primitive.bind(*operands, **params)
            return [np.asarray(x) for x in (results if equation.primitive.multiple_results else [results])]
        if name in _ELEMENTWISE:
            return [self._elementwise(_ELEMENTWISE[name], *operands)]
        match name:
            case "copy" | "copy_p" | "optimization_barrier" | "stop_gradient":
                return operands
            case "square":
                return [self._elementwise("Mul", operands[0], operands[0])]
            case "integer_pow":
                return [self._elementwise("Pow", operands[0], np.array(params["y"], np.float32))]
            case "rsqrt":
                return [self._elementwise("Reciprocal", self._elementwise("Sqrt", operands[0]))]
            case "select_n" if len(operands) == 3:
                condition, if_false, if_true = operands
                return [self._elementwise("Where", condition, if_true, if_false)]
            case "convert_element_type":
                return [self._elementwise("Cast", operands[0], to=helper.np_dtype_to_tensor_dtype(params["new_dtype"]))]
            case "broadcast_in_dim":
                sizes = dict(zip(params["broadcast_dimensions"], operands[0].shape, strict=True))
                return [self.reshape(operands[0], tuple(sizes.get(i, 1) for i in range(len(shapes[0]))))]
        operands = [self.expand(x, shape) for x, shape in zip(operands, inputs, strict=True)]
        match name:
            case "expand_dims" | "reshape" | "squeeze":
                return [self.reshape(operands[0], shapes[0])]
            case "transpose":
                return [self.transpose(operands[0], params["permutation"])]
            case "concatenate":
                return [self.node("Concat", *operands, shape=shapes[0], axis=params["dimension"])]
            case "reduce_max" | "reduce_min" | "reduce_sum":
                axes = np.array(params["axes"], np.int64)
                return [self.node(_REDUCTIONS[name], operands[0], axes, shape=shapes[0], keepdims=0)]
            case "dot_general":
                contracting, batching = params["dimension_numbers"]
                return [self._dot_general(operands[0], operands[1], contracting, batching, shapes[0])]
            case "dynamic_slice" | "gather" | "rev" | "slice" | "split":
                if all(isinstance(x, np.ndarray) for x in operands[1:]):
                    return self._move(equation, operands, shapes)
        raise UserError(f"the network computes {name!r}, which ONNX export does not support; try --format=stablehlo")

    def _elementwise(self, op: str, *operands: Tensor, **attributes: Any) -> Node:
        """Append an operator that broadcasts its operands, which have the same rank or rank 0."""
        sizes = zip(*(x.shape for x in operands if x.shape), strict=True)
        return self.node(op, *operands, shape=tuple(next((n for n in s if n != 1), 1) for s in sizes), **attributes)

    def _scan(self, params: dict[str, Any], operands: list[Tensor]) -> list[Tensor]:
        """Unroll a loop over constants that returns only its carry."""
        body, start = params["jaxpr"], params["num_consts"] + params["num_carry"]
        carry, stacks = operands[params["num_consts"] : start], operands[start:]
        if len(body.out_avals) > len(carry) or any(isinstance(x, Node) for x in stacks):
            raise UserError("the network computes a 'scan' with inputs or outputs by step; try --format=stablehlo")
        for i in sorted(range(params["length"]), reverse=params["reverse"]):
            layer = [np.asarray(x[i]) for x in stacks]
            carry = self.lower(body.jaxpr, body.consts, [*operands[: params["num_consts"]], *carry, *layer])
        return carry

    def _dot_general(
        self, left: Tensor, right: Tensor, contracting: Sequence[Any], batching: Sequence[Any], shape: Shape
    ) -> Tensor:
        """Lower a product to MatMul: [..., M, K] @ [..., K, N], batch dimensions first."""
        free = [
            [i for i in range(len(x.shape)) if i not in (*contracted, *batched)]
            for x, contracted, batched in zip((left, right), contracting, batching, strict=True)
        ]
        m, n = (math.prod(x.shape[i] for i in axes) for x, axes in zip((left, right), free, strict=True))
        k = math.prod(left.shape[i] for i in contracting[0])
        batch = tuple(left.shape[i] for i in batching[0])
        left = self.reshape(self.transpose(left, (*batching[0], *free[0], *contracting[0])), (*batch, m, k))
        right = self.reshape(self.transpose(right, (*batching[1], *contracting[1], *free[1])), (*batch, k, n))
        return self.reshape(self.node("MatMul", left, right, shape=(*batch, m, n)), shape)

    def _move(self, equation: Any, operands: list[Any], shapes: list[Shape]) -> list[Tensor]:
        """Lower what only moves numbers within each image: JAX moves their positions in a batch of one, ONNX gathers.

        Whole rows are gathered if the last axis is kept.
        """
        operand, *indices = operands
        one = tuple(map(self._of_one, operand.shape))
        positions = np.arange(math.prod(one), dtype=np.int32).reshape(one)
        results = equation.primitive.bind(positions, *indices, **jax.tree.map(self._of_one, equation.params))
        outputs = []
        for result, shape in zip(results if equation.primitive.multiple_results else [results], shapes, strict=True):
            size = result.shape[-1]
            source = np.asarray(result).reshape(-1, size)
            misaligned = positions.size % size or (source[:, 0] % size).any()
            if misaligned or (source != source[:, :1] + np.arange(size)).any():
                source, size = source.reshape(-1, 1), 1
            rows = self.reshape(operand, (self.batch, positions.size // size, size))
            gathered = self.node("Gather", rows, source[:, 0] // size, shape=(self.batch, len(source), size), axis=1)
            outputs.append(self.reshape(gathered, shape))
        return outputs

    def _of_one(self, parameter: Any) -> Any:
        """Return a parameter of a primitive for a batch of one."""
        return parameter // self.batch if isinstance(parameter, type(self.batch)) else parameter
