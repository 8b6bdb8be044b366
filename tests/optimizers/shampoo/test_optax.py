"""Shampoo and SOAP within optax's wrappers, past the first refresh, against plain loops without them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from simplest_vit.optimizers.shampoo import shampoo, soap, static_args

# From step 3 on statistics have full rank: until then bases are not unique, and rounding decides.
SETTINGS = {"precondition_frequency": 2, "max_preconditioner_dim": 4, "start_preconditioning_step": 2}
METHODS = {"shampoo": shampoo, "soap": soap}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
STEPS = 6  # steps 3 to 6 are preconditioned


def parameters():
    """Three blocks of one shape in two kernels, and a vector, which is not preconditioned."""
    rng = np.random.default_rng(0)
    a, c, d = (np.float32(rng.normal(size=shape)) for shape in ((6, 4), (3, 4), (4,)))
    return {"a": a, "b": {"c": c, "d": d}}


def gradient(params, t):
    """Of an ill-conditioned quadratic, with noise of this step."""
    rng = np.random.default_rng(t)
    scale = lambda x: np.float32(1 + np.arange(x.size) % 5).reshape(x.shape)  # noqa: E731
    return jax.tree.map(lambda x: scale(x) * (x + np.float32(rng.normal(size=x.shape))), params)


def apply(params, updates):
    return jax.tree.map(lambda x, update: x + np.asarray(update), params, updates)


def loop(update, params, state, steps=STEPS, gradient=gradient):
    for t in steps if isinstance(steps, range) else range(steps):
        updates, state = update(gradient(params, t), state, params)
        params = apply(params, updates)
    return params, state


def train(tx, params=None, **given):
    params = parameters() if params is None else params
    return loop(compiled(tx), params, tx.init(params), **given)[0]


@functools.cache
def compiled(tx):
    return jax.jit(tx.update)


@functools.cache
def alone(method):
    return method(0.1, **SETTINGS)


def assert_close(a, b, rtol=2e-4, atol=2e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


@every_method
def test_what_is_tested_here_is_preconditioned(method):
    trained, diagonal = train(alone(method)), train(method(0.1, **SETTINGS | {"start_preconditioning_step": 99}))
    assert np.linalg.norm(trained["a"] - diagonal["a"]) > 1e-2
    assert_close(trained["b"]["d"], diagonal["b"]["d"])


NUMBERS = {
    "learning_rate": 0.1,
    "b1": 0.8,
    "b2": 0.9,
    "eps": 1e-3,
    "weight_decay": 0.2,
}
GRAFTING = {"grafting_b2": 0.9, "grafting_eps": 0.1}  # Shampoo's own
SOAPS = {"shampoo_beta": 0.8}  # SOAP's own


@pytest.mark.parametrize(
    ("method", "numbers"),
    [(shampoo, NUMBERS | GRAFTING), (soap, NUMBERS | {"shampoo_beta": 0.8})],
    ids=["shampoo", "soap"],
)
def test_scheduled_numbers_are_those_of_each_step(method, numbers):
    """A plain loop gives the transformation the numbers of the first steps, then those of the others.

    Axes and masks are static: else `inject_hyperparams` would call them with a count of steps, as a schedule.
    """
    half = STEPS - 2
    schedules = {name: lambda t, value=value: jnp.where(t < half, value, value / 2) for name, value in numbers.items()}
    static = SETTINGS | {
        "stack_axes": lambda params: jax.tree.map(lambda x: int(x.ndim > 1), params),
        "mask": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    }
    tx = optax.inject_hyperparams(method, static_args=static_args(method))(**schedules, **static)
    params = parameters()
    ours, state = loop(jax.jit(tx.update), params, tx.init(params))
    update = jax.jit(lambda numbers, *arguments: method(**numbers, **static).update(*arguments))
    plain, inner = params, method(**numbers, **static).init(params)
    for n, steps in ((1, range(half)), (2, range(half, STEPS))):
        given = {name: value / n for name, value in numbers.items()}
        plain, inner = loop(functools.partial(update, given), plain, inner, steps=steps)
    assert_close(ours, plain)
    for name, value in numbers.items():
        np.testing.assert_allclose(state.hyperparams[name], value / 2, rtol=1e-6)


@every_method
def test_a_scheduled_decay_of_one_sums(method):
    """As the number 1 does: no average that is divided by nothing."""
    tx = optax.inject_hyperparams(method, static_args=static_args(method))(0.1, b2=lambda t: jnp.ones(()), **SETTINGS)
    assert_close(train(tx), train(method(0.1, b2=1.0, **SETTINGS)))


@every_method
def test_scheduled_numbers_bring_no_type_of_their_own_into_the_state(method):
    """With float64 enabled they are float64, and the statistics of the default settings float32."""
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, parameters())
        tx = optax.inject_hyperparams(method, static_args=static_args(method))(0.1, **SETTINGS)
        _, state = loop(jax.jit(tx.update), params, tx.init(params), steps=2)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(state.inner_state)} == {"float32", "int32", "int8"}


@every_method
def test_scheduled_numbers_of_too_few_bits_are_refused(method):
    """By default they are as wide as the parameters: a decay of 0.999 would be 1 in bfloat16, and sum."""
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), parameters())
    inject = functools.partial(optax.inject_hyperparams, method, static_args=static_args(method))
    with pytest.raises(ValueError, match=r"b1: bfloat16 would round it, .* hyperparam_dtype=jnp.float32"):
        inject()(0.1, **SETTINGS).init(params)
    tx = inject(hyperparam_dtype=jnp.float32)(0.1, **SETTINGS)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    plain, _ = alone(method).update(params, alone(method).init(params), params)
    assert_close(jax.tree.map(np.float32, updates), jax.tree.map(np.float32, plain), rtol=1e-2)


@every_method
def test_multi_transform_is_the_method_alone(method):
    """What others do to other parameters changes nothing; each is an `optax.masked` of its own."""
    tx = alone(method)
    params = parameters()
    of_b = lambda b, t: gradient(params | {"b": b}, t)["b"]  # noqa: E731
    trained = train(optax.multi_transform({"ours": tx, "sgd": optax.sgd(0.01)}, {"a": "sgd", "b": "ours"}))
    assert_close(trained["b"], train(tx, params["b"], gradient=of_b))
    by_sgd = params["a"]
    for t in range(STEPS):
        by_sgd = by_sgd - 0.01 * gradient(params | {"a": by_sgd}, t)["a"]
    assert_close(trained["a"], by_sgd)


@every_method
def test_multi_steps_take_steps_with_means(method):
    tx, k = alone(method), 2
    wrapped = optax.MultiSteps(tx, k)
    mean = lambda p, t: jax.tree.map(lambda *g: sum(g) / k, *(gradient(p, k * t + i) for i in range(k)))  # noqa: E731
    assert_close(train(wrapped, steps=k * STEPS), train(tx, gradient=mean))


@every_method
def test_apply_if_finite_skips_bad_steps_alone(method):
    tx = alone(method)
    bad = {3, 5}
    good = [t for t in range(STEPS + len(bad)) if t not in bad]
    spoil = lambda p, t: jax.tree.map(lambda g: g * np.float32(np.nan if t in bad else 1), gradient(p, t))  # noqa: E731
    trained = train(optax.apply_if_finite(tx, 3), steps=STEPS + len(bad), gradient=spoil)
    assert_close(trained, train(tx, gradient=lambda p, t: gradient(p, good[t])))


@every_method
def test_schedule_free_is_its_formula(method):
    """z <- z + step(gradient at y), x <- the mean of all z so far, y <- 0.9 x + 0.1 z, at a constant rate."""
    tx = alone(method)
    wrapped = optax.contrib.schedule_free(tx, 0.1, b1=0.9)
    params = parameters()
    y, state = loop(jax.jit(wrapped.update), params, wrapped.init(params))
    evaluated = optax.contrib.schedule_free_eval_params(state, y)

    inner, update, x, z = tx.init(params), compiled(tx), params, params
    mix = lambda c, a, b: jax.tree.map(lambda a, b: (1 - c) * a + c * b, a, b)  # noqa: E731
    expected = params
    for t in range(STEPS):
        updates, inner = update(gradient(expected, t), inner, expected)
        z = apply(z, updates)
        x = mix(1 / (t + 1), x, z)
        expected = mix(0.1, x, z)
    assert_close((y, evaluated), (expected, x), rtol=1e-3, atol=1e-4)


def stacked(trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


@every_method
def test_seeds_can_be_mapped_over(method):
    tx = alone(method)
    apart = [jax.tree.map(lambda x, seed=seed: np.float32(1 + seed) * x, parameters()) for seed in range(3)]

    def gradients(params, t):
        return stacked(gradient(jax.tree.map(lambda x, seed=seed: x[seed], params), t) for seed in range(3))

    params = stacked(apart)
    together, _ = loop(jax.jit(jax.vmap(tx.update)), params, jax.jit(jax.vmap(tx.init))(params), gradient=gradients)
    assert_close(together, stacked(train(tx, params) for params in apart))


@every_method
def test_state_and_parameters_can_be_donated(method):
    tx = alone(method)
    of_start = lambda _, t: gradient(parameters(), t)  # noqa: E731

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    donating, params = jax.jit(step, donate_argnums=(0, 1)), jax.device_put(parameters())
    state = jax.jit(tx.init)(params)
    for t in range(STEPS):
        old = jax.tree.leaves((params, state))
        params, state = donating(params, state, of_start(params, t))
        assert all(leaf.is_deleted() for leaf in old if leaf.size > 2)  # but for the layout's version
    assert_close(params, train(tx, gradient=of_start))


@every_method
@pytest.mark.parametrize("map_params", [optax.tree_utils.tree_map_params, optax.tree.map_params])
def test_parameters_in_the_state_can_be_mapped(method, map_params):
    """Momentum and second moment of what is not preconditioned have the parameters' tree, the stacks have none."""
    tx = alone(method)
    params = parameters()
    _, state = loop(compiled(tx), params, tx.init(params))
    doubled = map_params(tx, lambda x: 2 * x, state)
    for moment in ("mu", "nu"):
        before, after = (getattr(s[0], moment)["b"]["d"] for s in (state, doubled))
        np.testing.assert_array_equal(after, 2 * before)
    assert_close(doubled[0].stacks, state[0].stacks, 0, 0)
    # With the parameters beside it, where those of stacks are masked, as for `optax.masked`.
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    known = jax.tree.map(lambda x: x.size, params)
    sizes = map_params(tx, lambda x, size: x if is_masked(x) else size, state, known, is_leaf=is_masked)
    assert jax.tree.leaves(sizes[0].mu) == [4]


@every_method
def test_the_users_precision_is_respected_unless_one_is_given(method):
    """Of the products that make and apply preconditioners; 'highest' is that of roots and bases."""

    def precisions(**given):
        tx, params = method(0.1, **SETTINGS, **given), parameters()
        with jax.default_matmul_precision("high"):
            text = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
        return {kind for kind in ("HIGHEST", "HIGH", "DEFAULT") if f"Precision.{kind}," in text}

    assert precisions() == {"HIGHEST", "HIGH"}
    assert precisions(precision="default") == {"HIGHEST", "DEFAULT"}
    assert precisions(precision="highest") == {"HIGHEST"}
