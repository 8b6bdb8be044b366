"""Every field of `config.data` changes what it says it changes, in memory and streamed, and nothing else."""

import itertools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import jpeg, smooth_image, train_batches

import input_pipeline
from simplest_vit.config import FIELDS
from simplest_vit.data import augment, rand_augment, streaming
from simplest_vit.data.augment import Preprocessing, augment_batch
from simplest_vit.data.builders import BUILDERS
from simplest_vit.data.decode import encode_png

# For each field two settings, of which the second differs by it, and what differs: of the batches, or of the data set.
# What is in neither does not: an evaluation has no augmentation.
TRAIN, EVALUATION, PLACE = "train", "evaluation", "place"
CHANGES = {
    "name": ({}, {"name": "digits", "train_split": "train", "validation_split": "validation"}, {TRAIN, EVALUATION}),
    "dir": ({}, {"dir": "copy"}, set()),
    "manual_dir": ({}, {"manual_dir": "other"}, {TRAIN, EVALUATION}),
    "label": ({}, {"label": "label"}, set()),
    "train_split": ({}, {"train_split": "train[5:]"}, {TRAIN}),
    "validation_split": ({}, {"validation_split": "validation[1:]"}, {EVALUATION}),
    "image_size": ({}, {"image_size": 8}, {TRAIN, EVALUATION}),
    "random_resized_crop": ({}, {"random_resized_crop": True}, {TRAIN, EVALUATION, PLACE}),
    "crop_padding": ({}, {"crop_padding": 2}, {TRAIN}),
    "flip": ({}, {"flip": True}, {TRAIN}),
    "rand_augment.num_ops": ({}, {"rand_augment.num_ops": 2}, {TRAIN}),
    "rand_augment.magnitude": (
        {"rand_augment.num_ops": 2},
        {"rand_augment.num_ops": 2, "rand_augment.magnitude": 29},
        {TRAIN},
    ),
    "mixup_alpha": ({}, {"mixup_alpha": 0.5}, {TRAIN}),
    "cutmix_alpha": ({}, {"cutmix_alpha": 0.5}, {TRAIN}),
    "mixup_mode": ({"mixup_alpha": 0.5}, {"mixup_alpha": 0.5, "mixup_mode": "example"}, {TRAIN}),
    "device_budget_bytes": ({}, {"device_budget_bytes": 0}, {PLACE}),
    "num_workers": ({"device_budget_bytes": 0}, {"device_budget_bytes": 0, "num_workers": 1}, set()),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two folders of photos of two classes, of equal sizes, one prepared and copied."""
    root = tmp_path_factory.mktemp("fields")
    for seed, name in enumerate(("photos", "other")):
        for split, count in (("train", 8), ("val", 3)):
            for k, kind in enumerate(("cat", "dog")):
                (root / name / split / kind).mkdir(parents=True)
                for i in range(count):
                    content = jpeg(smooth_image(100 * seed + 20 * k + i + count, 20, 24))
                    (root / name / split / kind / f"{i}.jpg").write_bytes(content)
    return root


@pytest.fixture(scope="module")
def observe(folder):
    """Returns a function from settings to what a run sees; each is asked for once."""
    known = {}

    def observed(make_config, settings, batch_size=6, seed=0):
        key = str((sorted(settings.items()), batch_size, seed))
        if key not in known:
            config = make_config("image_folder", dir=folder / "tfds", batch_size=batch_size, seed=seed)
            options = {"manual_dir": str(folder / "photos"), "image_size": 16, "num_workers": 0} | settings
            options |= {name: str(folder / options[name]) for name in ("dir", "manual_dir") if name in settings}
            config.update_from_flattened_dict({f"data.{name}": value for name, value in options.items()})
            dataset = input_pipeline.load(config.data)
            batches = [jax.tree.map(np.asarray, b) for b in itertools.islice(train_batches(dataset, config), 2)]
            evaluated = list(input_pipeline.eval_batches(dataset, batch_size=4, sharding=None))
            known[key] = {
                TRAIN: batches,
                EVALUATION: [jax.tree.map(np.asarray, b) for b in evaluated],
                PLACE: type(dataset.train),
            }
        return known[key]

    return observed


def equal(one, other):
    if isinstance(one, type):
        return one is other
    leaves, others = jax.tree.leaves(one), jax.tree.leaves(other)
    return len(leaves) == len(others) and all(
        a.shape == b.shape and np.allclose(a, b, atol=1e-5) for a, b in zip(leaves, others, strict=True)
    )


def test_each_field_has_its_row():
    assert {f"data.{name}" for name in CHANGES} == {name for name in FIELDS if name.startswith("data.")}


@pytest.mark.parametrize("place", ["in memory", "streamed"])
@pytest.mark.parametrize("field", CHANGES)
def test_a_field_changes_what_it_should_and_nothing_else(observe, make_config, folder, field, place):
    before, after, changes = CHANGES[field]
    if place == "streamed":
        before, after = ({"device_budget_bytes": 0} | settings for settings in (before, after))
        changes = changes - {PLACE}
    if field == "dir" and not (folder / "copy").exists():
        observe(make_config, before)
        shutil.copytree(folder / "tfds", folder / "copy")
    one, other = observe(make_config, before), observe(make_config, after)
    assert {what for what in one if not equal(one[what], other[what])} == changes


def test_images_of_the_size_of_the_model_are_cropped_for_evaluation_in_memory_as_streamed(observe, make_config):
    settings = {"name": "digits", "image_size": 8, "validation_split": "validation[:9]", "random_resized_crop": True}
    places = (settings | {"device_budget_bytes": budget} for budget in (10**9, 0))
    in_memory, streamed = (observe(make_config, place)[EVALUATION] for place in places)
    assert equal(in_memory, streamed)


@pytest.mark.parametrize(
    ("budget", "augmentation"),
    [
        (0, {"crop_padding": 2}),
        *((10**9, {name: value}) for name, value in [("crop_padding", 2), ("rand_augment.num_ops", 1)]),
        *((10**9, {name: 0.5}) for name in ("mixup_alpha", "cutmix_alpha")),
    ],
    ids=str,
)
def test_the_seed_and_the_step_draw_the_augmentation_not_only_the_order(tmp_path, make_config, budget, augmentation):
    """Of one image per class in all places, so that another order of a class makes no difference."""
    kinds = {"cat": jpeg(smooth_image(1, 16, 16))}
    for split, (kind, content) in itertools.product(("train", "val"), kinds.items()):
        (tmp_path / "photos" / split / kind).mkdir(parents=True)
        for i in range(8):
            image = content if "alpha" not in str(augmentation) else jpeg(smooth_image(i, 16, 16))
            (tmp_path / "photos" / split / kind / f"{i}.jpg").write_bytes(image)
    config = make_config("image_folder", dir=tmp_path / "tfds", manual_dir=str(tmp_path / "photos"), batch_size=8)
    settings = {"image_size": 16, "num_workers": 0, "device_budget_bytes": budget, **augmentation}
    config.update_from_flattened_dict({f"data.{name}": value for name, value in settings.items()})
    dataset, seen = input_pipeline.load(config.data), {}
    for config.seed in (0, 1):
        for step, batch in enumerate(itertools.islice(train_batches(dataset, config), 2)):
            # Sorted: the multiset of images, whatever their order.
            seen[config.seed, step] = np.sort(np.asarray(batch["image"]).reshape(8, -1).sum(1))
    assert all(not np.allclose(seen[a], seen[b]) for a, b in itertools.combinations(seen, 2))


# The wires between the pieces.


def test_the_steps_of_augmentation_come_in_order_with_a_key_each(monkeypatch):
    calls = []

    def recorded(name, module=augment):
        original = getattr(module, name)

        def call(key, images, *args):
            calls.append((name, tuple(np.asarray(jax.random.key_data(key)).tolist()), images.dtype.name, args))
            return original(key, images, *args)

        monkeypatch.setattr(module, name, call)

    for name in ("random_crop_and_flip", "rand_augment", "mixup", "cutmix"):
        recorded(name)
    preprocessing = Preprocessing(
        (0.5,), (0.2,), 3, crop_padding=2, flip=False, num_ops=1, magnitude=7, mixup_alpha=0.3, cutmix_alpha=0.6,
        mixup_mode="example",
    )  # fmt: skip
    key = jax.random.key(0)
    augment_batch(key, jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.arange(4) % 3, preprocessing)
    assert [(name, dtype) for name, _, dtype, _ in calls] == [
        ("random_crop_and_flip", "uint8"),
        ("rand_augment", "uint8"),
        ("mixup", "float32"),
        ("cutmix", "float32"),
    ]
    assert calls[0][3] == (2, False)
    assert calls[1][3] == (1, 7)
    assert [call[3][1:] for call in calls[2:]] == [(0.3, True), (0.6, True)]
    keys = [tuple(np.asarray(jax.random.key_data(key)).tolist()), *(call[1] for call in calls[:3])]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("cutmix_alpha", [0.0, 0.6])
def test_no_two_draws_of_a_batch_share_a_key(monkeypatch, cutmix_alpha):
    keys = []
    for name in ("randint", "bernoulli", "uniform"):
        original = getattr(jax.random, name)

        def draw(key, *args, original=original):
            keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
            return original(key, *args)

        monkeypatch.setattr(jax.random, name, draw)
    options = {"crop_padding": 2, "flip": True, "num_ops": 1, "mixup_alpha": 0.3, "cutmix_alpha": cutmix_alpha}
    preprocessing = Preprocessing((0.5,), (0.2,), 3, **options)
    augment_batch(jax.random.key(0), jnp.zeros((4, 8, 8, 1), jnp.uint8), jnp.arange(4) % 3, preprocessing)
    assert len(keys) == (9 if cutmix_alpha else 5)
    assert len(set(keys)) == len(keys)


def test_without_flip_no_image_is_mirrored():
    image = np.broadcast_to(np.arange(1, 9, dtype=np.uint8)[:, None] * 20, (64, 8, 8, 1)).transpose(0, 2, 1, 3)
    preprocessing = Preprocessing((0.0,), (1 / 255,), 2, crop_padding=1, flip=False)
    batch = jax.jit(augment_batch, static_argnums=3)(jax.random.key(0), image, np.zeros(64, np.int32), preprocessing)
    rising = np.diff(np.asarray(batch["image"])[:, 4, 1:-1, 0], axis=1)
    assert np.all(rising >= 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_draws_an_operation_and_a_sign_for_each_image(monkeypatch, channels):
    """By what becomes of one image in all places: nearly all of the operations and signs occur, independently."""
    drawn = []

    def apply(images, operation, negative, magnitude):
        drawn.append((np.asarray(operation), np.asarray(negative), magnitude))
        return images + 1

    monkeypatch.setattr(rand_augment, "apply_operations", apply)
    monkeypatch.setattr(jax.lax, "fori_loop", lambda start, stop, body, x: body(1, body(0, x)))
    images = np.zeros((4000, 2, 2, channels), np.uint8)
    result = rand_augment.rand_augment(jax.random.key(0), images, 2, 9)
    assert np.all(result == 2)
    for operation, negative, magnitude in drawn:
        assert magnitude == 9
        table = np.zeros((14, 2))
        np.add.at(table, (operation, negative.astype(int)), 1)
        assert np.all(abs(table - 4000 / 28) < 5 * np.sqrt(4000 / 28))  # all pairs, evenly
    assert np.mean(drawn[0][0] == drawn[1][0]) < 0.12  # another draw in the second round
    assert abs(np.mean(drawn[0][1] == drawn[1][1]) - 0.5) < 0.05


def test_grey_images_are_augmented_too():
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1)).astype(np.uint8)
    preprocessing = Preprocessing((0.0,), (1 / 255,), 2, num_ops=2, magnitude=20)
    batch = jax.jit(augment_batch, static_argnums=3)(jax.random.key(0), images, np.zeros(32, np.int32), preprocessing)
    changed = np.any(np.abs(np.asarray(batch["image"]) - images) > 0.5, axis=(1, 2, 3))
    assert changed.sum() > 20


def test_mean_and_deviation_are_the_published_ones():
    """In the order red, green, blue; torchvision's for ImageNet, and those that the reference trains CIFAR with."""
    published = {
        "digits": ((0.3058,), (0.3761,)),
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
        "tiny_imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
        "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        "image_folder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    }
    assert {name: (builder.mean, builder.std) for name, builder in BUILDERS.items()} == published


def test_a_red_image_is_normalized_as_red(tmp_path, make_config):
    for split in ("train", "val"):
        (tmp_path / "photos" / split / "red").mkdir(parents=True)
        red = np.broadcast_to(np.array([255, 0, 0], np.uint8), (8, 8, 3))
        (tmp_path / "photos" / split / "red/0.png").write_bytes(encode_png(red))
    config = make_config("image_folder", dir=tmp_path / "tfds", manual_dir=str(tmp_path / "photos"), image_size=8)
    (batch,) = input_pipeline.eval_batches(input_pipeline.load(config.data), batch_size=1, sharding=None)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    np.testing.assert_allclose(batch["image"][0, 3, 3], expected, rtol=1e-4)


def test_the_workers_of_a_config_are_those_that_decode(folder, make_config, monkeypatch):
    config = make_config("image_folder", dir=folder / "tfds", manual_dir=str(folder / "photos"), image_size=16)
    config.data.update({"num_workers": 3, "device_budget_bytes": 0})
    asked = []
    monkeypatch.setattr(
        streaming, "_read_batches", lambda chunks, per_batch, workers: asked.append(workers) or iter(())
    )
    dataset = input_pipeline.load(config.data)
    config.batch_size = 4
    train_batches(dataset, config)
    input_pipeline.eval_batches(dataset, batch_size=4, sharding=None)
    assert asked == [3, 3]
    monkeypatch.setattr(streaming, "_IMAGES_PER_WORKER", 2)
    monkeypatch.setattr(streaming, "cpu_count", lambda: 16)
    config.data.num_workers = None
    dataset = input_pipeline.load(config.data)
    train_batches(dataset, config)
    input_pipeline.eval_batches(dataset, batch_size=4, sharding=None)
    assert asked[2:] == [8, 3], "of 16 and 6 images"
