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
        ("default()", ["--config.epoch=3"], r"names 'epoch', which is no field; did you mean config.epochs\?"),
        ("default()", ["--config.learning_rate=1"], r"did you mean config.optimizer.learning_rate\?"),
        (
            "default()",
            ["--config.optimizer.name=soap"],
            "choose it behind the config file: .*optimizer=soap",
        ),
        ("default()", ["--config.epochs=-3"], "config.epochs=-3.0 must be"),
    ],
)
def test_a_config_is_loaded_from_its_flags_or_told_what_is_wrong_with_it(tmp_path, source, arguments, message):
    (tmp_path / "own.py").write_text(f"from simplest_vit.config import default\ndef get_config(): return {source}\n")
    with pytest.raises(UserError, match=message):
        cli.load_config([f"--config={tmp_path}/own.py", *arguments])


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
