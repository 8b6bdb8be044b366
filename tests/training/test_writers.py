import io
import json
import sys
import types

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simplest_vit.errors import UserError
from simplest_vit.training.writers import MetricsWriter, create_writer, metric_writers


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    """Events written through clu's default writer, read back by TensorBoard."""
    logdir = tmp_path_factory.mktemp("events")
    writer = metric_writers.create_default_writer(logdir)
    writer.write_scalars(3, {"loss": 1.5, "accuracy": np.float32(0.25)})
    writer.write_images(3, {"colour": GRID, "grey": GRID[..., :1]})
    writer.write_hparams({"depth": 12, "steps": None})
    writer.flush()
    writer.close()
    accumulator = EventAccumulator(str(logdir))
    accumulator.Reload()
    return accumulator


GRID = np.random.default_rng(0).integers(256, size=(5, 4, 3)).astype(np.uint8)


def test_scalars(events):
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 1.5)]
    assert events.Scalars("accuracy")[0].value == 0.25


@pytest.mark.parametrize(("tag", "expected"), [("colour", GRID), ("grey", GRID[..., 0])])
def test_images_come_back_to_the_pixel(events, tag, expected):
    (event,) = events.Images(tag)
    image = Image.open(io.BytesIO(event.encoded_image_string))
    np.testing.assert_array_equal(np.asarray(image), expected)
    assert (event.step, event.height, event.width) == (3, 5, 4)


def test_hyperparameters(events):
    assert "hparams" in events.summary_metadata["_hparams_/session_start_info"].plugin_data.plugin_name


def lines_of(folder):
    """The lines, as strict JSON."""
    refuse = lambda name: pytest.fail(f"{name} is no JSON")  # noqa: E731
    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_step_has_one_line_with_all_its_values(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write_scalars(2, {"loss": np.float32(1.5)})
    writer.write_scalars(3, {"loss": 0.123456789, "norm": np.inf})
    writer.write_scalars(3, {"accuracy": 0.5})
    assert lines_of(tmp_path)[1] == {"step": 3, "loss": 0.123456789, "norm": None, "accuracy": 0.5}, "at once"
    writer.write_scalars(3, {"loss": 0.1})  # an evaluation that is made up for
    writer.write_scalars(4, {"loss": 0.0})
    writer.close()
    again = {"step": 3, "loss": 0.1, "norm": None, "accuracy": 0.5}
    assert lines_of(tmp_path) == [{"step": 2, "loss": 1.5}, again, {"step": 4, "loss": 0.0}]


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', "null\n"])
def test_a_resume_removes_the_lines_of_later_steps(tmp_path, torn, monkeypatch):
    writer = MetricsWriter(tmp_path, 0)
    for step in (2, 4, 5):
        writer.write_scalars(step, {"loss": 1 / step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    writer = MetricsWriter(tmp_path, 4)
    writer.write_scalars(4, {"accuracy": 0.5})
    writer.write_scalars(6, {"loss": 3.0})
    writer.close()
    expected = [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25, "accuracy": 0.5}, {"step": 6, "loss": 3.0}]
    assert lines_of(tmp_path) == expected

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", kill)
        with pytest.raises(KeyboardInterrupt):
            MetricsWriter(tmp_path, 2)
    assert lines_of(tmp_path) == expected
    MetricsWriter(tmp_path, 0).close()
    assert lines_of(tmp_path) == []


def test_metrics_that_cannot_be_written_are_reported_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("simplest_vit.training.writers.log.propagate", True)
    (tmp_path / "metrics.jsonl").mkdir()
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2):
        writer.write_scalars(step, {"loss": 1.0})
    writer.close()
    (record,) = caplog.records
    assert "metrics.jsonl cannot be written (Is a directory): the run continues without it" in record.message


def test_weights_and_biases_that_do_not_start_are_one_line(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty).\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=dict))
    with pytest.raises(UserError, match=r"^config.wandb=mine: .* \(api_key not .*\); run `wandb login`, set [^\n]*$"):
        create_writer(tmp_path, 0, "mine")
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    create_writer(tmp_path, 0, "mine").close()
