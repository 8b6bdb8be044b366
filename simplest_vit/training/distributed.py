"""A run with several processes, one per host or device, on JAX's multi-controller runtime.

Every process runs the same program on its share of each batch. Process 0 is the coordinator to which the others
connect, and the only one that logs and writes results. All processes write checkpoints.
"""

import contextlib
import itertools
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from simplest_vit import preemption
from simplest_vit.errors import CheckpointError, Interrupted, TrainingError, UserError, first_line, print_error

# Seconds: for all processes to start; without a heartbeat until a process counts as lost; for all to fail together.
_START_TIMEOUT = 300
_HEARTBEAT_TIMEOUT = 30
_FAILURE_TIMEOUT = 10
# Errors of collectives (gloo on CPU, NCCL on GPU) and of the coordinator after a process is lost.
_GONE = re.compile(r"^(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED)|gloo|connection|remote process|heartbeat", re.IGNORECASE)

log = logging.getLogger("simplest_vit")


def initialize(
    detect: bool, coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Connect to the other processes. This must come before anything that uses a device.

    Args:
      detect: Whether to get the other arguments, which must then be None, from the cluster (SLURM, MPI, Kubernetes,
        TPU).
      coordinator_address: Host and port of process 0, such as "10.0.0.1:1234".
      num_processes: Number of processes.
      process_id: Number of this process, from 0.

    Raises:
      UserError: If an argument is missing or the other processes cannot be reached.
    """
    given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if not detect and len(missing) == len(given):
        return
    if detect and len(missing) < len(given):
        raise UserError(
            "--config.distributed=auto gets --coordinator_address, --num_processes and --process_id from the "
            "cluster; give it or them, not both"
        )
    if not detect and missing:
        raise UserError(
            f"--{missing[0]} is missing; a run of several processes needs {', '.join(f'--{name}' for name in given)}, "
            "or --config.distributed=auto on a cluster that provides them"
        )
    if num_processes is not None and process_id is not None and process_id >= num_processes:
        raise UserError(f"--process_id={process_id} must be below --num_processes={num_processes}")
    if coordinator_address is not None and process_id is not None:
        _reach(coordinator_address, process_id)
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            cluster_detection_method=None if detect else "deactivate",
            initialization_timeout=_START_TIMEOUT,
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=_HEARTBEAT_TIMEOUT,
        )
    except (ValueError, RuntimeError) as error:
        reason = first_line(error).rstrip(".")
        if detect and isinstance(error, ValueError):  # JAX found no cluster that provides the arguments
            raise UserError(
                f"config.distributed=auto: no cluster was found ({reason}); supported are SLURM, Open MPI, Kubernetes, "
                f"TPU; elsewhere give {', '.join(f'--{name}' for name in given)}"
            ) from error
        if detect:
            raise UserError(
                f"config.distributed=auto: the processes cannot find each other ({reason}); see docs/running.md"
            ) from error
        raise UserError(f"--coordinator_address={coordinator_address} cannot be used ({reason})") from error
    if jax.process_count() == 1:
        # JAX has replaced Python's handler of SIGTERM, but `interruption` asks it only with several processes.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    if jax.process_index() > 0:
        log.setLevel(logging.WARNING)


def _reach(address: str, process_id: int) -> None:
    """Wait for the coordinator; JAX would abort the process if it is absent."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator_address={address} must be HOST:PORT, such as 10.0.0.1:1234")
    deadline = time.monotonic() + _START_TIMEOUT
    while process_id != 0:
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--coordinator_address={address} does not answer ({error}); start process 0 and open its port"
                ) from error
        time.sleep(1)


@contextlib.contextmanager
def abort_together() -> Iterator[None]:
    """Stop all processes of a run if one of them cannot continue.

    If all processes fail within `_FAILURE_TIMEOUT`, each ends as if it were alone. If only one fails, it exits
    immediately; the others exit when a collective fails, or JAX aborts them after `_HEARTBEAT_TIMEOUT` without a
    heartbeat. Nothing is closed in that case, because checkpoints and JAX's own shutdown would wait for all processes.

    Raises:
      TrainingError: If a single process is out of device memory.
    """
    several = jax.process_count() > 1
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = first_line(error).rstrip(".")
        if reason.startswith("RESOURCE_EXHAUSTED"):
            line = (
                f"the device is out of memory ({reason}); raise config.fsdp, or in another --workdir lower "
                "config.batch_size, raise config.accumulation_steps or set config.model.remat=True"
            )
        elif several:
            what = "another process of the run was lost" if _GONE.search(reason) else "the computation failed"
            line = (
                f"{what} ({reason}); the last checkpoint is intact: rerun the command for all processes to "
                "resume from it"
            )
        else:
            raise
        if several:
            _report_and_exit(TrainingError(line))
        raise TrainingError(line) from error
    except BaseException as error:
        if several and (isinstance(error, CheckpointError) or not _all_fail()):
            _report_and_exit(error)
        raise


def _all_fail() -> bool:
    """Return whether all processes fail, that is, reach this barrier."""
    try:
        ocp.multihost.get_barrier_sync_fn()(key="failure", timeout_ms=1000 * _FAILURE_TIMEOUT)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _report_and_exit(error: BaseException) -> NoReturn:
    """Report an error and end this process without waiting for anything."""
    if isinstance(error, UserError | TrainingError | Interrupted):
        code = print_error(error)
    else:
        traceback.print_exception(error)
        sys.stderr.flush()
        code = 1
    preemption.exit_now(code)


@contextlib.contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Defer signals, so that they stop the run only at the end of a step.

    With several processes, JAX handles SIGTERM and makes all of them stop after the same step; other signals are
    forwarded as SIGTERM.

    Yields:
      A function that returns whether the run must stop; all processes must call it once after each step.
    """
    # JAX stops all processes at a call that none has made yet. It counts calls, and the steps of a resumed run would
    # never match that count.
    calls = itertools.count(1)

    def forward(number: signal.Signals) -> None:
        if jax.process_count() > 1 and number != signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)

    def reached() -> bool:
        if jax.process_count() == 1:
            return preemption.received() is not None
        return multihost_utils.reached_preemption_sync_point(next(calls))

    with preemption.deferred(forward):
        yield reached
