"""What all programs of the project share: the flags of a run, and one line for what a user can mend."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from simplest_vit import preemption
from simplest_vit.errors import Interrupted, TrainingError, UserError, not_installed, print_error

_CONFIGS: list[flags.FlagHolder] = []


def define_config(name: str, description: str) -> flags.FlagHolder:
    """Define a flag `--NAME=FILE`, with `--NAME.FIELD=VALUE`; `run` loads and checks its config where it is given."""
    _CONFIGS.append(config_flags.DEFINE_config_file(name, None, description))
    return _CONFIGS[-1]


CONFIG = define_config("config", "Config file, with its arguments behind a colon: configs/cifar10.py:model=simple_vit")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: checkpoints, TensorBoard files, results.json.")


def load_config(arguments: list[str]) -> ConfigDict:
    """Load and check the config of a `--config` flag and its overrides, as a program that is called with them does.

    Raises:
      UserError: If it cannot be loaded, or a value is not allowed.
    """
    values = flags.FlagValues()
    argv = ["", *arguments]
    config = config_flags.DEFINE_config_file(CONFIG.name, flag_values=values, sys_argv=argv)
    try:
        values(argv)
        _require_config(config)
    except Exception as error:
        raise UserError(_explain(error, config.name, arguments)) from error
    from simplest_vit.config import check

    check(config.value)
    return config.value


def config_arguments(arguments: list[str]) -> list[str]:
    """The `--config...` flags among the arguments of a program, which has parsed them."""
    given, words = [], iter(arguments)
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if word.startswith("-") and name.removeprefix("no").split(".")[0] == CONFIG.name:
            given.append(word)
            if not equals and not flags.FLAGS[name.removeprefix("no")].boolean:
                given.append(next(words))
    return given


def _require_config(config: flags.FlagHolder) -> None:
    """Read a config file, which flags leave to its first use."""
    getattr(config.value, "to_dict", None)
    if not isinstance(config.value, ConfigDict):
        raise UserError(f"--{config.name}: get_config of the file returns no ConfigDict; see configs/digits.py")


def run(
    program: Callable[[list[str]], None],
    usage: str,
    *,
    required: tuple[str, ...] = ("config", "workdir"),
    optional: tuple[str, ...] = (),
    positional: bool = False,
) -> None:
    """Parse the flags, run, and turn a user's mistake into one line on standard error.

    Exit codes: 0, 2 for a `UserError`, 3 for a `TrainingError`, 75 for an `Interrupted`.

    Args:
      program: Gets the positional arguments.
      usage: An example of the command, told where a flag is missing.
      required: Names of flags that must be given.
      optional: Which of --config and --workdir may be given, besides.
      positional: Whether arguments without a flag are allowed.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(_help(program, (*required, *optional)))
        return
    # The libraries tell what goes wrong, this project also what goes on.
    absl_logging.set_verbosity(absl_logging.ERROR)
    # Orbax logs whatever it raises as well, with a traceback for each of its threads, and TensorStore prints another
    # (needed by tests/faults/test_disk.py).
    absl_logging.get_absl_logger().addFilter(lambda record: f"{os.sep}orbax{os.sep}" not in record.pathname)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    log = logging.getLogger("simplest_vit")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
    heard: list[int] = []

    def stop(number: int, frame: Any) -> None:
        heard.append(number)
        interrupt(number, frame)

    preemption.watch((signal.SIGTERM, signal.SIGINT), handler=stop)
    try:
        app.run(
            lambda arguments: _run_program(program, arguments[1:]),
            flags_parser=lambda argv: _parse(argv, usage, required, optional, positional),
        )
    except (UserError, TrainingError, Interrupted) as error:
        sys.exit(print_error(error))
    except BrokenPipeError:  # of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except ImportError:
        if not heard:
            raise
        # Where the import of an extension module is interrupted, it fails with an error of its own.
        sys.exit(print_error(_interrupted(heard[0])))


def interrupt(number: int, frame: Any) -> None:
    """Stop what is under way; training itself notes signals instead (`training/interrupt.py`)."""
    raise _interrupted(number)


def _interrupted(number: int) -> Interrupted:
    return Interrupted(f"{signal.Signals(number).name}; the same command starts again")


def _run_program(program: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Check the config and run; what the machine lacks is the user's to mend as well."""
    try:
        if configs := _given():
            from simplest_vit.config import check  # imported here, so that a mistyped flag is answered at once

            for config in configs:
                check(config.value)
        program(arguments)
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["there is no such device"])[0]
        if reason.startswith("RESOURCE_EXHAUSTED"):
            raise TrainingError(
                f"the device is out of memory ({reason}); end what else uses it, or choose another: JAX_PLATFORMS=cpu"
            ) from error
        if _raised_in(error) != "jax._src.xla_bridge":
            raise
        raise UserError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {reason}; install jax for that device, or choose "
            "another: JAX_PLATFORMS=cpu"
        ) from error


def _given() -> list[flags.FlagHolder]:
    """The flags of config files that the command line has."""
    return [config for config in _CONFIGS if config.present]


def _raised_in(error: BaseException) -> str:
    """The module that raised an exception."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals["__name__"] if frames else ""


def _parse(
    argv: list[str], usage: str, required: tuple[str, ...], optional: tuple[str, ...], positional: bool
) -> list[str]:
    """Parse flags; a config that cannot be made of them is the user's mistake."""
    name = CONFIG.name
    try:
        remaining = flags.FLAGS(argv)
        for needed in required:
            if flags.FLAGS[needed].value in (None, "") and not (needed == CONFIG.name and CONFIG.present):
                raise UserError(f"--{needed} is missing; usage: {usage}")
        for shared in (CONFIG, WORKDIR):
            if shared.present and shared.name not in (*required, *optional):
                raise UserError(f"--{shared.name} is no flag of this program; usage: {usage}")
        for config in _given():
            name = config.name
            _require_config(config)
    except Exception as error:  # a config file is a program: it may raise anything
        raise UserError(_explain(error, name, argv[1:])) from error
    if len(remaining) > 1 and not positional:
        raise UserError(f"unexpected argument {remaining[1]!r}; every option is a --flag")
    return remaining


def _help(program: Callable[[list[str]], None], shared: tuple[str, ...]) -> str:
    """Describe a program by the docstring of its module, the flags of that module, and those of the run it takes."""
    module = sys.modules[program.__module__]
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0] if module.__name__ == "__main__" else module.__name__)
    taken = [flags.FLAGS[name] for name in shared] + [flag for flag in own if flag.name not in shared]
    lines = [f"  --{flag.name:<20} {_meaning(flag)}" for flag in taken]
    return "\n".join([module.__doc__ or "", "Flags:", *lines])


def _meaning(flag: flags.Flag) -> str:
    default = "" if flag.default in (None, [], False) else f" (default: {flag.default_as_str})"
    return flag.help.splitlines()[0].rstrip(";") + default  # absl appends lines of its own


def _explain(error: BaseException, flag: str, arguments: list[str]) -> str:
    """Say in one line what is behind a chain of exceptions from parsing the flags, of which one may be a config's."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    innermost = chain[-1]
    name = str(innermost.args[0] if innermost.args else "").strip("\"'")
    if isinstance(innermost, KeyError) and any(f".{name}" in word.partition("=")[0] for word in arguments):
        return f"a --config.FIELD flag names {name!r}, which is no field; all are in simplest_vit/config.py"
    if isinstance(innermost, UserError):
        return str(innermost)
    message = (str(innermost).splitlines() or [""])[-1].strip()
    if not isinstance(error, flags.Error) or isinstance(innermost, SyntaxError | ImportError | OSError):
        return f"--{flag} cannot be loaded: {type(innermost).__name__}: {message}"
    first = str(error).splitlines()[0]
    return first if message in first else f"{first} {message}"
