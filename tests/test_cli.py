import os
import subprocess
import sys

import jax
import pytest

import simplest_vit
from simplest_vit import cli
from simplest_vit.commands import ENVIRONMENT
from simplest_vit.errors import TrainingError, UserError
from simplest_vit.recipes import digits
from simplest_vit.training.workdir import lock_workdir
from tests.tiny import DIGITS, tiny_config


def test_a_device_out_of_memory_is_told_in_one_line():
    def program():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 bytes.\nmore")

    with pytest.raises(TrainingError, match=r"of memory \(RESOURCE_EXHAUSTED: .* 12 bytes.\); stop other programs"):
        cli._run_program(program)


def test_other_errors_keep_their_traceback():
    def program():
        raise RuntimeError("INTERNAL: a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        cli._run_program(program)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("{}['muon']", [], r"^--config cannot be loaded: KeyError: 'muon'$"),
        ("None", [], "get_config in the file must return a ConfigDict"),
        ("default()", ["--config.epoch=3"], r"names 'epoch', which is not a field; did you mean config.epochs\?"),
        ("default()", ["--config.learning_rate=1"], r"did you mean config.optimizer.learning_rate\?"),
        (
            "default()",
            ["--config.optimizer.name=soap"],
            "choose it after the config file: .*optimizer=soap",
        ),
        ("default()", ["--config.optimizer.name=lion"], "choose it after the config file: .*optimizer=lion"),  # no eps
        ("default('lion')", ["--config.optimizer.name=adam"], "choose it after the config file: .*optimizer=adam"),
        ("default()", ["--config.epochs=-3"], "config.epochs=-3.0 must be"),
    ],
)
def test_a_config_is_loaded_from_its_flags_or_told_what_is_wrong_with_it(tmp_path, source, arguments, message):
    (tmp_path / "own.py").write_text(f"from simplest_vit.config import default\ndef get_config(): return {source}\n")
    with pytest.raises(UserError, match=message):
        cli.load_config([f"--config={tmp_path}/own.py", *arguments])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
def test_a_recipe_is_meant_even_beside_a_run_in_a_folder_of_its_name(tmp_path, monkeypatch):
    """`train --config digits --workdir digits` and then `--config digits` for another run."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(epochs=7.0)
    with lock_workdir(tmp_path / "digits", config.to_dict(), DIGITS):
        pass
    assert cli.load_config(["--config=digits"]).epochs == digits.get_config().epochs != 7
    assert cli.load_config(["--config=./digits"]).epochs == 7
    own, *_ = cli._with_own_config(["--workdir=digits", "--config.log_every=9"])
    assert cli.load_config([own]).epochs == 7


def test_nobody_reads_on():
    """As `| head` does."""
    program = (
        "from simplest_vit import cli; cli.run(lambda: [print(i, flush=True) for i in range(10**6)], '', required=())"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"0\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def run_program(body, **streams):
    program = f"import logging, sys, time\nfrom simplest_vit import cli\ndef program():\n    {body}\n"
    program += "cli.run(program, '', required=())"
    return subprocess.run([sys.executable, "-c", program], **{"stderr": subprocess.PIPE} | streams, timeout=60)


@pytest.mark.parametrize("body", ["print('result')", "print('result', flush=True)", "sys.stdout.write(10**6 * 'x')"])
def test_a_full_disk_behind_standard_output_is_one_line(body):
    with open("/dev/full", "w") as full:
        ended = run_program(body, stdout=full)
    assert (ended.returncode, ended.stderr) == (
        3,
        b"error: standard output cannot be written (No space left on device)\n",
    )


def test_a_log_that_cannot_be_written_ends_nothing():
    body = "logging.getLogger('simplest_vit').info(10**5 * 'x'); print('progress', file=sys.stderr); print('result')"
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        for stream in (full, writer):
            ended = run_program(body, stdout=subprocess.PIPE, stderr=stream)
            assert (ended.returncode, ended.stdout) == (0, b"result\n")
    os.close(writer)


@pytest.mark.parametrize(("closed", "numbers"), [(">&-", [1]), ("<&- >&- 2>&-", [0, 1, 2])])
def test_a_closed_standard_stream_is_the_null_device_and_its_number_is_never_a_file_s(tmp_path, closed, numbers):
    program = f"""import os, pathlib, sys; from simplest_vit import cli
def program():
    print("result"), print("progress" * {len(numbers) - 1}, end="", file=sys.stderr)
    found = " ".join(os.readlink(f"/proc/self/fd/{{number}}") for number in {numbers})
    pathlib.Path({str(tmp_path / "found")!r}).write_text(found)
cli.run(program, "", required=())"""
    command = ["sh", "-c", f'"$@" {closed}', "sh", sys.executable, "-c", program]
    ended = subprocess.run(command, capture_output=True, timeout=60)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
    assert (tmp_path / "found").read_text().split() == ["/dev/null"] * len(numbers)


def test_a_callback_to_an_event_loop_that_orbax_has_closed_prints_nothing_unlike_other_errors():
    body = """import asyncio, tensorstore
    promise, future = tensorstore.Promise.new()
    async def wait(): await future
    loop = asyncio.new_event_loop()
    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    future.add_done_callback(lambda _: 1 / 0)
    promise.set_result(0)"""
    error = run_program(body).stderr
    assert error.count(b"Traceback") == 1
    assert error.endswith(b"ZeroDivisionError: division by zero\n")


def test_what_would_break_a_line_or_a_terminal_is_escaped():
    body = (
        r"logging.getLogger('simplest_vit').info('a\x1b[2Jb\udcff'); print('c\udcff'); raise cli.UserError('d\ne\x1b')"
    )
    ended = run_program(body, stdout=subprocess.PIPE)
    assert ended.stdout == rb"c\udcff" + b"\n"
    log, error = ended.stderr.splitlines()
    assert log.endswith(rb"  a\x1b[2Jb\udcff")
    assert error == rb"error: d\ne\x1b"


def test_help_needs_no_width_and_no_docstrings():
    environment = os.environ | {"COLUMNS": "1", "PYTHONOPTIMIZE": "2"}
    command = [sys.executable, "-m", "simplest_vit", "evaluate", "--help"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    flags = [line.split()[0] for line in ended.stdout.splitlines() if line.startswith("  --")]
    assert flags[:2] == ["--workdir", "--config"]
    of_processes = {"--coordinator_address", "--num_processes", "--process_id"}
    assert set(flags[2:]) == {"--split", "--image_folder", "--output", *of_processes}


def test_the_version_is_the_package_s():
    command = [sys.executable, "-m", "simplest_vit", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, f"simplest-vit {simplest_vit.__version__}\n")


def test_commands_set_the_environment_of_a_process_unless_the_user_has():
    program = "import os; from simplest_vit.commands import *; print(*map(os.getenv, ENVIRONMENT), flush=True); main()"
    own = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT} | {"MALLOC_ARENA_MAX": "3"}
    command = [sys.executable, "-c", program, "--version"]
    lines = subprocess.run(command, env=own, capture_output=True, text=True, timeout=60).stdout.splitlines()
    assert lines[0].split() == ["None", "None", "3", "None", "None"]
    assert lines[1].split() == [*(ENVIRONMENT | {"MALLOC_ARENA_MAX": "3"}).values()]
    assert lines[2].startswith("simplest-vit")
    assert len(lines) == 3


@pytest.mark.parametrize("field", ["data.dir", "steps", "checkpoint_minutes"])
def test_a_field_is_unset_by_none(field):
    """Before, data.dir became a folder of that name."""
    value = cli.load_config(["--config=digits", f"--config.{field}=7", f"--config.{field}=None"])
    for name in field.split("."):
        value = value[name]
    assert value is None
