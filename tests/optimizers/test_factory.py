import functools
import operator
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from simplest_vit.config import default
from simplest_vit.errors import UserError
from simplest_vit.models.reference_layout import pytorch_layout
from simplest_vit.optimizers import paths
from simplest_vit.optimizers.factory import (
    WarmupCosine,
    create_optimizer,
    declared,
    optimizers,
    settings_without_effect,
)
from simplest_vit.optimizers.shampoo import reference_shampoo
from simplest_vit.training.run import build
from tests.tiny import DIGITS, tiny_config

PARAMS = {
    "blocks": {
        "mlp": {"dense1": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}},
        "attention": {"norm": {"scale": jnp.ones((2, 3))}, "alpha": jnp.ones((2,))},
    },
    "head": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)},
}

# One for each of Muon's two parts, for programs half as large.
TWO = {"blocks": {"mlp": {"dense1": {"kernel": jnp.ones((2, 3, 4))}}}, "head": {"kernel": jnp.ones((3, 5))}}


def random_like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)


def apart(tree):
    """The tree with arrays of its own for each of two blocks."""
    blocks = {f"block{i}": jax.tree.map(operator.itemgetter(i), tree["blocks"]) for i in range(2)}
    return blocks | {"head": tree["head"]}


def leaves(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def test_only_kernels_decay():
    mask = leaves(paths.decay_mask(PARAMS))
    assert {name for name, decays in mask.items() if decays} == {"blocks/mlp/dense1/kernel", "head/kernel"}


def test_only_stacked_kernels_go_to_muon():
    numbers = leaves(paths.muon_dimension_numbers(PARAMS))
    assert {name.rsplit("/", 1)[0] for name in numbers} == {"blocks/mlp/dense1/kernel"}
    assert leaves(paths.stack_axes(PARAMS))["blocks/mlp/dense1/bias"] == 1
    assert leaves(paths.stack_axes(PARAMS))["head/kernel"] == 0


@pytest.mark.parametrize("decoupled", [False, True])
def test_adam_chain_equals_float64_numpy(decoupled):
    schedule = WarmupCosine(0.1, 2, 8)
    tx = create_optimizer("adam", schedule, grad_clip=1.0, weight_decay=0.1, decoupled_weight_decay=decoupled)
    params, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    expected = {name: np.ones(p.shape) for name, p in leaves(PARAMS).items()}
    m = {name: np.zeros(p.shape) for name, p in expected.items()}
    v = {name: np.zeros(p.shape) for name, p in expected.items()}
    for t in range(1, 6):
        gradient = random_like(PARAMS, t)
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        g = {name: np.float64(x) for name, x in leaves(gradient).items()}
        norm = np.sqrt(sum((x**2).sum() for x in g.values()))
        for name, p in expected.items():
            decay = 0.1 * p if name.endswith("kernel") else 0.0
            clipped = g[name] / max(norm, 1.0) + (0.0 if decoupled else decay)
            m[name] = 0.9 * m[name] + 0.1 * clipped
            v[name] = 0.999 * v[name] + 0.001 * clipped**2
            direction = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.999**t)) + 1e-8)
            expected[name] = p - float(schedule(t - 1)) * (direction + (decay if decoupled else 0.0))
    for name, p in leaves(params).items():
        np.testing.assert_allclose(p, expected[name], rtol=2e-5, err_msg=name)


def test_muon_orthogonalizes_each_block_and_leaves_biases_to_adam():
    """With all singular values near sqrt(max(1, out / in)), as Jordan's for kernels [in, out]."""
    params = PARAMS | {
        "blocks": {"dense1": {"kernel": jnp.ones((2, 3, 12))}, "dense2": {"kernel": jnp.ones((2, 12, 3))}}
    }
    tx = create_optimizer("muon", lambda step: 1.0)
    updates, _ = tx.update(random_like(params, 0), tx.init(params), params)
    for layer, scale in (("dense1", 2.0), ("dense2", 1.0)):
        singular = np.linalg.svd(updates["blocks"][layer]["kernel"], compute_uv=False)
        assert np.all((singular > 0.6 * scale) & (singular < 1.3 * scale))
    magnitude = np.abs(updates["head"]["kernel"])  # Adam's first step has one magnitude for all entries
    np.testing.assert_allclose(magnitude, magnitude[0, 0], rtol=1e-3)


def test_muon_has_the_settings_of_the_run():
    """Without momentum a step depends on its own gradient alone; what is Adam's has a learning rate of its own."""
    schedule = WarmupCosine(0.5, 2, 100)
    same = create_optimizer("muon", schedule, beta=0.0)
    tx = create_optimizer("muon", schedule, beta=0.0, adam_learning_rate=0.125)
    first, second = random_like(PARAMS, 0), random_like(PARAMS, 1)
    alone, _ = tx.update(second, tx.init(PARAMS), PARAMS)
    _, state = tx.update(first, tx.init(PARAMS), PARAMS)
    after, _ = tx.update(second, state, PARAMS)
    by_muon = [tree["blocks"]["mlp"]["dense1"]["kernel"] for tree in (after, alone)]
    np.testing.assert_allclose(by_muon[0] / float(schedule(1)), by_muon[1] / float(schedule(0)), rtol=1e-3, atol=1e-4)
    at_one_rate, _ = same.update(second, same.init(PARAMS), PARAMS)
    np.testing.assert_allclose(alone["head"]["kernel"], at_one_rate["head"]["kernel"] / 4, rtol=1e-5)


@functools.cache
def first_update(name, steps=3, **arguments):
    """The updates of a few steps, as one vector."""
    if "precondition_frequency" in declared(name):
        arguments = {"precondition_frequency": 2} | arguments
    tx, params = create_optimizer(name, 0.1, **arguments), TWO
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for seed in range(steps):
        updates, state = update(random_like(params, seed), state, params)
        found += [np.ravel(x).astype(float) for x in jax.tree.leaves(updates)]
    return np.concatenate(found)


# Another value of settings of optimizers that many runs use; it must change the updates. `shampoo/test_settings.py` has
# all of Shampoo's and SOAP's.
OTHER = {
    "adam": {"b1": 0.0, "b2": 0.5, "eps": 0.1, "eps_root": 0.1, "mu_dtype": "bfloat16", "nesterov": True},
    "adamw": {"b1": 0.0, "b2": 0.5, "eps": 0.1, "nesterov": True},
    "lion": {"b1": 0.0, "b2": 0.0},
    "sgd": {"momentum": 0.5},
    "muon": {"beta": 0.0, "ns_steps": 1, "nesterov": False, "adam_b1": 0.0, "adam_b2": 0.5},
    "shampoo": {"b1": 0.0, "grafting": "sgd"},
    "soap": {"b1": 0.0, "shampoo_beta": 0.5},
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, others in OTHER.items() for key in others])
def test_every_setting_reaches_optax(name, key):
    """Falsy ones too."""
    assert key in declared(name)
    assert np.abs(first_update(name, **{key: OTHER[name][key]}) - first_update(name)).max() > 1e-6


@pytest.mark.parametrize(
    ("name", "settings", "ineffective"),
    [
        ("sgd", {"nesterov": True, "accumulator_dtype": "bfloat16"}, {"nesterov", "accumulator_dtype"}),
        ("sgd", {"nesterov": True, "momentum": 0.5}, set()),
        ("soap", {"max_preconditioner_dim": 500, "b1": 0.5, "precondition_frequency": 3}, {"max_preconditioner_dim"}),
        ("soap", {"max_preconditioner_dim": 2, "b1": 0.95}, set()),
        ("shampoo", {"even_blocks": False, "grafting": "sgd", "grafting_b2": 0.5}, {"even_blocks", "grafting_b2"}),
        # The default of one does not fit the other: a relative eps is at least 1e-6.
        ("shampoo", {"relative_eps": False, "eps": 1e-12}, set()),
    ],
)
def test_a_setting_has_no_effect_if_its_default_makes_the_same_program(name, settings, ineffective):
    config = default(name).optimizer
    config.update(settings)
    given = {f"optimizer.{setting}" for setting in config}
    found = set(settings_without_effect(config, given, TWO, None))
    assert found == {f"optimizer.{setting}" for setting in ineffective}
    assert not [*settings_without_effect(config, (), TWO, None)], "only those that are given"
    for setting in set(settings) & ineffective:
        other = {**settings, setting: declared(name)[setting][0]}
        np.testing.assert_array_equal(first_update(name, **settings), first_update(name, **other))


def test_a_setting_without_effect_is_said():
    config = tiny_config("optimizer=sgd", optimizer__nesterov=True)
    (line,) = build(config, DIGITS).without_effect(config, ["optimizer.nesterov"], types.SimpleNamespace(train=0))
    assert line == "config.optimizer.nesterov=True has no effect with the other settings of sgd"


@pytest.mark.parametrize("name", ["shampoo", "reference_shampoo", "soap"])
def test_the_work_of_shampoo_is_spread_over_the_mesh(name):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    (state,) = [part for part in create_optimizer(name, 0.1, mesh=mesh).init(PARAMS)[0] if hasattr(part, "stacks")]
    for leaf in jax.tree.leaves(state.stacks):
        assert leaf.sharding.device_set == set(mesh.devices.flat)


def test_every_setting_of_adam_has_a_row():
    assert set(OTHER["adam"]) == set(declared("adam"))


@pytest.mark.parametrize(
    ("name", "given", "mask"),
    [
        ("adamw", {"weight_decay": 0.3}, "mask"),
        ("adadelta", {"weight_decay": 0.3}, "weight_decay_mask"),
        ("adafactor", {"weight_decay_rate": 0.3}, "weight_decay_mask"),
    ],
)
def test_an_optimizer_of_optax_is_optax_s_own(name, given, mask):
    """By its name there, with its defaults; only kernels decay."""
    ours, theirs = create_optimizer(name, 0.1, **given), getattr(optax, name)(0.1, **given, **{mask: paths.decay_mask})
    gradient = random_like(PARAMS, 0)
    updates, _ = ours.update(gradient, ours.init(PARAMS), PARAMS)
    expected, _ = theirs.update(apart(gradient), theirs.init(apart(PARAMS)), apart(PARAMS))
    bound = 1e-6 if name == "adafactor" else 0  # which works by layer, here under vmap
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=bound), apart(updates), expected)
    assert not {"mask", "weight_decay", "weight_decay_mask", "learning_rate"} & set(declared(name))


@pytest.mark.parametrize(("name", "is_said"), [("adamw", True), ("lars", True), ("adam", False), ("muon", False)])
def test_a_decoupled_weight_decay_without_effect_is_logged(name, is_said):
    """Optimizers that decay the weights in their own way ignore whether the decay is decoupled."""
    config = tiny_config(f"optimizer={name}", weight_decay=0.3, decoupled_weight_decay=True)
    said = "config.decoupled_weight_decay has no effect: " in "".join(build(config, DIGITS).remarks(config))
    flags = [create_optimizer(name, 0.1, weight_decay=0.3, decoupled_weight_decay=flag) for flag in (False, True)]
    steps = [tx.update(random_like(TWO, 0), tx.init(TWO), TWO)[0]["head"]["kernel"] for tx in flags]
    assert said == is_said == np.array_equal(*steps)


@pytest.mark.parametrize("name", optimizers())
def test_every_optimizer_takes_a_step_with_its_declared_defaults_and_decays_kernels_alone(name):
    """With the schedule of a run. Without a gradient, a parameter moves by its decay or not at all."""
    defaults = {key: value for key, (value, _) in declared(name).items()}
    tx = create_optimizer(name, WarmupCosine(0.1, 1, 1000), weight_decay=0.3, **defaults)
    gradient = jax.tree.map(jnp.zeros_like, PARAMS)
    gradient["blocks"]["mlp"]["dense1"]["kernel"] += 0.5  # some optimizers divide by the norm of all gradients
    state = tx.init(PARAMS)
    for _ in range(2):  # ADOPT moves from the second step on
        updates, state = jax.jit(tx.update)(gradient, state, PARAMS)
    assert all(np.isfinite(update).all() for update in leaves(updates).values())
    moved = {path for path, update in leaves(updates).items() if np.any(update)}
    if name not in ("fromage", "yogi"):  # which move without a gradient
        assert moved == {"blocks/mlp/dense1/kernel", "head/kernel"}


@pytest.mark.parametrize("name", sorted({*optimizers()} - {"shampoo", "reference_shampoo", "soap"}))
def test_every_block_is_a_layer_of_its_own(monkeypatch, name):
    """Each of optax's optimizers updates stacked blocks as it does blocks with arrays of their own, with every flag."""
    layer = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}
    stacked = {"blocks": layer, "head": {"kernel": jnp.ones((3, 5))}}
    settings = {key: value for key, (value, _) in declared(name).items()}
    settings |= {"min_dim_size_to_factor": 2} if name == "adafactor" else {}
    flags = [key for key, (value, _) in declared(name).items() if isinstance(value, bool)]

    def updates(settings, view):
        tx, params = create_optimizer(name, WarmupCosine(0.1, 1, 9), **settings), view(random_like(stacked, 0))
        state = tx.init(params)
        for seed in (1, 2):
            updates, state = tx.update(view(random_like(stacked, seed)), state, params)
        return updates

    for flag in (None, *flags):
        chosen = settings | ({flag: not settings[flag]} if flag else {})
        found = apart(updates(chosen, lambda tree: tree))
        with monkeypatch.context() as patch:
            patch.setattr(paths, "is_stacked", lambda path: paths.path_names(path)[0] != "head")
            patch.setattr(optax, "partition", lambda transforms, _: transforms[0])
            expected = updates(chosen, apart)
        same = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6, err_msg=flag)
        jax.tree.map(same, found, expected)


def test_declared_types_are_those_of_flags():
    assert declared("lion")["b1"] == (0.9, float)
    assert declared("adamw")["mu_dtype"] == (None, str)
    assert declared("sgd")["momentum"] == (None, float)
    assert declared("muon")["ns_steps"] == (5, int)
    assert declared("muon")["adam_learning_rate"] == (None, float)
    assert declared("shampoo")["precondition_frequency"][1] is int


def test_every_setting_without_a_default_takes_values_of_its_type():
    for name in optimizers():
        for key in [key for key, (value, _) in declared(name).items() if value is None]:
            tx = create_optimizer(name, 0.1, **{key: 0.5 if declared(name)[key][1] is float else "bfloat16"})
            jax.eval_shape(lambda tx=tx: tx.update(TWO, tx.init(TWO), TWO))


@pytest.mark.parametrize(("name", "hint"), [("adamW", "adamw?"), ("soup", "soap?"), ("zzz", "expected shampoo, soap")])
def test_an_unknown_optimizer_is_one_line_with_near_names(name, hint):
    with pytest.raises(UserError, match=rf"^config.optimizer.name='{name}' is unknown; [^\n]*$") as error:
        create_optimizer(name, 0.1)
    assert hint in str(error.value)


@pytest.mark.parametrize("name", ["shampoo", "soap"])
def test_stacked_layers_are_preconditioned_apart(name):
    """What one layer's gradient is changes nothing in another layer."""
    tx = create_optimizer(name, 0.1, precondition_frequency=1, start_preconditioning_step=1)
    update, steps = jax.jit(tx.update), []
    for change in (1.0, 3.0):
        state = tx.init(PARAMS)
        for seed in range(3):
            gradient = random_like(PARAMS, seed)
            gradient["blocks"] = jax.tree.map(lambda g: g.at[1].multiply(change**seed), gradient["blocks"])  # noqa: B023
            updates, state = update(gradient, state, PARAMS)
        steps.append(updates["blocks"])
    for one, other in zip(*map(jax.tree.leaves, steps), strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=1e-4, atol=1e-6)
        assert not np.allclose(one[1], other[1], rtol=1e-2)


@pytest.mark.parametrize("model", ["simplest_vit", "simple_vit"])
def test_reference_shampoo_sees_the_parameters_as_pytorch_lays_them_out(model):
    config = tiny_config(f"optimizer=shampoo,model={model}", grad_clip=0.0)
    # At its own eps, 1e-12, roots of few gradients are made of rounding errors, which no two programs share.
    settings = {"precondition_frequency": 2, "eps": 1e-2}
    params = build(config, DIGITS).create_state().params
    theirs = reference_shampoo(0.1, **settings)
    view = jax.jit(lambda tree: pytorch_layout(tree, config.model.patch_size))
    ours = create_optimizer("reference_shampoo", 0.1, layout=view, **settings)
    viewed = view(params)
    assert {name: tensor.shape for name, tensor in viewed.items()}["to_patch_embedding.weight"] == (16, 1, 2, 2)
    ours_state, theirs_state = ours.init(params), theirs.init(viewed)
    for t in range(3):
        gradient = random_like(params, t)
        updates, ours_state = jax.jit(ours.update)(gradient, ours_state, params)
        expected, theirs_state = jax.jit(theirs.update)(view(gradient), theirs_state, viewed)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), view(updates), expected)


def test_the_reference_s_values_are_those_of_its_train_py():
    found = {name: value for name, (value, _) in declared("reference_shampoo").items()}
    expected = {"b1": 0.9, "b2": 0.999, "eps": 1e-12, "relative_eps": False, "precondition_frequency": 25}
    expected |= {"max_preconditioner_dim": 8192, "merge_dims": True, "precondition_1d": True, "even_blocks": False}
    expected |= {"stagger": False, "one_sided": False, "root": "eigh", "exponent_override": 0, "precision": "highest"}
    expected |= {"grafting": "adam", "grafting_b2": 0.999, "grafting_eps": 1e-8, "statistics": "shampoo"}
    assert {name: found[name] for name in expected} == expected
    assert found["ignored_dim"] > 10**9


def test_reference_shampoo_has_no_layout_for_value_skipinit():
    config = tiny_config("optimizer=reference_shampoo", model__attention="value_skipinit")
    with pytest.raises(
        UserError, match=r"^config.optimizer.name='reference_shampoo' has no layout for .*'value_skipinit'; "
    ):
        build(config, DIGITS)


def test_schedule_warms_up_linearly_and_ends_at_zero():
    schedule = WarmupCosine(2.0, 4, 12)
    rates = np.array([schedule(step) for step in range(12)])
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose(rates[4:], 1 + np.cos(np.pi * np.arange(1, 9) / 8), atol=1e-6)


@pytest.mark.parametrize("warmup_steps", [0, 5, 9])
def test_schedule_of_a_run_shorter_than_its_warmup(warmup_steps):
    rates = np.array([WarmupCosine(1.0, warmup_steps, 5)(step) for step in range(5)])
    assert np.all(np.isfinite(rates))
    assert rates.max() <= 1.0
    if warmup_steps:
        np.testing.assert_allclose(rates, np.arange(1, 6) / 5, rtol=1e-6)
