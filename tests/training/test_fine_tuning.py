"""A run that starts from another's weights, against its parts: that run, and one that starts from scratch."""

import dataclasses
import logging
import shutil

import jax
import numpy as np
import pytest

from simplest_vit.errors import UserError
from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.evaluate import restore_best
from simplest_vit.training.fine_tuning import load_initial_params
from simplest_vit.training.run import build
from simplest_vit.training.sharding import create_mesh
from simplest_vit.training.train import train
from simplest_vit.training.workdir import read_run
from tests.tiny import DIGITS, tiny_config

LARGER = dataclasses.replace(DIGITS, class_names=("even", "odd", "none"), image_shape=(12, 12, 1))


@pytest.fixture(scope="module", autouse=True)
def pretrained(tmp_path_factory, two_devices):
    """A trained run: its average is what shall be taken, not its last parameters."""
    folder = tmp_path_factory.mktemp("pretrained")
    train(tiny_config(steps=3, ema__decay=0.5, ema__every=1), str(folder))
    return folder


@pytest.fixture(scope="module")
def best(pretrained):
    """The whole state of its best checkpoint."""
    _, config, data = read_run(str(pretrained))
    with Checkpoints(pretrained, create=False) as checkpoints:
        return jax.device_get(checkpoints.restore(build(config, data).abstract, checkpoints.best())[0])


def first_state(data, **overrides):
    run = build(tiny_config(**overrides), data)
    return jax.device_get(run.create_state(load_initial_params(run, run.config.init_from)))


def scratch(data, **overrides):
    return jax.device_get(build(tiny_config(**overrides), data).create_state())


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_same_classes_take_all_of_the_best_weights(pretrained, best):
    state = first_state(DIGITS, init_from=str(pretrained))
    assert_equal(state.params, best.ema_params)
    assert np.abs(best.ema_params["head"]["kernel"] - best.params["head"]["kernel"]).max() > 0
    assert state.step == 0


def test_other_classes_and_another_grid_begin_with_their_own_head_and_constants(pretrained, best, caplog):
    caplog.set_level(logging.INFO, "simplest_vit")
    state = first_state(LARGER, init_from=str(pretrained), data__image_size=12)
    own = scratch(LARGER, data__image_size=12)
    assert_equal(state.params["head"], own.params["head"])
    assert_equal(state.constants, own.constants)
    assert state.constants["position_embedding"].shape[0] == 36
    for name in ("patch_embedding", "blocks"):
        assert_equal(state.params[name], best.ema_params[name])
    assert f"starting from step 3 of {pretrained}: blocks, patch_embedding loaded" in caplog.text
    assert "the head reinitialized: other classes or another order of them (3 here, 10 there)" in caplog.text
    assert "positions are for 6x6 tokens; the loaded run has 4x4" in caplog.text
    assert "normalized" not in caplog.text


def test_data_of_another_mean_are_reported(pretrained, caplog):
    caplog.set_level(logging.INFO, "simplest_vit")
    first_state(dataclasses.replace(DIGITS, mean=(0.5,), std=(0.25,)), init_from=str(pretrained))
    were = f"{DIGITS.mean} and {DIGITS.std}"
    assert f"normalized by mean (0.5,) and deviation (0.25,); the loaded run's were {were}" in caplog.text


def test_classes_of_other_names_begin_anew_though_they_are_as_many(pretrained):
    renamed = dataclasses.replace(DIGITS, class_names=tuple("abcdefghij"))
    assert_equal(first_state(renamed, init_from=str(pretrained)).params["head"], scratch(renamed).params["head"])


def test_optimizer_and_average_start_from_the_weights_that_were_taken(pretrained, best):
    state = first_state(DIGITS, init_from=str(pretrained), ema__decay=0.9)
    assert_equal(state.ema_params, best.ema_params)
    assert_equal(state.opt_state, scratch(DIGITS, ema__decay=0.9).opt_state)


def test_devices_share_the_weights(pretrained, best):
    run = build(tiny_config(init_from=str(pretrained)), DIGITS, create_mesh(2, jax.devices()[:2]))
    state = run.create_state(load_initial_params(run, run.config.init_from))
    assert_equal(jax.device_get(state.params), best.ema_params)
    kernel = state.params["blocks"]["mlp"]["dense1"]["kernel"]
    assert kernel.sharding == run.abstract.params["blocks"]["mlp"]["dense1"]["kernel"].sharding
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 2


def test_a_run_begins_there_and_goes_on_without_it(pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "source"
    shutil.copytree(pretrained, source)
    config = tiny_config(steps=3, init_from="source", optimizer__learning_rate=1e-9)
    outcome = train(config, str(tmp_path / "run"))
    assert outcome["config"]["init_from"] == str(source)  # so that a report does not mix up the sources
    reached = restore_best(str(source))[1].params
    shutil.rmtree(source)
    with Checkpoints(tmp_path / "run", create=False) as checkpoints:
        state, _ = checkpoints.restore(build(config, DIGITS).abstract, checkpoints.best())
    # At a rate of next to nothing the run ends where the other did.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, reached)
    (tmp_path / "run" / "results.json").unlink()
    assert train(config, str(tmp_path / "run"))["validation_accuracy"] == outcome["validation_accuracy"]


@pytest.mark.parametrize(
    ("overrides", "data", "message"),
    [
        ({"model__mlp_dim": 64}, DIGITS, r"its config.model.mlp_dim is 32, here 64"),
        ({"model__attention": "uspa"}, DIGITS, r"its config.model.attention is 'espa', here 'uspa'"),
        ({"model__name": "simple_vit"}, DIGITS, r"its config.model.name is 'simplest_vit', here 'simple_vit'"),
        ({}, dataclasses.replace(DIGITS, image_shape=(8, 8, 3)), r"images of 1 channels, expected 3"),
    ],
)
def test_another_model_is_refused(pretrained, overrides, data, message):
    with pytest.raises(UserError, match=f"config.init_from={pretrained}.*{message}"):
        first_state(data, init_from=str(pretrained), **overrides)


def test_what_does_not_change_the_function_may_differ(pretrained):
    first_state(DIGITS, init_from=str(pretrained), model__dropout=0.1, model__remat=True, model__init="reference")


def test_a_mistake_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"config.init_from=\S*nowhere.* holds no checkpoint"):
        train(tiny_config(init_from=str(tmp_path / "nowhere")), str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
