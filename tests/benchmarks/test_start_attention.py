"""The attention of the start in a network that has learned another."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import start_attention
from benchmarks.start_attention import start_state
from simplest_vit.errors import UserError
from simplest_vit.training.run import build
from simplest_vit.training.state import ModelState
from tests.tiny import DIGITS, tiny_config


def learned(run):
    """The state of a network whose weights have all moved."""
    state = run.create_state()
    params = jax.tree.map(lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), state.params)
    return ModelState(step=state.step, params=params, constants=state.constants)


def test_only_attention_goes_back_to_the_start():
    run = build(tiny_config(model__name="isometric_vit", model__num_heads=4), DIGITS)
    other = build(tiny_config(model__name="isometric_vit", model__attention="fixed_shift", model__num_heads=4), DIGITS)
    state = learned(run)
    start = start_state(run, state)
    attention = {"value": start.params["blocks"]["attention"]["value"]}
    params = start.params | {"blocks": start.params["blocks"] | {"attention": attention}}
    same = dataclasses.replace(start, params=params, constants=other.create_state().constants)
    images = jax.random.normal(jax.random.key(0), (3, 8, 8, 1))
    np.testing.assert_allclose(run.model(start)(images), other.model(same)(images), rtol=1e-4, atol=1e-4)
    assert np.abs(run.model(start)(images) - run.model(state)(images)).max() > 1e-2


def test_a_network_whose_queries_do_not_start_at_zero_is_refused():
    run = build(tiny_config(model__name="simple_vit"), DIGITS)
    with pytest.raises(UserError, match="the queries of simple_vit do not start at zero"):
        start_state(run, learned(run))


def test_a_run_is_not_evaluated_on_other_data(tmp_path, monkeypatch):
    (tmp_path / "dataset.json").write_text(json.dumps(DIGITS.to_json()))
    run = build(tiny_config(model__name="isometric_vit", model__num_heads=4), DIGITS)
    changed = types.SimpleNamespace(info=dataclasses.replace(DIGITS, fingerprint="changed"))
    monkeypatch.setattr(start_attention, "restore_best", lambda folder, mesh: (run, None, None))
    monkeypatch.setattr(start_attention.input_pipeline, "load", lambda data, mesh: changed)
    with pytest.raises(UserError, match="was started with other data: their fingerprint was '', now 'changed'"):
        start_attention._main([str(tmp_path)])
