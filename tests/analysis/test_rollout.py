"""Rollout of a network with skip connections against its definition, in float64 and block by block."""

import jax
import numpy as np
from flax import nnx

from simplest_vit.analysis.rollout import attention_rollout
from tests.models import tiny


def test_each_skip_is_half_of_its_block():
    model = tiny.vit("simple_vit")
    image = jax.random.normal(jax.random.key(0), (2, 8, 12, 3))
    graphdef, state = nnx.split(model.blocks)
    x, product = model.embed(image), np.eye(6)
    for layer in range(3):
        block = nnx.merge(graphdef, jax.tree.map(lambda a, layer=layer: a[layer], state))
        matrix = np.asarray(block.attention.matrix(x), np.float64).mean(axis=1)
        product = (matrix + np.eye(6)) / 2 @ product
        x = block(x)
    rollout = attention_rollout(model, image)
    np.testing.assert_allclose(rollout, product.mean(axis=1).reshape(2, 2, 3), rtol=1e-4)
    assert np.abs(rollout - 1 / 6).max() > 1e-3
