"""What holds whatever the numbers: turns, robustness, layouts and bad input."""

import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType

from simplest_vit.optimizers.shampoo import (
    reference_shampoo,
    scale_by_shampoo,
    scale_by_soap,
    shampoo,
    shampoo_metrics,
    shampoo_plan,
    soap,
    soap_plan,
    view_as,
)
from simplest_vit.optimizers.shampoo.axes import AxisState, update_if_valid

shampoo_module, soap_module = (
    importlib.import_module(f"simplest_vit.optimizers.shampoo.{name}") for name in ("shampoo", "soap")
)
METHODS = {"shampoo": scale_by_shampoo, "soap": scale_by_soap}
every_method = pytest.mark.parametrize("method", METHODS)


PARAMS = {"kernel": np.ones((6, 4), np.float32), "other": np.ones((4, 4), np.float32), "bias": np.ones(4, np.float32)}


@functools.cache  # so that tests of the same settings compile one program
def scale(method, **settings):
    return METHODS[method](**settings)


def normal(seed, tree):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), tree)


def run(tx, params, steps, gradients=normal, state=None):
    state = jax.jit(tx.init)(params) if state is None else state
    update, history = jax.jit(tx.update), []
    for seed in range(steps):
        updates, state = update(gradients(seed, params), state)
        history.append(updates)
    return history, state


def assert_same(a, b, rtol=1e-5, atol=1e-6):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


@every_method
def test_as_many_slots_take_their_turn_in_every_step(method):
    """Five blocks: by the end of each period every one of them was recomputed once; of SOAP all in the first period."""
    params, changed, frequency = {"kernel": np.zeros((5, 4, 4), np.float32)}, [], 3
    tx = scale(method, stack_axes=1, precondition_frequency=frequency)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for seed in range(3 * frequency):
        before = state.stacks[0].axes[0].preconditioner
        _, state = update(normal(seed, params), state)
        after = state.stacks[0].axes[0].preconditioner
        changed.append(set(np.flatnonzero(np.any(np.asarray(before != after), axis=(1, 2)))))
    for step, slots in enumerate(changed):
        due = {slot for slot in range(5) if slot % frequency == step % frequency}
        assert slots == (set(range(5)) if method == "soap" and step < frequency else due)


@every_method
def test_few_blocks_of_many_shapes_are_refreshed_together(method):
    """An MLP of 784-256-128-10 in turns of 10 would recompute 5 of its 8 matrices in each step."""
    shapes = {"a": (10, 8), "b": (8, 6), "c": (6, 2)}
    params = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    plan = (soap_plan if method == "soap" else shampoo_plan)(params, precondition_frequency=4)
    assert not plan.is_staggered
    assert plan.step_cubes == plan.refresh_cubes // 4
    tx = scale(method, precondition_frequency=4)
    state, update = jax.jit(tx.init)(params), jax.jit(tx.update)
    for step in range(1, 10):
        before = [stack.axes[0].preconditioner for stack in state.stacks]
        _, state = update(normal(step, params), state)
        changed = [np.any(old != new.axes[0].preconditioner) for old, new in zip(before, state.stacks, strict=True)]
        assert changed == [step in (4, 8) or (method == "soap" and step < 4)] * 3


@pytest.mark.parametrize("stagger", [True, False])
def test_every_block_has_a_root_before_the_first_preconditioned_step(stagger):
    """Also if the start step is not a multiple of the frequency."""
    tx = scale("shampoo", precondition_frequency=4, start_preconditioning_step=6, stagger=stagger)
    params = {"kernel": PARAMS["kernel"]}
    _, state = run(tx, params, 6)
    for axis in state.stacks[0].axes:
        assert np.linalg.norm(axis.preconditioner[0] - np.eye(len(axis.preconditioner[0]))) > 0.1


def test_strict_promotion_of_types_is_possible():
    with jax.numpy_dtype_promotion("strict"):
        for method in METHODS:
            run(scale(method, precondition_frequency=2), PARAMS, 1)


def test_turns_are_taken_without_a_branch():
    """The program of a step has no condition, and no loop whose length is not known; SOAP's has one such loop."""
    params = {"kernel": jnp.zeros((12, 12)), "bias": jnp.zeros(3)}
    unknown = {}
    for method in METHODS:
        tx = scale(method, precondition_frequency=3, max_preconditioner_dim=4)
        text = jax.jit(tx.update).lower(params, tx.init(params), params).compile().as_text()
        loops = [line for line in text.splitlines() if re.search(r" while\(", line)]
        assert " conditional(" not in text
        unknown[method] = sum("known_trip_count" not in line for line in loops)
    assert unknown == {"shampoo": 0, "soap": 1}


def test_the_method_is_chosen_for_the_platform_that_the_program_is_for():
    tx = scale("shampoo", precondition_frequency=3)
    params = {"kernel": jnp.zeros((8, 8))}
    traced = jax.jit(tx.update).trace(params, tx.init(params))
    assert "syevd" in traced.lower(lowering_platforms=("cpu",)).as_text()
    for method in METHODS:
        tx = scale(method, precondition_frequency=3)
        traced = jax.jit(tx.update).trace(params, tx.init(params))
        for_gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "custom_call" not in re.sub(r"custom_call @(Sharding|annotate_device_placement)", "", for_gpu)


def statistics_of(state, shape):
    """Both of the only block of this shape."""
    (stack,) = [stack for stack in state.stacks if stack.mu.shape[1:] == shape]
    return [axis.statistics for axis in stack.axes]


@every_method
@pytest.mark.parametrize("bad", [1e30, jnp.nan])
def test_a_bad_gradient_does_not_enter_the_state(method, bad):
    tx = scale(method, precondition_frequency=1)
    _, state = run(tx, PARAMS, 2)
    grads = jax.tree.map(np.array, PARAMS)
    grads["kernel"][1, 2] = bad
    updates, after = jax.jit(tx.update)(grads, state)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((updates, after)))
    assert_same(statistics_of(after, (6, 4)), statistics_of(state, (6, 4)), 0, 0)
    assert not np.array_equal(statistics_of(after, (4, 4))[0], statistics_of(state, (4, 4))[0])


def test_a_gradient_that_overflows_only_when_whitened_does_not_enter_the_statistics():
    """After small ones: KL-Shampoo multiplies it by a root of 1e6 before it is squared."""
    params = {"kernel": np.ones((4, 4), np.float32)}
    tx = scale("shampoo", precondition_frequency=1, statistics="kl")
    small = lambda seed, tree: jax.tree.map(lambda x: np.float32(1e-6) * x, normal(seed, tree))  # noqa: E731
    _, state = run(tx, params, 3, small)
    huge = {"kernel": np.float32(5e18) * normal(3, params)["kernel"]}
    assert np.all(np.isfinite(np.square(huge["kernel"])))
    _, after = jax.jit(tx.update)(huge, state)
    assert_same(statistics_of(after, (4, 4)), statistics_of(state, (4, 4)), 0, 0)


@every_method
@pytest.mark.parametrize("is_missing", [True, False], ids=["missing", "one square overflows"])
def test_a_bad_gradient_leaves_statistics_and_moments_as_they_are(method, is_missing):
    params = {"kernel": np.ones((6, 4), np.float32), "bias": np.ones(4, np.float32), "other": np.ones(3, np.float32)}
    # Two steps before the first basis, with which SOAP's moments would turn.
    tx = scale(method, precondition_frequency=1, start_preconditioning_step=9)
    _, state = run(tx, params, 2)
    given = {name: None if is_missing else np.array(x) for name, x in params.items()} | {"other": params["other"]}
    if not is_missing:
        given["kernel"][1, 2], given["bias"][:] = 1e30, np.inf
    updates, after = jax.jit(tx.update)(given, state, params)
    assert not is_missing or (updates["kernel"], updates["bias"]) == (None, None)
    kept = [
        (s.stacks[0].mu, s.stacks[0].nu, statistics_of(s, (6, 4)), s.mu["bias"], s.nu["bias"]) for s in (state, after)
    ]
    assert_same(*kept, 0, 0)
    assert not np.array_equal(after.mu["other"], state.mu["other"])


@pytest.mark.parametrize(("new", "error"), [(jnp.inf, 0.0), (jnp.nan, 0.0), (1.0, jnp.inf), (1.0, jnp.nan)])
def test_what_is_not_finite_is_rejected_whatever_the_limit_is(new, error):
    eye = jnp.eye(2)[None]
    old = AxisState(eye, eye, jnp.zeros(1), jnp.zeros(1, jnp.int32))
    after = update_if_valid(old, eye.at[0, 1, 1].set(2 * new), jnp.array([error]), np.inf)
    np.testing.assert_array_equal(after.preconditioner, eye)
    assert after.rejections == 1
    assert update_if_valid(old, 2 * eye, jnp.array([1e9]), np.inf).rejections == 0
    assert update_if_valid(old, 2 * eye, jnp.array([1e9]), 0.1, counts=False).rejections == 0


def test_the_worst_residual_is_that_of_all_stacks():
    axes = [AxisState(None, None, jnp.array(errors), jnp.array([1, 0])) for errors in ([1.0, 2.0], [4.0, 3.0])]
    for order in (axes, axes[::-1]):
        assert shampoo_metrics({"nested": order}) == {"worst_residual": 4, "rejected_roots": 2}


@every_method
def test_a_rejected_preconditioner_keeps_the_old_one_and_is_counted(method, monkeypatch):
    module = {"shampoo": shampoo_module, "soap": soap_module}[method]
    monkeypatch.setattr(module, "MOST_ERROR", 1e-12)
    params = {"kernel": np.ones((6, 4), np.float32)}
    later = {"start_preconditioning_step": 2} if method == "soap" else {}  # what SOAP computes before is not used
    tx = METHODS[method](precondition_frequency=1, **later)  # its own program, because the limit is compiled in
    history, state = run(optax.chain(optax.clip(1.0), tx), params, 3)
    metrics = jax.jit(shampoo_metrics)(state)
    assert metrics["rejected_roots"] == {"shampoo": 6, "soap": 4}[method]
    assert 0 < metrics["worst_residual"] < 1e-2
    np.testing.assert_array_equal(state[1].stacks[0].axes[0].preconditioner[0], np.eye(6))
    assert np.linalg.norm(history[-1]["kernel"]) > 1  # the step of the diagonal method's size, not zero
    assert shampoo_metrics(optax.adam(1e-3).init(params)) == {}


def test_view_is_the_transformation_in_that_layout():
    """Unstacked, transposed and fused, as in PyTorch."""
    params = {name: np.zeros((2, 4, 4), np.float32) for name in ("query", "key", "value")}
    params["head"] = np.zeros((4, 3), np.float32)

    def view(tree):
        fused = [jnp.concatenate([tree[k][i].T for k in ("query", "key", "value")]) for i in range(2)]
        return {"layers": fused, "head": tree["head"].T}

    tx = reference_shampoo(-1.0, precondition_frequency=2, max_preconditioner_dim=6)
    history, _ = run(view_as(view, tx), params, 4)
    direct, _ = run(tx, view(params), 4, lambda seed, _: view(normal(seed, params)))
    assert_same([view(updates) for updates in history], direct)
    with pytest.raises(ValueError, match=r"view: it has 12 entries: it must have the 108"):
        view_as(lambda tree: tree["head"], shampoo(0.1)).init(params)
    twice = lambda tree: tree | {"value": tree["key"]}  # noqa: E731
    for other in (twice, lambda tree: jax.tree.map(lambda x: 2 * x, tree)):
        with pytest.raises(ValueError, match=r"view: it must have each entry of the parameters once, unchanged"):
            jax.eval_shape(view_as(other, shampoo(0.1)).init, params)


def test_a_view_passes_further_arguments_on():
    tx = view_as(lambda tree: {"x": tree["x"].T}, optax.chain(shampoo(0.1), optax.scale_by_polyak()))
    params = {"x": np.ones((3, 2), np.float32)}
    updates, _ = jax.jit(tx.update)(params, jax.jit(tx.init)(params), params, value=0.0)
    np.testing.assert_array_equal(updates["x"], np.zeros((3, 2)))  # Polyak's step at the optimal value


@pytest.mark.parametrize("alias", [shampoo, soap])
def test_nnx_state_and_types(alias):
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    tx = alias(0.1, mu_dtype="bfloat16", precondition_frequency=2)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    history, state = run(tx, half, 3)
    assert jax.tree.structure(history[0]) == jax.tree.structure(params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(history[-1])} == {"bfloat16"}
    assert {stack.mu.dtype.name for stack in state[0].stacks} == {"bfloat16"}
    assert all(np.all(np.isfinite(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(history))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"b1": 1.0}, r"b1=1.0: it must be in \[0, 1\)"),
        ({"b2": 0.0}, r"b2=0.0: it must be in \(0, 1\]"),
        ({"grafting_b2": 1.0}, r"grafting_b2=1.0: it must be in \(0, 1\)"),
        ({"eps": 0.0}, r"eps=0.0: it must be finite and > 0"),
        ({"eps": -1e-3}, r"eps=-0.001: it must be finite and > 0"),
        ({"eps": 1e-7}, r"eps=1e-07: it must be at least 1e-06 if relative_eps is True: float32 cannot resolve"),
        ({"grafting_eps": 0.0}, r"grafting_eps=0.0: it must be finite and > 0"),
        ({"precondition_frequency": 0}, r"precondition_frequency=0: it must be an integer >= 1"),
        ({"precondition_frequency": 2.5}, r"precondition_frequency=2.5: it must be an integer >= 1"),
        ({"start_preconditioning_step": -1}, r"start_preconditioning_step=-1: it must be an integer >= 0"),
        ({"max_preconditioner_dim": 0}, r"max_preconditioner_dim=0: it must be an integer >= 1"),
        ({"exponent_override": -1}, r"exponent_override=-1: it must be an integer >= 0"),
        ({"ignored_dim": 0}, r"ignored_dim=0: it must be an integer >= 1"),
        ({"one_sided": 1}, r"one_sided=1: it must be True or False"),
        ({"statistics": "l1"}, r"statistics='l1': it must be one of \('shampoo', 'kl'\)"),
        ({"precision": "low"}, r"precision='low': it must be one of"),
        ({"grafting": "lion"}, r"grafting='lion': it must be one of \('none', 'sgd'"),
        ({"root": "svd"}, r"root='svd': it must be one of \('auto', 'eigh', 'newton'\)"),
        ({"root": "newton", "relative_eps": False}, r"root='newton': it must be 'eigh' or 'auto'"),
        ({"preconditioner_dtype": "int32"}, r"preconditioner_dtype='int32': it must be one of"),
        ({"mu_dtype": "nonsense"}, r"mu_dtype='nonsense': it must be one of"),
        ({"mu_dtype": None}, r"mu_dtype=None: it must be one of"),
        ({"mu_dtype": "float16"}, r"mu_dtype='float16': it must be one of"),
        ({"statistics": "kl", "exponent_override": 4}, r"exponent_override=4: it must be 0 with KL"),
        ({"b1": np.True_}, r"b1=np.True_: it must be in \[0, 1\)"),
    ],
)
def test_bad_settings_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        shampoo(0.1, **setting)


@pytest.mark.parametrize("setting", [{"b1": -0.1}, {"eps": 0.0}, {"basis": "svd"}, {"shampoo_beta": 0.0}])
def test_bad_settings_of_soap_are_named(setting):
    with pytest.raises(ValueError, match=rf"^{next(iter(setting))}="):
        soap(0.1, **setting)


def test_numpy_numbers_are_numbers():
    """And bring no type of their own into the state."""
    params = {"kernel": np.ones((4, 4), np.float32), "bias": np.ones(4, np.float32)}
    given = {"b1": np.float64(0.5), "b2": np.float32(0.5), "eps": np.float64(1e-3), "grafting_b2": np.float64(0.5)}
    counts = {"precondition_frequency": 2, "start_preconditioning_step": 2, "max_preconditioner_dim": 3}
    expected, _ = run(scale("shampoo", **{k: float(v) for k, v in given.items()}, **counts), params, 3)
    tx = scale("shampoo", **given, **{k: np.int64(v) for k, v in counts.items()})
    with jax.enable_x64(True):
        history, state = run(tx, params, 3)
    assert_same(history, expected)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32", "int8"}


def test_python_numbers_can_be_parameters():
    tx, params = shampoo(0.1), {"x": 1.0}
    updates, _ = tx.update({"x": 2.0}, tx.init(params), params)
    np.testing.assert_allclose(updates["x"], -0.1, rtol=1e-6)  # Adam's first step


def test_bad_parameters_are_named():
    tx = shampoo(0.1)
    for dtype in ("int32", "complex64"):
        with pytest.raises(ValueError, match=rf"a/kernel: its dtype is {dtype}: it must be a real"):
            tx.init({"a": {"kernel": jnp.zeros((2, 2), dtype)}})
    with pytest.raises(ValueError, match=r"kernel: stack_axes=3: it must be in 0..2"):
        shampoo(0.1, stack_axes=3).init({"kernel": jnp.zeros((2, 2))})
    for name in ("preconditioner_dtype", "mu_dtype"):
        with pytest.raises(ValueError, match=rf"{name}='float64': it must be 'float32' unless"):
            shampoo(0.1, **{name: "float64"}).init({"kernel": jnp.zeros((2, 2))})
    state = tx.init({"kernel": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"state.stacks: .* or a gradient is None and `params` is not given"):
        tx.update({"kernel": None}, state)
    with pytest.raises(ValueError, match=r"^updates: their tree is not the parameters'; "):
        tx.update({"bias": jnp.zeros(2)}, state, {"kernel": jnp.zeros((2, 2))})
    with pytest.raises(ValueError, match=r"kernel: a gradient of shape \(3, 2\): it must be \(2, 2\)"):
        tx.update({"kernel": jnp.zeros((3, 2))}, state, {"kernel": jnp.zeros((2, 2))})


def test_an_unknown_setting_is_named():
    for alias in (shampoo, soap):
        with pytest.raises(TypeError, match="'shards'"):
            alias(0.1, shards=8)


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """A node whose children have the same key."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey("twin"), child) for child in self.children], None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize("make", [lambda x, y: {"a/b": x, "a": {"b": y}}, Twins], ids=["paths", "keys"])
def test_parameters_that_are_called_the_same_are_told_apart(make):
    ones = np.ones((2, 2), np.float32)
    params, grads = make(ones, ones), make(ones, -ones)
    tx = shampoo(0.1)
    updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    assert_same(updates, jax.tree.map(lambda x: -0.1 * x, grads))


@pytest.mark.parametrize("grafting", ["none", "sgd", "adam"])
def test_gradients_whose_norm_overflows_have_finite_steps(grafting):
    """Of 1e18 each: their squares are finite, and the sums of squares are not. Adam takes steps of its usual size."""
    params = {"kernel": np.zeros((48, 32), np.float32)}
    tx = scale("shampoo", grafting=grafting, precondition_frequency=2)
    history, _ = run(tx, params, 5, lambda seed, tree: {"kernel": np.float32(1e18) * normal(seed, tree)["kernel"]})
    assert all(np.all(np.isfinite(updates["kernel"])) for updates in history)
    assert np.all(np.abs(history[-1]["kernel"]).max() > 0.1)


@every_method
def test_a_bad_gradient_is_not_multiplied(method):
    """With JAX_DEBUG_NANS and without jit, where 0 x inf would be an error."""
    tx = scale(method, precondition_frequency=1)
    params = {"kernel": PARAMS["other"], "bias": PARAMS["bias"]}
    _, state = run(tx, params, 2)
    with jax.debug_nans(True):
        for bad in (None, np.inf):
            tx.update({name: bad and np.full_like(x, bad) for name, x in params.items()}, state, params)


@pytest.mark.parametrize(("method", "stagger"), [("shampoo", True), ("soap", False)])
def test_devices_may_have_gradients_of_their_own_in_shard_map(method, stagger):
    """Each steps as it would alone."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    given = {"root": "newton"} if method == "shampoo" else {"basis": "gram_schmidt"}
    tx = scale(method, precondition_frequency=2, stagger=stagger, **given)
    params = {"kernel": np.ones((6, 6), np.float32)}
    _, state = run(tx, params, 2)
    grads = [normal(10 + seed, params)["kernel"] for seed in range(2)]

    def update(grads):
        updates, _ = tx.update({"kernel": grads[0]}, state)
        return updates["kernel"][None]

    spec = jax.sharding.PartitionSpec("data")
    together = jax.jit(jax.shard_map(update, mesh=mesh, in_specs=spec, out_specs=spec))(np.stack(grads))
    for ours, grad in zip(together, grads, strict=True):
        assert_same(ours, jax.jit(tx.update)({"kernel": grad}, state)[0]["kernel"], rtol=1e-4)


@every_method
def test_a_single_side_is_the_parameter_s_shorter_one(method):
    """Also if it is cut into blocks whose other side is shorter."""
    params = {"long": jax.ShapeDtypeStruct((50, 9), jnp.float32), "near": jax.ShapeDtypeStruct((10, 8), jnp.float32)}
    plan = (soap_plan if method == "soap" else shampoo_plan)(params, one_sided=True, max_preconditioner_dim=8)
    assert (5, 8) in [stack.block_shape for stack in plan.stacks]
    assert {stack.axes for stack in plan.stacks} == {(1,)}


@every_method
def test_an_embedding_of_many_words_has_no_matrix_of_words(method):
    plan = (soap_plan if method == "soap" else shampoo_plan)(jax.ShapeDtypeStruct((50257, 16), jnp.float32))
    assert [stack.sizes for stack in plan.stacks] == [[16]]
    assert plan.state_bytes < 2.1 * 4 * 50257 * 16


@every_method
@pytest.mark.parametrize(
    ("part", "made_with"),
    [
        ("stacks", {"max_preconditioner_dim": 4}),
        ("stacks", {"one_sided": True}),
        ("stacks", {"mu_dtype": "bfloat16"}),
        ("mu", {"params": {"kernel": (8, 6), "bias": (8,)}}),
        ("mu", {"params": {"kernel": (8, 6), "a": (1,), "bias": (1,)}}),
        ("mu", {"params": {"kernel": (8, 6)}}),
    ],
)
def test_a_state_of_other_shapes_or_types_is_refused(part, method, made_with):
    made_with = dict(made_with)
    shapes = {"kernel": (8, 6), "bias": (1,)}
    others = jax.tree.map(jnp.zeros, made_with.pop("params", shapes), is_leaf=lambda node: isinstance(node, tuple))
    state = scale(method, **made_with).init(others)
    with pytest.raises(ValueError, match=rf"^state.{part}: it has .*: it must have .* other parameters"):
        scale(method).update({name: jnp.zeros(shape) for name, shape in shapes.items()}, state)


@pytest.mark.parametrize(("shape", "part"), [((8, 6), "stacks"), ((8,), "nu")])
def test_a_state_of_another_grafting_method_is_refused(shape, part):
    params = {"x": jnp.zeros(shape)}
    state = scale("shampoo", grafting="sgd").init(params)
    with pytest.raises(ValueError, match=rf"^state.{part}: it has "):
        scale("shampoo").update(params, state)


def test_a_state_of_another_method_or_version_is_refused():
    params = {"kernel": jnp.zeros((8, 8))}
    tx = scale("shampoo")
    with pytest.raises(ValueError, match=r"^state.version: its shape is \(3, 2\): it must be \(3, 1\)"):
        jax.jit(tx.update)(params, scale("soap").init(params))
    old = tx.init(params)._replace(version=jnp.zeros(1, jnp.int8))
    with pytest.raises(ValueError, match=r"^state.version: its shape is \(1,\): it must be \(3, 1\)"):
        jax.jit(tx.update)(params, old)


@every_method
def test_renaming_and_nesting_parameters_leaves_their_stacks_usable(method):
    """The program is the same."""
    tx = scale(method, precondition_frequency=2)
    params = {name: np.ones((4, 4), np.float32) for name in "ab"}
    state = tx.init(params)
    renamed = {"layers": [params["a"], params["b"]]}
    masked = jax.tree.map(lambda _: optax.MaskedNode(), renamed)
    expected = jax.make_jaxpr(tx.update)(params, state)
    assert str(jax.make_jaxpr(tx.update)(renamed, state._replace(mu=masked, nu=masked))) == str(expected)


@every_method
def test_what_only_changes_the_next_steps_may_change(method):
    params = {"kernel": jnp.ones((8, 8))}
    state = scale(method, b2=0.9).init(params)
    jax.eval_shape(scale(method, b2=0.99, precondition_frequency=3, stagger=False, b1=0.5).update, params, state)


@every_method
@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({"ignored_dim": 10}, [3, 4, 4, 6]),
        ({"one_sided": True}, [3, 4, 6]),
        ({"one_sided": True, "max_preconditioner_dim": 3}, [2, 3, 3]),
        ({"ignored_dim": 2}, [1]),
    ],
)
def test_ignored_and_single_sides(method, settings, sizes):
    """An embedding of 50 words keeps only the preconditioner of its width; a single side is a block's shorter one."""
    params = {"words": jnp.zeros((50, 4)), "kernel": jnp.zeros((3, 4)), "column": jnp.zeros((6, 1))}
    plan = (soap_plan if method == "soap" else shampoo_plan)(params, **settings)
    assert sorted(size for stack in plan.stacks for size in stack.sizes) == sizes
