"""Full disks and files that may not grow: told in one line, and nothing that is there is harmed."""

import os
import shutil
import subprocess

import pytest

from simplest_vit.training.checkpoint import Checkpoints
from tests.faults.processes import Run, assert_same_end

SCHEDULE = {"steps": 40, "eval_every": 10, "checkpoint_every": 10, "log_every": 1}


@pytest.fixture
def small_disk(tmp_path):
    """An empty file system, and a function that sets its size in KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")

    def resize(kib):
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(folder)], check=True)

    yield folder, resize
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_which_goes_on_when_there_is_room(small_disk, tmp_path):
    disk, resize = small_disk
    uninterrupted = Run(tmp_path / "uninterrupted", data__dir=str(tmp_path), **SCHEDULE)
    uninterrupted.finish()
    size = sum(4 * -(-path.stat().st_size // 4096) for path in (uninterrupted.workdir / "checkpoints/40").rglob("*"))
    resize(round(2.5 * size))
    run = Run(disk / "run", data__dir=str(tmp_path), **SCHEDULE)
    code, stderr = run.stop("", 0)
    assert code == 3, stderr
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert f"checkpoint in {run.workdir}/checkpoints cannot be written (No space left on device)" in line
    with Checkpoints(run.workdir, create=False) as checkpoints:
        saved = checkpoints.newest()
    assert saved in (10, 20)
    resize(10_000)
    stderr = run.finish()
    assert f"resuming at step {saved} of 40" in stderr
    assert_same_end(run, uninterrupted.end())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prlimit") is None, reason="prlimit (util-linux) limits the size of files")
def test_an_event_file_that_cannot_grow_does_not_stop_the_run(tmp_path):
    schedule = SCHEDULE | {"steps": 300, "eval_every": 100, "checkpoint_every": 100}
    uninterrupted = Run(tmp_path / "uninterrupted", data__dir=str(tmp_path), **schedule)
    uninterrupted.finish()
    limit = ("prlimit", f"--fsize={64 * 1024}")
    run = Run(tmp_path / "run", data__dir=str(tmp_path), launcher=limit, **schedule)
    stderr = run.finish()
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if "tfevents" in line]
    assert line.endswith("cannot be written (File too large): the run continues without it")
    (events,) = run.workdir.glob("*tfevents*")
    assert events.stat().st_size == 64 * 1024
    assert_same_end(run, uninterrupted.end())
