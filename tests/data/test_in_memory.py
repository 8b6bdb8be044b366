"""Digits and other small sets on the device, through the one door."""

import jax
import numpy as np
import pytest
from conftest import train_batches
from jax.sharding import NamedSharding, PartitionSpec
from sklearn.datasets import load_digits

import input_pipeline
from simplest_vit.data.augment import Preprocessing
from simplest_vit.data.input_pipeline import eval_batch, train_batch
from simplest_vit.errors import UserError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def digits(make_config, data_dir):
    config = make_config("digits", dir=data_dir, batch_size=100)
    return input_pipeline.load(config.data), config


def take(dataset, config, count, start_step=0, sharding=None):
    batches = train_batches(dataset, config, start_step=start_step, sharding=sharding)
    return [next(batches) for _ in range(count)]


def pixels(dataset, batch):
    """Undoes the normalization: uint8 [B, H, W, C]."""
    x = np.asarray(batch["image"]) * np.array(dataset.std) + np.array(dataset.mean)
    return np.round(x * 255).astype(np.uint8)


def test_digits_are_scikit_learns_with_a_stratified_split(digits):
    dataset, _ = digits
    assert (dataset.train_size, dataset.validation_size, dataset.num_classes) == (1437, 360, 10)
    assert dataset.image_shape == (8, 8, 1)
    assert dataset.class_names == tuple("0123456789")
    (batch,) = input_pipeline.eval_batches(dataset, batch_size=360, sharding=None)
    train = np.asarray(dataset.train.images)[..., 0]
    both = np.concatenate([train, pixels(dataset, batch)[..., 0]]).reshape(1797, 64)
    original = np.round(load_digits().images * 255 / 16).astype(np.uint8).reshape(1797, 64)
    np.testing.assert_array_equal(both[np.lexsort(both.T)], original[np.lexsort(original.T)])
    per_class = np.asarray(batch["label"]).sum(0)
    np.testing.assert_allclose(per_class, np.bincount(load_digits().target) / 5, atol=1)
    np.testing.assert_allclose([train.mean() / 255, train.std() / 255], [*dataset.mean, *dataset.std], atol=5e-4)


def test_every_epoch_is_a_new_permutation_without_the_remainder(digits):
    dataset, config = digits
    steps = input_pipeline.steps_per_epoch(dataset.train_size, config.batch_size)
    assert steps == 14
    known = {image.tobytes() for image in np.asarray(dataset.train.images)}
    assert len(known) == 1437  # so an image tells which example it is
    epochs = []
    for epoch in range(2):
        batches = take(dataset, config, steps, start_step=epoch * steps)
        epochs.append([image.tobytes() for batch in batches for image in pixels(dataset, batch)])
        assert len(set(epochs[-1])) == 1400
        assert set(epochs[-1]) <= known
    assert epochs[0] != epochs[1]


def test_a_batch_is_a_function_of_seed_and_step(digits, make_config, data_dir):
    dataset, _ = digits
    config = make_config("digits", dir=data_dir, batch_size=64, crop_padding=1, flip=True, mixup_alpha=0.2)
    from_zero = take(dataset, config, 4)
    resumed = take(dataset, config, 2, start_step=2)
    jax.tree.map(np.testing.assert_array_equal, from_zero[2:], resumed)
    config.seed = 1
    (other,) = take(dataset, config, 1)
    assert not np.array_equal(other["image"], from_zero[0]["image"])


def test_the_mesh_does_not_change_a_batch(digits, make_config, data_dir):
    dataset, _ = digits
    config = make_config(
        "digits", dir=data_dir, batch_size=64, crop_padding=1, flip=True, mixup_alpha=0.2,
        rand_augment={"num_ops": 2, "magnitude": 10},
    )  # fmt: skip
    sharding = NamedSharding(
        jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,)), PartitionSpec("batch")
    )
    (alone,) = take(dataset, config, 1)
    dataset = input_pipeline.load(config.data, mesh=sharding.mesh)
    (sharded,) = take(dataset, config, 1, sharding=sharding)
    assert sharded["image"].sharding.is_equivalent_to(sharding, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), alone, sharded)
    evaluated = list(input_pipeline.eval_batches(dataset, batch_size=64, sharding=sharding))
    assert sum(float(batch["weight"].sum()) for batch in evaluated) == 360


def test_a_split_is_copied_to_the_devices_once_not_at_every_evaluation(digits):
    _, config = digits
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    dataset = input_pipeline.load(config.data, mesh=mesh)
    for _ in range(3):
        with jax.transfer_guard_device_to_device("disallow_explicit"):
            (batch,) = input_pipeline.eval_batches(
                dataset, batch_size=360, sharding=NamedSharding(mesh, PartitionSpec("batch"))
            )
        assert batch["image"].sharding.device_set == set(mesh.devices.flat)
    for array, shape in ((dataset.validation.images, (360, 8, 8, 1)), (dataset.validation.labels, (360,))):
        assert [shard.data.shape for shard in array.addressable_shards] == [shape] * 4
        assert {shard.device for shard in array.addressable_shards} == set(mesh.devices.flat)


def test_evaluation_covers_each_example_once(digits):
    dataset, _ = digits
    batches = list(input_pipeline.eval_batches(dataset, batch_size=100, sharding=None))
    assert [batch["image"].shape for batch in batches] == [(100, 8, 8, 1)] * 4
    weight = np.concatenate([batch["weight"] for batch in batches])
    np.testing.assert_array_equal(weight, np.arange(400) < 360)
    images = np.concatenate([pixels(dataset, batch) for batch in batches])[:360]
    np.testing.assert_array_equal(images, dataset.validation.images)
    labels = np.concatenate([batch["label"].argmax(1) for batch in batches])[:360]
    np.testing.assert_array_equal(labels, dataset.validation.labels)


def test_one_trace_serves_the_run(digits):
    dataset, config = digits
    train_batch.clear_cache()
    eval_batch.clear_cache()
    take(dataset, config, 5)
    take(dataset, config, 3, start_step=1000)
    for _ in range(2):
        list(input_pipeline.eval_batches(dataset, batch_size=128, sharding=None))
    assert train_batch._cache_size() == 1
    assert eval_batch._cache_size() == 1


def test_the_data_is_no_constant_of_the_program(digits):
    dataset, _ = digits
    lowered = train_batch.lower(
        dataset.train.images, dataset.train.labels, np.uint32(0), np.uint32(0),
        preprocessing=Preprocessing(dataset.mean, dataset.std, 10), batch_size=8, sharding=None,
    )  # fmt: skip
    assert "1437x8x8x1xui8" in lowered.as_text().split("{", 2)[2].split("->")[0]
    assert len(lowered.as_text()) < 100_000


def test_too_few_examples_for_a_batch(digits, make_config, data_dir):
    dataset, _ = digits
    config = make_config("digits", dir=data_dir, batch_size=1438)
    with pytest.raises(UserError, match=r"batch_size=1438.*1437 training examples"):
        train_batches(dataset, config, start_step=0, sharding=None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mnist"}, r"data.name=mnist: no such data set in .*; expected one of digits"),
        ({"name": "cifar10", "manual_dir": "/nowhere"}, r"data.manual_dir=/nowhere: no such folder"),
        ({"name": "image_folder"}, r"folder with your images: --config.data.manual_dir=FOLDER"),
    ],
)
def test_wrong_choices_are_named(make_config, data_dir, options, message):
    with pytest.raises(UserError, match=message):
        input_pipeline.load(make_config(**{"dir": data_dir, **options}).data)


def test_images_are_resized_on_request(make_config, data_dir):
    dataset = input_pipeline.load(make_config("digits", dir=data_dir, image_size=16).data)
    assert dataset.image_shape == (16, 16, 1)
    assert dataset.train.images.shape == (1437, 16, 16, 1)
