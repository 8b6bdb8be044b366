"""Shared test settings: eight fake CPU devices, no silent rank promotion, and nothing left behind in /tmp."""

import gc
import importlib.metadata
import os
import pathlib
import signal
import tempfile

from simplest_vit.commands import ENVIRONMENT

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.update(ENVIRONMENT | os.environ)  # so that commands need not start again to set it
# Most of the time goes into compiling programs that run once. LLVM need not optimize them or split them over threads.
# jaxlib 0.10 still has the older emitters, which compile them in half the time.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if importlib.metadata.version("jaxlib").startswith("0.10.") else "")
)

import hypothesis
import jax
import pytest

from tests.fork_server import ForkServer

gc.disable()  # until all is imported
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which `nohup` ignores
hypothesis.settings.register_profile("same", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("same")  # every run tries the same examples
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)  # others cost more to keep than they save
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.hookimpl(trylast=True)  # for pytest makes its folder in this hook
def pytest_configure(config):
    """Let all temporary files be in pytest's own folder, of which it keeps the last three; for subprocesses, too.

    Tests compile the same small programs again and again: they are kept for the session, for all workers.
    """
    own = config._tmp_path_factory.getbasetemp()
    os.environ.setdefault("SIMPLEST_VIT_TEST_CACHE", str(own / "compiled"))  # by the process that starts the workers
    os.environ["TMPDIR"] = str(own / "tmp")
    os.makedirs(os.environ["TMPDIR"], exist_ok=True)
    tempfile.tempdir = None  # it is asked for anew
    jax.config.update("jax_compilation_cache_dir", os.environ["SIMPLEST_VIT_TEST_CACHE"])


def pytest_collection_finish():
    """Hide the half million objects that are imported by now from the garbage collector, and let it run less often.

    Each full collection walked through them for 0.3 seconds, and each stream of batches ends with one. JAX makes
    thousands of objects per program, most of which live on, so walking through the new ones finds little.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)
    gc.enable()


@pytest.fixture(scope="session")
def data_dir():
    """The folder of prepared digits, for all workers."""
    return str(pathlib.Path(os.environ["SIMPLEST_VIT_TEST_CACHE"]).with_name("tfds"))


@pytest.fixture(scope="module")
def two_devices():
    """Let runs take two of the eight devices: they save each array in as many parts, most of a tiny run's time."""
    from simplest_vit.training import evaluate, sharding, train

    with pytest.MonkeyPatch.context() as patch:
        for module in (evaluate, train):
            patch.setattr(module, "create_mesh", lambda fsdp: sharding.create_mesh(fsdp, jax.devices()[:2]))
        yield


@pytest.fixture(scope="session")
def server():
    """Runs command lines as processes of their own."""
    with ForkServer(pathlib.Path(__file__).parents[1]) as server:
        yield server
