import io

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simplest_vit.training.writers import metric_writers


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
