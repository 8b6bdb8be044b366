import subprocess
import sys

import jax
import pytest

from simplest_vit import cli
from simplest_vit.errors import TrainingError, UserError


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


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("{}['muon']", [], r"^--config cannot be loaded: KeyError: 'muon'$"),
        ("None", [], "get_config of the file returns no ConfigDict"),
        ("default()", ["--config.epoch=3"], "a --config.FIELD flag names 'epoch', which is no field"),
        ("default()", ["--config.epochs=-3"], "config.epochs=-3 must be"),
    ],
)
def test_a_config_is_loaded_from_its_flags_or_told_what_is_wrong_with_it(tmp_path, source, arguments, message):
    (tmp_path / "own.py").write_text(f"from simplest_vit.config import default\ndef get_config(): return {source}\n")
    with pytest.raises(UserError, match=message):
        cli.load_config([f"--config={tmp_path}/own.py", *arguments])


@pytest.mark.parametrize(
    ("signalled", "code", "said"), [(True, 75, b"interrupted: SIGTERM; "), (False, 1, b"Traceback ")]
)
def test_an_import_that_fails_because_it_is_interrupted_is_an_interruption(signalled, code, said):
    """Extension modules turn what is raised during their import into an ImportError."""
    program = f"""
import os, signal
from simplest_vit import cli

def program(arguments):
    try:
        os.kill(os.getpid(), signal.SIGTERM) if {signalled} else None
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error

cli.run(program, "", required=())
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True)
    assert ended.returncode == code
    assert ended.stderr.startswith(said), ended.stderr


def test_nobody_reads_on():
    """As `| head` does."""
    program = (
        "from simplest_vit import cli; cli.run(lambda _: [print(i, flush=True) for i in range(10**6)], '', required=())"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
