"""What a run remembers of its data: there and back through JSON, and a fingerprint that tells data sets apart."""

import json
import math
import pathlib
import shutil

import pytest

import input_pipeline
from simplest_vit.data.dataset import DatasetInfo
from simplest_vit.errors import UserError

FILE = pathlib.Path("run/dataset.json")
INFO = DatasetInfo(
    name="digits",
    version="1.0.0",
    description="Two animals.",
    train_split="train[:90%]",
    validation_split="train[90%:]",
    train_size=3,
    validation_size=2,
    class_names=("cat", "Hündin\u2028"),
    image_shape=(8, 9, 3),
    eval_resize=8,
    mean=(0.1, 0.2, 0.3),
    std=(1.0, 1 / 3, 1e-9),
    fingerprint="0123",
)


def test_a_data_set_is_remembered_by_a_json_file():
    assert DatasetInfo.from_json(json.loads(json.dumps(INFO.to_json())), FILE) == INFO
    assert INFO.to_json() == json.loads(json.dumps(INFO.to_json()))  # so that a run can compare them
    assert INFO.num_classes == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 3),
        ("version", None),
        ("fingerprint", ["0"]),
        ("train_size", 0),
        ("train_size", True),
        ("validation_size", "2"),
        ("class_names", "cat"),
        ("class_names", []),
        ("class_names", ["cat", 2]),
        ("image_shape", [8, 8]),
        ("eval_resize", 0),
        ("image_shape", [8, 8, 0]),
        ("image_shape", [8, 8, 1.0]),
        ("image_shape", [8, 8, True]),
        ("mean", [0.1, 0.2]),
        ("mean", 0.5),
        ("std", [0.1, 0.2, "0.3"]),
        ("std", [0.1, 0.2, 0.0]),
        ("std", [0.1, 0.2, math.nan]),
        ("mean", [0.1, 0.2, math.inf]),
        ("mean", [0.1, 0.2, 10**400]),
        ("image_shape", [2**40, 8, 3]),
        ("colour", 1),
        *((name, ...) for name in INFO.to_json()),
    ],
)
def test_a_damaged_missing_or_unknown_field_is_named(field, value):
    values = {name: found for name, found in (INFO.to_json() | {field: value}).items() if found is not ...}
    with pytest.raises(UserError, match=rf"^run/dataset.json: {field} is not valid \(.+\); restore .* --workdir$"):
        DatasetInfo.from_json(values, FILE)


def test_the_fingerprint_is_of_the_content_not_of_the_place_and_needs_no_tensorflow(make_config, tmp_path, server):
    first = input_pipeline.load(make_config("digits", dir=tmp_path / "a").data)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    (tmp_path / "copy/digits/1.0.0/.DS_Store").touch()
    (tmp_path / "copy/digits/1.0.0/simplest_vit.npz").unlink()  # measured anew
    info = tmp_path / "copy/digits/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("builders.digits", "elsewhere"))
    copy = input_pipeline.load(make_config("digits", dir=tmp_path / "copy").data)
    assert copy.info == first.info
    assert type(first.info) is DatasetInfo
    assert len(first.info.fingerprint) == 64
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, input_pipeline as ip; from configs.digits import get_config\n"
        f"data = get_config().data; data.dir = {str(tmp_path / 'prepared anew')!r}\n"
        "print(ip.load(data).fingerprint, 'tensorflow' in sys.modules)"
    )
    _, out, err = server.run([program])
    assert out.splitlines()[-1] == f"{first.fingerprint} False", err
