import dataclasses
import errno
import fcntl
import json
import os
import re
import subprocess
import sys

import pytest

from simplest_vit.errors import TrainingError, UserError
from simplest_vit.training import workdir
from simplest_vit.training.workdir import (
    VERSION,
    check_workdir,
    is_resumable,
    lock_workdir,
    read_run,
    write_json,
    write_results,
)
from tests.tiny import DIGITS, tiny_config

CONFIG = tiny_config().to_dict()


def changed(**values):
    return tiny_config(**values).to_dict()


def test_a_new_folder_is_checked_without_being_made(tmp_path):
    path = check_workdir(str(tmp_path / "a" / "b"), CONFIG)
    assert not path.exists()
    with lock_workdir(path, CONFIG, DIGITS):
        assert json.loads((path / "config.json").read_text()) == {"version": VERSION, "config": CONFIG}
        assert json.loads((path / "dataset.json").read_text()) == DIGITS.to_json()
    _, config, data = read_run(str(path))
    assert (config.to_dict(), data) == (CONFIG, DIGITS)


def test_a_run_finds_its_folders_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = changed(data__dir="tfds", data__manual_dir="../photos", init_from="other")
    with lock_workdir(tmp_path / "run", relative, DIGITS):
        check_workdir("run", relative)
        monkeypatch.chdir("/")
    config = read_run(str(tmp_path / "run"))[1]
    assert (config.data.dir, config.data.manual_dir) == (str(tmp_path / "tfds"), str(tmp_path.parent / "photos"))
    assert config.init_from == str(tmp_path / "other")
    with pytest.raises(UserError, match=f"config.init_from is '{tmp_path}/other', now '/other'"):
        check_workdir(str(tmp_path / "run"), relative)


def test_the_same_run_may_change_how_it_is_watched(tmp_path):
    with lock_workdir(tmp_path, CONFIG, DIGITS):
        pass
    check_workdir(str(tmp_path), changed(log_every=1, data__dir="/elsewhere"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed(seed=2), r"config.seed is 3407, now 2"),
        (changed(data__flip=True), r"config.data.flip is False, now True"),
        (CONFIG | {"new": 3}, r"config.new is None, now 3"),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    with lock_workdir(tmp_path, CONFIG, DIGITS), pytest.raises(UserError, match=message):
        check_workdir(str(tmp_path), change)


def test_a_folder_is_for_one_process_at_a_time(tmp_path):
    claim = f"""
from simplest_vit.training.workdir import lock_workdir
from tests.tiny import DIGITS, tiny_config
import pathlib, sys
with lock_workdir(pathlib.Path({str(tmp_path)!r}), tiny_config().to_dict(), DIGITS):
    print("claimed", flush=True)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", claim], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"claimed\n"
        with (
            pytest.raises(UserError, match=r"is in use: another process trains there"),
            lock_workdir(tmp_path, CONFIG, DIGITS),
        ):
            pass
        other.kill()
    with lock_workdir(tmp_path, CONFIG, DIGITS):
        pass


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch, caplog):
    def flock(handle, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_workdir(tmp_path, CONFIG, DIGITS):
        assert (tmp_path / "config.json").exists()
    assert "cannot be locked ([Errno 38] Function not implemented): make sure that no other" in caplog.text


def test_the_lock_is_one_that_nfs_keeps(tmp_path, monkeypatch):
    """There flock is fcntl's lock, which needs a file that is open for writing."""
    modes = []
    monkeypatch.setattr(fcntl, "flock", lambda file, _: modes.append(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))
    with lock_workdir(tmp_path, CONFIG, DIGITS):
        assert modes == [os.O_RDWR]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("depth", "x", r"config.json is damaged or not of this version \(config.model.depth='x' must be an integer"),
        ("patch_size", 0, r"config.model.patch_size=0 must be"),
        ("shards", 3, r"config.model.shards is unknown"),
    ],
)
def test_the_config_of_a_folder_is_checked_as_any_other(tmp_path, field, value, message):
    with lock_workdir(tmp_path, CONFIG, DIGITS):
        pass
    content = json.loads((tmp_path / "config.json").read_text())
    content["config"]["model"][field] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_run(str(tmp_path))


def test_only_whole_names_of_fields_and_sections_are_resumable():
    assert all(map(is_resumable, ("fsdp", "profile.first_step", "data.dir")))
    assert not any(map(is_resumable, ("data.name", "eval_every_epochs", "profiles", "data.directory")))


def test_the_commit_is_that_of_this_project_not_of_one_around_it(tmp_path, monkeypatch):
    for command in (["init", "-q"], ["-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "x", "--allow-empty"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    package = tmp_path / "site-packages" / "simplest_vit" / "training"
    package.mkdir(parents=True)
    monkeypatch.setattr(workdir, "__file__", str(package / "workdir.py"))
    assert workdir.environment()["commit"] is None
    monkeypatch.setattr(workdir, "__file__", str(tmp_path / "simplest_vit" / "training" / "workdir.py"))
    commit = workdir.environment()["commit"]
    assert re.fullmatch(r"[0-9a-f]{40}", commit)
    (tmp_path / "changed").touch()
    subprocess.run(["git", "-C", tmp_path, "add", "changed"], check=True)
    assert workdir.environment()["commit"] == commit + "+"


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
    with (
        pytest.raises(UserError, match="cannot be written"),
        lock_workdir(tmp_path / "file" / "below", CONFIG, DIGITS),
    ):
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "dataset.json"])
def test_files_of_these_names_that_are_not_of_a_run_are_kept(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=f"has {name} but no config.json; choose another folder"):
        check_workdir(str(tmp_path), CONFIG)


def test_a_run_that_stopped_before_it_wrote_its_config_is_restarted(tmp_path):
    write_json(tmp_path / "dataset.json", DIGITS.to_json())
    assert check_workdir(str(tmp_path), CONFIG) == tmp_path


def test_a_json_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"value": object()})
    assert list(tmp_path.iterdir()) == []


def test_a_link_a_pipe_and_a_device_are_written_to_and_not_replaced(tmp_path):
    """As root, `--csv /dev/null` made it a plain file."""
    target, link, pipe = (tmp_path / name for name in ("target.json", "link.json", "pipe"))
    link.symlink_to(target)
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (link, link, pipe):  # the link's target does not exist the first time
        write_json(path, {"value": 1})
    assert link.is_symlink()
    assert pipe.is_fifo()
    assert target.read_bytes() == os.read(reader, 100) == b'{\n  "value": 1\n}\n'
    os.close(reader)
    assert {path.name for path in tmp_path.iterdir()} == {"target.json", "link.json", "pipe"}


def test_results_that_cannot_be_written_leave_nothing_behind(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(TrainingError, match=r"results.json cannot be written \(.*its last checkpoint is intact"):
        write_results(tmp_path, {"steps": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_run_that_another_process_began_meanwhile_is_not_taken_over(tmp_path):
    """Between check and claim data may be prepared, for minutes."""
    check_workdir(str(tmp_path), CONFIG)
    with lock_workdir(tmp_path, changed(seed=2), DIGITS):
        pass
    with (
        pytest.raises(UserError, match=r"holds another run: its config.seed is 2, now 3407"),
        lock_workdir(tmp_path, CONFIG, DIGITS),
    ):
        pass
    assert read_run(str(tmp_path))[1]["seed"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_size": 1431}, r"their train_size was 1437, now 1431; restore the data"),
        ({"class_names": tuple("abcdefghij")}, r"their class_names was \['0', .*, now \['a', "),
        ({"fingerprint": "x"}, r"their fingerprint was '', now 'x'"),
    ],
)
def test_a_run_does_not_go_on_with_other_data(tmp_path, change, message):
    with lock_workdir(tmp_path, CONFIG, DIGITS):
        pass
    other = dataclasses.replace(DIGITS, **change)
    with pytest.raises(UserError, match=message) as caught, lock_workdir(tmp_path, CONFIG, other):
        pass
    assert "\n" not in str(caught.value)
    assert read_run(str(tmp_path))[2] == DIGITS


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_resume_on_a_full_disk_asks_for_room_and_not_for_another_folder(tmp_path, monkeypatch, number):
    def full(_):
        raise OSError(number, os.strerror(number))

    with lock_workdir(tmp_path, CONFIG, DIGITS):
        pass
    monkeypatch.setattr(os, "fsync", full)
    message = (
        rf"^--workdir=.* cannot be written \({os.strerror(number)}\): make room on the disk and rerun the command$"
    )
    with pytest.raises(TrainingError, match=message), lock_workdir(tmp_path, CONFIG, DIGITS):
        pass
    assert read_run(str(tmp_path))[2] == DIGITS


def test_a_folder_of_an_older_version_is_refused_and_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))  # as 0.1 wrote it
    for read in (lambda: check_workdir(str(tmp_path), CONFIG), lambda: read_run(str(tmp_path))):
        with pytest.raises(
            UserError, match=r"was made by version 0.1 of this project, this is .*; use version 0.1, or choose"
        ):
            read()


def test_a_field_that_is_new_since_has_its_default(tmp_path):
    settings, other = (tiny_config("optimizer=muon", model__remat=remat).to_dict() for remat in (False, True))
    with lock_workdir(tmp_path, settings, DIGITS):
        pass
    content = json.loads((tmp_path / "config.json").read_text())
    del content["config"]["model"]["remat"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    check_workdir(str(tmp_path), settings)
    assert read_run(str(tmp_path))[1].to_dict() == settings
    with pytest.raises(UserError, match=r"config.model.remat is False, now True"):
        check_workdir(str(tmp_path), other)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """So that a power cut leaves the old file or the new one, and never an empty one."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: [events.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle)]
    )
    monkeypatch.setattr(os, "replace", lambda a, b: [events.append("replace"), replace(a, b)])
    write_json(tmp_path / "x.json", {"value": 1})
    temporary, *then = events
    assert re.fullmatch(rf"{tmp_path}/x\.json\.\w+\.tmp", temporary)
    assert then == ["replace", str(tmp_path)]


def test_no_other_file_is_overwritten_and_the_umask_holds(tmp_path):
    (tmp_path / "x.json.tmp").write_text("the user's")
    write_json(tmp_path / "x.json", {})
    assert (tmp_path / "x.json.tmp").read_text() == "the user's"
    assert (tmp_path / "x.json").stat().st_mode == (tmp_path / "x.json.tmp").stat().st_mode
