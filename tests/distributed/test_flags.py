"""Flags of a run of several processes that do not fit: one line, before JAX is asked."""

import pytest

from simplest_vit.errors import UserError
from simplest_vit.training import distributed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((False, None, 2, 0), r"--coordinator_address is missing.*--config.distributed=auto"),
        ((False, "localhost:1", None, 0), "--num_processes is missing"),
        ((False, "localhost:1", 2, None), "--process_id is missing"),
        ((False, "localhost:1", 2, 2), "--process_id=2 must be below --num_processes=2"),
        ((False, "localhost", 2, 0), "--coordinator_address=localhost must be HOST:PORT"),
        ((False, "localhost:1", 2, 1), "--coordinator_address=localhost:1 does not answer.*start process 0 there"),
        ((False, "nowhere.invalid:1", 2, 1), "--coordinator_address=nowhere.invalid:1 does not answer"),
    ],
)
def test_what_does_not_fit_is_told(monkeypatch, arguments, message):
    monkeypatch.setattr(distributed, "_START_TIMEOUT", -1)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *_, **__: pytest.fail("asked JAX"))
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)


def test_without_flags_there_is_one_process(monkeypatch):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *_, **__: pytest.fail("asked JAX"))
    distributed.initialize(False, None, None, None)
    assert distributed.is_primary()


def test_auto_names_the_clusters_it_knows_where_there_is_none(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match=r"config.distributed=auto: no cluster was found .*SLURM.*Kubernetes"):
        distributed.initialize(True, None, None, None)
