"""Mistakes that the tests must catch, each with the test that does.

    python -m tests.optimizers.shampoo.mutants            # all of them
    python -m tests.optimizers.shampoo.mutants phase root # those with one of these words in their name

Copies the package, checks that the tests pass, makes one mistake at a time and runs its test, which must fail. Takes
minutes.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

FOLDER = "simplest_vit/optimizers/shampoo/"
REFERENCE = "test_reference.py::test_the_reference_preset_follows_the_oracle[exponent, none-float64]"
SQUARE = "test_reference.py::test_the_reference_preset_follows_the_oracle[gap-float64]"
FAST = "test_reference.py::test_the_default_preset_follows_the_oracle[3-3]"
SOAP = "test_reference.py::test_soap_follows_the_oracle[4-5-qr]"
ORIGINAL = "test_reference.py::test_the_reference_preset_follows_the_original_in_pytorch[blocks of 5, ]"
SCALE = "test_reference.py::test_the_reference_preset_moves_whatever_the_scale_of_gradients"
REJECT = "test_transform.py::test_a_rejected_preconditioner_keeps_the_old_one_and_is_counted"
PADDED = "test_sharding.py::test_devices_that_divide_nothing_share_the_work"
SETTINGS = "test_settings.py::test_a_changed_value_changes_the_update"

# What is wrong, file, text, text in its place, test.
MUTANTS = [
    ("only the first phase is recomputed", "axes.py", "(phase - device", "(0 * phase - device", FAST),
    ("the phases are off by one", "axes.py", "(phase - device", "(phase + 1 - device", FAST),
    ("the basis never moves", "soap.py", "refresh_basis(s, q", "refresh_basis(0 * s, q", SOAP),
    ("second moments are not carried", "soap.py", "multiply_axes(nu, squared, precision)", "nu", SOAP),
    ("momentum is not carried", "soap.py", "multiply_axes(mu, rotations, precision), ", "mu, ", SOAP),
    ("no early refreshes", "transform.py", "if options.refreshes_early and k", "if False and k", SOAP),
    ("left and right swapped", "shampoo.py", "zip(stack.axes, state.axes", "zip(stack.axes, state.axes[::-1]", SQUARE),
    ("no bias correction of statistics", "shampoo.py", "s / correction", "s", REFERENCE),
    ("no bias correction of momentum", "moments.py", "new / bias_correction(b1, count, dtype)", "new", FAST),
    ("grafting by the wrong norm", "moments.py", "_block_norms(step) /", "_block_norms(step) ** 2 /", FAST),
    ("a rejected root is taken", "axes.py", "(good & counts)[", "(good | True)[", REJECT),
    ("rejections are not counted", "axes.py", "+ (~good & counts)", "", REJECT),
    ("padded slots leak", "sharding.py", ")[:count]", ")[-count:]", PADDED),
    ("the reference's blocks are even", "shampoo.py", "    even_blocks=False,\n", "", ORIGINAL),
    (
        "the shift in one sum",
        "roots.py",
        "(eigenvalues - jnp.minimum(eigenvalues[:, :1], 0)) + eps",
        "eigenvalues + (eps - jnp.minimum(eigenvalues[:, :1], 0))",
        SCALE,
    ),
    ("statistics decay with b2", "options.py", "step, self.shampoo_beta", "step, self.b2", SETTINGS),
    ("the weight decay is dropped", "transform.py", "if weight_decay is None", "if True", SETTINGS),
    ("the mask is dropped", "transform.py", "(weight_decay, mask)", "(weight_decay)", SETTINGS),
    (
        "layers are not apart",
        "transform.py",
        "make_plan(given, options, stack_axes)",
        "make_plan(given, options)",
        FAST,
    ),
    (
        "the stored momentum's type is the other's",
        "options.py",
        '_enabled("mu_dtype", self.mu_dtype)',
        "self.dtype",
        SETTINGS,
    ),
]


def _test(folder: pathlib.Path, *tests: str) -> int:
    """Run tests in a copy of the project; return pytest's exit code."""
    paths = [f"tests/optimizers/shampoo/{test}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", *paths]
    cache = {"SIMPLEST_VIT_TEST_CACHE": str(folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, env=os.environ | cache).returncode


def main(words: list[str]) -> None:
    """Print the mutants with their tests; exit with 1 if one lives."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant[0] for word in words)]
    root, alive = pathlib.Path(__file__).parents[3], 0
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for part in ("simplest_vit", "tests"):
            shutil.copytree(root / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(root / "pyproject.toml", folder)
        if _test(folder, *{mutant[-1] for mutant in chosen}):
            sys.exit("The tests must pass before a mistake is made.")
        for name, file, old, new, test in chosen:
            path = folder / FOLDER / file
            source = path.read_text()
            assert source.count(old) == 1, (file, old)
            path.write_text(source.replace(old, new))
            start, code = time.monotonic(), _test(folder, test)
            path.write_text(source)
            alive += code != 1
            outcome = "killed" if code == 1 else f"ALIVE ({code})"
            print(f"{outcome} in {time.monotonic() - start:.0f} s | {name} | {test}", flush=True)
    sys.exit(alive > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
