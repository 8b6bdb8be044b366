"""Everything that only a GPU can tell, the most valuable first, within a budget of minutes.

python -m benchmarks.gpu --workdir results --data_dir ~/tensorflow_datasets --minutes 30

1. The fused attention kernel: exact, and faster than XLA's form?
2. The train step of S/4 at batch 2048 beside PyTorch's, eager and compiled.
3. CIFAR-10 for 90 epochs by the reference's recipe: `CELLS`, in this order, several at once with --at_once.
4. What Shampoo and SOAP add to a step.
5. The small runs of `benchmarks.vanilla`, whose steps leave most of the GPU idle: eight at once.

Each part leaves its lines in WORKDIR/NAME.log and prints the last ones. What is under way when the time is over is told
to stop; a run of part 3 goes on with the same command. `python -m simplest_vit report WORKDIR/cifar10` makes tables.
"""

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import time

CONFIG = "configs/cifar10.py"

# Name -> arguments of the config file, and what differs from the recipe. Refreshes by turns would pay the latency of a
# whole one in every step.
CELLS: dict[str, tuple[str, list[str]]] = {
    "isometric-soap": (
        "model=simplest_vit,method=isometric,optimizer=soap",
        ["optimizer.learning_rate=1e-3", "optimizer.stagger=False"],
    ),
    "simple_vit-soap": (
        "model=simple_vit,optimizer=soap",
        ["optimizer.learning_rate=1e-3", "optimizer.stagger=False"],
    ),
    "espa_tat-shampoo": ("model=simplest_vit,optimizer=shampoo", []),
    "simple_vit-adam": ("model=simple_vit,optimizer=adam", []),
    "espa_tat-adam": ("model=simplest_vit,optimizer=adam", []),
}
ROWS = ("isometric", "SimpleViT", "E-SPA + TAT", "E-SPA + TAT, reference")
# A run that only shows that all of it works, on any machine.
TOY = ["model.depth=7", "model.width=64", "model.num_heads=2", "model.mlp_dim=128", "batch_size=32"]
TOY_STEPS = ["steps=4", "warmup_steps=1", "log_every=2", "eval_every=2", "checkpoint_every=2"]


class Part:
    """A program under way, whose lines go to a file and, when it ends, to the terminal."""

    def __init__(self, name: str, command: list[str], folder: pathlib.Path) -> None:
        print(f"== {name}: {shlex.join(command)}", flush=True)
        self.name, self.log, self.begin = name, folder / f"{name}.log", time.monotonic()
        with self.log.open("a") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def end(self) -> bool:
        """Print how it ended and its last lines; whether it ended well."""
        code = self.process.wait()
        print(f"== {self.name}: exit code {code} after {time.monotonic() - self.begin:.0f} s")
        print("\n".join(self.log.read_text().splitlines()[-15:]), flush=True)
        return code == 0


def run(waiting: list[tuple[str, list[str]]], folder: pathlib.Path, end: float, at_once: int = 1) -> bool:
    """Run programs until the time is over; whether all ended well."""
    running: list[Part] = []
    good = True
    while running or (waiting and time.monotonic() < end):
        while waiting and len(running) < at_once and time.monotonic() < end:
            running.append(Part(*waiting.pop(0), folder))
        for part in list(running):
            if part.process.poll() is not None:
                running.remove(part)
                good &= part.end()
        if time.monotonic() > end:
            for part in running:
                part.process.terminate()  # a run saves its step
            for part in running:
                try:
                    part.process.wait(30)
                except subprocess.TimeoutExpired:
                    part.process.kill()
        time.sleep(0.2)
    for name, _ in waiting:
        print(f"== {name}: not begun, the time is over")
    return good and not waiting


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="folder of the results")
    parser.add_argument("--data_dir", default="~/tensorflow_datasets", help="prepared CIFAR-10")
    parser.add_argument("--minutes", type=float, default=60, help="time for all of it")
    parser.add_argument("--at_once", type=int, default=1, help="runs of part 3 at the same time on the GPU")
    parser.add_argument(
        "--parts", nargs="*", type=int, default=[1, 2, 3, 4, 5], choices=range(1, 6), help="some of them"
    )
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=CELLS, help="some of those of part 3")
    parser.add_argument("--toy", action="store_true", help="tiny sizes, to try it on any machine")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    folder = options.workdir
    (folder / "cifar10").mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(0.9 / options.at_once))

    good = True
    toy = [f"--config.{field}" for field in TOY] if options.toy else []

    def program(module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", module, *arguments]

    if 1 in options.parts:
        arguments = ["--interpret", "--batch_size=2"] if options.toy else []
        good &= run([("attention_kernel", program("benchmarks.attention_kernel", *arguments))], folder, end)
    if 2 in options.parts:
        kernel = ".model.attention_kernel="
        fused = [] if options.toy else [f"--config{kernel}fused", f"--against={CONFIG}", f"--against{kernel}xla"]
        step = program("benchmarks.train_step", f"--config={CONFIG}", *fused, *toy)
        good &= run([("train_step", step)], folder, end)
    if 3 in options.parts:
        cells = []
        for name in options.cells:
            arguments, fields = CELLS[name]
            fields = [*fields, f"data.dir={options.data_dir}"]
            fields += ["eval_every=720", "checkpoint_every=720", *(TOY_STEPS if options.toy else [])]
            command = program("simplest_vit", "train", f"--config={CONFIG}:augmentation=basic,{arguments}")
            command += [f"--workdir={folder / 'cifar10' / name}", *(f"--config.{field}" for field in fields), *toy]
            cells.append((name, command))
        good &= run(cells, folder, end, options.at_once)
    if 4 in options.parts:
        direct = program("benchmarks.optimizers", "--direct", f"--config={CONFIG}", *toy)
        good &= run([("optimizers", direct)], folder, end)
    if 5 in options.parts:
        small = program("benchmarks.vanilla", f"--workdir={folder / 'vanilla'}", f"--data_dir={options.data_dir}")
        small += ["--rows", *ROWS, "--at_once=8", *(["--steps=2"] if options.toy else [])]
        rates = {"soap": "1e-3,2e-3,4e-3,8e-3", "adam": "3e-4,1e-3,3e-3", "muon": "3e-3,1e-2,3e-2"}
        for name, values in rates.items():
            seeds = "1" if options.toy else "1,2,3"
            command = [*small, f"--optimizers={name}", f"--learning_rates={values}", f"--seeds={seeds}"]
            good &= run([(f"vanilla-{name}", command)], folder, end)
    sys.exit(not good)


if __name__ == "__main__":
    main()
