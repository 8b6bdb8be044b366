"""Forward pass, loss and gradients against the plain PyTorch peer: recorded (always) and live (where torch is).

Parameters are perturbed: at initialization queries are zero and keys have no gradient.
"""

import os
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.models import tiny

FIXTURES = Path(__file__).parents[1] / "fixtures"
LABEL_SMOOTHING = 0.1
SHAPING = {"c_val_0_target": 0.5, "gamma_max_depth": 0.02}


def loss_and_gradients(model, params, image, targets):
    """Logits, loss and gradients by path, with the parameters given by path."""
    graphdef, own, constants = tiny.split(model)
    nested = jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(params, sep="/"))
    assert jax.tree.map(jnp.shape, nested) == jax.tree.map(jnp.shape, own)

    def loss(params):
        logits = nnx.merge(graphdef, params, constants)(image)
        labels = optax.smooth_labels(targets, LABEL_SMOOTHING)
        return optax.softmax_cross_entropy(logits, labels).mean(), logits

    (value, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(nested)
    return logits, value, flax.traverse_util.flatten_dict(gradients, sep="/")


def assert_close(actual, expected):
    """To 1e-4 of the largest entry of each array."""
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        if name == "blocks/attention/key/bias":  # softmax ignores it: its gradient is zero but for rounding
            assert max(np.abs(array).max(), np.abs(actual[name]).max()) < 1e-5 * np.abs(expected["logits"]).max()
            continue
        np.testing.assert_allclose(actual[name], array, rtol=0, atol=1e-4 * np.abs(array).max(), err_msg=name)


def create(name, **sizes):
    return tiny.vit(name, **SHAPING, **sizes)


@pytest.mark.parametrize("name", ["simplest_vit", "simple_vit"])
def test_recorded(name):
    recorded = np.load(FIXTURES / f"{name}.npz")
    params, gradients = (
        {key.removeprefix(prefix): recorded[key] for key in recorded if key.startswith(prefix)}
        for prefix in ("params/", "gradients/")
    )
    model = create(name, depth=2, width=8, mlp_dim=12)
    logits, value, actual = loss_and_gradients(model, params, recorded["image"], recorded["targets"])
    assert_close({"logits": logits, "loss": value} | actual, {k: recorded[k] for k in ("logits", "loss")} | gradients)


@pytest.mark.parametrize("name", ["simplest_vit", "isometric_vit", "simple_vit"])
def test_live(name):
    if not os.environ.get("SIMPLEST_VIT_REQUIRE_TORCH"):
        pytest.importorskip("torch", reason="torch is an optional extra; the recorded fixture is checked instead")
    import torch

    from tests import torch_reference

    torch.manual_seed(0)
    sizes = tiny.SIZES | {"depth": 4, "width": 48, "num_heads": 3, "mlp_dim": 96, "patch_size": 2}
    sizes = {field: value for field, value in sizes.items() if field not in SHAPING}
    model = create(name, **sizes)
    bias = torch.tensor(np.asarray(model.blocks.attention.attention_bias[...])) if name == "isometric_vit" else None
    options = {"simplest_vit": SHAPING, "isometric_vit": {"attention_bias": bias}, "simple_vit": {}}[name]
    peer = torch_reference.ViT(name, **sizes, **options)
    torch_reference.perturb_(peer)
    image = torch.randn(4, *sizes["image_shape"]).numpy()
    targets = torch.softmax(torch.randn(4, sizes["num_classes"]), dim=1).numpy()
    expected_logits, expected_loss, expected = torch_reference.loss_and_gradients(peer, image, targets, LABEL_SMOOTHING)
    params = torch_reference.to_flax(peer, dict(peer.named_parameters()))
    logits, value, gradients = loss_and_gradients(model, params, image, targets)
    assert all(np.abs(array).max() > 0 for array in gradients.values())
    assert_close(
        {"logits": logits, "loss": value} | gradients,
        {"logits": expected_logits, "loss": np.float32(expected_loss)} | expected,
    )
