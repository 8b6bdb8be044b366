"""Shared test settings: eight fake CPU devices and no silent rank promotion."""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small matrices: NumPy's threads would only wait for each other
# Most of the time goes into compiling programs that run once: LLVM need not optimize them.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

# Tests compile the same small programs again and again: keep them for the session, for all workers.
if "SIMPLEST_VIT_TEST_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="simplest-vit-tests-")
    os.environ["SIMPLEST_VIT_TEST_CACHE"] = _cache.name
jax.config.update("jax_compilation_cache_dir", os.environ["SIMPLEST_VIT_TEST_CACHE"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
