"""Process 0 of a run, which decides for all, because each process may see a different state of the disk."""

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from simplest_vit import preemption
from simplest_vit.errors import Interrupted, TrainingError, UserError, first_line

_CALLS = itertools.count()  # number of the call, the same in all processes
_POLL_MS = 1000
_BY_EXIT_CODE = {error.exit_code: error for error in (UserError, TrainingError, Interrupted)}


def is_primary() -> bool:
    """Return whether this process writes logs and results."""
    return jax.process_index() == 0


def broadcast_from_primary(ask: Callable[[], Any]) -> Any:
    """Call `ask` on process 0 and return its result in all processes, which wait for it, perhaps for hours.

    Args:
      ask: Returns plain JSON.

    Raises:
      UserError: In the other processes, if `ask` raises anything except TrainingError or Interrupted; those they raise
        as well.
      Interrupted: In a process that received a signal.
    """
    if jax.process_count() == 1:
        return ask()
    client: Any = ocp.multihost.get_jax_distributed_client()
    key, received = f"simplest_vit/{next(_CALLS)}", {}
    if is_primary():
        try:
            received["answer"] = ask()
        except BaseException as error:  # the others must neither keep waiting nor assume that all is well
            received |= {"error": first_line(error), "exit_code": getattr(error, "exit_code", None)}
            raise
        finally:
            client.key_value_set(key, json.dumps(received))
    while not received:
        preemption.check()
        try:
            received = json.loads(client.blocking_key_value_get(key, _POLL_MS))
        except jax.errors.JaxRuntimeError as problem:
            if "DEADLINE_EXCEEDED" not in str(problem):
                raise
    if "error" in received:
        raise _BY_EXIT_CODE.get(received["exit_code"], UserError)(received["error"])
    return received["answer"]


def require_same(values: dict[str, Any]) -> None:
    """Raise a UserError in each process whose values (plain JSON, by name) are not those of process 0."""
    for name, value in broadcast_from_primary(lambda: values).items():
        if values.get(name) != value:
            here, there = (repr(each)[:80] for each in (values.get(name), value))
            raise UserError(
                f"{name} is {here} in process {jax.process_index()} and {there} in process 0; start the same command "
                "with the same data in all processes"
            )
