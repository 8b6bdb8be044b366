"""The checkpoints of the PyTorch reference: reading `.pth` files, and conversion of models to and from them.

A `.pth` file (torch.save since 1.6) is a zip archive of stored (not compressed) members: a pickle, `data.pkl`, and the
bytes of each tensor's storage. A pickle can call any function and ask for any amount of memory or time. Here
PyTorch is not needed and nothing in the file is executed: the unpickler knows only the opcodes of torch.save and the
few calls that tensors need. All other classes and functions, such as those of an optimizer's state, become inert. Time
and memory are bounded by the size of the file.
"""

import math
import os
import pickle
import zipfile
from typing import IO, Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util

from simplest_vit.errors import UserError, one_line
from simplest_vit.models import PRESETS
from simplest_vit.models.layers import sincos_position_embedding, token_grid
from simplest_vit.models.mlp import MLPS
from simplest_vit.models.reference_layout import pytorch_layout
from simplest_vit.training.run import Run

_DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_MAX_PICKLE_BYTES = 2**26
# Those that torch.save writes, in protocol 2.
_OPCODES = """
PROTO STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE LONG1 LONG4 BININT BININT1 BININT2 BINFLOAT BINUNICODE
EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
BINGET LONG_BINGET BINPUT LONG_BINPUT GLOBAL REDUCE NEWOBJ BUILD BINPERSID
"""
_CODES = {getattr(pickle, name)[0] for name in _OPCODES.split()}


class TensorView(NamedTuple):
    """A tensor whose bytes have not been read: a view of a storage, sizes in elements."""

    dtype: np.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for an unknown class or function; accepts and ignores whatever a pickle does to an object."""

    def __init__(self, *args: Any, **kwargs: Any):
        del args, kwargs

    def _ignore(self, *args: Any) -> None:
        del args

    __setitem__ = append = extend = _ignore


class _Dict(dict[Any, Any]):
    """Ignores keys such as nested tuples, whose hash can take forever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if isinstance(key, str | int):
            super().__setitem__(key, value)


# Python's implementation, because the one in C allocates what a pickle asks for and cannot drop opcodes.
_PythonUnpickler: Any = pickle._Unpickler


class _Unpickler(_PythonUnpickler):
    dispatch = {code: load for code, load in _PythonUnpickler.dispatch.items() if code in _CODES}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
            ("collections", "OrderedDict"): lambda *_: _Dict(),  # its items come after the call
        }
        return known.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype)):
            return None
        return (pid[1], pid[2]) if isinstance(pid[2], str) else None

    def load_build(self) -> None:
        """Ignore the attributes of an object, which could hide its methods."""
        self.stack.pop()

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dictionary


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TensorView | None:
    if storage is None:
        return None
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(isinstance(n, int) and 0 <= n < 2**48 for n in numbers):
        raise pickle.UnpicklingError("a tensor of impossible sizes")
    dtype, key = storage
    return TensorView(dtype, key, offset, tuple(shape), tuple(strides))


class PthFile:
    """A `.pth` file opened for reading: names and shapes immediately, the numbers of a tensor on request."""

    def __init__(self, path: str | os.PathLike[str] | IO[bytes]):
        """Read the names.

        Raises:
          UserError: If the file is missing, is not a checkpoint, or has no `model_state_dict`.
        """
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
            pickles = [name for name in self._archive.namelist() if name.endswith("/data.pkl")]
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from error
        except Exception as error:  # a damaged archive may raise anything
            raise self._error("is not a checkpoint written by torch.save") from error
        if len(pickles) != 1:
            raise self._error("is a zip archive, but not a checkpoint of torch.save (it has no data.pkl)")
        self._root = pickles[0].removesuffix("data.pkl")
        try:
            if self._archive.getinfo(pickles[0]).file_size > _MAX_PICKLE_BYTES:
                raise pickle.UnpicklingError("its data.pkl is too large")
            with self._open(pickles[0]) as file:
                content = _Unpickler(file).load()
        except Exception as error:  # a damaged pickle may, too
            raise self._error(f"is damaged ({type(error).__name__} in its data.pkl)") from error
        state = content.get("model_state_dict") if isinstance(content, dict) else None
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise self._error("has no model_state_dict")
        tensors = {name: value for name, value in state.items() if isinstance(value, TensorView)}
        # torch.compile adds this prefix to every name.
        self.tensors: dict[str, TensorView] = {name.removeprefix("_orig_mod."): t for name, t in tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """Read the numbers of a tensor, in its dtype and shape; a UserError if they are not in the file."""
        tensor = self.tensors[name]
        size = tensor.dtype.itemsize
        try:
            with self._open(f"{self._root}data/{tensor.key}") as file:
                content = file.read()
            if size * math.prod(tensor.shape) > len(content):  # strides of 0 would repeat numbers
                raise ValueError("a tensor larger than its storage")
            strides = [size * stride for stride in tensor.strides]
            return np.ndarray(tensor.shape, tensor.dtype, content, size * tensor.offset, strides).copy()
        except Exception as error:  # of the archive, or NumPy's for a view beyond the storage
            raise self._error(f"is damaged: the numbers of {name} cannot be read") from error

    def _open(self, name: str) -> Any:
        """Open a member, which must not be compressed: a small file could then hold any number of bytes."""
        if self._archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
            raise zipfile.BadZipFile("compressed")
        return self._archive.open(name)

    def _error(self, reason: str) -> UserError:
        return UserError(one_line(f"--checkpoint={self.path} {reason}; expected a .pth file of the PyTorch reference"))


# Networks of the reference, and the kinds of attention whose parameters and constants are those of its checkpoints.
_ATTENTIONS = {"simplest_vit": ("espa", "espa_2d", "espa_reference", "uspa"), "simple_vit": ("softmax",)}


def to_reference(model: Any, params: Any, constants: Any) -> dict[str, np.ndarray]:
    """Arrange the arrays of a model of `config.model` by the names, and in the layouts, of the reference.

    Raises:
      UserError: If the reference, which has two networks and few of the options here, has no such model.
    """
    if model.name not in _ATTENTIONS:
        networks = ", ".join(_ATTENTIONS)
        raise UserError(f"config.model.name={model.name!r} is not in the PyTorch reference; expected {networks}")
    preset = PRESETS[model.name]
    own = {"activation": MLPS[preset["mlp"]].activations[0], **preset}
    allowed = {field: (own[field],) for field in ("mlp", "activation", "norm", "skip")}
    for field, values in (allowed | {"attention": _ATTENTIONS[model.name]}).items():
        if model[field] not in (None, *values):
            expected = ", ".join(values)
            raise UserError(
                f"config.model.{field}={model[field]!r} is not in the PyTorch reference; expected {expected}"
            )
    params, constants = jax.tree.map(np.asarray, (params, constants))
    flat = traverse_util.flatten_dict(params, sep="/") | traverse_util.flatten_dict(constants, sep="/")
    return {name: np.asarray(tensor) for name, tensor in pytorch_layout(flat, model.patch_size).items()}


def from_reference(run: Run, checkpoint: PthFile) -> tuple[Any, Any]:
    """Read the parameters and constants of a run's model from a checkpoint of the reference.

    Returns:
      Parameters and constants as nested dicts of float32 arrays. The constants of E-SPA are those of the file.

    Raises:
      UserError: If a tensor is missing, superfluous or of another shape.
    """
    model, abstract = run.config.model, run.abstract
    leaves, tree = jax.tree.flatten((abstract.params, abstract.constants))
    ends = np.cumsum([leaf.size for leaf in leaves])
    parts = np.split(np.arange(ends[-1], dtype=np.int32), ends[:-1])
    # The layout of the positions in one array of all numbers shows where the entries of each tensor belong.
    positions = jax.tree.unflatten(tree, [x.reshape(leaf.shape) for x, leaf in zip(parts, leaves, strict=True)])
    numbers, expected = np.empty(ends[-1], np.float32), to_reference(model, *positions)
    superfluous = [name for name in checkpoint.tensors if name not in expected]
    if superfluous:
        raise _mismatch(checkpoint, f"holds {superfluous[0]}, which a {model.name} of this config does not have")
    for name, places in expected.items():
        if name not in checkpoint.tensors:
            raise _mismatch(checkpoint, f"lacks {name} {list(places.shape)}")
        found = checkpoint.tensors[name].shape
        if found != places.shape:
            raise _mismatch(checkpoint, f"has {name} {list(found)}, expected {list(places.shape)}")
        numbers[places] = checkpoint[name]
    params, constants = jax.tree.map(lambda places: numbers[places], positions)
    grid = token_grid(run.data.image_shape, model.patch_size)
    constants["position_embedding"] = sincos_position_embedding(grid, constants["position_embedding"].shape[1])
    return params, constants


def _mismatch(checkpoint: PthFile, reason: str) -> UserError:
    return UserError(
        f"--checkpoint={checkpoint.path} {reason}; set config.model (name, depth, width, mlp_dim, patch_size) and "
        "config.data to what it was trained with"
    )
