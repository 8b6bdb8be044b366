"""The reference's checkpoints: logits, the way back, and files that must be refused."""

import io
import os
import pathlib
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from simplest_vit.errors import UserError
from simplest_vit.interop.import_reference import import_reference
from simplest_vit.interop.torch_file import Checkpoint
from simplest_vit.training import evaluate, train
from simplest_vit.training.evaluate import restore_best
from tests.tiny import tiny_config

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def need_torch():
    if "SIMPLEST_VIT_REQUIRE_TORCH" not in os.environ:
        pytest.importorskip("torch")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


def config_of(name, data_dir, **overrides):
    return tiny_config(f"optimizer=adam,model={name}", data__dir=data_dir, **overrides)


@pytest.mark.parametrize("name", ["simplest_vit", "simple_vit"])
def test_an_imported_checkpoint_gives_the_logits_of_pytorch(tmp_path, data_dir, name):
    config = config_of(name, data_dir, ema__decay=0.9)
    import_reference(config, str(tmp_path), str(FIXTURES / f"{name}.pth"))
    run, state = restore_best(str(tmp_path))
    model = run.model(state)
    expected = np.load(FIXTURES / "expected.npz")
    np.testing.assert_allclose(model(jnp.asarray(expected["image"])), expected[name], rtol=1e-5, atol=1e-5)
    assert state.step == 1


@pytest.mark.slow
def test_an_imported_run_is_evaluated_and_trained_on_quick(tmp_path, data_dir):
    config = config_of("simplest_vit", data_dir)
    import_reference(config, str(tmp_path), str(FIXTURES / "simplest_vit.pth"))
    assert evaluate.evaluate(str(tmp_path), config)["best"]["step"] == 1
    assert train.train(config, str(tmp_path))["steps"] == 6


@pytest.mark.parametrize("name", ["simplest_vit", "simple_vit"])
def test_there_and_back_is_the_same_file(tmp_path, data_dir, name):
    """Tensors and names after import and export are bit for bit those of the file; PyTorch itself loads them."""
    need_torch()
    import torch

    from simplest_vit.interop.export_reference import export_reference

    config = config_of(name, data_dir)
    import_reference(config, str(tmp_path / "run"), str(FIXTURES / f"{name}.pth"))
    export_reference(str(tmp_path / "run"), str(tmp_path / "back.pth"))
    first, back = Checkpoint(FIXTURES / f"{name}.pth"), Checkpoint(tmp_path / "back.pth")
    assert first.tensors.keys() == back.tensors.keys()
    for tensor in first.tensors:
        np.testing.assert_array_equal(back[tensor], first[tensor], err_msg=tensor)
    content = torch.load(tmp_path / "back.pth", weights_only=True)
    loaded = content["model_state_dict"]
    assert loaded.keys() == first.tensors.keys()
    for tensor, value in loaded.items():
        np.testing.assert_array_equal(value.numpy(), first[tensor], err_msg=tensor)


def test_views_and_dtypes_are_read_as_pytorch_reads_them(tmp_path):
    need_torch()
    import torch

    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "transposed": base.T,
        "window": base[1:3, 2:5],
        "bfloat16": base.bfloat16(),
        "half": base.half(),
        "long": base.long(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
    }
    torch.save({"model_state_dict": tensors}, tmp_path / "model.pth")
    checkpoint = Checkpoint(tmp_path / "model.pth")
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        np.testing.assert_array_equal(checkpoint[name].astype(np.float64), tensor.detach().double().numpy())


class Runs:
    """Unpickles by calling a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def archive(path, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", content if isinstance(content, bytes) else pickle.dumps(content, 2))
    return path


@pytest.mark.parametrize("function", [os.system, eval, exec, __import__, getattr, os.mkdir, io.open])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, function):
    victim = tmp_path / "victim"
    argument = {os.system: f"mkdir {victim}", exec: f"import os; os.mkdir({str(victim)!r})"}.get(function, str(victim))
    path = archive(tmp_path / "model.pth", {"model_state_dict": {"x": Runs(function, argument)}})
    with pytest.raises(UserError, match=r"is refused: it wants to run .*, which no checkpoint needs"):
        Checkpoint(path)
    assert not victim.exists()


def bad_files(folder):
    good = (FIXTURES / "simplest_vit.pth").read_bytes()
    (folder / "text.pth").write_text("hello")
    (folder / "short.pth").write_bytes(good[:500])
    archive(folder / "no_state.pth", {"weights": {}})
    archive(folder / "damaged.pth", b"\x80\x02garbage")
    with zipfile.ZipFile(folder / "other.zip", "w") as file:
        file.writestr("readme.txt", "no checkpoint")
    return {
        "missing.pth": "cannot be read (No such file or directory)",
        "text.pth": "is no checkpoint of torch.save",
        "short.pth": "is no checkpoint of torch.save",
        "no_state.pth": "has no model_state_dict",
        "damaged.pth": "is damaged",
        "other.zip": "it has no data.pkl",
    }


def test_a_file_that_is_no_checkpoint_is_one_line_and_nothing_is_written(tmp_path, data_dir):
    for name, message in bad_files(tmp_path).items():
        with pytest.raises(UserError) as caught:
            import_reference(config_of("simplest_vit", data_dir), str(tmp_path / "run"), str(tmp_path / name))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model__width": 32}, "has to_patch_embedding.weight [16, 1, 2, 2], expected [32, 1, 2, 2]"),
        ({"model__patch_size": 4}, "has to_patch_embedding.weight [16, 1, 2, 2], expected [16, 1, 4, 4]"),
        ({"model__mlp_dim": 64}, "has transformer.layers.1.layer1.lin.weight [32, 16], expected [64, 16]"),
        ({"model__depth": 1, "model__c_val_0_target": 0.1}, "holds transformer.layers.2"),
        ({"model__depth": 3}, "lacks transformer.layers.4.d [1, 1, 16, 1]"),
        ({"model__name": "simple_vit"}, "which a simple_vit of this config has not"),
        ({"model__attention": "softmax"}, "config.model.attention='softmax' is not in the PyTorch reference"),
        (
            {"model__mlp": "looks_linear", "model__activation": "gelu"},
            "config.model.mlp='looks_linear' is not in the PyTorch reference",
        ),
        ({"model__activation": "relu"}, "config.model.activation='relu' is not in the PyTorch reference"),
    ],
)
def test_another_shape_names_the_tensor_and_both_shapes(tmp_path, data_dir, overrides, message):
    config = config_of("simplest_vit", data_dir, **overrides)
    with pytest.raises(UserError) as caught:
        import_reference(config, str(tmp_path / "run"), str(FIXTURES / "simplest_vit.pth"))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_left_alone(tmp_path, data_dir):
    config = config_of("simple_vit", data_dir)
    import_reference(config, str(tmp_path), str(FIXTURES / "simple_vit.pth"))
    with pytest.raises(UserError, match="already holds a run"):
        import_reference(config, str(tmp_path), str(FIXTURES / "simple_vit.pth"))
