"""Crop, flip, normalization, mixup and CutMix against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from scipy import stats

from simplest_vit.data import augment
from simplest_vit.data.augment import Preprocessing, augment_batch, normalize, random_crop_and_flip

RNG = np.random.default_rng(0)


# Compiled as a whole, and on NumPy arrays: less to compile than operation by operation.
def mixup(*arguments):
    return jax.tree.map(np.asarray, jax.jit(augment.mixup, static_argnums=(3, 4))(*arguments))


def cutmix(*arguments):
    return jax.tree.map(np.asarray, jax.jit(augment.cutmix, static_argnums=(3, 4))(*arguments))


def crop_and_flip(*arguments):
    return np.asarray(jax.jit(random_crop_and_flip, static_argnums=(2, 3))(*arguments))


def test_crop_and_flip_are_crops_of_the_padded_image_mirrored_or_not():
    images = RNG.integers(1, 256, (300, 8, 6, 3)).astype(np.uint8)
    result = crop_and_flip(jax.random.key(0), images, 2, True)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = set()
    for i in range(len(images)):
        crops = {(y, x): padded[i, y : y + 8, x : x + 6] for y in range(5) for x in range(5)}
        found = [
            (y, x, mirrored)
            for (y, x), crop in crops.items()
            for mirrored, candidate in ((False, crop), (True, crop[:, ::-1]))
            if np.array_equal(candidate, result[i])
        ]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) == 5 * 5 * 2  # all of them occur


def test_without_padding_only_the_flip_remains():
    images = RNG.integers(0, 256, (64, 4, 5, 1)).astype(np.uint8)
    result = crop_and_flip(jax.random.key(1), images, 0, True)
    mirrored = [np.array_equal(r, i[:, ::-1]) for r, i in zip(result, images, strict=True)]
    same = [np.array_equal(r, i) for r, i in zip(result, images, strict=True)]
    assert np.all(np.logical_xor(mirrored, same))
    assert 15 < sum(mirrored) < 50


def test_normalize():
    images = RNG.integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    expected = (images.astype(np.float64) / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalize(images, mean, std), expected, atol=2e-6)


@pytest.mark.parametrize("per_example", [False, True])
def test_mixup_blends_opposite_examples_and_their_labels_by_the_same_weight(per_example):
    images = RNG.normal(size=(9, 4, 4, 3)).astype(np.float32)
    labels = np.eye(9, dtype=np.float32)
    x, y = mixup(jax.random.key(2), images, labels, 0.8, per_example)
    weight = np.array([y[i, 8 - i] if i != 4 else 0.0 for i in range(9)])
    expected = images + weight[:, None, None, None] * (images[::-1] - images)
    np.testing.assert_allclose(x, expected, atol=1e-6)
    np.testing.assert_allclose(np.sum(y, 1), 1, atol=1e-6)
    assert np.all(weight <= 0.5)
    others = np.delete(weight, 4)
    assert (len(np.unique(others)) == 8) == per_example


def test_mixup_weight_is_the_smaller_part_of_a_beta_variable():
    alpha = 0.2
    labels = np.eye(2, dtype=np.float32)[np.repeat([0, 1], 2000)]
    _, y = mixup(jax.random.key(3), np.zeros((4000, 1, 1, 1), np.float32), labels, alpha, True)
    weight = np.sort(np.minimum(y[:, 0], y[:, 1]))
    z = np.random.default_rng(0).beta(alpha, alpha, 4000)
    expected = np.sort(np.minimum(z, 1 - z))
    assert np.max(np.abs(weight - expected)) < 0.05  # quantiles agree


@pytest.mark.parametrize("per_example", [False, True])
def test_cutmix_pastes_a_box_and_weighs_the_labels_by_its_area(per_example):
    batch = 12
    images = np.broadcast_to(np.arange(batch, dtype=np.float32)[:, None, None, None], (batch, 16, 20, 1))
    x, y = cutmix(jax.random.key(4), images, np.eye(batch, dtype=np.float32), 1.0, per_example)
    areas = []
    for i in range(batch):
        pasted = x[i, ..., 0] == batch - 1 - i
        assert np.all(pasted | (x[i, ..., 0] == i))
        rows, columns = pasted.any(1), pasted.any(0)
        np.testing.assert_array_equal(pasted, rows[:, None] & columns[None])
        for line in (rows, columns):  # connected
            assert np.sum(np.abs(np.diff(np.r_[0, line.astype(int), 0]))) in (0, 2)
        np.testing.assert_allclose(y[i, batch - 1 - i], pasted.mean(), atol=1e-6)
        areas.append(float(pasted.mean()))
    assert (len(set(areas)) > 1) == per_example
    assert max(areas) > 0


def test_with_mixup_and_cutmix_batches_draw_one_of_them():
    images = RNG.integers(1, 256, (8, 8, 8, 1)).astype(np.uint8)
    preprocessing = Preprocessing((0.0,), (1.0,), 8, mixup_alpha=1.0, cutmix_alpha=1.0)
    augmented = jax.jit(lambda key: augment_batch(key, images, jnp.arange(8), preprocessing)["image"])
    kinds = set()
    for seed in range(12):
        pixels = np.asarray(augmented(jax.random.key(seed))) * 255
        copied = np.isclose(pixels, images, atol=1e-3) | np.isclose(pixels, images[::-1], atol=1e-3)
        kinds.add("cutmix" if np.all(copied) else "mixup")
    assert kinds == {"mixup", "cutmix"}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_symmetric_beta_is_that_of_scipy(alpha):
    samples = augment.symmetric_beta(jax.random.key(5), alpha, (20_000,))
    assert samples.dtype == np.float32
    # Where float32 tells values apart: 3 % of Beta(0.2, 0.2) are nearer to 0 or 1 than 3e-8.
    position = np.linspace(1e-6, 1 - 1e-6, 1000)
    drawn = np.searchsorted(np.sort(samples), position) / len(samples)
    # The 1 % quantile of the Kolmogorov-Smirnov statistic.
    assert np.abs(drawn - stats.beta(alpha, alpha).cdf(position)).max() < 1.63 / np.sqrt(len(samples))
    assert np.corrcoef(samples[1:], samples[:-1])[0, 1] < 0.03


@pytest.mark.parametrize("kinds", [{"mixup_alpha": 0.2}, {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}])
def test_no_loop_and_no_condition_makes_a_gpu_wait_for_its_host(kinds):
    preprocessing = Preprocessing((0.0,), (1.0,), 8, **kinds)
    batch = jax.random.key(0), np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int32)
    jaxpr = jax.make_jaxpr(augment_batch, static_argnums=3)(*batch, preprocessing)
    names = set(primitive_names(jaxpr.jaxpr))
    assert "random_bits" in names
    assert not names & {"while", "cond"}


def primitive_names(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jaxprs_in_params(equation.params):
            yield from primitive_names(inner)
