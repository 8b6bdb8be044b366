"""Reads the `model_state_dict` of a PyTorch checkpoint without PyTorch, and without running anything that is in it.

A `.pth` file (torch.save since 1.6) is a zip archive: a pickle, `data.pkl`, and the bytes of each tensor's storage. A
pickle can call any function, so this one is read by an unpickler that knows tensors and plain containers. Classes it
does not know, such as those of an optimizer's state, become objects that do nothing; the standard library's functions
are refused.
"""

import collections
import dataclasses
import pathlib
import pickle
import sys
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from simplest_vit.errors import UserError

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
_CONTAINERS = {
    t.__name__: t for t in (bool, bytearray, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)
}
# Modules of the standard library whose classes occur in harmless checkpoints; they become inert, too.
_INERT = ("_codecs", "argparse", "collections", "copyreg", "datetime", "enum", "functools", "pathlib")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor whose bytes have not been read: a view of a storage, sizes in elements."""

    dtype: np.dtype
    key: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Inert:
    """Stands for an object of an unknown class: takes what a pickle does to an object, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        del args, kwargs

    def _ignore(self, *args: Any) -> None:
        del args

    __setstate__ = __setitem__ = append = extend = update = add = _ignore


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return np.dtype(_DTYPES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *rest: data
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module in ("builtins", "__builtin__") and name in _CONTAINERS:
            return _CONTAINERS[name]
        top = module.split(".")[0]
        if top in (*sys.stdlib_module_names, "__builtin__") and top not in _INERT:
            raise _Refused(f"{module}.{name}")
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and isinstance(pid[1], np.dtype)):
            return None
        return pid[1], str(pid[2])


class _Refused(pickle.UnpicklingError):
    """The pickle wants to call something that has no place in a checkpoint."""


def _tensor(storage: Any, offset: int, shape: tuple, strides: tuple, *rest: Any) -> Tensor | None:
    del rest
    if storage is None:
        return None
    dtype, key = storage
    return Tensor(dtype, key, int(offset), tuple(shape), tuple(strides))


class Checkpoint:
    """A `.pth` file opened for reading: names and shapes at once, the numbers of a tensor when it is asked for."""

    def __init__(self, path: str | pathlib.Path):
        """Read the names.

        Raises:
          UserError: If the file is missing, no checkpoint, holds code, or has no `model_state_dict`.
        """
        self.path = pathlib.Path(path)
        try:
            self._archive = zipfile.ZipFile(self.path)
        except zipfile.BadZipFile as error:
            raise self._error(f"is no checkpoint of torch.save ({error})") from error
        except OSError as error:
            raise self._error(f"cannot be read ({error.strerror})") from error
        pickles = [name for name in self._archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise self._error("is a zip archive, but no checkpoint of torch.save (it has no data.pkl)")
        self._root = pickles[0].removesuffix("data.pkl")
        try:
            with self._archive.open(pickles[0]) as file:
                content = _Unpickler(file).load()
        except _Refused as error:
            raise self._error(f"is refused: it wants to run {error}, which no checkpoint needs") from error
        except Exception as error:  # a damaged pickle may raise anything
            raise self._error(f"is damaged ({type(error).__name__}: {error})".splitlines()[0]) from error
        state = content.get("model_state_dict") if isinstance(content, dict) else None
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise self._error("has no model_state_dict")
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        # torch.compile puts this before every name.
        self.tensors: dict[str, Tensor] = {name.removeprefix("_orig_mod."): t for name, t in tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """The numbers of a tensor, in its dtype and shape.

        Raises:
          UserError: If they are not in the file.
        """
        tensor = self.tensors[name]
        try:
            data = np.frombuffer(self._archive.read(f"{self._root}data/{tensor.key}"), tensor.dtype)
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            raise self._error(f"is damaged: the numbers of {name} cannot be read") from error
        last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=False))
        sizes = (*tensor.shape, *tensor.strides, tensor.offset, len(tensor.strides) - len(tensor.shape))
        if min(sizes) < 0 or (0 not in tensor.shape and last >= len(data)):
            raise self._error(f"is damaged: {name} reaches beyond its storage")
        strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(data[tensor.offset :], tensor.shape, strides).copy()

    def _error(self, reason: str) -> UserError:
        return UserError(f"--checkpoint={self.path} {reason}; expected a .pth file of the PyTorch reference")
