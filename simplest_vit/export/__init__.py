"""Export the best checkpoint of a run to a file that other runtimes can load.

| format | what it is | loads with | images |
|---|---|---|---|
| stablehlo | a JAX function, for CPU, CUDA, ROCm and TPU; metadata in FILE.json | `jax.export.deserialize` | uint8 |
| onnx | an ONNX graph, metadata in `metadata_props` | onnxruntime and others | uint8 |
| safetensors | arrays by path and metadata, without the computation | safetensors | normalized float32 |
| pth | parameters and E-SPA's constants by the names of the PyTorch reference | the reference | normalized float32 |

The first two take images [B, H, W, C] for any B, and normalize them by the mean and standard deviation of the training
data.
"""

import contextlib
import importlib.util
import io
import json
import logging
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from simplest_vit import __version__
from simplest_vit.data.augment import normalize
from simplest_vit.data.dataset import DatasetInfo
from simplest_vit.errors import TrainingError, UserError
from simplest_vit.files import write_file
from simplest_vit.interop import PthFile, from_reference, to_reference
from simplest_vit.models import ViT, model_arguments
from simplest_vit.training.evaluate import restore_best
from simplest_vit.training.run import Run
from simplest_vit.training.state import ModelState

log = logging.getLogger("simplest_vit")

# Maps images, uint8 [B, H, W, C], to logits, float32 [B, num_classes].
Classifier = Callable[[Any], Any]
Metadata = dict[str, Any]

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
# Relative to the largest logit, or to 1.
_TOLERANCE = 1e-5
# Of protobuf (ONNX) and flatbuffers (StableHLO).
_MAX_BYTES = 2**31


def export(workdir: str, output: str, format: str | None = None) -> None:
    """Write the best checkpoint of a run to `output`, after comparing the artifact with the model on random images.

    Args:
      workdir: The run's folder; nothing else is needed.
      output: The file, which must not exist; its folder is created. For stablehlo, metadata go to a file of this name
        with `.json` appended.
      format: One of `FORMATS`; None for the suffix of `output`.

    Raises:
      UserError: If the format is unknown, needs a library that is missing, or has no such network; if the run has no
        checkpoint; or if the file exists or cannot be written.
      TrainingError: If the logits differ; nothing is then written.
    """
    path = pathlib.Path(output)
    named, format = (f"--format={format}", format) if format else (f"--output={output}", path.suffix[1:])
    if format not in FORMATS:
        raise UserError(f"{named}: the format {format!r} is unknown; give --format, one of {', '.join(FORMATS)}")
    serialize, extra, libraries = FORMATS[format]
    if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
        raise UserError(
            f'--format={format} needs {" and ".join(missing)}; install the extra: pip install "simplest-vit[{extra}]"'
        )
    paths = [path.with_name(path.name + ".json"), path] if format == "stablehlo" else [path]
    for new in paths:
        if new.is_dir():
            raise UserError(f"--output={new} is a folder; name a file")
        if new.exists():
            raise UserError(f"--output={new} exists; name another file")

    run, state, _ = restore_best(workdir)
    # Computed on a CPU, because a GPU may round the factors of float32 products.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        state = jax.tree.map(jnp.asarray, jax.device_get(state))
        model = run.model(state)
        metadata = _metadata(run, model, int(state.step), format)
        content, artifact = serialize(run, state, metadata)
        difference = _check(format, artifact, jax.jit(_classifier(model, run.data)), run.data.image_shape)
    contents = [json.dumps(metadata, indent=2).encode() + b"\n", content][-len(paths) :]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for new, part in zip(paths, contents, strict=True):
            write_file(new, part)
    except OSError as error:
        with contextlib.suppress(OSError):  # of a read-only disk
            for new in paths:
                new.unlink(missing_ok=True)
        raise UserError(f"--output={output} cannot be written ({error.strerror}); choose another place") from error
    log.info("%s: its logits differ from the model's by at most %.1e of the largest", output, difference)


def _metadata(run: Run, model: ViT, step: int, format: str) -> Metadata:
    """Describe the model, and how images are prepared for it."""
    height, width, channels = run.data.image_shape
    pixels = f"{'gray' if channels == 1 else 'RGB'} pixels 0 to 255"
    resized = f"{pixels}; shorter side resized to {run.data.eval_resize} by Pillow's bilinear filter"
    return {
        "producer": f"simplest-vit {__version__}",
        "network": run.config.model.name,
        "class_names": list(run.data.class_names),
        "image_shape": list(run.data.image_shape),
        "preprocessing": f"{resized}, {height} x {width} cropped from the centre; "
        + ("(pixels / 255 - mean) / std" if format == "safetensors" else "normalization is inside the graph"),
        "mean": list(run.data.mean),
        "std": list(run.data.std),
        "data": f"{run.data.name} {run.data.version}",
        "step": step,
        "model": model_arguments(**run.config.model, image_shape=run.data.image_shape)
        | {"negative_slope": model.blocks.mlp.negative_slope},
    }


def _classifier(model: ViT, data: DatasetInfo) -> Classifier:
    """Return the model with its normalization of images."""
    return lambda images: model(normalize(jnp.asarray(images), data.mean, data.std))


def _check(format: str, artifact: Classifier, model: Classifier, image_shape: tuple[int, ...]) -> float:
    """Compare logits on random images in batches of one and of three; a TrainingError if they differ or are not finite.

    Returns the largest difference, relative to the largest logit, or to 1.
    """
    random, errors = np.random.default_rng(0), []
    for batch in (1, 3):
        images = random.integers(0, 256, (batch, *image_shape), np.uint8)
        actual, expected = (np.asarray(classify(images)) for classify in (artifact, model))
        error = np.abs(actual - expected).max() / max(1.0, np.abs(expected).max())
        if not error <= _TOLERANCE:
            raise TrainingError(
                f"--format={format}: the logits of the exported model differ by {error:.1e} from the model's, expected "
                f"at most {_TOLERANCE:g}; nothing was written; choose another format"
            )
        errors.append(float(error))
    return max(errors)


def _check_size(model: ViT, format: str) -> None:
    size = sum(array.nbytes for array in _arrays(model).values())
    if size >= _MAX_BYTES:
        raise UserError(f"--format={format} holds at most 2 GB and the model has {size / 1e9:.1f} GB; use safetensors")


def _arrays(model: ViT) -> dict[str, np.ndarray]:
    """Return parameters and constants by path, such as `blocks/mlp/dense1/kernel` [L, D, M]."""
    flat = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep="/")
    return {name: np.asarray(array) for name, array in flat.items()}


def _as_text(metadata: Metadata) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}


def _stablehlo(run: Run, state: ModelState, metadata: Metadata) -> tuple[bytes, Classifier]:
    """Serialize as a JAX function; the metadata go to a separate file."""
    model = run.model(state)
    _check_size(model, "stablehlo")
    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, *run.data.image_shape), jnp.uint8)
    exported = jax.export.export(jax.jit(_classifier(model, run.data)), platforms=_PLATFORMS)(images)
    content = bytes(exported.serialize())
    return content, jax.export.deserialize(bytearray(content)).call


def _onnx(run: Run, state: ModelState, metadata: Metadata) -> tuple[bytes, Classifier]:
    """Serialize as an ONNX model."""
    import onnx
    import onnxruntime

    from simplest_vit.export.onnx_lowering import to_onnx

    model = run.model(state)
    _check_size(model, "onnx")
    proto = to_onnx(_classifier(model, run.data), run.data.image_shape)
    onnx.helper.set_model_props(proto, _as_text(metadata))
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda images: session.run(["logits"], {"images": images})[0]


def _safetensors(run: Run, state: ModelState, metadata: Metadata) -> tuple[bytes, Classifier]:
    """Serialize arrays alone."""
    import safetensors.numpy

    model = run.model(state)
    content = safetensors.numpy.save(_arrays(model), _as_text(metadata))
    arrays = traverse_util.unflatten_dict(safetensors.numpy.load(content), sep="/")
    loaded = nnx.merge(nnx.graphdef(model), jax.tree.map(jnp.asarray, arrays))
    return content, jax.jit(_classifier(loaded, run.data))


def _pth(run: Run, state: ModelState, metadata: Metadata) -> tuple[bytes, Classifier]:
    """Serialize as the reference does, and read that as `import_reference` does."""
    import torch

    arrays = to_reference(run.config.model, state.params, state.constants)
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    file = io.BytesIO()
    torch.save({"step": int(state.step), "model_state_dict": tensors}, file)
    loaded = from_reference(run, PthFile(file))
    model = nnx.merge(run.graphdef, *jax.tree.map(jnp.asarray, loaded))
    return file.getvalue(), jax.jit(_classifier(model, run.data))


_Serialize = Callable[[Run, ModelState, Metadata], tuple[bytes, Classifier]]
# By name: the serializer, and the extra with the libraries that it needs.
FORMATS: dict[str, tuple[_Serialize, str, tuple[str, ...]]] = {
    "stablehlo": (_stablehlo, "train", ()),
    "onnx": (_onnx, "export", ("onnx", "onnxruntime")),
    "safetensors": (_safetensors, "export", ("safetensors",)),
    "pth": (_pth, "torch", ("torch",)),
}
