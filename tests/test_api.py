"""The public names: lazily imported, and equal to what they are made of."""

import logging
import multiprocessing
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict
from PIL import Image
from sklearn.datasets import load_digits

import input_pipeline
import simplest_vit
from examples import isometric_vit as example
from simplest_vit.errors import UserError
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir, two_devices):
    """A finished run of six steps, its data, and what training printed."""
    folder = tmp_path_factory.mktemp("api")
    config = tiny_config(data__dir=data_dir)
    results = simplest_vit.train(config, folder / "run")
    return folder / "run", input_pipeline.load(config.data), results


def test_a_loaded_model_reproduces_the_accuracy_that_training_reported(run):
    workdir, dataset, results = run
    predictor = simplest_vit.load(workdir)
    images = np.asarray(dataset.validation.images)
    probability = predictor.probabilities(images)
    assert probability.shape == (360, 10)
    np.testing.assert_allclose(probability.sum(axis=1), 1, rtol=1e-5)
    accuracy = (probability.argmax(axis=1) == np.asarray(dataset.validation.labels)).mean()
    assert accuracy == pytest.approx(results["best_validation_accuracy"], abs=1e-6)
    assert predictor.class_names == tuple("0123456789")
    assert predictor.step in (3, 6)
    about = f"10 classes, images 8x8x1, step {predictor.step}, validation accuracy {100 * accuracy:.2f}%"
    assert repr(predictor) == f"Predictor(simplest_vit, {about})"


def test_predictions_of_files_and_of_their_pixels_are_equal(run, tmp_path):
    workdir, dataset, _ = run
    predictor = simplest_vit.load(str(workdir))
    images = np.asarray(dataset.validation.images[:3])
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, pixels in zip(paths, images, strict=True):
        Image.fromarray(pixels[..., 0]).save(path)
    from_files, from_pixels = predictor.predict(paths), predictor.predict(images)
    assert [p["image"] for p in from_files] == list(map(str, paths))
    assert [p["top"] for p in from_files] == [p["top"] for p in from_pixels]
    best = from_files[0]["top"]
    assert len(best) == 5
    assert best[0]["probability"] == pytest.approx(predictor.probabilities(images)[0].max())


def test_features_are_what_the_head_sees(run):
    workdir, dataset, _ = run
    predictor = simplest_vit.load(workdir)
    images = np.asarray(dataset.validation.images[:70])  # more than a batch
    head = predictor.model.head
    logits = predictor.embed(images) @ np.asarray(head.kernel[...]) + np.asarray(head.bias[...])
    np.testing.assert_allclose(jax.nn.softmax(logits), predictor.probabilities(images), atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images is empty; give at least one path"),
        ("photo.png", r"must be a list of paths; write \['photo.png'\]"),
        (np.zeros((2, 9, 8, 1), np.uint8), r"uint8 \[2, 9, 8, 1\] must be uint8 \[N, 8, 8, 1\]"),
        (np.zeros((2, 8, 8, 1), np.float32), r"float32 .* must be uint8"),
    ],
)
def test_wrong_images_are_named(run, images, message):
    with pytest.raises(UserError, match=message):
        simplest_vit.load(run[0]).predict(images)


@pytest.mark.parametrize("convert", [list, jnp.asarray, lambda pixels: [Image.fromarray(pixels[0, ..., 0])], iter])
def test_images_of_other_kinds_are_named(run, convert):
    images = convert(np.zeros((2, 8, 8, 1), np.uint8))
    with pytest.raises(UserError, match="images must be a list of paths, or pixels as one NumPy array"):
        simplest_vit.load(run[0]).predict(images)


def test_a_changed_model_changes_the_predictions(run):
    predictor = simplest_vit.load(run[0])
    images = np.asarray(run[1].validation.images[:2])
    assert np.ptp(predictor.probabilities(images)) > 1e-3
    head = predictor.model.head
    head.kernel[...], head.bias[...] = jnp.zeros((16, 10)), jnp.zeros(10)
    np.testing.assert_allclose(predictor.probabilities(images), 0.1, rtol=1e-6)


def test_a_batch_is_not_cut_by_the_size_of_another_thread(run, monkeypatch):
    """Which sets the size of its own batch while this one is cut."""
    images = np.asarray(run[1].validation.images[:70])
    expected = simplest_vit.load(run[0]).embed(images)
    predictor = simplest_vit.load(run[0])
    sizes = iter(range(1, 1000))
    other = property(lambda self: next(sizes), lambda self, value: None)
    monkeypatch.setattr(simplest_vit.Predictor, "_size", other, raising=False)
    np.testing.assert_allclose(predictor.embed(images), expected, atol=1e-5)


@pytest.mark.parametrize("use", [simplest_vit.load, lambda workdir: simplest_vit.train(tiny_config(), workdir)])
def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, use):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the path is empty; give a path"):
        use("")
    assert not list(tmp_path.iterdir())


def test_training_logs_to_standard_output_and_leaves_logging_as_it_was(run, capsys, data_dir):
    log = logging.getLogger("simplest_vit")
    before = (log.handlers[:], log.level, log.propagate)
    workdir, _, results = run
    again = simplest_vit.train(tiny_config(data__dir=data_dir), workdir)
    assert again == results  # a finished run stays finished
    assert "has finished" in capsys.readouterr().out
    assert (log.handlers, log.level, log.propagate) == before


def test_a_wrong_config_is_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(UserError, match=r"config.batch_size=0 must be"):
        simplest_vit.train(tiny_config(batch_size=0), tmp_path / "run")
    for other in (dict, FrozenConfigDict):
        with pytest.raises(UserError, match=rf"config must be a ConfigDict, as .* returns, not {other.__name__}"):
            simplest_vit.train(other(tiny_config().to_dict()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_script_that_trains_when_it_is_imported_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)  # as `spawn` does
    with pytest.raises(UserError, match=r"imports the script; call it after if __name__ == \"__main__\":"):
        simplest_vit.train(tiny_config(), tmp_path / "run")


def test_every_public_name_exists_and_others_do_not():
    for name in simplest_vit.__all__:
        assert getattr(simplest_vit, name) is not None
        assert name in dir(simplest_vit)
    with pytest.raises(AttributeError, match="no attribute 'SOAP'"):
        simplest_vit.SOAP  # noqa: B018


def test_importing_the_package_imports_nothing_else():
    code = "import sys, simplest_vit; print(sorted({'jax', 'flax', 'numpy', 'orbax'} & set(sys.modules)))"
    root = pathlib.Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root).stdout == "[]\n"


def test_the_pages_make_the_pixels_that_the_run_was_trained_on():
    """As the builder does, which rounds; the pages truncated."""
    digits, root = load_digits(), pathlib.Path(__file__).parents[1]
    expected = np.round(digits.images * 255 / 16)[..., None]
    for page, names in (("README.md", {"digits": digits.images[..., None]}), ("examples/quickstart.ipynb", {})):
        made = re.findall(r"= (\(digits.* / 16\).*astype\(.*?\))", (root / page).read_text())
        assert made
        for code in made:
            pixels = eval(code, {"np": np, "digits": digits} | names)
            np.testing.assert_array_equal(pixels, expected[: len(pixels)])


def test_the_example_is_the_package_s_isometric_network():
    model = simplest_vit.create_model(
        "isometric_vit",
        image_shape=(8, 8, 1),
        num_classes=10,
        patch_size=2,
        depth=12,
        width=48,
        num_heads=4,
        mlp_dim=192,
        rngs=nnx.Rngs(0),
    )
    # The constants first: they make the attention matrices at initialization.
    expected = np.asarray(model.initial_attention())
    np.testing.assert_allclose(np.exp(example.attention_bias(12, 4, (4, 4))), expected, atol=1e-6)

    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.05 * rng.normal(size=x.shape).astype(np.float32), params)  # biases too
    nnx.update(model, jax.tree.map(lambda x: x, nnx.State(params)))
    attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
    blocks = {name: attention[name]["kernel"] for name in ("query", "key", "value")}
    blocks |= {f"{name}_bias": attention[name]["bias"] for name in ("query", "key", "value")}
    blocks |= {"dense1": mlp["dense1"]["kernel"], "bias1": mlp["dense1"]["bias"]}
    blocks |= {"dense2": mlp["dense2"]["kernel"], "bias2": mlp["dense2"]["bias"]}
    own = {
        "embedding": params["patch_embedding"]["kernel"],
        "blocks": blocks,
        "head": params["head"]["kernel"],
        "head_bias": params["head"]["bias"],
    }
    shapes = jax.eval_shape(lambda: example.init(0))
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, shapes)
    images = rng.normal(size=(5, 8, 8, 1)).astype(np.float32)
    shift = params["patch_embedding"]["bias"]
    params["patch_embedding"]["bias"] = jnp.zeros_like(shift)  # the example's embedding has none
    nnx.update(model, nnx.State(params))
    with jax.numpy_rank_promotion("allow"):  # which its users have
        found = jax.jit(example.forward)(own, images[..., 0])
    np.testing.assert_allclose(found, nnx.jit(lambda model, images: model(images))(model, images), rtol=1e-4, atol=1e-4)


def test_the_example_starts_as_an_isometry_of_tokens():
    layer = jax.jit(example.init_block)(jax.random.key(0))
    x = np.random.default_rng(1).normal(size=(1, 16, 48)).astype(np.float32)
    exact = np.where(example.attention_bias(12, 4, (4, 4))[0] > -1, 0.0, -np.inf)  # without its uniform fraction
    with jax.numpy_rank_promotion("allow"):
        jacobian = jax.jit(jax.jacobian(lambda x: example.block(x, layer, exact)))(x).reshape(768, 768)
    np.testing.assert_allclose(jacobian @ jacobian.T, np.eye(768), atol=1e-4)
