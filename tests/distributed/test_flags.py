"""Flags of a run of several processes that do not fit, and computations that fail: one line."""

import contextlib
import itertools
import logging
import os
import subprocess
import sys

import jax
import pytest

from simplest_vit import primary
from simplest_vit.data import dataset
from simplest_vit.errors import CheckpointError, Interrupted, TrainingError, UserError
from simplest_vit.primary import is_primary
from simplest_vit.training import distributed, train
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((False, None, 2, 0), r"--coordinator_address is missing.*--config.distributed=auto"),
        ((False, "localhost:1", None, 0), "--num_processes is missing"),
        ((False, "localhost:1", 2, None), "--process_id is missing"),
        ((False, "localhost:1", 2, 2), "--process_id=2 must be below --num_processes=2"),
        ((False, "localhost", 2, 0), "--coordinator_address=localhost must be HOST:PORT"),
        ((False, "localhost:65536", 2, 0), "--coordinator_address=localhost:65536 must be HOST:PORT"),
        ((False, "localhost:0", 2, 0), "--coordinator_address=localhost:0 must be HOST:PORT"),
        ((True, "localhost:1", None, None), "--config.distributed=auto gets .*give it or them, not both"),
        (
            (False, "localhost:1", 2, 1),
            "--coordinator_address=localhost:1 does not answer.*start process 0 and open its port",
        ),
        ((False, "nowhere.invalid:1", 2, 1), "--coordinator_address=nowhere.invalid:1 does not answer"),
    ],
)
def test_what_does_not_fit_is_told(monkeypatch, arguments, message):
    monkeypatch.setattr(distributed, "_START_TIMEOUT", -1)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *_, **__: pytest.fail("asked JAX"))
    with pytest.raises(UserError, match=message):
        distributed.initialize(*arguments)


@pytest.mark.parametrize(("process", "level"), [(0, logging.INFO), (1, logging.WARNING)])
def test_jax_gets_the_flags_and_only_process_0_logs_its_progress(monkeypatch, caplog, process, level):
    caplog.set_level(logging.INFO, "simplest_vit")
    given = []
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *arguments, **_: given.append(arguments))
    monkeypatch.setattr(distributed, "_reach", lambda *_: None)
    monkeypatch.setattr(jax, "process_index", lambda: process)
    distributed.initialize(False, "localhost:1", 2, process)
    assert (given, distributed.log.level) == ([("localhost:1", 2, process)], level)


def test_a_single_process_with_flags_sees_sigterm():
    program = """
import signal, socket, time
from simplest_vit import preemption
from simplest_vit.training import distributed
preemption.install()
with socket.create_server(("localhost", 0)) as free:
    port = free.getsockname()[1]
distributed.initialize(False, f"localhost:{port}", 1, 0)
with distributed.interruption() as reached:
    signal.raise_signal(signal.SIGTERM)
    deadline = time.monotonic() + 5
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.01)
    print(reached())"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "True\n", ended.stderr


def test_without_flags_there_is_one_process(monkeypatch):
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda *_, **__: pytest.fail("asked JAX"))
    distributed.initialize(False, None, None, None)
    assert is_primary()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("coordinator_address should be defined."), r"no cluster was found .*SLURM.*Kubernetes"),
        (RuntimeError("DEADLINE_EXCEEDED: Barrier timed out.\n\nMore"), r"cannot find each other \(DEADLINE_EX.*out\)"),
        (RuntimeError(), r"cannot find each other \(RuntimeError\)"),
    ],
)
def test_auto_says_why_it_fails(monkeypatch, error, message):
    def initialize(*_, **__):
        raise error

    monkeypatch.setattr(distributed.jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="config.distributed=auto: .*" + message):
        distributed.initialize(True, None, None, None)


class Coordinator(dict):
    """The store of JAX's coordinator, for processes that run one after the other."""

    key_value_set = dict.__setitem__

    def blocking_key_value_get(self, key, _):
        return self[key]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (UserError("no such folder"), UserError),
        (CheckpointError("the disk is full"), TrainingError),
        (Interrupted("step 3 is saved"), Interrupted),
        (OSError("EIO"), UserError),
    ],
)
def test_all_processes_end_with_the_exit_code_of_process_0(monkeypatch, error, raised):
    coordinator = Coordinator()
    monkeypatch.setattr(primary.ocp.multihost, "get_jax_distributed_client", lambda: coordinator)
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    def ask():
        raise error

    for process, expected in enumerate((type(error), raised)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(primary, "_CALLS", iter([7]))
        with pytest.raises(expected, match=str(error)) as caught:
            primary.broadcast_from_primary(ask if process == 0 else None)
        assert type(caught.value) is expected


@pytest.mark.parametrize("there", [{"config.seed": 1}, {"config.seed": 2}, {}])
def test_processes_with_other_values_than_process_0_say_which(monkeypatch, there):
    """Before, each process trained with its own learning rate and data, and the run ended as if nothing were wrong."""
    coordinator = Coordinator()
    monkeypatch.setattr(primary.ocp.multihost, "get_jax_distributed_client", lambda: coordinator)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process, values in enumerate(({"config.seed": 1}, there)):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(primary, "_CALLS", iter([7]))
        if values == {"config.seed": 1}:
            primary.require_same(values)
            continue
        with pytest.raises(
            UserError, match=rf"^config.seed is {there.get('config.seed')} in process 1 and 1 in process 0"
        ):
            primary.require_same(values)


def test_processes_do_not_evaluate_or_train_on_other_splits_than_process_0(monkeypatch, data_dir):
    coordinator, config = Coordinator(), tiny_config(data__dir=data_dir)
    monkeypatch.setattr(primary.ocp.multihost, "get_jax_distributed_client", lambda: coordinator)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(dataset, "load_split", lambda *_, **__: None)
    for process, split in enumerate(("validation", "validation[:100]")):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(primary, "_CALLS", itertools.count())
        config.data.validation_split = split
        expected = r"the data's validation_split is 'validation\[:100\]' in process 1 and 'validation' in process 0"
        with pytest.raises(UserError, match=expected) if process else contextlib.nullcontext():
            dataset.load(config.data)


class Agreed(Exception):
    """The processes have the same settings."""


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("seed", 2, (UserError, r"^config.seed is 2 in process 1 and 1 in process 0")),
        ("optimizer__learning_rate", 0.5, (UserError, r"^config.optimizer.learning_rate is 0.5 in process 1 and ")),
        ("data__num_workers", 3, (Agreed, None)),  # a process's own
    ],
)
def test_processes_do_not_train_with_other_settings_than_process_0(monkeypatch, tmp_path, field, value, expected):
    def agreed(*_):
        raise Agreed

    coordinator = Coordinator()
    monkeypatch.setattr(primary.ocp.multihost, "get_jax_distributed_client", lambda: coordinator)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(train, "check_workdir", agreed)
    for process, fields in enumerate(({}, {field: value})):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        monkeypatch.setattr(primary, "_CALLS", itertools.count())
        error, message = expected if process else (Agreed, None)
        with pytest.raises(error, match=message):
            train.train(tiny_config(**{"seed": 1} | fields), str(tmp_path / "run"))


GONE = "another process of the run was lost"


@pytest.mark.parametrize(
    ("error", "processes", "raised", "said"),
    [
        ("UNAVAILABLE: failed to connect to all addresses", 2, SystemExit, GONE),
        (
            "INTERNAL: Gloo AllReduce failed: [gloo/transport/tcp/pair.cc:547] Connection closed by peer",
            2,
            SystemExit,
            GONE,
        ),
        ("INTERNAL: NCCL operation failed: remote process exited or there was a network error", 2, SystemExit, GONE),
        ("INVALID_ARGUMENT: a shape does not fit", 2, SystemExit, "the computation failed (INVALID_ARGUMENT: a shape"),
        ("RESOURCE_EXHAUSTED: Out of memory.", 2, SystemExit, "the device is out of memory (RESOURCE_EXHAUSTED"),
        ("RESOURCE_EXHAUSTED: Out of memory.", 1, TrainingError, ""),
        ("INVALID_ARGUMENT: a shape does not fit", 1, jax.errors.JaxRuntimeError, ""),
        ("INTERNAL: Barrier failed because: task is set to ERROR: Task 1 heartbeat timeout.", 2, SystemExit, GONE),
    ],
)
def test_what_ends_a_computation_is_told(monkeypatch, capsys, error, processes, raised, said):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(raised) as info, distributed.abort_together():
        raise jax.errors.JaxRuntimeError(error)
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == (processes > 1)
    if raised is SystemExit:
        assert info.value.code == 3
    if "RESOURCE" in error:
        for remedy in ("config.batch_size", "config.accumulation_steps", "config.model.remat", "config.fsdp"):
            assert remedy in line + str(info.value)


@pytest.mark.parametrize(
    ("error", "all_fail", "raised", "said"),
    [
        (UserError("a mistake"), True, UserError, ""),
        (UserError("a mistake"), False, 2, "error: a mistake\n"),
        (Interrupted("SIGINT"), False, 75, "interrupted: SIGINT\n"),
        (CheckpointError("full"), True, 3, "error: full\n"),  # to leave like others would wait for them
        (KeyError("a bug"), False, 1, "KeyError: 'a bug'\n"),
    ],
)
def test_who_fails_alone_leaves_at_once(monkeypatch, capsys, error, all_fail, raised, said):
    def wait(*, key, timeout_ms):
        if not all_fail:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out.")

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.ocp.multihost, "get_barrier_sync_fn", lambda: wait)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with (
        pytest.raises(SystemExit if isinstance(raised, int) else raised) as info,
        distributed.abort_together(),
    ):
        raise error
    if isinstance(raised, int):
        assert info.value.code == raised
    assert capsys.readouterr().err.endswith(said)
