"""The reference's checkpoints: logits, the way back, and files that must be refused."""

import collections
import io
import os
import pathlib
import pickle
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from simplest_vit.commands.import_reference import import_reference
from simplest_vit.errors import UserError
from simplest_vit.export import export
from simplest_vit.interop import PthFile
from simplest_vit.training import evaluate, train
from simplest_vit.training.evaluate import restore_best
from tests.tiny import tiny_config

FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def need_torch():
    if "SIMPLEST_VIT_REQUIRE_TORCH" not in os.environ:
        pytest.importorskip("torch")


def config_of(name, data_dir, **overrides):
    return tiny_config(f"optimizer=adam,model={name}", data__dir=data_dir, **overrides)


@pytest.mark.parametrize(
    ("name", "gamma", "is_said"),
    [("simplest_vit", 0.5, True), ("simplest_vit", 0.005, False), ("simple_vit", 0.5, False)],
)
def test_an_imported_checkpoint_gives_the_logits_of_pytorch(tmp_path, data_dir, name, gamma, is_said, caplog):
    """By the constants of the file, whatever the config's would be, which is said."""
    config = config_of(name, data_dir, ema__decay=0.9, model__gamma_max_depth=gamma)
    import_reference(config, str(tmp_path), str(FIXTURES / f"{name}.pth"))
    assert ("are not those of config.model.attention" in caplog.text) == is_said
    run, state, _ = restore_best(str(tmp_path))
    model = run.model(state)
    expected = np.load(FIXTURES / "expected.npz")
    np.testing.assert_allclose(model(jnp.asarray(expected["image"])), expected[name], rtol=1e-5, atol=1e-5)
    assert state.step == 1


@pytest.mark.slow
def test_an_imported_run_is_evaluated_and_trained_on_quick(tmp_path, data_dir):
    config = config_of("simplest_vit", data_dir)
    import_reference(config, str(tmp_path), str(FIXTURES / "simplest_vit.pth"))
    assert evaluate.evaluate(str(tmp_path), config)["best"].step == 1
    assert train.train(config, str(tmp_path))["steps"] == 6


@pytest.mark.parametrize("name", ["simplest_vit", "simple_vit"])
def test_there_and_back_is_the_same_file(tmp_path, data_dir, name):
    """Tensors and names after import and export are bit for bit those of the file; PyTorch itself loads them."""
    need_torch()
    import torch

    config = config_of(name, data_dir)
    import_reference(config, str(tmp_path / "run"), str(FIXTURES / f"{name}.pth"))
    export(str(tmp_path / "run"), str(tmp_path / "back.pth"), "pth")
    first, back = PthFile(FIXTURES / f"{name}.pth"), PthFile(tmp_path / "back.pth")
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
    checkpoint = PthFile(tmp_path / "model.pth")
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
def test_a_pickle_runs_no_code(tmp_path, function):
    victim = tmp_path / "victim"
    argument = {os.system: f"mkdir {victim}", exec: f"import os; os.mkdir({str(victim)!r})"}.get(function, str(victim))
    path = archive(tmp_path / "model.pth", {"model_state_dict": {"x": Runs(function, argument)}})
    assert PthFile(path).tensors == {}
    assert not victim.exists()


def nested(depth=60):
    """The pickle of a tuple of two that are the same, and so on: 2**depth leaves in a few bytes."""
    value = (1,)
    for _ in range(depth):
        value = (value, value)
    return pickle.dumps(value, 2)[2:-1]


class HasGet:
    """Unpickles as an OrderedDict whose `get` is a number."""

    def __reduce__(self):
        return collections.OrderedDict, (), {"get": 1}, None, iter([("model_state_dict", {})])


def storage(key):
    return b"(X\x07\0\0\0storagectorch\nFloatStorage\n" + key + b"X\x03\0\0\0cpuK\x01tQ"


BOMBS = {
    "memory": {"model_state_dict": {"x": Runs(list, Runs(bytearray, 2**40))}},
    "hash": b"\x80\x02}" + nested() + b"K\x01s.",
    "text": b"\x80\x02" + storage(nested()) + b".",
    "memo": b"\x80\x02Nr\xff\xff\xff\xff.",
    "bytes": b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
    "depth": b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b".",
    "attribute": HasGet(),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_cannot_ask_for_much_time_or_memory(tmp_path, name):
    path = archive(tmp_path / "model.pth", BOMBS[name])
    tracemalloc.start()
    try:
        assert PthFile(path).tensors == {}
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**28


def test_a_tensor_is_no_larger_than_its_storage_and_nothing_is_compressed(tmp_path):
    good = PthFile(FIXTURES / "simplest_vit.pth")
    name = "linear_head.bias"
    for changes in ({"shape": (2**30,), "strides": (0,)}, {"offset": 2**40}, {"key": "missing"}):
        good.tensors[name] = PthFile(good.path).tensors[name]._replace(**changes)
        with pytest.raises(UserError, match=r"is damaged: .*linear_head.bias"):
            good[name]
    with zipfile.ZipFile(tmp_path / "model.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("model/data.pkl", bytes(2**20))
    with pytest.raises(UserError, match="is damaged"):
        PthFile(tmp_path / "model.pth")


def test_damaged_files_are_one_line_or_a_checkpoint(tmp_path):
    """400 mutants of a file: bytes changed, cut out, repeated; in the pickle or anywhere."""
    whole = (FIXTURES / "simplest_vit.pth").read_bytes()
    with zipfile.ZipFile(FIXTURES / "simplest_vit.pth") as file:
        inner = file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))
    rng, path, refused = np.random.default_rng(0), tmp_path / "model.pth", 0
    for k in range(400):
        data = bytearray(inner if k % 2 else whole)
        for _ in range(rng.integers(1, 4)):
            first, last = sorted(rng.integers(0, len(data), 2))
            match rng.integers(3):
                case 0:
                    data[first] = rng.integers(256)
                case 1:
                    del data[first : min(last, first + 20)]
                case 2:
                    data[first:first] = data[last : last + 20]
        if k % 2:
            archive(path, bytes(data))
        else:
            path.write_bytes(data)
        try:
            checkpoint = PthFile(path)
            for name in checkpoint.tensors:
                checkpoint[name]
        except UserError as error:
            refused += 1
            assert str(error).isprintable()  # noqa: PT017
    assert refused > 100


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
        "text.pth": "is not a checkpoint written by torch.save",
        "short.pth": "is not a checkpoint written by torch.save",
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
        ({"model__name": "simple_vit"}, "which a simple_vit of this config does not have"),
        ({"model__attention": "softmax"}, "config.model.attention='softmax' is not in the PyTorch reference"),
        (
            {"model__mlp": "looks_linear", "model__activation": "gelu"},
            "config.model.mlp='looks_linear' is not in the PyTorch reference",
        ),
        ({"model__activation": "relu"}, "config.model.activation='relu' is not in the PyTorch reference"),
        ({"model__norm": "layer_norm"}, "config.model.norm='layer_norm' is not in the PyTorch reference"),
        ({"model__skip": "scaled"}, "config.model.skip='scaled' is not in the PyTorch reference"),
    ],
)
def test_another_shape_names_the_tensor_and_both_shapes(tmp_path, data_dir, overrides, message):
    config = config_of("simplest_vit", data_dir, **overrides)
    with pytest.raises(UserError) as caught:
        import_reference(config, str(tmp_path / "run"), str(FIXTURES / "simplest_vit.pth"))
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_import_that_was_stopped_is_repeated_and_another_run_is_left_alone(tmp_path, data_dir, monkeypatch):
    """Stopped before, within and after its save; then the folder holds what an import without a stop gives."""
    config = config_of("simple_vit", data_dir)
    path = str(FIXTURES / "simple_vit.pth")

    def stop(*_, **__):
        raise KeyboardInterrupt

    for place in ("__init__", "save"):
        with monkeypatch.context() as patch:
            patch.setattr(f"simplest_vit.commands.import_reference.Checkpoints.{place}", stop)
            with pytest.raises(KeyboardInterrupt):
                import_reference(config, str(tmp_path), path)
    (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    for _ in range(2):
        import_reference(config, str(tmp_path), path)
        assert restore_best(str(tmp_path))[1].step == 1
    monkeypatch.setattr(PthFile, "__getitem__", lambda self, name: np.zeros(self.tensors[name].shape, np.float32))
    with pytest.raises(UserError, match="already holds another run"):
        import_reference(config, str(tmp_path), path)


def test_an_import_of_the_same_weights_with_other_attention_is_not_taken_for_the_first(tmp_path, data_dir, monkeypatch):
    config, path = config_of("simplest_vit", data_dir), str(FIXTURES / "simplest_vit.pth")
    for _ in range(2):
        import_reference(config, str(tmp_path), path)
    read = PthFile.__getitem__
    monkeypatch.setattr(PthFile, "__getitem__", lambda self, name: read(self, name) + name.endswith(".B"))
    with pytest.raises(UserError, match="already holds another run"):
        import_reference(config, str(tmp_path), path)
