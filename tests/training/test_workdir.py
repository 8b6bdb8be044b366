import json

import pytest

from simplest_vit.errors import TrainingError, UserError
from simplest_vit.training.workdir import check_workdir, claim_workdir, write_json, write_results

CONFIG = {"seed": 1, "log_every": 10, "data": {"dir": None, "flip": True}}


def test_a_new_folder_is_checked_without_being_made(tmp_path):
    path = check_workdir(str(tmp_path / "a" / "b"), CONFIG)
    assert not path.exists()
    claim_workdir(path, CONFIG)
    assert json.loads((path / "config.json").read_text()) == CONFIG


def test_the_same_run_may_change_how_it_is_watched(tmp_path):
    claim_workdir(tmp_path, CONFIG)
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
    claim_workdir(tmp_path, CONFIG)
    with pytest.raises(UserError, match=message):
        check_workdir(str(tmp_path), CONFIG | change)


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
    with pytest.raises(UserError, match="cannot be written"):
        claim_workdir(tmp_path / "file" / "below", CONFIG)


def test_a_json_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"value": object()})
    assert list(tmp_path.iterdir()) == []


def test_results_that_cannot_be_written_leave_nothing_behind(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(TrainingError, match=r"results.json cannot be written \(.*its last checkpoint is intact"):
        write_results(tmp_path, {"steps": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
