"""Measure what needs a GPU, by priority, within a time limit.

    python -m benchmarks.gpu --plan
    python -m benchmarks.gpu --workdir results --data_dir ~/tensorflow_datasets --minutes 30

1. kernel: is the fused attention kernel accurate, and faster than XLA's form?
2. step: a step of the isometric network at S/4 and batch 2,048, compared with SimpleViT's.
3. s4: `benchmarks.reproduce s4`, three runs at a time: 30 epochs on the hold-out for each rate, then 90 for each seed.
4. optimizers: what Shampoo and SOAP add to a step.
5. headline: `benchmarks.reproduce headline`, whose steps leave most of the GPU idle: eight runs at a time.

Each part writes WORKDIR/NAME.log and prints the last lines. When time is up, the current part is stopped; rerun the
command to resume it. `--toy` tries the whole plan at tiny sizes, on any machine.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys
import time

from benchmarks.protocols import recipe_arguments

# Sizes that only show that each part works.
_TOY = ["model.depth=7", "model.width=64", "model.num_heads=2", "model.mlp_dim=128", "batch_size=32"]


def plan(folder: pathlib.Path, data_dir: str, toy: bool) -> dict[str, list[str]]:
    """Return the command of each part, in order."""
    sizes = _TOY if toy else []

    def config(preset: str, flag: str = "config") -> list[str]:
        kernel = [] if toy else ["model.attention_kernel=fused"]
        file = f"--{flag}=configs/cifar10.py:{recipe_arguments(preset, 'adam')}"
        return [file, *(f"--{flag}.{field}" for field in (*sizes, *kernel))]

    def reproduce(table: str, at_once: int) -> list[str]:
        return [
            *("benchmarks.reproduce", table, f"--workdir={folder / table}", f"--data_dir={data_dir}"),
            *(f"--at_once={at_once}", *(["--check"] if toy else [])),
        ]

    modules = {
        "kernel": ["benchmarks.attention_kernel", *(["--interpret", "--batch_size=2"] if toy else [])],
        "step": ["benchmarks.train_step", *config("isometric_vit"), *config("simple_vit", "against")],
        "s4": reproduce("s4", 3),
        "optimizers": ["benchmarks.optimizers", "--direct", *config("simplest_vit")],
        "headline": reproduce("headline", 8),
    }
    return {name: [sys.executable, "-m", *words] for name, words in modules.items()}


def run(name: str, command: list[str], folder: pathlib.Path, end: float) -> bool:
    """Run a part until it ends or time is up; return whether it succeeded."""
    print(f"== {name}: {shlex.join(command)}", flush=True)
    log, begin = folder / f"{name}.log", time.monotonic()
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        code = process.wait(max(end - begin, 0))
    except subprocess.TimeoutExpired:
        process.terminate()  # the run saves its step
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
    print(f"== {name}: exit code {code} after {time.monotonic() - begin:.0f} s")
    print("\n".join(log.read_text().splitlines()[-15:]), flush=True)
    return code == 0


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", default="results", type=pathlib.Path, help="folder of the logs and runs")
    parser.add_argument("--data_dir", default="~/tensorflow_datasets", help="prepared CIFAR-10 and CIFAR-100")
    parser.add_argument("--minutes", type=float, default=30, help="time limit for all parts")
    parser.add_argument("--parts", nargs="*", help="parts to run, by name")
    parser.add_argument("--plan", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try it on any machine")
    options = parser.parse_args()
    parts = plan(options.workdir, options.data_dir, options.toy)
    chosen = options.parts or list(parts)
    if unknown := set(chosen) - parts.keys():
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; expected some of {', '.join(parts)}")
    if options.plan:
        print("\n".join(f"{name}: {shlex.join(parts[name])}" for name in chosen))
        return
    options.workdir.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    left = list(chosen)
    good = True
    while left and time.monotonic() < end:
        name = left.pop(0)
        good &= run(name, parts[name], options.workdir, end)
    for name in left:
        print(f"== {name}: not started, time is up")
    sys.exit(not good or bool(left))


if __name__ == "__main__":
    main()
