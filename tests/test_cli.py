import jax
import pytest

from simplest_vit import cli
from simplest_vit.errors import TrainingError


def test_a_device_out_of_memory_is_told_in_one_line():
    def program(arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.\nmore")

    with pytest.raises(TrainingError, match=r"of memory \(RESOURCE_EXHAUSTED: .* 12 bytes.\); end what else uses it"):
        cli._run_program(program, [])


def test_other_errors_keep_their_traceback():
    def program(arguments):
        raise RuntimeError("INTERNAL: a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli._run_program(program, [])
