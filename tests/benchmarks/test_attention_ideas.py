"""Ideas for attention: what each starts as, and that queries get through where they should."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_ideas import IDEAS
from simplest_vit.models import attention_kinds, shift
from simplest_vit.training.run import build
from tests.tiny import DIGITS, tiny_config

GRID, DEPTH, HEADS, FRACTION = (4, 4), 4, 4, 0.1


@pytest.fixture(scope="module")
def shifts():
    """The matrices of shift attention, float64 [L, H, T, T]."""
    source = shift.sources(shift.head_offsets(HEADS, GRID, DEPTH), GRID)
    return shift.attention_matrices(source, FRACTION)


def model(kind, monkeypatch):
    monkeypatch.setitem(attention_kinds.KINDS, kind, IDEAS[kind])
    heads = HEADS // 4 if "four_shifts" in kind else HEADS
    fields = {"attention": kind, "patch_size": 2, "depth": DEPTH, "num_heads": heads, "uniform_fraction": FRACTION}
    run = build(tiny_config(model__name="isometric_vit", **{f"model__{k}": v for k, v in fields.items()}), DIGITS)
    return run, run.create_state()


@pytest.mark.parametrize("kind", IDEAS)
def test_the_first_attention_is_that_of_shifts_or_uniform_in_free_heads(kind, monkeypatch, shifts):
    expected = shifts.copy()
    free = {"shift_free_head": 1, "shift_two_free_heads": 2}.get(kind, 0)
    expected[:, :free] = 1 / 16
    run, state = model(kind, monkeypatch)
    vit = run.model(state)
    if kind == "shift_random_queries":
        assert vit.initial_attention() is None
        return
    np.testing.assert_allclose(vit.initial_attention(), expected, atol=1e-12)
    # And so do the blocks themselves: each is applied to the identity as values.
    x = jax.random.normal(jax.random.key(0), (1, 16, run.config.model.width))
    for layer, block in enumerate(expected):
        attention = jax.tree.map(lambda leaf, layer=layer: leaf[layer], vit.blocks.attention)
        np.testing.assert_allclose(attention.matrix(x)[0], block, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "moves"),
    [
        ("shift_late", [False, False, True, True]),
        ("shift_beside_softmax", [False] * 4),
        ("four_shifts_beside_softmax", [False] * 4),
        ("shift_free_head", [True] * 4),
    ],
)
def test_queries_or_their_gate_have_a_gradient_where_there_is_attention(kind, moves, monkeypatch):
    run, state = model(kind, monkeypatch)
    image = jax.random.normal(jax.random.key(1), (2, *DIGITS.image_shape))
    gradient = jax.grad(lambda params: jnp.sum(run.model(dataclasses.replace(state, params=params))(image) ** 2))(
        state.params
    )
    attention = gradient["blocks"]["attention"]
    assert [bool(np.any(block)) for block in attention["query"]["kernel"]] == moves
    if "beside" in kind:
        assert np.all(np.abs(attention["beta"]) > 0)
