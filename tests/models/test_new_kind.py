"""A new kind of attention is one object and one row: training, analysis and checks work on it as on any other."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplest_vit.analysis import propagation
from simplest_vit.commands.signal_propagation import initial_models
from simplest_vit.config import check
from simplest_vit.errors import UserError
from simplest_vit.models import attention_kinds
from simplest_vit.training.train import train
from tests.tiny import DIGITS, tiny_config


@dataclasses.dataclass(frozen=True)
class Near(attention_kinds.AttentionKind):
    """Starts with the weights softmax(-gamma |i - j|); a trainable share of the values is added."""

    gamma_max_depth: float = 0.5

    zero_queries: ClassVar[bool] = True
    parameters: ClassVar[dict[str, float]] = {"own": 0.5}

    def check(self, grid, num_heads):
        if num_heads % 2:
            raise UserError(f"config.model.num_heads={num_heads} must be even")

    def constants(self, grid, depth, num_heads):
        place = np.arange(grid[0] * grid[1])
        return {"attention_bias": np.tile(-self.gamma_max_depth * np.abs(place[:, None] - place), (depth, 1, 1))}

    def mix(self, value, softmax_attention, num_heads, arrays):
        return arrays["own"].astype(value.dtype) * value + softmax_attention(value)

    def initial_matrix(self, constants, num_tokens):
        return super().initial_matrix(constants, num_tokens) + 0.5 * np.eye(num_tokens)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(attention_kinds.KINDS, "near", Near)


def config(**fields):
    return tiny_config(model__attention="near", model__gamma_max_depth=0.3, **fields)


def test_it_is_trained(tmp_path, data_dir, two_devices):
    run = config(steps=2, eval_every=2, checkpoint_every=2, data__dir=data_dir)
    assert train(run, str(tmp_path / "run"))["steps"] == 2


def test_it_is_analysed_by_its_own_matrix(monkeypatch):
    monkeypatch.setattr(propagation, "jacobian_spectrum", lambda *_: (np.ones(1), np.ones(1)))  # of blocks of any kind
    (model,) = initial_models(config(model__width=256, model__mlp_dim=256), DIGITS, [1])
    image = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    result = propagation.analyse("near", [model], image, jax.nn.one_hot(jnp.arange(2), 10))
    np.testing.assert_allclose(result.measured["attention_distance"][1:], 0, atol=1e-6)
    assert result.measured["kernel_error"].max() < 0.2


def test_its_checks_are_made():
    check(config())
    with pytest.raises(UserError, match=r"config.model.num_heads=1 must be even"):
        check(config(model__num_heads=1))
    with pytest.raises(UserError, match=r"config.model.attention='far' is unknown; expected .*, near$"):
        check(tiny_config(model__attention="far"))
