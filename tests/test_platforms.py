"""Platforms that lack what Linux has, as far as one can tell without them."""

import subprocess
import sys

import pytest

from simplest_vit.errors import not_installed

HIDE = """
import importlib.abc, os, platform, signal, sys, warnings

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden())
for name in {signals}:
    delattr(signal, name)
for name in ("EX_TEMPFAIL", "set_blocking", "sched_getaffinity"):
    delattr(os, name)
warnings.filterwarnings("ignore", "only soft file lock is available")
system, platform.system = platform.system, lambda: "Windows"
import grain  # asks for the name, not for the module
platform.system = system
"""
WINDOWS = HIDE.format(
    modules={"fcntl", "resource", "pwd", "grp", "termios", "array_record"},
    signals=["SIGHUP", "SIGUSR1", "SIGKILL", "SIGBUS", "SIGPIPE", "pthread_sigmask"],
)


def run(program):
    ended = subprocess.run([sys.executable, "-c", WINDOWS + program], capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stdout, ended.stderr


def test_all_is_imported_and_signals_are_watched_without_what_windows_lacks():
    program = """
import simplest_vit, simplest_vit.commands.train, simplest_vit.commands.predict, simplest_vit.training.train
from simplest_vit import preemption
print(*(getattr(simplest_vit, name).__name__ for name in simplest_vit.__all__))
with preemption.deferred(lambda number: print(number.name, flush=True)):
    signal.raise_signal(signal.SIGTERM)
    while preemption.received() is None: pass
"""
    code, out, err = run(program)
    public = ["Predictor", "create_model", "default", "load", "shampoo", "soap", "train"]
    assert (code, out.split()) == (0, [*public, "SIGTERM"]), err


def test_data_that_cannot_be_read_there_are_one_line(tmp_path):
    program = f"""
from simplest_vit.commands import main
sys.argv[1:] = ["prepare", "digits", "--data_dir={tmp_path}"]
main()
"""
    code, _, err = run(program)
    assert (code, err.splitlines()[1:]) == (2, [err.splitlines()[-1]])
    assert "error: No module named 'array_record'; install what the commands need" in err


@pytest.mark.parametrize(("platform", "remedy"), [("win32", "train in WSL"), ("linux", "pip install")])
def test_what_windows_lacks_is_not_to_be_installed_there(monkeypatch, platform, remedy):
    monkeypatch.setattr(sys, "platform", platform)
    error = not_installed(ModuleNotFoundError("No module named 'array_record'", name="array_record"))
    assert remedy in str(error)
    assert "pip install" in str(not_installed(ModuleNotFoundError("No module named 'optax'", name="optax")))
