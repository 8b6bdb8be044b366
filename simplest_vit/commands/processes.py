"""Flags for a run with several processes."""

import contextlib
from collections.abc import Iterator
from typing import Any

from absl import flags

COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "For several processes: HOST:PORT of process 0. On a cluster use --config.distributed=auto instead.",
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "For several processes: the number of processes.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "For several processes: the number of this process, from 0.", lower_bound=0
)


@contextlib.contextmanager
def connected(config: Any) -> Iterator[None]:
    """Connect the processes that the flags or the config describe, and stop all of them if one fails."""
    from simplest_vit.training import distributed

    by_cluster = config is not None and config.get("distributed") == "auto"
    distributed.initialize(by_cluster, COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)
    with distributed.abort_together():
        yield
