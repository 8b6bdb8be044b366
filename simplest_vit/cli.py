"""The parts that all commands share: the flags of a run, streams, signals, and one-line errors."""

import atexit
import contextlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags.config_flags import ConfigFileFlagParser

from simplest_vit import preemption, streams
from simplest_vit.config import FIELDS, check, suggest
from simplest_vit.errors import Interrupted, TrainingError, UserError, not_installed, print_error
from simplest_vit.files import local_path

_CONFIGS: list[flags.FlagHolder] = []
_EXIT_S = 5


class _PathParser(flags.ArgumentParser):
    """Expands and checks paths when they are parsed: see `local_path`."""

    def parse(self, argument: str) -> str:
        return local_path(argument) if argument else argument


def define_path(name: str, default: str | None, description: str) -> flags.FlagHolder:
    """Define a flag `--NAME=PATH`."""
    return flags.DEFINE(_PathParser(), name, default, description)


def define_paths(name: str, description: str) -> flags.FlagHolder:
    """Define a flag `--NAME=PATH` that may be repeated."""
    serializer: flags.ArgumentSerializer[str] = flags.ArgumentSerializer()
    return flags.DEFINE_multi(_PathParser(), serializer, name, [], description)


def _is_run(folder: str | None) -> bool:
    return bool(folder) and os.path.exists(os.path.join(str(folder), "config.json"))


class _ConfigParser(ConfigFileFlagParser):
    """Accepts the name of a recipe, else the folder of a run or a file, which the base class cuts at its colon."""

    def parse(self, path: str) -> Any:
        from simplest_vit import recipes  # a clone without symbolic links does not have it

        if _is_run(path) and path not in recipes.NAMES:  # a run in the folder `digits` is ./digits
            from simplest_vit.training.workdir import read_run

            return read_run(path)[1].lock()
        recipe = recipes.find(path, self.name)
        return super().parse(path) if recipe is None else recipe.lock()


def _define_config(name: str, description: str, values: flags.FlagValues, **options: Any) -> flags.FlagHolder:
    holder = config_flags.DEFINE_config_file(name, None, description, values, **options)
    values[name].parser = _ConfigParser(name)
    return holder


class _IntervalParser(flags.ArgumentParser):
    """Reads steps as an integer; `config.check` checks other text, such as "1 epoch"."""

    def parse(self, argument: str | int) -> str | int:
        return int(argument) if re.fullmatch(r"-?[0-9]+", str(argument)) else argument


class _OptionalParser(flags.ArgumentParser):
    """Reads None as no value, as the table of fields writes it."""

    def __init__(self, parser: flags.ArgumentParser) -> None:
        self._parser = parser

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


config_flags.register_flag_parser_for_type(int | str, _IntervalParser())
for _kind, _parser in ((str, flags.ArgumentParser()), (int, flags.IntegerParser()), (float, flags.FloatParser())):
    config_flags.register_flag_parser_for_type(_kind, _OptionalParser(_parser))


def define_config(name: str, description: str) -> flags.FlagHolder:
    """Define a flag `--NAME=RECIPE`, with `--NAME.FIELD=VALUE`; `run` loads and checks its config if it is given."""
    _CONFIGS.append(_define_config(name, description, flags.FLAGS))
    return _CONFIGS[-1]


CONFIG = define_config("config", "Recipe or config file, with its arguments after a colon: cifar10:model=simple_vit")
WORKDIR = define_path("workdir", None, "Folder of the run: checkpoints, metrics, TensorBoard files, results.")
flags.disclaim_key_flags()  # what these functions define from now on belongs to their callers, whose help lists it


def _with_own_config(arguments: list[str]) -> list[str]:
    """Name the run in --workdir as the config if fields are set without --config."""
    names = {word.lstrip("-").partition("=")[0] for word in arguments if word.startswith("-")}
    if CONFIG.name in names or not any(name.removeprefix("no").startswith(f"{CONFIG.name}.") for name in names):
        return arguments
    values = flags.FlagValues()
    workdir = flags.DEFINE(_PathParser(), WORKDIR.name, None, "", flag_values=values)
    values.set_gnu_getopt()
    values(["", *arguments], known_only=True)
    if not _is_run(workdir.value):
        return arguments
    return [f"--{CONFIG.name}={os.path.join(os.curdir, str(workdir.value))}", *arguments]  # not a recipe of that name


def load_config(arguments: list[str]) -> ConfigDict:
    """Load and check a config from `--config` flags, as a command that is called with these flags does.

    Raises:
      UserError: If it cannot be loaded, or a value is not allowed.
    """
    values = flags.FlagValues()
    argv = ["", *arguments]
    config = _define_config(CONFIG.name, "", values, sys_argv=argv)
    try:
        values(argv)
        _require_config(config)
    except Exception as error:
        raise UserError(_explain(error, config.name, arguments)) from error
    check(config.value)
    return config.value


def given_fields() -> dict[str, Any]:
    """Return the fields of the config that this command's flags set, by dotted name."""
    return config_flags.get_override_values(flags.FLAGS[CONFIG.name])


def config_arguments() -> list[str]:
    """Return the flags that give the config of this command again."""
    set_fields = (f"--{CONFIG.name}.{field}={value}" for field, value in given_fields().items())
    return [f"--{CONFIG.name}={config_flags.get_config_filename(flags.FLAGS[CONFIG.name])}", *set_fields]


def seeds_from(first: int, count: int) -> range:
    """Return the `count` seeds of --seeds from `first` up; a UserError if the last one is too large."""
    seeds, allowed = range(first, first + count), FIELDS["seed"].values
    if not allowed.allows(seeds[-1]):
        raise UserError(
            f"--seeds={count}: the last seed is {seeds[-1]}, expected {allowed.expected}; lower config.seed"
        )
    return seeds


def _require_config(config: flags.FlagHolder) -> None:
    """Read a config file now; absl reads it only when the flag is first used."""
    getattr(config.value, "to_dict", None)
    if not isinstance(config.value, ConfigDict):
        raise UserError(f"--{config.name}: get_config in the file must return a ConfigDict; see configs/digits.py")


def run(
    program: Callable[..., None],
    usage: str,
    *,
    required: tuple[str, ...] = ("config", "workdir"),
    optional: tuple[str, ...] = (),
    positional: bool = False,
) -> None:
    """Parse the flags, run a command, and print each user error as one line on standard error.

    Exit codes: 0, 2 for a `UserError`, 3 for a `TrainingError`, 75 for an `Interrupted`.

    Args:
      program: The command. It takes the list of positional arguments if these are allowed, otherwise nothing.
      usage: An example of the command, printed when a flag is missing.
      required: Names of flags that must be given.
      optional: Those of --config and --workdir that may also be given.
      positional: Whether arguments without a flag are allowed.
    """
    streams.install()
    preemption.install()
    try:
        # ml_collections finds the fields of a config in sys.argv.
        sys.argv[1:] = flags.FLAGS.read_flags_from_files(sys.argv[1:])
        if {"--help", "-h"} & set(sys.argv[1:]):
            print(_help(program, (*required, *optional)))
            return
        app.run(
            lambda arguments: _run_program(program, *([arguments[1:]] if positional else [])),
            flags_parser=lambda argv: _parse(argv, usage, required, optional, positional),
        )
    except UserError as error:
        sys.exit(print_error(error))
    except flags.Error as error:
        sys.exit(print_error(UserError(str(error))))
    except (TrainingError, Interrupted) as error:
        _exit(error)
    except streams.StdoutError as error:
        if isinstance(error.__cause__, BrokenPipeError):  # the reader has exited, as in `| head`
            sys.exit(141)  # 128 + SIGPIPE, which Windows lacks
        sys.exit(print_error(TrainingError(f"standard output cannot be written ({error})")))


def _exit(error: TrainingError | Interrupted) -> NoReturn:
    """End the process without waiting for its threads.

    XLA may be running, and would crash when the interpreter is torn down. Threads of Orbax wait forever after a disk
    error. The reader of standard error may have paused, so that the pipe is full.
    """

    def end() -> None:
        print_error(error)
        atexit._run_exitfuncs()

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    ending.join(_EXIT_S)
    os._exit(error.exit_code)


def _run_program(program: Callable[..., None], *arguments: list[str]) -> None:
    """Check the config and run; a lack of libraries, memory or devices also becomes a one-line error."""
    try:
        for config in _given():
            check(config.value)
        preemption.check()
        program(*arguments)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    except MemoryError as error:
        raise TrainingError("the process is out of memory; stop other programs or raise its limit") from error
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["there is no such device"])[0]
        if reason.startswith("RESOURCE_EXHAUSTED"):
            raise TrainingError(
                f"the device is out of memory ({reason}); stop other programs there, or set JAX_PLATFORMS=cpu"
            ) from error
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if frame.f_globals["__name__"] != "jax._src.xla_bridge":
            raise
        raise UserError(
            f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {reason}; install jax for that device, or choose "
            "another: JAX_PLATFORMS=cpu"
        ) from error


def _given() -> list[flags.FlagHolder]:
    """Return the config-file flags given on the command line."""
    return [config for config in _CONFIGS if config.present]


def _parse(
    argv: list[str], usage: str, required: tuple[str, ...], optional: tuple[str, ...], positional: bool
) -> list[str]:
    """Parse flags; raise a UserError if they do not make a valid config."""
    name = CONFIG.name
    try:
        if name in optional:
            argv = [argv[0], *_with_own_config(argv[1:])]
        remaining = flags.FLAGS(argv)
        for needed in required:
            if flags.FLAGS[needed].value in (None, "") and not (needed == CONFIG.name and CONFIG.present):
                raise missing(needed, usage)
        for shared in (CONFIG, WORKDIR):
            if shared.present and shared.name not in (*required, *optional):
                raise UserError(f"--{shared.name} is not a flag of this command; usage: {usage}")
        for config in _given():
            name = config.name
            _require_config(config)
    except Exception as error:  # a config file is a program and may raise anything
        raise UserError(_explain(error, name, argv[1:])) from error
    if len(remaining) > 1 and not positional:
        raise UserError(f"unexpected argument {remaining[1]!r}; every option is a --flag")
    return remaining


@contextlib.contextmanager
def naming(flags_of: dict[str, str]) -> Iterator[None]:
    """Name a command's own flags in user errors, instead of the config fields that they set, given by dotted name."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for field, flag in flags_of.items():
            message = re.sub(rf"(--)?\bconfig\.{re.escape(field)}\b", flag, message)
        raise UserError(message) from error


def missing(name: str, usage: str) -> UserError:
    """Return what to raise if a flag is needed and not given."""
    return UserError(f"--{name} is missing; usage: {usage}")


def _help(program: Callable[..., None], shared: tuple[str, ...]) -> str:
    """Format the help of a command: its module's docstring and flags, and the shared flags that it accepts."""
    module = sys.modules[program.__module__]
    own = flags.FLAGS.get_key_flags_for_module(sys.argv[0] if module.__name__ == "__main__" else module.__name__)
    taken = [flags.FLAGS[name] for name in shared] + [flag for flag in own if flag.name not in shared]
    lines = [f"  --{flag.name:<20} {_meaning(flag)}" for flag in taken]
    return "\n".join([module.__doc__ or "", *(["Flags:", *lines] if lines else [])])


def _meaning(flag: flags.Flag) -> str:
    default = "" if flag.default in (None, [], False) else f" (default: {flag.default_as_str})"
    return flag.help.splitlines()[0].rstrip(";") + default  # absl appends its own lines


def _explain(error: BaseException, flag: str, arguments: list[str]) -> str:
    """Describe in one line the cause of a chain of exceptions from parsing flags or loading a config."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    innermost = chain[-1]
    name = str(innermost.args[0] if innermost.args else "").strip("\"'")
    if isinstance(innermost, KeyError) and any(f".{name}" in word.partition("=")[0] for word in arguments):
        return f"a --config.FIELD flag names {name!r}, which is not a field; {suggest(name)}"
    if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith(f"{CONFIG.name}."):
        return f"--{error.flagname} sets a field of a config, and --{CONFIG.name} is missing; give it as well"
    if isinstance(innermost, UserError):
        named = re.match(r"flag --([\w.]+)=", str(error))
        is_path = named and named[1] not in [config.name for config in _CONFIGS]  # an error of `_PathParser`
        return f"--{named[1]}={innermost}" if named and is_path else str(innermost)
    field = re.match(r"flag --config\.([\w.]+)=(.*?): ", str(error))
    if field and field[1] in FIELDS and isinstance(innermost, ValueError):
        _, values, meaning, _ = FIELDS[field[1]]
        return f"config.{field[1]}={field[2]} must be {values.expected} ({meaning})"
    message = (str(innermost).splitlines() or [""])[-1].strip()
    if not isinstance(error, flags.Error) or isinstance(innermost, SyntaxError | ImportError | OSError):
        return f"--{flag} cannot be loaded: {type(innermost).__name__}: {message}"
    first = str(error).splitlines()[0]
    return first if message in first else f"{first} {message}"
