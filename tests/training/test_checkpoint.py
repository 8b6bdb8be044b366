import errno
import hashlib
import json
import logging
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from simplest_vit.errors import CheckpointError, UserError
from simplest_vit.training import state as state_module
from simplest_vit.training.checkpoint import Checkpoints
from simplest_vit.training.state import RunProgress

STATE = {
    "kernel": np.random.default_rng(0).normal(size=(100, 100)).astype(np.float32),
    "step": np.int32(3),
    "nothing": None,
}


def state_of(step):
    return jax.tree.map(jnp.asarray, STATE) | {"step": jnp.int32(step)}


def abstract():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state_of(0))


def evaluated(step, accuracy):
    return RunProgress(last_evaluation=step, validation_accuracy=accuracy)


def save(workdir, accuracies):
    with Checkpoints(workdir, create=True) as checkpoints:
        for step, accuracy in accuracies.items():
            checkpoints.save(state_of(step), evaluated(step, accuracy), step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, {3: 0.5, 6: 0.4})
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def replace(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


DAMAGES = {
    "flipped array": lambda folder: flip(largest(folder)),
    "truncated array": lambda folder: largest(folder).write_bytes(largest(folder).read_bytes()[:-100]),
    "missing array": lambda folder: largest(folder).unlink(),
    "flipped index": lambda folder: flip(folder / "state" / "manifest.ocdbt"),
    "flipped structure": lambda folder: flip(folder / "state" / "_METADATA"),
    "changed progress": lambda folder: replace(folder / "record.json", "0.4", "0.9"),
    "missing progress": lambda folder: replace(folder / "record.json", "progress", "regress"),
    "flipped record": lambda folder: flip(folder / "record.json"),
    "truncated record": lambda folder: (folder / "record.json").write_text("{"),
    "no dict": lambda folder: (folder / "record.json").write_text("3"),
    "deeply nested": lambda folder: (folder / "record.json").write_text(200_000 * "["),
    "not finished": lambda folder: (folder / "record.json").unlink(),
    "empty folder": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_newest_checkpoint_falls_back_and_can_be_saved_again(workdir, damage, caplog, capfd, monkeypatch):
    monkeypatch.setattr(logging.getLogger("simplest_vit"), "propagate", True)
    damage(workdir / "checkpoints" / "6")
    with Checkpoints(workdir, create=True) as checkpoints:
        assert checkpoints.newest() == 3
        (line,) = [record.getMessage() for record in caplog.records if record.name == "simplest_vit"]
        assert "checkpoint 6 in" in line
        assert "is damaged" in line
        assert "set aside as 6.damaged" in line
        assert (workdir / "checkpoints" / "6.damaged").is_dir()
        assert "going back to step 3" in line
        assert checkpoints.steps() == [3]
        state, progress = checkpoints.restore(abstract(), 3)
        jax.tree.map(np.testing.assert_array_equal, state, state_of(3))
        assert progress == evaluated(3, 0.5)
        checkpoints.save(state_of(6), progress, 6)
    with Checkpoints(workdir, create=False) as checkpoints:
        assert checkpoints.newest() == 6
    assert "Traceback" not in capfd.readouterr().err


def test_what_only_could_not_be_read_is_not_lost(workdir, monkeypatch):
    folder = workdir / "checkpoints"
    for aside in ("6.damaged", "6.damaged1"):  # the second time something is set aside already
        with monkeypatch.context() as patch, Checkpoints(workdir, create=True) as checkpoints:
            patch.setattr(state_module, "read_record", lambda _: json.loads((folder / "3/record.json").read_text()))
            assert checkpoints.newest() == 3
        shutil.copytree(folder / aside, folder / "6")
    assert (folder / "6.damaged").is_dir()
    with Checkpoints(workdir, create=False) as checkpoints:
        assert checkpoints.newest() == 6


def test_a_checkpoint_that_vanishes_is_told_in_one_line(workdir):
    with Checkpoints(workdir, create=False) as checkpoints:
        assert checkpoints.newest() == 6
        shutil.rmtree(workdir / "checkpoints" / "6")
        with pytest.raises(CheckpointError, match=r"checkpoint in .* cannot be read \(.*6"):
            checkpoints.restore(abstract(), 6)


def test_orbax_does_not_ask_jax_whether_to_stop(tmp_path, monkeypatch):
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: pytest.fail("asked"))
    save(tmp_path, {3: 0.5})


def test_reading_removes_nothing_and_tells_a_damage_once(workdir, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("simplest_vit"), "propagate", True)
    save(workdir, {6: 0.6})
    flip(largest(workdir / "checkpoints" / "6"))
    with Checkpoints(workdir, create=False) as checkpoints:
        assert (checkpoints.newest(), checkpoints.best()) == (3, 3)
        assert len([record for record in caplog.records if record.name == "simplest_vit"]) == 1
        with pytest.raises(UserError, match=r"checkpoint .*/6 cannot be restored \(state/.* is changed\)"):
            checkpoints.restore(abstract(), 6)
        assert checkpoints.steps() == [3, 6]


def test_a_checkpoint_that_cannot_be_read_counts_as_damaged(workdir, monkeypatch):
    def digest(file, name):
        if "/6/" in file.name:
            raise OSError(errno.EIO, "Input/output error")  # of a read: without the name of the file
        return file_digest(file, name)

    file_digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", digest)
    with Checkpoints(workdir, create=False) as checkpoints:
        assert checkpoints.newest() == 3
        with pytest.raises(UserError, match=r"/6 cannot be restored \(.*Input/output error\)"):
            checkpoints.restore(abstract(), 6)


def test_a_checkpoint_is_proved_once(workdir, monkeypatch):
    def digest(file, name):
        read.append(file.name)
        return file_digest(file, name)

    read, file_digest = [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", digest)
    with Checkpoints(workdir, create=False) as checkpoints:
        assert (checkpoints.newest(), checkpoints.best(), checkpoints.newest()) == (6, 3, 6)
        checkpoints.restore(abstract(), 3)
        checkpoints.restore(abstract(), 6)
    assert len(read) == len(set(read)) > 2


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/disk/run/checkpoints/10"), "No space left on device"),
        (ValueError("RESOURCE_EXHAUSTED: Failed to write [os_error_code='27'] a.tmp"), "File too large"),
        (ValueError("some\n other"), "some other"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_failed_write_is_told_in_few_words(tmp_path, monkeypatch, error, reason):
    def wait(manager):
        raise error

    with Checkpoints(tmp_path, create=True) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(type(checkpoints._manager), "wait_until_finished", wait)
        with pytest.raises(CheckpointError, match=rf"checkpoint in .* cannot be written \({reason}\)"):
            checkpoints.wait()


def test_another_process_that_has_gone_is_not_told_as_a_full_disk(tmp_path, monkeypatch):
    def wait(manager):
        try:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: barrier")
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError("waiting for async_write_complete") from error

    with Checkpoints(tmp_path, create=True) as checkpoints, monkeypatch.context() as patch:
        patch.setattr(type(checkpoints._manager), "wait_until_finished", wait)
        with pytest.raises(jax.errors.JaxRuntimeError, match="barrier"):
            checkpoints.wait()


def test_without_a_whole_checkpoint_the_run_does_not_start_anew(workdir):
    for step in ("3", "6"):
        flip(largest(workdir / "checkpoints" / step))
    with Checkpoints(workdir, create=True) as checkpoints:
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(6: state/.*; 3: .*; check the disk"):
            checkpoints.newest()
        assert checkpoints.steps() == [3, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": jax.ShapeDtypeStruct((3,), np.float32)}, r"its momentum is missing, here float32 \[3\]"),
        (
            {"kernel": jax.ShapeDtypeStruct((100, 50), np.float32)},
            r"its kernel is float32 \[100, 100\], here float32 \[100, 50\]",
        ),
    ],
)
def test_another_state_is_named_and_does_not_count_as_damage(workdir, change, message):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    other = abstract() | {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=device) for k, v in change.items()}
    with Checkpoints(workdir, create=True) as checkpoints:
        assert checkpoints.newest() == 6
        with pytest.raises(UserError, match=rf"checkpoint .*/6 cannot be restored \({message}.*written by this config"):
            checkpoints.restore(other, 6)
        assert checkpoints.steps() == [3, 6]


def test_a_part_is_restored_whatever_the_rest_is(workdir):
    with Checkpoints(workdir, create=False) as checkpoints:
        found, progress = checkpoints.restore({"kernel": abstract()["kernel"]}, 6)
    assert found.keys() == {"kernel"}
    np.testing.assert_array_equal(found["kernel"], STATE["kernel"])
    assert progress.last_evaluation == 6


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    with Checkpoints(tmp_path, create=True) as checkpoints:
        assert (checkpoints.newest(), checkpoints.best()) == (None, None)
        for step, accuracy, best in (
            (1, 0.1, 1),
            (2, 0.3, 2),
            (3, 0.1, 2),
            (4, 0.2, 2),
            (5, 0, 2),
            (6, 0.3, 6),
            (7, 0, 6),
        ):
            checkpoints.save(state_of(step), evaluated(step, accuracy), step)
            assert checkpoints.steps() == sorted({max(step - 1, 1), step, best})
    with Checkpoints(tmp_path, create=True) as checkpoints:
        assert (checkpoints.newest(), checkpoints.best()) == (7, 6)
        checkpoints.save(state_of(8), evaluated(8, 0.2), 8)
        checkpoints.save(state_of(9), evaluated(8, 0.9), 9)  # of an earlier step: this one was not evaluated
        assert checkpoints.steps() == [6, 8, 9]


def test_the_best_is_not_deleted_while_its_record_cannot_be_read(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("simplest_vit"), "propagate", True)
    save(tmp_path, {1: 0.9, 2: 0.3, 3: 0.1})
    record, aside = tmp_path / "checkpoints/1/record.json", tmp_path / "record.json"
    record.rename(aside)
    save(tmp_path, {4: 0.1})
    aside.rename(record)
    with Checkpoints(tmp_path, create=True) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best()) == ([1, 2, 3, 4], 1)
        checkpoints.save(state_of(5), evaluated(5, 0.1), 5)
        assert checkpoints.steps() == [1, 4, 5]
    (line,) = [record.getMessage() for record in caplog.records if record.name == "simplest_vit"]
    assert "record of checkpoint 1 in" in line


def test_a_best_whose_record_is_damaged_is_reported(workdir, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("simplest_vit"), "propagate", True)
    DAMAGES["truncated record"](workdir / "checkpoints" / "3")
    with Checkpoints(workdir, create=False) as checkpoints:
        assert checkpoints.best() == 6
    assert "checkpoint 3 in" in caplog.text
    assert "going back to step 6" in caplog.text


def test_a_step_saved_again_has_the_new_progress(workdir):
    save(workdir, {6: 0.6})
    with Checkpoints(workdir, create=False) as checkpoints:
        assert (checkpoints.steps(), checkpoints.newest(), checkpoints.best()) == ([3, 6], 6, 6)
        assert checkpoints.progress(6) == evaluated(6, 0.6)


def test_a_step_saved_again_is_never_missing(workdir, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)  # what makes the new record final
    with pytest.raises(KeyboardInterrupt):
        save(workdir, {6: 0.6})
    monkeypatch.undo()
    with Checkpoints(workdir, create=False) as checkpoints:
        assert (checkpoints.newest(), checkpoints.progress(6)) == (6, evaluated(6, 0.4))
        jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract(), 6)[0], state_of(6))


def test_what_a_killed_process_left_half_written_is_removed_but_not_by_a_reader(workdir):
    """A training run may be writing it at this moment."""
    unfinished = shutil.copytree(workdir / "checkpoints" / "6", workdir / "checkpoints" / "9.orbax-checkpoint-tmp")
    before = set(threading.enumerate())
    with Checkpoints(workdir, create=False) as checkpoints:
        assert checkpoints.newest() == 6
    for thread in set(threading.enumerate()) - before:  # Orbax removes in the background
        thread.join()
    assert unfinished.exists()
    save(workdir, {9: 0.4})
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"3", "6", "9"}


def test_a_reader_takes_the_next_checkpoint_if_a_training_removes_the_one_it_chose(workdir, monkeypatch, caplog):
    monkeypatch.setattr("simplest_vit.training.checkpoint._REMOVAL_S", 0)
    removed = []
    with Checkpoints(workdir, create=False) as checkpoints:

        def choose():
            step = checkpoints.newest()
            if not removed:
                removed.append(step)
                shutil.rmtree(workdir / "checkpoints" / str(step))
            return step

        assert checkpoints.load(choose, {"step": abstract()["step"]})[0]["step"] == 3
    assert removed == [6]
    assert "damaged" not in caplog.text
