"""The wheel in an environment of its own, outside of the repository."""

import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
SITE_PACKAGES = pathlib.Path(sysconfig.get_path("purelib"))

TINY = (
    *("--config.steps=4", "--config.batch_size=64", "--config.eval_every=2", "--config.checkpoint_every=2"),
    *("--config.model.depth=2", "--config.model.width=16", "--config.model.num_heads=2", "--config.model.mlp_dim=32"),
    "--config.data.dir=data",
)
OPTIMIZE = """
import importlib.util
import jax
import optax
import simplest_vit
from simplest_vit.optimizers.shampoo import shampoo, soap

assert not any(importlib.util.find_spec(name) for name in ("flax", "orbax", "ml_collections"))
for tx in (shampoo(0.1), soap(0.1)):
    params = {"kernel": jax.numpy.ones((4, 3))}
    state = tx.init(params)
    updates, state = tx.update(jax.grad(lambda p: (p["kernel"] ** 2).sum())(params), state, params)
    assert optax.global_norm(updates) > 0
print(simplest_vit.__file__)
"""
MODEL = """
import importlib.util
from simplest_vit.models import ViT, create_model
import simplest_vit

assert not importlib.util.find_spec("ml_collections")
print(simplest_vit.__file__)
"""


def run(*command, cwd):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    environment |= {"MPLCONFIGDIR": str(cwd)}
    return subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)


def output(*command, cwd):
    result = run(*command, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "simplest_vit", folder / "simplest_vit", ignore=shutil.ignore_patterns("__pycache__"))
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    output(*pip, "--wheel-dir", folder / "dist", folder, cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def install(wheel, folder, packages):
    """Make an environment of the wheel alone, which also sees a folder of packages: its folder of programs."""
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    output(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(str(packages))
    return python.parent


def what_it_brings(wheel, extra, folder):
    """Make a folder of all packages that pip would install beside the wheel, as far as they are here."""
    folder.mkdir()
    (metadata,) = importlib.metadata.distributions(path=[str(wheel)])
    waiting, found = [(text, extra) for text in metadata.requires], set()
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if (requirement.marker and not requirement.marker.evaluate({"extra": extra})) or name in found:
            continue
        found.add(name)
        waiting += [(more, "") for more in importlib.metadata.requires(name) or ()]
        for top in {file.parts[0] for file in importlib.metadata.files(name)} - {"..", "__pycache__"}:
            (folder / top).symlink_to(SITE_PACKAGES / top)
    return folder


@pytest.mark.slow
def test_the_base_brings_shampoo_and_soap_quick(wheel, tmp_path):
    bin = install(wheel, tmp_path / "venv", what_it_brings(wheel, "", tmp_path / "packages"))
    assert output(bin / "python", "-c", OPTIMIZE, cwd=tmp_path).startswith(str(tmp_path))
    assert "sweep" in output(bin / "simplest-vit", "--help", cwd=tmp_path)
    for command in ("train", "report"):
        result = run(bin / "simplest-vit", command, cwd=tmp_path)
        assert result.returncode == 2
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: No module named ")
        assert 'pip install "simplest-vit[train]"' in line


@pytest.mark.slow
def test_the_models_need_their_extra_alone_quick(wheel, tmp_path):
    bin = install(wheel, tmp_path / "venv", what_it_brings(wheel, "models", tmp_path / "packages"))
    assert output(bin / "python", "-c", MODEL, cwd=tmp_path).startswith(str(tmp_path))


@pytest.mark.slow
def test_it_trains_evaluates_predicts_and_reports_quick(wheel, tmp_path):
    bin = install(wheel, tmp_path / "venv", SITE_PACKAGES)
    options = ("--config", "digits:model=simple_vit,optimizer=adam", *TINY, "--workdir", "run")
    assert "1,437 examples" in output(bin / "simplest-vit", "prepare", "digits", "--data_dir=data", cwd=tmp_path)
    trained = json.loads(output(bin / "simplest-vit", "train", *options, cwd=tmp_path))
    evaluated = json.loads(output(bin / "simplest-vit", "evaluate", *options, cwd=tmp_path))
    assert evaluated["latest"]["validation_accuracy"] == trained["validation_accuracy"]
    Image.new("L", (8, 8), 128).save(tmp_path / "image.png")
    assert "image.png  " in output(
        bin / "simplest-vit", "predict", "--workdir", "run", "--images", "image.png", cwd=tmp_path
    )
    assert "All: network simple_vit, optimizer adam" in output(bin / "simplest-vit", "report", "run", cwd=tmp_path)
    place = output(bin / "python", "-c", "import simplest_vit; print(simplest_vit.__file__)", cwd=tmp_path)
    assert place.startswith(str(tmp_path))
    recipe = "from simplest_vit.recipes import cifar10; print(cifar10.get_config('model=shift_mlp').model.name)"
    assert output(bin / "python", "-c", recipe, cwd=tmp_path) == "shift_mlp\n"
