"""Every flag of every command reaches what it is for; what that does is tested elsewhere."""

import contextlib
import importlib
import json
import shlex
import types

import jax
import numpy as np
import pytest
from absl import flags
from PIL import Image

from simplest_vit import cli, export, predict
from simplest_vit.analysis import classification_files
from simplest_vit.commands import processes, signal_propagation, sweep
from simplest_vit.data import input_pipeline, prepare
from simplest_vit.data.preview import image_grid
from simplest_vit.errors import UserError
from simplest_vit.training import evaluate
from simplest_vit.training.workdir import RESULTS
from tests.tiny import tiny_config

KINDS = ("string", "bool", "integer", "multi_string")


@pytest.fixture
def run(monkeypatch):
    """A function that runs a command in this process, with flags by name."""

    def run(name, *arguments, config=None, workdir="runs/mine", **given):
        def define(name, default=None, *_, **__):
            return types.SimpleNamespace(value=given.pop(name, default))

        for owner, function in [(flags, f"DEFINE_{kind}") for kind in KINDS] + [(cli, "define_path")]:
            monkeypatch.setattr(owner, function, define)
        monkeypatch.setattr(cli, "define_paths", lambda name, _: define(name))
        monkeypatch.setattr(cli, "CONFIG", types.SimpleNamespace(value=config, name="config"))
        monkeypatch.setattr(cli, "WORKDIR", types.SimpleNamespace(value=workdir))
        monkeypatch.setattr(
            cli, "run", lambda program, *_, positional=False, **__: program(*([list(arguments)] if positional else []))
        )
        importlib.import_module(f"simplest_vit.commands.{name}").main()
        assert not given, "no such flag"

    return run


@pytest.fixture
def record(monkeypatch):
    """A function that replaces another by one that records its arguments and returns a value."""

    def record(module, name, value=None):
        calls = []
        monkeypatch.setattr(module, name, lambda *a, **named: [calls.append((*a, *named.values())), value][1])
        return calls

    return record


def test_predict(run, record, capsys):
    calls = record(predict, "predict", iter([found := {"image": "a.jpg", "top": []}]))
    run("predict", "file:///b.jpg", images=["a.jpg"], json=True, csv="c.csv")
    assert calls == [("runs/mine", ["a.jpg", "/b.jpg"], "c.csv")]
    assert json.loads(capsys.readouterr().out) == found


def test_evaluate(run, record, monkeypatch, tmp_path):
    latest, best = (types.SimpleNamespace(name=name, summary=dict) for name in ("latest", "best"))
    calls, written = record(evaluate, "evaluate", {"latest": latest, "best": best}), []
    monkeypatch.setattr(classification_files, "write_classification", lambda *a: written.append(a))
    monkeypatch.setattr(processes, "connected", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    run("evaluate", config="config", split="test[:9]", output="report")
    assert calls == [("runs/mine", "config", {"validation_split": "test[:9]"})]
    assert written == [(best, "report")]
    for folder, split in (("cat", "all"), ("train", None)):  # all images, or those of val/
        (tmp_path / folder).mkdir()
        run("evaluate", image_folder=str(tmp_path))
        folder = {"name": "image_folder", "manual_dir": str(tmp_path), "label": None}  # not the label of the run's data
        assert calls.pop()[2] == {**folder, "validation_split": split}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"image_folder": "nope"}, "--image_folder=nope: no such folder; config.data.validation_split=x"),
        ({"split": "x"}, "config.data.manual_dir=nope: no such folder; --split=x"),
    ],
)
def test_an_error_of_evaluate_names_the_flags_that_were_given(run, monkeypatch, given, message):
    def fail(*_):
        raise UserError("config.data.manual_dir=nope: no such folder; config.data.validation_split=x")

    monkeypatch.setattr(evaluate, "evaluate", fail)
    monkeypatch.setattr(processes, "connected", contextlib.nullcontext)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(UserError, match=f"^{message}$"):
        run("evaluate", **given)


def test_export(run, record):
    calls = record(export, "export")
    run("export", output="a.onnx", format="onnx")
    assert calls == [("runs/mine", "a.onnx", "onnx")]


@pytest.mark.parametrize("skips", [True, False])
def test_prepare(run, record, skips):
    calls, described = record(prepare, "prepare", "prepared"), record(prepare, "describe")
    run("prepare", "digits", data_dir="data", manual_dir="tars", skip_corrupt=skips)
    assert (calls, described) == ([("digits", "data", "tars", skips)], [("prepared",)])


def test_preview(run, tmp_path, data_dir):
    """The first batch of the run, which is fitted to the data as in training."""
    config = tiny_config(data__dir=data_dir, seed=5, batch_size=2400, accumulation_steps=3)
    run("preview", config=config, output=str(tmp_path / "a.png"))
    dataset = input_pipeline.load(config.data)
    options = {"batch_size": 96, "seed": 5, "start_step": 0, "sharding": None}
    expected = image_grid(dataset, next(input_pipeline.train_batches(dataset, config.data, **options)))
    np.testing.assert_array_equal(Image.open(tmp_path / "a.png"), expected)


def test_signal_propagation(run, record):
    calls = record(signal_propagation, "signal_propagation")
    run("signal_propagation", config="config", trained=True, seeds=4)
    assert calls == [("config", "runs/mine", True, 4)]


def test_sweep(run, record, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "config_arguments", lambda: ["--config=digits"])
    record(sweep, "find_devices", ("gpu", [0, 1]))
    checked, calls = record(sweep, "check_points"), record(sweep, "execute", 0)
    axes = {"grid": ["config.weight_decay=0,1"], "seeds": 2, "at_once": 3}
    run("sweep", config=tiny_config(seed=7), workdir=str(tmp_path / "sweep"), **axes)
    ((points, shares),) = calls
    assert checked == [(points,)]
    assert "--config=digits" in points[0].commands[0]
    assert [[path.name for path in point.workdirs] for point in points] == [["seed=7", "seed=8"]] * 2
    assert [share["JAX_CUDA_VISIBLE_DEVICES"] for share in shares] == ["0", "1", "0"]
    capsys.readouterr()
    (finished := points[0].workdirs[0]).mkdir(parents=True)
    (finished / RESULTS).write_text("{}")
    run("sweep", config=tiny_config(seed=7), workdir=str(tmp_path / "sweep"), print_commands=True, **axes)
    unfinished = [command for point in points for command in point.commands][1:]
    assert capsys.readouterr().out.splitlines() == list(map(shlex.join, unfinished))
