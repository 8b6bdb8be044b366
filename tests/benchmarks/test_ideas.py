"""Ideas: what each kind of attention starts as, that queries get through where they should, and optimizers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.ideas import KINDS, adam_by_shape, soap_near_isometry
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
    monkeypatch.setitem(attention_kinds.KINDS, kind, KINDS[kind])
    heads = HEADS // 4 if "four_shifts" in kind else HEADS
    fields = {"attention": kind, "patch_size": 2, "depth": DEPTH, "num_heads": heads, "uniform_fraction": FRACTION}
    run = build(tiny_config(model__name="isometric_vit", **{f"model__{k}": v for k, v in fields.items()}), DIGITS)
    return run, run.create_state()


@pytest.mark.parametrize("kind", KINDS)
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
        ("shift_last_quarter", [False, False, False, True]),
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


def test_without_values_a_block_moves_its_tokens(monkeypatch, shifts):
    run, state = model("shift_without_values", monkeypatch)
    assert "value" not in state.params["blocks"]["attention"]
    x = np.asarray(jax.random.normal(jax.random.key(0), (1, 16, run.config.model.width)))
    heads = x.reshape(16, HEADS, -1)
    expected = np.einsum("hts,shd->thd", shifts[1], heads).reshape(x.shape)
    attention = jax.tree.map(lambda leaf: leaf[1], run.model(state).blocks.attention)
    np.testing.assert_allclose(attention(jnp.asarray(x)), expected, atol=1e-5)


def kernels(rng):
    """Kernels by path: two stacked blocks, embedding and a bias."""
    shapes = {"value": (2, 6, 6), "dense1": (2, 6, 16), "dense2": (2, 16, 6)}
    blocks = {
        name: {"kernel": rng.normal(size=shape), "bias": rng.normal(size=shape[::2])} for name, shape in shapes.items()
    }
    return jax.tree.map(jnp.asarray, {"blocks": blocks, "patch_embedding": {"kernel": rng.normal(size=(5, 6))}})


def test_a_pull_moves_every_singular_value_towards_one():
    rng = np.random.default_rng(0)
    params, gradient, pull, rate = kernels(rng), kernels(rng), 0.5, lambda step: 0.1 * (step + 1)
    optimizers = [soap_near_isometry(rate, strength) for strength in (0.0, pull)]
    states = [tx.init(params) for tx in optimizers]
    for step in range(2):  # the rate is that of the step
        (plain, pulled), states = zip(
            *(tx.update(gradient, state, params) for tx, state in zip(optimizers, states, strict=True)), strict=True
        )
        moved = jax.tree.map(lambda a, b: np.asarray(b, np.float64) - a, plain, pulled)
        for (path, found), kernel in zip(
            jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(params), strict=True
        ):
            name = jax.tree_util.keystr(path)
            expected = np.zeros(found.shape)
            if "kernel" in name and "blocks" in name:
                halves = 1 if "value" in name else 2
                axis = 1 if "dense2" in name else 2
                parts = []
                for half in np.split(np.asarray(kernel, np.float64), halves, axis):
                    u, s, v = np.linalg.svd(half, full_matrices=False)
                    parts.append(-pull * rate(step) * (u * (s**3 - s)[:, None]) @ v)
                expected = np.concatenate(parts, axis)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4, err_msg=name)


def test_adam_by_shape_multiplies_the_updates_of_kernels():
    params = kernels(np.random.default_rng(1))
    found, plain = (tx.update(params, tx.init(params))[0] for tx in (adam_by_shape(0.1, 0.9), optax.adam(0.1, b2=0.9)))
    ratio = jax.tree.map(lambda a, b: float(jnp.mean(a / b)), found, plain)
    blocks = ratio["blocks"]
    assert blocks["dense1"]["kernel"] == pytest.approx(64 / 96**0.5, rel=1e-5)
    assert blocks["value"]["kernel"] == pytest.approx(64 / 6, rel=1e-5)
    assert ratio["patch_embedding"]["kernel"] == pytest.approx(64 / 30**0.5, rel=1e-5)
    assert blocks["dense1"]["bias"] == pytest.approx(1)
