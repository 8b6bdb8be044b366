"""Rerun a table of results, from the choice of learning rates to the accuracy on the test images.

    python -m benchmarks.reproduce headline --workdir runs/headline --data_dir ~/tensorflow_datasets
    python -m benchmarks.reproduce headline --workdir runs/headline --optimizer soap --row isometric --row SimpleViT
    python -m benchmarks.reproduce controls --workdir runs/check --check

The rate of each row is chosen on a hold-out of 5,000 training images, with the table's seeds for that, after as many
steps as the table has (30 epochs of a recipe); nothing is chosen before all runs have ended, with a result or a loss
that is not finite. Then fresh seeds train on all training images, and the test images are read once, at the end.
Tables without seeds end with the choice. Rerun the command to resume;
`python -m benchmarks.records WORKDIR --selected_on hold-out` records the runs.
--check takes two steps of each row and reads a hundred images, with the first data set, rate and seed.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Iterator
from typing import Any

from absl import flags

from benchmarks import ideas
from benchmarks.protocols import (
    CHOOSING_EPOCHS,
    HOLD_OUT,
    PROTOCOLS,
    TABLES,
    Network,
    Table,
    networks,
    recipe_arguments,
)
from simplest_vit import cli
from simplest_vit.commands.sweep import Point, check_points, execute, find_devices, share_devices
from simplest_vit.errors import TrainingError, UserError, did_you_mean

Key = tuple[str, str, str]  # data, optimizer, row


def part(table: Table, **named: list[str]) -> Table:
    """Keep the named part of a table.

    Args:
      table: The table.
      **named: Values of `data`, `optimizer` and `row` to keep; an empty list keeps all.

    Raises:
      UserError: If the table has no such name.
    """
    known = {"data": table.data, "optimizer": tuple(table.learning_rates), "row": table.rows}
    for kind, names in known.items():
        for name in (name for name in named[kind] if name not in names):
            hint = did_you_mean(name, names, f"expected one of {', '.join(names)}", repr)
            raise UserError(f"--{kind}={name} is not in this table; {hint}")
    data, optimizers, rows = (
        tuple(name for name in names if name in (named[kind] or names)) for kind, names in known.items()
    )
    rates = {optimizer: table.learning_rates[optimizer] for optimizer in optimizers}
    return table._replace(data=data, learning_rates=rates, rows=rows)


def smallest(table: Table) -> Table:
    """Return the smallest version of a table, to show that it runs: one data set, rate and seed, two steps."""
    rates = {optimizer: rates[:1] for optimizer, rates in table.learning_rates.items()}
    seeds = {"seeds": table.seeds[:1], "choosing_seeds": table.choosing_seeds[:1]}
    return table._replace(data=table.data[:1], learning_rates=rates, steps=2, steps_of={}, **seeds)


def cells(table: Table) -> Iterator[tuple[Key, Network]]:
    """Yield the rows of a table for each data set and optimizer."""
    for data in table.data:
        for optimizer in table.learning_rates:
            for row in table.rows:
                yield (data, optimizer, row), networks(table.protocol)[row]


def point(table: Table, key: Key, network: Network, rate: float, seeds: tuple[int, ...], **run: Any) -> Point:
    """Lay out the runs of one rate.

    Args:
      table: The table.
      key: Data set, optimizer and row.
      network: The row's network.
      rate: Learning rate.
      seeds: One run each.
      **run: `stage`, the name of a folder; `root`, the folder of the table; `fields`, which differ from the protocol.

    Returns:
      The runs.
    """
    data, optimizer, row = key
    length = _length(table.row_steps(row))
    fields = PROTOCOLS[table.protocol] | network.fields | {"optimizer.learning_rate": rate} | length | run["fields"]
    result = Point({"data": data, "optimizer": optimizer, "row": row, "learning rate": f"{rate:g}"}, [], [])
    for seed in seeds:
        folder = pathlib.Path(run["root"], run["stage"], data, optimizer, row, f"{rate:g}", f"seed={seed}")
        recipe = f"--config=configs/{data}.py:{recipe_arguments(network.preset, optimizer, table.augmentation)}"
        overrides = (f"--config.{name}={value}" for name, value in {**fields, "seed": seed}.items())
        # `simplest-vit`, which also knows the kinds of attention and the optimizers of `ideas`.
        command = [sys.executable, "-m", "benchmarks.ideas", "train", recipe]
        result.workdirs.append(folder)
        result.commands.append([*command, *overrides, f"--workdir={folder}"])
    return result


def choices(table: Table, root: str, fields: dict[str, Any], check: bool) -> dict[Key, list[Point]]:
    """Lay out a run on the hold-out for each rate of each row."""
    fields = HOLD_OUT | ({"epochs": CHOOSING_EPOCHS} if table.protocol == "recipe" else {}) | fields
    if check:
        fields |= {"data.validation_split": "train[45000:45100]"}
    found: dict[Key, list[Point]] = {}
    for key, network in cells(table):
        rates = network.learning_rates[: 1 if check else None] or table.learning_rates[key[1]]
        run = {"stage": "choose", "root": root, "fields": fields}
        found[key] = [point(table, key, network, rate, table.choosing_seeds, **run) for rate in rates]
    return found


def reported(
    table: Table, chosen: dict[Key, float], root: str, fields: dict[str, Any], check: bool = False
) -> list[Point]:
    """Lay out the runs of fresh seeds at the chosen rates, which read the test images once, at the end."""
    few = {"data.validation_split": "test[:100]"} if check else {}
    run = {"stage": "test", "root": root, "fields": few | fields}
    return [point(table, key, network, chosen[key], table.seeds, **run) for key, network in cells(table)]


def _length(steps: int | None) -> dict[str, Any]:
    """Return the fields of a run of this many steps, or of the recipe's epochs, that is evaluated once."""
    if steps is None:
        return {"eval_every": 2**31 - 1, "checkpoint_every": 240}
    return {"steps": steps, "eval_every": steps, "checkpoint_every": min(steps, 500), "log_every": min(steps, 100)}


def best_rates(found: dict[Key, list[Point]]) -> dict[Key, float]:
    """Return the rate of each row with the highest accuracy on the hold-out, of those that finished.

    Raises:
      TrainingError: If no run of a row finished, or one failed for another reason than a loss that is not finite: its
        rerun may change the choice, after which the test images would be read again.
    """
    best = {}
    for key, points in found.items():
        for folder in (folder for tried in points for folder in tried.workdirs):
            if not (folder / "results.json").exists():
                log = folder / "log.txt"
                if "is not finite" not in "".join(log.read_text(errors="replace").splitlines()[-1:]):
                    raise TrainingError(f"no rate is chosen yet: correct what {log} reports and rerun the command")
        accuracies = {}
        for tried in points:
            finished = [path for workdir in tried.workdirs if (path := workdir / "results.json").exists()]
            if finished:
                rate = float(tried.values["learning rate"])
                accuracies[rate] = statistics.fmean(
                    json.loads(path.read_text())["validation_accuracy"] for path in finished
                )
        if not accuracies:
            raise TrainingError(f"no run of {', '.join(key)} finished; see the lines above")
        best[key] = max(accuracies, key=lambda rate: accuracies[rate])
        shown = ", ".join(f"{rate:g}: {accuracy:.2%}" for rate, accuracy in accuracies.items())
        print(f"{', '.join(key)}: {shown}; chosen {best[key]:g}", flush=True)
    return best


def main() -> None:
    """Run as a program."""
    data_dir = flags.DEFINE_string("data_dir", "~/tensorflow_datasets", "Folder of the prepared data sets.")
    check = flags.DEFINE_bool("check", False, "Take only two steps of each row.")
    at_once = flags.DEFINE_integer("at_once", 1, "Number of simultaneous runs.", lower_bound=1)
    named = {
        "data": flags.DEFINE_multi_string("data", [], "Data set to rerun, such as cifar10; repeatable."),
        "optimizer": flags.DEFINE_multi_string("optimizer", [], "Optimizer to rerun, such as soap; repeatable."),
        "row": flags.DEFINE_multi_string("row", [], "Row to rerun, such as isometric; repeatable."),
    }
    usage = f"python -m benchmarks.reproduce {'|'.join(TABLES)} --workdir FOLDER"

    def program(arguments: list[str]) -> None:
        ideas.register()
        if len(arguments) != 1 or arguments[0] not in TABLES:
            raise UserError(f"unknown table {' '.join(arguments) or '(none)'}; usage: {usage}")
        table = part(TABLES[arguments[0]], **{kind: flag.value for kind, flag in named.items()})
        if check.value:
            table = smallest(table)
        root, fields = str(cli.WORKDIR.value), {"data.dir": data_dir.value}
        found = choices(table, root, fields, check.value)
        points = [tried for tries in found.values() for tried in tries]
        check_points(points)
        environments = share_devices(*find_devices(), at_once.value)
        failed = execute(points, environments)
        chosen = best_rates(found)
        if table.seeds:
            failed += execute(reported(table, chosen, root, fields, check.value), environments)
        if failed:
            raise TrainingError(f"{failed} runs failed, see above; rerun the command for these")
        print(f"done; record the runs: python -m benchmarks.records {root} --selected_on hold-out")

    cli.run(program, usage, required=("workdir",), positional=True)


if __name__ == "__main__":
    main()
