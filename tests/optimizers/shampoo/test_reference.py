"""The default paths, the `reference` preset and SOAP follow an independent float64 oracle."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simplest_vit.optimizers.shampoo import reference_shampoo, shampoo, shampoo_metrics, soap
from tests.optimizers.shampoo import make_trajectory, oracle

SQUARE = {"square": (8, 8)}
MATRICES = {"tall": (16, 6), "wide": (6, 9)}
RAGGED = {"ragged": (20, 13)}
CONVOLUTION = {"conv": (8, 3, 2, 2)}
STEPS = 55


def parameters_of(tx, params, noises):
    """The parameters after each step, with gradients of 0.1 of them and noise."""
    state = jax.jit(tx.init)(params)

    @jax.jit
    def step(params, state, noise):
        updates, state = tx.update({k: 0.1 * params[k] + noise[k] for k in params}, state, params)
        return optax.apply_updates(params, updates), state

    for noise in noises:
        params, state = step(params, state, noise)
        yield {k: np.asarray(v) for k, v in params.items()}


def trajectories(tx, peer, shapes, dtype):
    """The largest relative distance between the parameters of both over all steps.

    Rows and columns of the gradients have scales of their own, which differ from block to block and change with time:
    no two slots have the same statistics, and a stale preconditioner is not a fresh one.
    """
    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=shape) for k, shape in shapes.items()}
    noises = [
        {
            k: rng.normal(size=shape) * np.exp(np.sin(np.arange(np.prod(shape)) + t / 5)).reshape(shape)
            for k, shape in shapes.items()
        }
        for t in range(STEPS)
    ]
    typed = lambda tree: {k: np.asarray(v, dtype) for k, v in tree.items()}  # noqa: E731
    worst = 0.0
    for noise, ours in zip(noises, parameters_of(tx, typed(params), map(typed, noises)), strict=True):
        params = peer.step(params, {k: 0.1 * params[k] + noise[k] for k in params})
        for k in params:
            worst = max(worst, np.linalg.norm(ours[k] - params[k]) / np.linalg.norm(params[k]))
    return worst


@contextlib.contextmanager
def precision(name):
    with jax.enable_x64(name == "float64"):
        yield jnp.dtype(name)


BLOCKS = {"max_dim": 8, "merge_dims": False}
WHOLE = {"max_dim": 8192, "merge_dims": False}
# Layouts, and settings that are independent of them.
CASES = {
    "matrices": (MATRICES, WHOLE, {}),
    "blocks, rmsprop": (RAGGED, BLOCKS, {"grafting": "rmsprop", "frequency": 4, "start": 10}),
    "merged blocks, sgd": (CONVOLUTION, {"max_dim": 8, "merge_dims": True}, {"grafting": "sgd"}),
    "convolution, sums": (CONVOLUTION, WHOLE, {"b2": 1.0, "grafting": "adagrad"}),
    # Full rank before the first root: 12 entries after 25 steps.
    "vectors": (
        {"bias": (5,), "merged": (4, 3)},
        {"max_dim": 8192, "merge_dims": True},
        {"frequency": 25, "start": 25},
    ),
    "gap": (SQUARE, BLOCKS, {"frequency": 4, "start": 10}),
    "every step": (SQUARE, BLOCKS, {"frequency": 1, "start": 1}),
    "exponent, none": (SQUARE, BLOCKS, {"exponent": 3, "grafting": "none"}),
}
RUNS = [(case, "float64") for case in CASES] + [(case, "float32") for case in ("matrices", "vectors")]


@pytest.mark.parametrize(("case", "dtype"), RUNS)
def test_the_reference_preset_follows_the_oracle(case, dtype):
    shapes, layout, given = CASES[case]
    settings = {"frequency": 5, "start": 5} | given
    peer = oracle.Optimizer(
        {k: np.zeros(v) for k, v in shapes.items()},
        oracle.Shampoo,
        learning_rate=0.01,
        weight_decay=1e-2,
        even=False,
        **layout,
        **settings,
    )
    ours = {k: v for k, v in settings.items() if k in ("b2", "grafting")}
    with precision(dtype) as dtype:
        tx = reference_shampoo(
            0.01,
            max_preconditioner_dim=layout["max_dim"],
            merge_dims=layout["merge_dims"],
            precondition_frequency=settings["frequency"],
            start_preconditioning_step=settings["start"],
            exponent_override=settings.get("exponent", 0),
            preconditioner_dtype=dtype,
            mu_dtype=dtype,
            **ours,
        )
        tx = optax.chain(optax.add_decayed_weights(1e-2), tx)
        assert trajectories(tx, peer, shapes, dtype) < (1e-9 if dtype == "float64" else 1e-3)


# Stacks of 4 x 5 (8 blocks of two parameters), 6 x 6, 7 x 6 (3, of which one is shorter), 4 x 5 x 4; and vectors.
MIXED = {"a": (8, 10), "b": (4, 4, 5), "c": (3, 6, 6), "d": (20, 6), "e": (4, 5, 4), "f": (5,), "g": ()}
LAYERED = {"b": 1, "c": 1}
# Where the shapes are not the matter: one stack of 4 x 5 (8 blocks of two parameters), alone and beside a vector.
STACK = {name: MIXED[name] for name in "ab"}
FEW = STACK | {"f": MIXED["f"]}


def follow(factory, method, frequency, shapes=MIXED, *, adam, ours=(), theirs=()):
    """The distance from the oracle, with settings of either."""
    peer = oracle.Optimizer(
        {k: np.zeros(v) for k, v in shapes.items()},
        method,
        learning_rate=0.01,
        weight_decay=0.1,
        decoupled=True,
        max_dim=7,
        merge_dims=False,
        adam=adam,
        layered=LAYERED,
        frequency=frequency,
        **dict(theirs),
    )
    with precision("float64") as dtype:
        tx = factory(
            0.01,
            weight_decay=0.1,
            max_preconditioner_dim=7,
            precondition_frequency=frequency,
            stack_axes={k: LAYERED.get(k, 0) for k in shapes},
            preconditioner_dtype=dtype,
            mu_dtype=dtype,
            **dict(ours),
        )
        return trajectories(tx, peer, shapes, dtype)


FAST = {"epsilon": 1e-5, "relative": True, "stagger": True}
NUMBERS = {"b1": 0.5, "eps": 1e-3, "grafting_b2": 0.8, "grafting_eps": 0.1}
THEIR_NUMBERS = {"b1": 0.5, "epsilon": 1e-3, "grafting_b2": 0.8, "grafting_epsilon": 0.1}
# For what is decided by the lengths of two sides: of vectors there is nothing to decide.
SIDES = {"d": (18, 6), "e": (3, 4, 2), "h": (1, 6), "i": (4, 1, 5), "j": (1, 1)}


@pytest.mark.parametrize(
    ("frequency", "start", "shapes", "ours", "theirs"),
    [
        (3, 3, MIXED, {}, {}),
        (1, 1, FEW, {}, {}),
        (3, 8, FEW, NUMBERS, THEIR_NUMBERS),
        (5, 2, FEW, {}, {}),
        (11, 11, STACK, {"statistics": "kl"}, {"whiten": True}),
        (4, 4, SIDES, {"one_sided": True}, {"one_sided": True}),
        (4, 4, SIDES, {"ignored_dim": 15}, {"ignored": 15}),
    ],
    ids=["3-3", "1-1", "3-8 numbers", "5-2", "11-11 kl", "one-sided", "ignored"],
)
def test_the_default_preset_follows_the_oracle(frequency, start, shapes, ours, theirs):
    distance = follow(
        shampoo,
        oracle.Shampoo,
        frequency,
        shapes,
        adam={"b1": ours.get("b1", 0.9), "b2": ours.get("grafting_b2", 0.999), "eps": ours.get("grafting_eps", 1e-8)},
        ours={"start_preconditioning_step": start, **ours},
        theirs={**FAST, "start": start, **theirs},
    )
    assert distance < 1e-8


DECAYS = {"shampoo_beta": 0.8, "b2": 0.9, "b1": 0.8}


@pytest.mark.parametrize(
    ("frequency", "start", "basis", "shapes", "ours", "theirs"),
    [
        (1, 4, "qr", FEW, {}, {}),
        (4, 5, "qr", MIXED, {}, {}),
        (11, 11, "gram_schmidt", FEW, {}, {}),
        (4, 5, "gram_schmidt", STACK, DECAYS, {"beta": 0.8, "b2": 0.9, "b1": 0.8}),
        (4, 5, "eigh", FEW, {}, {}),
        (4, 5, "auto", FEW, {}, {}),
        (4, 5, "qr", SIDES, {"one_sided": True}, {"one_sided": True}),
        (4, 5, "qr", SIDES, {"ignored_dim": 15, "eps": 0.1}, {"ignored": 15, "eps": 0.1}),
        (1, 12, "eigh", FEW, {"stagger": False}, {"stagger": False}),
        (6, 12, "eigh", FEW, {"stagger": False}, {"stagger": False}),
    ],
    ids=[
        *("1-4-qr", "4-5-qr", "11-11-gram_schmidt", "4-5-gram_schmidt, decays", "4-5-eigh", "4-5-auto"),
        *("one-sided", "ignored, eps", "at once, 1", "at once, 6"),
    ],
)
def test_soap_follows_the_oracle(frequency, start, basis, shapes, ours, theirs):
    distance = follow(
        soap,
        oracle.Soap,
        frequency,
        shapes,
        adam={"b1": 0.95, "b2": 0.95},
        ours={"basis": basis, "start_preconditioning_step": start, **ours},
        theirs={"basis": basis, "stagger": True, "start": start, **theirs},
    )
    # From the start steps on all statistics have full rank: until then a basis is not unique.
    assert distance < 1e-7


def test_soap_without_a_refresh_is_adam_and_so_are_vectors_without_grafting():
    rng, shapes = np.random.default_rng(0), {"kernel": (8, 5), "bias": (5,)}
    noises = [{k: np.float32(rng.normal(size=shape)) for k, shape in shapes.items()} for _ in range(5)]

    def run(tx):
        *_, last = parameters_of(tx, {k: np.ones(shape, np.float32) for k, shape in shapes.items()}, noises)
        return last

    ours = run(soap(0.01, b1=0.9, b2=0.99, start_preconditioning_step=100))
    adam = run(optax.adam(0.01, 0.9, 0.99))
    for k in shapes:
        np.testing.assert_allclose(ours[k], adam[k], rtol=2e-6)
    ours = run(shampoo(0.01, b1=0.9, grafting="none", grafting_b2=0.99))
    np.testing.assert_allclose(ours["bias"], adam["bias"], rtol=2e-6)


@pytest.mark.parametrize("case", make_trajectory.CASES)
def test_the_reference_preset_follows_the_original_in_pytorch(case):
    """To 1e-5 of what was moved: the original's bias correction is float32. Blocks are full ones and a remainder."""
    start, noise = make_trajectory.initial_and_noise()
    original = np.load(make_trajectory.FIXTURE)
    with precision("float64"):
        tx = reference_shampoo(
            1e-2,
            merge_dims=False,
            precondition_frequency=5,
            start_preconditioning_step=10,
            max_preconditioner_dim=make_trajectory.CASES[case],
            preconditioner_dtype="float64",
            mu_dtype="float64",
        )
        run = enumerate(parameters_of(tx, start, noise), 1)
        recorded = [params for t, params in run if t in make_trajectory.RECORDED]
    for name in start:
        for ours, theirs in zip(recorded, original[f"{case}{name}"], strict=True):
            difference, moved = ours[name] - theirs, theirs - start[name]
            assert np.linalg.norm(difference) < 1e-5 * np.linalg.norm(moved)
        assert np.abs(difference).max() < 3e-6


@functools.cache
def unscaled():
    tx = reference_shampoo(1.0, precondition_frequency=4)
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e2, 1e4])
def test_the_reference_preset_moves_whatever_the_scale_of_gradients(scale):
    """In float32, with statistics of low rank, whose smallest eigenvalues are rounding errors of either sign."""
    params = {"kernel": jnp.zeros((24, 16))}  # one vector of 384
    tx, update = unscaled()
    state = tx.init(params)
    for t in range(9):
        updates, state = update({"kernel": scale * jax.random.normal(jax.random.key(t), (24, 16))}, state)
    assert shampoo_metrics(state)["rejected_roots"] == 0
    assert 1 < jnp.linalg.norm(updates["kernel"]) < 100  # Adam's would be about sqrt(24 x 16) = 20
