"""TAT against golden values, numerical integration and plain autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simplest_vit.models import tat


@pytest.mark.parametrize(("compositions", "slope"), [(49, 0.42590719), (100, 0.57043953), (151, 0.63864791)])
def test_golden_slopes(compositions, slope):
    assert tat.solve_negative_slope(compositions, 0.9) == pytest.approx(slope, abs=1e-8)


def test_depth_12():
    slope = tat.solve_negative_slope(24, 0.9)
    assert slope == pytest.approx(0.23850260, abs=1e-8)
    assert tat.output_scale(slope) == pytest.approx(1.37562937, abs=1e-8)


@pytest.mark.parametrize("slope", [0.0, 0.2385, 0.7, 1.0])
def test_c_map_is_the_cosine_behind_the_activation(slope):
    """Integrated in polar coordinates: (x, y) = r (cos t, cos(t - arccos c)) has cosine c, and r^2 factors out."""
    angle = (np.arange(1_000_000) + 0.5) * (2 * np.pi / 1_000_000)

    def activation(x):
        return np.sqrt(2 / (1 + slope**2)) * np.where(x > 0, x, slope * x)

    for c in (-1.0, -0.6, 0.0, 0.3, 0.95, 1.0):
        # E[r^2] = 2 and the mean over the angle give E[phi(x) phi(y)]; E[phi(x)^2] = 1.
        integral = 2 * np.mean(activation(np.cos(angle)) * activation(np.cos(angle - np.arccos(c))))
        assert tat.c_map(c, slope) == pytest.approx(integral, abs=1e-9)


def test_c_map_falls_with_the_slope_and_ends_linear():
    values = [float(tat.composed_c_map(0.0, slope, 24)) for slope in np.linspace(0, 1, 11)]
    assert (np.diff(values) < 0).all()
    assert values[-1] == 0.0


def test_shallow_network_is_told_what_to_change():
    message = (
        r"c_val_0_target=0\.9 is out of reach for depth 6 \(12 activations\): even ReLU gives only 0\.8\d+; "
        r"lower c_val_0_target below that or use a depth of at least (\d+)"
    )
    with pytest.raises(ValueError, match=message) as error:
        tat.solve_negative_slope(12, 0.9)
    depth = int(str(error.value).split()[-1])
    assert 0 < tat.solve_negative_slope(2 * depth, 0.9) < 1
    with pytest.raises(ValueError, match="out of reach"):
        tat.solve_negative_slope(2 * (depth - 1), 0.9)


def test_a_depth_beyond_all_is_not_suggested():
    with pytest.raises(ValueError, match=r"out of reach for depth 12 .* lower c_val_0_target below that$"):
        tat.solve_negative_slope(24, 1 - 1e-12)


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, 2.0, float("nan")])
def test_target_outside_the_unit_interval(target):
    with pytest.raises(ValueError, match=r"c_val_0_target=.* must lie in \(0, 1\)"):
        tat.solve_negative_slope(24, target)


@pytest.mark.parametrize("slope", [0.0, 0.2385])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tailored_relu_value_and_gradient(slope, dtype):
    x = jnp.array([-2.5, -1e-3, 1e-3, 3.0], dtype)
    gradient = jnp.array([1.0, -2.0, 3.0, 4.0], dtype)

    def plain(x):
        return tat.output_scale(slope) * jax.nn.leaky_relu(x.astype(jnp.float32), slope)

    y, vjp = jax.vjp(lambda x: tat.tailored_relu(x, slope), x)
    expected_y, expected_vjp = jax.vjp(plain, x)
    tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
    assert y.dtype == dtype
    np.testing.assert_allclose(y.astype(jnp.float32), expected_y, rtol=tolerance)
    np.testing.assert_allclose(
        vjp(gradient)[0].astype(jnp.float32),
        expected_vjp(gradient.astype(jnp.float32))[0].astype(jnp.float32),
        rtol=tolerance,
    )


def test_tailored_relu_keeps_the_mean_square_of_a_unit_gaussian():
    slope = tat.solve_negative_slope(24)
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    values = np.asarray(tat.tailored_relu(jnp.asarray(nodes, jnp.float32), slope), np.float64)
    assert np.sum(weights * values**2) / np.sum(weights) == pytest.approx(1.0, abs=1e-5)
