import ast
import dataclasses
import importlib
import itertools
import pathlib
import subprocess
import sys

import pytest

import simplest_vit
from simplest_vit import cli, recipes
from simplest_vit.config import FIELDS, check, default
from simplest_vit.data.builders import BUILDERS
from simplest_vit.errors import UserError
from simplest_vit.models import model_arguments
from simplest_vit.training.run import build
from tests.tiny import DIGITS

OPTIMIZERS = ("adam", "muon", "shampoo", "reference_shampoo", "soap")
IMAGES = {
    "digits": (8, 8, 1),
    "cifar10": (32, 32, 3),
    "cifar100": (32, 32, 3),
    "tiny_imagenet": (64, 64, 3),
    "imagenet": (224, 224, 3),
    "photos": (64, 64, 3),
}


def get_config(name, arguments=None):
    return importlib.import_module(f"configs.{name}").get_config(arguments)


@pytest.mark.parametrize("name", IMAGES)
def test_every_choice_of_every_config_describes_a_run(name):
    setups = [None] if name == "digits" else ["basic", "strong"]
    models = ["simplest_vit", "isometric_vit", "shift_mlp", "simple_vit"]
    for setup, model, optimizer in itertools.product(setups, models, OPTIMIZERS):
        arguments = f"model={model},optimizer={optimizer}" + (f",augmentation={setup}" if setup else "")
        config = get_config(name, arguments)
        check(config)
        assert config.data.name == ("image_folder" if name == "photos" else name)
        assert model_arguments(**config.model, image_shape=IMAGES[name])["depth"] == 12
        assert config.model.name == model


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("cifar10", None, {"epochs": 90, "batch_size": 2048, "warmup_steps": 75, "grad_clip": 1.0, "seed": 3407}),
        ("cifar10", "augmentation=basic", {"label_smoothing": 0.1, "data.mixup_alpha": 0.0, "model.patch_size": 4}),
        ("cifar100", "augmentation=strong", {"label_smoothing": 0.0, "data.mixup_alpha": 0.2}),
        ("cifar10", "model=simple_vit,optimizer=adam", {"optimizer.learning_rate": 1e-3}),
        ("cifar10", "model=simplest_vit,optimizer=adam", {"optimizer.learning_rate": 5e-4}),
        ("cifar10", "model=isometric_vit,optimizer=soap", {"optimizer.start_preconditioning_step": 10}),
        ("cifar100", "model=shift_mlp,optimizer=soap", {"optimizer.start_preconditioning_step": 10}),
        ("imagenet", "model=simple_vit,optimizer=soap", {"optimizer.start_preconditioning_step": 0}),
        ("tiny_imagenet", None, {"epochs": 90, "batch_size": 2048, "model.patch_size": 8, "warmup_steps": 75}),
        ("imagenet", None, {"epochs": 90, "batch_size": 1024, "warmup_steps": 10_000, "weight_decay": 1e-5}),
        ("imagenet", "optimizer=shampoo", {"optimizer.learning_rate": 3e-4}),
        ("imagenet", None, {"model.patch_size": 16, "model.variant": "S", "compute_dtype": "bfloat16"}),
    ],
)
def test_hyperparameters_are_the_reference_s(name, arguments, expected):
    config = get_config(name, arguments)
    for field, value in expected.items():
        section = config
        for part in field.split("."):
            section = section[part]
        assert section == value, field


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
@pytest.mark.parametrize("name", IMAGES)
def test_a_recipe_is_found_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert set(recipes.NAMES) == set(IMAGES)
    found = cli.load_config([f"--config={name}:model=isometric_vit,optimizer=soap", "--config.epochs=0.5"])
    expected = get_config(name, "model=isometric_vit,optimizer=soap")
    expected.epochs = 0.5
    assert found.to_dict() == expected.to_dict()
    (tmp_path / "mine").write_text("from simplest_vit.config import default as get_config")
    assert cli.load_config(["--config=mine"]).to_dict() == default().to_dict()


@pytest.mark.parametrize(("train_size", "steps"), [(40, 240), (120, 240), (399, 240), (416, 260), (960, 600)])
def test_few_photos_are_trained_on_for_as_many_steps_as_500(train_size, steps):
    """960 / 32 * 20 = 600; 80 % of 500 photos are 400, which make 12 whole batches of 32 and 12 * 20 = 240 steps."""
    config = get_config("photos")
    config.model.depth = 1
    data = dataclasses.replace(DIGITS, train_size=train_size, image_shape=IMAGES["photos"], mean=(0.5,) * 3)
    assert build(config, data).total_steps == steps


def test_a_recipe_is_found_in_a_place_with_a_colon(tmp_path):
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b" / "simplest_vit").symlink_to(pathlib.Path(simplest_vit.__file__).parent)
    program = f"import sys; sys.path.insert(0, '{tmp_path}/a:b'); from simplest_vit import cli, recipes; "
    program += "print(recipes.__file__, cli.load_config(['--config=digits:model=simple_vit']).model.name)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == [f"{tmp_path}/a:b/simplest_vit/recipes/__init__.py", "simple_vit"], found.stderr


@pytest.mark.parametrize("arguments", ["optimiser=adam", "adam", "augmentation=vit", "model="])
def test_a_mistyped_argument_is_one_line(arguments):
    with pytest.raises(UserError, match=r"config argument .* is unknown; expected [^\n]*$"):
        get_config("cifar10", arguments)


def test_defaults_are_values_that_their_rows_allow():
    for optimizer in (*OPTIMIZERS, "lion", "adamw", "sgd"):
        config = default(optimizer)
        check(config)
        assert config.optimizer.name == optimizer
    for name, field in FIELDS.items():
        assert field.values.allows(field.default), name
        assert field.meaning, name


def test_a_flag_can_set_what_has_no_default():
    config = default("shampoo")
    config.update_from_flattened_dict({"steps": 3, "data.dir": "/data", "model.depth": 24, "optimizer.b2": 0.99})
    check(config)
    for field in ("stagger", "precondition_frequency"):
        with pytest.raises(TypeError):
            config.optimizer[field] = "text"


def test_an_unknown_optimizer_is_one_line():
    with pytest.raises(UserError, match=r"config.optimizer.name='adamm' is unknown; did you mean adamw?\?"):
        default("adamm")


def test_the_data_sets_of_the_table_are_those_that_can_be_prepared():
    names = FIELDS["data.name"].meaning.removesuffix(" or a set that TFDS prepared")
    assert set(names.split(", ")) == set(BUILDERS)


# Everything below them takes plain arguments, or the one section that it is about.
READERS = {
    *("config.py", "cli.py", "api.py", "training/train.py", "training/run.py", "training/evaluate.py"),
}


def test_the_config_stops_at_the_door():
    package = pathlib.Path(simplest_vit.__file__).parent
    for path in package.rglob("*.py"):
        name = str(path.relative_to(package))
        if name in READERS or name.startswith("commands/"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.arg) and node.arg == "config"), f"{name}:{node.lineno} takes the config"
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert "ConfigDict" not in imported, f"{name} imports ConfigDict"
