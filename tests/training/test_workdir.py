import errno
import fcntl
import json
import subprocess
import sys

import pytest

from simplest_vit.errors import TrainingError, UserError
from simplest_vit.training.workdir import check_workdir, claim_workdir, write_json, write_results

CONFIG = {"seed": 1, "log_every": 10, "data": {"dir": None, "flip": True}}


def test_a_new_folder_is_checked_without_being_made(tmp_path):
    path = check_workdir(str(tmp_path / "a" / "b"), CONFIG)
    assert not path.exists()
    with claim_workdir(path, CONFIG):
        assert json.loads((path / "config.json").read_text()) == CONFIG


def test_the_same_run_may_change_how_it_is_watched(tmp_path):
    with claim_workdir(tmp_path, CONFIG):
        pass
    check_workdir(str(tmp_path), CONFIG | {"log_every": 1, "data": {"dir": "/elsewhere", "flip": True}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, r"config.seed is 1, now 2"),
        ({"data": {"dir": None, "flip": False}}, r"config.data.flip is True, now False"),
        ({"new": 3}, r"config.new is None, now 3"),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    with claim_workdir(tmp_path, CONFIG), pytest.raises(UserError, match=message):
        check_workdir(str(tmp_path), CONFIG | change)


def test_a_folder_is_for_one_process_at_a_time(tmp_path):
    claim = f"""
from simplest_vit.training.workdir import claim_workdir
import pathlib, sys
with claim_workdir(pathlib.Path({str(tmp_path)!r}), {{}}):
    print("claimed", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"claimed\n"
        with (
            pytest.raises(UserError, match=r"is in use: another process trains there"),
            claim_workdir(tmp_path, CONFIG),
        ):
            pass
        other.kill()
    with claim_workdir(tmp_path, CONFIG):
        pass


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def flock(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with claim_workdir(tmp_path, CONFIG):
        assert (tmp_path / "config.json").exists()


def test_bad_folders(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "orphan" / "checkpoints").mkdir(parents=True)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    for name, message in [
        ("file", "is a file"),
        ("file/below", "is a file"),
        ("orphan", "has checkpoints but no config.json"),
        ("torn", "cannot be read"),
    ]:
        with pytest.raises(UserError, match=message):
            check_workdir(str(tmp_path / name), CONFIG)
    with pytest.raises(UserError, match="cannot be written"), claim_workdir(tmp_path / "file" / "below", CONFIG):
        pass


def test_a_json_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"value": object()})
    assert list(tmp_path.iterdir()) == []


def test_results_that_cannot_be_written_leave_nothing_behind(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(TrainingError, match=r"results.json cannot be written \(.*its last checkpoint is intact"):
        write_results(tmp_path, {"steps": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
