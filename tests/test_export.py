"""Exported models in runtimes of others, on images that only the test normalizes; and exports that are refused."""

import dataclasses
import errno
import json
import logging
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from simplest_vit import export as export_module
from simplest_vit.errors import TrainingError, UserError
from simplest_vit.export import export
from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.run import build
from simplest_vit.training.state import ModelState, RunProgress
from simplest_vit.training.workdir import lock_workdir
from tests.tiny import DIGITS, tiny_config

if "SIMPLEST_VIT_REQUIRE_TORCH" not in os.environ:
    for library in ("onnx", "onnxruntime", "safetensors", "torch"):
        pytest.importorskip(library)

import onnx
import onnxruntime
import safetensors
import torch
from torch import nn

from simplest_vit.export import onnx_lowering
from tests import torch_reference

NETWORKS = ("simplest_vit", "simple_vit", "isometric_vit", "shift_mlp")
# Two by three patches of three channels: nothing is square, so that swapped axes show.
DATA = dataclasses.replace(
    DIGITS,
    image_shape=(8, 12, 3),
    eval_resize=9,
    class_names=("eel", "cat", "dög"),
    mean=(0.2, 0.4, 0.6),
    std=(0.1, 0.3, 0.5),
)
FORMATS = ("stablehlo", "onnx", "safetensors")
IMAGES = np.random.default_rng(1).integers(0, 256, (5, *DATA.image_shape), np.uint8)
NORMALIZED = ((IMAGES / 255 - DATA.mean) / DATA.std).astype(np.float32)


@pytest.fixture(scope="module", params=NETWORKS)
def model(request):
    """A run, random weights for it, and the logits of `IMAGES`."""
    run = build(tiny_config(f"optimizer=adam,model={request.param}", model__patch_size=4), DATA)
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x.shape[-1] ** -0.5 * random.standard_normal(x.shape, np.float32), run.abstract.params
    )
    constants = jax.jit(lambda: run.initialize().constants)()
    state = ModelState(step=jnp.int32(3), params=params, constants=constants)
    return run, state, np.asarray(jax.jit(run.model(state))(NORMALIZED))


def test_other_runtimes_compute_the_logits(model, tmp_path, monkeypatch):
    run, state, expected = model
    monkeypatch.setattr(export_module, "restore_best", lambda workdir: (run, state, None))
    files = {format: tmp_path / format for format in FORMATS}
    for format, file in files.items():
        export("run", str(file), format)
    logits, metadata = {}, {}

    function = jax.export.deserialize(bytearray(files["stablehlo"].read_bytes()))
    assert {"cpu", "cuda", "tpu"} <= set(function.platforms)
    logits["stablehlo"] = function.call(IMAGES)
    metadata["stablehlo"] = json.loads((tmp_path / "stablehlo.json").read_text())

    session = onnxruntime.InferenceSession(files["onnx"])
    (images,), (output,) = session.get_inputs(), session.get_outputs()
    assert (images.shape, output.shape) == (["batch", *DATA.image_shape], ["batch", 3])
    assert "Expand" not in {node.op_type for node in onnx.load(files["onnx"]).graph.node}  # ONNX broadcasts by itself
    logits["onnx"] = session.run([output.name], {images.name: IMAGES})[0]
    metadata["onnx"] = as_values(session.get_modelmeta().custom_metadata_map)

    with safetensors.safe_open(files["safetensors"], "pt") as file:
        metadata["safetensors"] = as_values(file.metadata())
        peer = torch_model(metadata["safetensors"], {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    with torch.no_grad():
        logits["safetensors"] = peer(torch.from_numpy(NORMALIZED).permute(0, 3, 1, 2)).numpy()

    for format in FORMATS:
        np.testing.assert_allclose(logits[format], expected, rtol=1e-5, atol=1e-5, err_msg=format)
        about = metadata[format]
        assert about["class_names"] == list(DATA.class_names)
        assert (about["network"], about["image_shape"]) == (run.config.model.name, list(DATA.image_shape))
        assert ("inside" in about["preprocessing"]) == (format != "safetensors")
        assert "shorter side resized to 9 by Pillow's bilinear filter, 8 x 12 cropped" in about["preprocessing"]
        assert (about["mean"], about["std"], about["model"]["depth"]) == (list(DATA.mean), list(DATA.std), 2)


def as_values(texts):
    """What metadata of texts say: those that are lists and dicts are JSON."""
    return {name: json.loads(text) if text[0] in "[{" else text for name, text in texts.items()}


def torch_model(about, tensors):
    """The plain PyTorch model, with tensors by the paths of the JAX model."""
    settings, network = about["model"], about["network"]
    sizes = {name: settings[name] for name in ("patch_size", "depth", "width", "num_heads", "mlp_dim")}
    options = {name: settings[name] for name in ("c_val_0_target", "gamma_max_depth") if name in settings}
    if network == "isometric_vit":
        options = {"attention_bias": tensors["blocks/attention/attention_bias"]}
    elif network == "shift_mlp":  # it lacks queries and keys, which are zero, and values, which are the tokens
        share, tokens = settings["uniform_fraction"], 6
        source = nn.functional.one_hot(tensors["blocks/attention/source"].long(), tokens)
        options = {"attention_bias": ((1 - share) * source + share / tokens).log()}
    peer = torch_reference.ViT(
        "isometric_vit" if network == "shift_mlp" else network,
        image_shape=about["image_shape"],
        num_classes=len(about["class_names"]),
        **sizes,
        **options,
    )
    if network == "simplest_vit":
        assert settings["negative_slope"] == pytest.approx(peer.blocks[0].mlp.slope)

    def find(module, kind, layer):
        """A tensor of a layer; queries and keys that the network lacks are zero, values that it lacks the identity."""
        if module[-1] in ("query", "key", "value") and "/".join([*module, kind]) not in tensors:
            identity = torch.eye(settings["width"]) if kind == "kernel" else torch.ones(settings["width"])
            return identity if (module[-1], kind) == ("value", "kernel") else torch.zeros_like(identity)
        tensor = tensors["/".join([*module, kind])]
        return tensor if layer is None else tensor[layer]

    for name, parameter in peer.named_parameters():
        *module, kind = name.split(".")
        layer = int(module.pop(1)) if module[0] == "blocks" else None
        if kind == "weight":
            kind = "scale" if parameter.ndim == 1 else "kernel"
        if module[-1] == "qkv":
            value = torch.cat([find([*module[:-1], part], kind, layer) for part in ("query", "key", "value")], dim=-1)
        else:
            value = find(module, kind, layer)
        if parameter.ndim == 4:
            value = value.reshape(*parameter.shape[2:], parameter.shape[1], -1).permute(3, 2, 0, 1)
        parameter.data.copy_(value.T if parameter.ndim == 2 else value)
    return peer


@pytest.mark.parametrize("model", NETWORKS[-1:], indirect=True)
def test_a_run_is_exported_from_its_folder(model, tmp_path, monkeypatch, caplog):
    run, state, expected = model
    folder = tmp_path / "run"
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), run.abstract)
    whole = dataclasses.replace(zeros, **vars(state))
    folder.mkdir()
    with lock_workdir(folder, run.config.to_dict(), DATA), Checkpoints(folder, create=True) as checkpoints:
        checkpoints.save(whole, RunProgress(last_evaluation=3), 3)
    before = sorted(folder.rglob("*"))
    caplog.set_level(logging.INFO, "simplest_vit")
    file = tmp_path / "new/folder/model.onnx"
    export(str(folder), str(file))
    session = onnxruntime.InferenceSession(file)
    np.testing.assert_allclose(session.run(None, {"images": IMAGES})[0], expected, rtol=1e-5, atol=1e-5)
    difference = re.search(r"model.onnx: its logits differ from the model's by at most (\S+) of", caplog.text)
    assert 0 <= float(difference[1]) < 1e-5
    assert session.get_modelmeta().custom_metadata_map["step"] == "3"
    assert sorted(folder.rglob("*")) == before

    # What cannot be exported leaves nothing.
    others = sorted(tmp_path.iterdir())
    monkeypatch.setitem(onnx_lowering._ELEMENTWISE, "erf", "Tanh")
    with pytest.raises(TrainingError, match=r"differ by .*nothing was written"):
        export(str(folder), str(tmp_path / "other.onnx"), "onnx")
    monkeypatch.delitem(onnx_lowering._ELEMENTWISE, "erf")
    with pytest.raises(UserError, match="computes 'erf', which ONNX export does not support"):
        export(str(folder), str(tmp_path / "other.onnx"), "onnx")
    monkeypatch.setattr(export_module, "_MAX_BYTES", 10_000)
    with pytest.raises(UserError, match="holds at most 2 GB and the model has"):
        export(str(folder), str(tmp_path / "other.onnx"), "onnx")
    monkeypatch.undo()
    replace, calls = os.replace, []

    def fail_second(*paths):
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(UserError, match="cannot be written"):
        export(str(folder), str(tmp_path / "model.stablehlo"), "stablehlo")
    assert sorted(tmp_path.iterdir()) == others

    # A read-only disk refuses to remove even what does not exist.
    def fail(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "replace", fail)
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "unlink", fail)
        with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
            export(str(folder), str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("output", "format", "expected"),
    [
        ("new", "tflite", "^--format=tflite: the format 'tflite' is unknown; give --format, one of stablehlo, onnx,"),
        ("new.bin", None, "^--output=.*new.bin: the format 'bin' is unknown; give --format, one of stablehlo, onnx,"),
        ("", "onnx", "is a folder"),
        ("taken.json", "onnx", "exists"),
        ("taken", "stablehlo", r"taken\.json exists"),
        ("missing/new", "onnx", "run"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(tmp_path, output, format, expected):
    (tmp_path / "taken.json").touch()
    with pytest.raises(UserError, match=expected):
        export(str(tmp_path / "run"), str(tmp_path / output), format)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.json"]


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx and onnxruntime; .*simplest-vit\[export\]"):
        export("run", str(tmp_path / "new"), "onnx")


def every_primitive(images):
    """What the networks do not compute as well: images [B, 8, 12, 3] to [B, 4]."""
    x = images.astype(jnp.float32) / 64 - 2
    x = jnp.where(images.astype(jnp.int32) == 0, 0.0, x[:, ::-1, :, jnp.array([0, 2, 1])]) + jnp.flip(x, 3)
    x += x[:, :1, :1, 1:3].sum(3, keepdims=True) - x[:, 0, :5, 0][:, 2:4].sum(1)[:, None, None, None]
    tokens = x.reshape(-1, 3)
    x = jnp.concatenate([tokens, jnp.ones_like(tokens)], axis=1)[:, 1:5].reshape(-1, 8, 16, 3)
    x = jnp.concatenate([x[:, ::2, 4:], x[:, 4:, :12], jnp.ones_like(x[:, :4, :12])], axis=1)
    a, b, c = jnp.split(x, 3, axis=3)
    y = jnp.where(a > b, jax.nn.silu(a), jnp.minimum(b, c)) ** 3 + lax.rsqrt(1 + c**2) - jnp.abs(b) ** 0.5
    y += jnp.tanh(a) * jnp.sin(b) - jnp.cos(c) + jnp.log(1 + a * a) + jnp.sign(b) * jnp.sqrt(jnp.abs(c))
    y += jnp.where((a <= b) & ~(b < c) | (a == 0), 1.0, -y)
    y += jnp.where(c >= jnp.max(c, axis=2, keepdims=True), jnp.min(y, axis=2, keepdims=True), y)
    y = lax.fori_loop(0, 3, lambda i, y: y * 0.5 + y.mean(1, keepdims=True), y[..., 0])
    y = lax.scan(lambda y, w: (y * w + a[..., 0] / w, None), y, jnp.array([0.5, 2.0]), reverse=True)[0]
    y = jnp.einsum("bij,bik->bkj", y, y[:, :, :4])
    weights = jnp.linspace(-1, 1, 4)
    y = jnp.concatenate([y, y[..., :4] * weights[None, :, None] - weights[None, None] * y[..., 4:8]], axis=2)
    return jnp.einsum("kjn,bkj->bn", jnp.linspace(-1, 1, 4 * 16 * 4).reshape(4, 16, 4), y)


def first_pixel(images):
    return jnp.broadcast_to(images[:, 0, 0, :1].astype(jnp.float32), (images.shape[0], 4))


@pytest.mark.parametrize("function", [every_primitive, first_pixel])
def test_the_lowering_agrees_with_jax(function):
    content = onnx_lowering.to_onnx(function, DATA.image_shape).SerializeToString()
    actual = onnxruntime.InferenceSession(content).run(None, {"images": IMAGES})[0]
    assert actual.shape == (5, 4)
    np.testing.assert_allclose(actual, jax.jit(function)(IMAGES), rtol=1e-4)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda images: jnp.sort(images[:, :, 0, 0].astype(jnp.float32)), "computes 'sort'"),
        (lambda images: lax.scan(lambda c, x: (c + x, None), 0.0 * images[:, 0], images.swapaxes(0, 1))[0], "a 'scan'"),
    ],
)
def test_the_lowering_names_what_it_does_not_know(function, expected):
    with pytest.raises(UserError, match=f"{expected}.*--format=stablehlo"):
        onnx_lowering.to_onnx(function, DATA.image_shape)


def test_the_difference_of_logits_is_measured():
    near, far = (lambda images, x=x: np.full((len(images), 3), x) for x in (100.0, 100.0 + 4e-4))
    assert export_module._check("onnx", far, near, DATA.image_shape) == pytest.approx(4e-6, rel=1e-3)


@pytest.mark.parametrize("value", [0.1, np.nan])
def test_logits_that_differ_or_are_not_finite_are_refused(value):
    def zeros(images):
        return np.zeros((len(images), 3))

    with pytest.raises(TrainingError, match="nothing was written"):
        export_module._check("onnx", lambda images: zeros(images) + value * (len(images) == 3), zeros, DATA.image_shape)
