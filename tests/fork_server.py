"""Runs command lines of this project as processes of their own, without importing everything for each of them.

A process that has imported the libraries, but not used them, forks for each command; so each has its own flags,
environment, standard error and exit code, and takes a tenth of a second instead of seconds.
"""

import contextlib
import gc
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings

import jax


def xla_flags(devices: int) -> str:
    """The flags of the tests, with which XLA compiles fast, for another number of devices."""
    return re.sub("(device_count)=[0-9]+", rf"\1={devices}", os.environ["XLA_FLAGS"])


class ForkServer:
    """To be used as a context; `run` runs a command line, by default on one device."""

    def __init__(self, root):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        environment |= {
            "XLA_FLAGS": xla_flags(devices=1),
            "JAX_COMPILATION_CACHE_DIR": os.environ["SIMPLEST_VIT_TEST_CACHE"],
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def run(self, arguments, environment=None, missing=()):
        """Run a command line.

        Args:
          arguments: `main.py`, or a module to run, and its arguments.
          environment: Variables to set, or with None as the value, to remove.
          missing: Modules to pretend that are not installed.

        Returns:
          Exit code, standard output, standard error.
        """
        request = {"arguments": [*map(str, arguments)], "environment": environment or {}, "missing": missing}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return tuple(json.loads(self._process.stdout.readline()))


def _run(request):
    """In the forked process: run the command line and return its exit code."""
    signal.alarm(300)
    for name, value in request["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    for name in request["missing"]:
        for loaded in [module for module in sys.modules if module.split(".")[0] in (name, "simplest_vit")]:
            del sys.modules[loaded]
        sys.modules[name] = None
    if "JAX_PLATFORMS" in request["environment"]:  # which JAX has read already
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
    program, *arguments = request["arguments"]
    sys.argv = [program, *arguments]
    try:
        if program.endswith(".py"):
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _serve():
    import scipy.optimize  # noqa: F401  # which networks with TAT import

    import input_pipeline  # noqa: F401
    from simplest_vit import config, predict  # noqa: F401
    from simplest_vit.analysis import report  # noqa: F401
    from simplest_vit.commands import signal_propagation  # noqa: F401
    from simplest_vit.training import evaluate, train  # noqa: F401

    warnings.filterwarnings("ignore", "os.fork|.*found in sys.modules")
    gc.collect()
    gc.freeze()  # as in `conftest.py`; and collecting would copy their pages into each child
    for line in sys.stdin:
        request = json.loads(line)
        with contextlib.ExitStack() as stack:
            out, err = (stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2))
            child = os.fork()
            if child == 0:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                code = _run(request)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read())
        print(json.dumps([code, *texts]), flush=True)


if __name__ == "__main__":
    _serve()
