"""Finished runs beside the published results of the PyTorch reference: tables, RESULTS.md and a figure."""

import csv
import importlib.resources
import json
import os
import pathlib
from typing import Any

from simplest_vit.analysis import figures
from simplest_vit.analysis.command import command
from simplest_vit.analysis.curve_figure import draw_curves
from simplest_vit.analysis.runs import Group, read_curves
from simplest_vit.config import METHODS
from simplest_vit.errors import UserError
from simplest_vit.models.factory import VARIANTS

BEGIN, END = "<!-- report: begin, made by simplest_vit.analysis.report -->", "<!-- report: end -->"
_SETUPS = {"tat": "TAT setup", "simple_vit": "SimpleViT setup"}
_DATA = {"cifar10": "CIFAR-10 (/4)", "cifar100": "CIFAR-100 (/4)", "tiny_imagenet": "TinyImageNet-200 (/8)"}
_REFERENCE = {"attention": "espa_reference", "init": "reference"}  # what it has for E-SPA and SUO
_MODELS = {"simple_vit": "SimpleViT-S", "simplest_vit": "SimplEsT-ViT-S", "isometric": "isometric ViT-S"}


def reference_results() -> dict[str, Any]:
    """The figures that the reference publishes: `reference_results.json` of this package."""
    return json.loads(importlib.resources.files(__package__).joinpath("reference_results.json").read_text())


def setup_of(config: dict[str, Any]) -> str:
    """`simple_vit` for a run with RandAugment, else `tat`."""
    return "simple_vit" if config.get("data.rand_augment.num_ops") else "tat"


def method_of(config: dict[str, Any]) -> str:
    """Model and optimizer, named as in `reference_results.json`: `simplest_vit/shampoo25`."""
    optimizer = config.get("optimizer.name")
    frequency = config.get("optimizer.precondition_frequency") if optimizer == "shampoo" else None
    model = config.get("model.name")
    if model == "simplest_vit" and config.get("model.attention") == "shift":
        model = "isometric"
    return f"{model}/{optimizer}{frequency or ''}"


def deviations(config: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """What keeps a run out of the reference's tables: fields that are not those of its recipe."""
    data = config.get("data.name")
    if data == "imagenet":
        recipe, patch = reference["imagenet"], reference["imagenet"]["patch"]
    elif data in _DATA:
        recipe, patch = reference["small_data"], reference["small_data"]["patch"][data]
    else:
        return [f"data.name={data}"]
    expected = {
        "epochs": recipe["epochs"],
        "steps": None,
        "batch_size": recipe["batch_size"],
        "model.patch_size": patch,
    }
    found = [f"{name}={config.get(name)}" for name, value in expected.items() if config.get(name) != value]
    sizes = VARIANTS.get(config.get("model.variant", ""), {})
    for name, value in VARIANTS["S"].items():
        size = config.get(f"model.{name}")
        size = sizes.get(name) if size is None else size
        if size != value:
            found.append(f"model.{name}={size}")
    if config.get("model.name") == "simplest_vit":
        method = METHODS["isometric" if config.get("model.attention") == "shift" else "espa_tat"]
        for name, part in method.items():
            if config.get(f"model.{name}") not in (part, _REFERENCE.get(name)):
                found.append(f"model.{name}={config.get(f'model.{name}')}")
    return found


def best_group(groups: list[Group], reference: dict[str, Any], data: str, setup: str, method: str) -> Group | None:
    """Of the runs by the reference's recipe, those with the highest mean accuracy; it chose from a grid, too."""
    candidates = [
        group
        for group in groups
        if (group.config.get("data.name"), setup_of(group.config), method_of(group.config)) == (data, setup, method)
        and not deviations(group.config, reference)
    ]
    return max(candidates, key=Group.mean, default=None)


def cell(published: float | None, group: Group | None) -> str:
    """Reference, ours, difference."""
    first = "-" if published is None else f"{published:.4f}"
    if group is None:
        return f"{first} / no run"
    difference = "" if published is None else f" / {group.mean() - published:+.4f}"
    return f"{first} / {group.summary()}{difference}"


def table(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(groups: list[Group], reference: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The reference's tables with our runs: title, header, body; methods of ours that it has not come last."""
    result = []
    for setup, title in _SETUPS.items():
        published = reference["small_data"][setup]
        ours = [
            method_of(g.config) for g in groups if g.config.get("data.name") in _DATA and setup_of(g.config) == setup
        ]
        body = [
            [_method_title(method)]
            + [
                cell(published.get(method, {}).get(data), best_group(groups, reference, data, setup, method))
                for data in _DATA
            ]
            for method in dict.fromkeys([*published, *ours])
        ]
        result.append((title, ["", *_DATA.values()], body))
    published = reference["imagenet"]
    methods = [name for name in published if "/" in name]
    ours = [method_of(group.config) for group in groups if group.config.get("data.name") == "imagenet"]
    body = [
        [_method_title(method) + "/16"]
        + [
            cell(published.get(method, {}).get(setup), best_group(groups, reference, "imagenet", setup, method))
            for setup in _SETUPS
        ]
        for method in dict.fromkeys([*methods, *ours])
    ]
    return [*result, ("ImageNet-1k, 90 epochs", ["", *_SETUPS.values()], body)]


def _method_title(method: str) -> str:
    model, optimizer = method.split("/")
    name = "SOAP" if optimizer == "soap" else optimizer.capitalize()
    if optimizer.startswith("shampoo"):
        name = f"Shampoo@{optimizer.removeprefix('shampoo')}"
    return f"{name}, {_MODELS.get(model, model)}"


def markdown(groups: list[Group], problems: list[str]) -> str:
    """The report without its figure."""
    reference = reference_results()
    parts = [
        "Top-1 validation accuracy at the end of training, each cell: reference / ours (mean ± standard deviation over "
        "n seeds) / difference. The reference is one run each; ours are runs by its recipe (model S, epochs, batch "
        "size, patch), of several hyperparameters those with the best mean, as it did."
    ]
    parts += [f"### {title}\n\n{table(header, body)}" for title, header, body in tables(groups, reference)]
    parts.append("### All runs\n\n" + (_all_runs(groups, reference) if groups else "no run"))
    if problems:
        parts.append("### Not in the tables\n\n" + "\n".join(f"- {problem}" for problem in problems))
    return "\n\n".join(parts)


def _all_runs(groups: list[Group], reference: dict[str, Any]) -> str:
    header = ["run", "accuracy", "best", "steps", "wall time", "device", "commit", "recipe differs in"]
    body, commands = [], []
    for number, group in enumerate(groups, start=1):
        first = group.runs[0].results
        data, commit = group.config.get("data.name"), str(first.get("commit") or "-")
        times = [run.results.get("wall_time_s", float("nan")) for run in group.runs]
        body.append(
            [
                f"{number}: {data}, {method_of(group.config)}, {_SETUPS[setup_of(group.config)]}",
                group.summary(),
                f"{group.mean('best_validation_accuracy'):.4f}",
                str(first["steps"]),
                f"{sum(times) / len(times):.0f} s",
                str(first.get("device", "-")),
                commit[:10] + "+" * commit.endswith("+"),  # which stands for changes beside the commit
                ", ".join(deviations(group.config, reference)) or "-",
            ]
        )
        seeds = ", ".join(str(run.results["seed"]) for run in group.runs)
        line = command(first["config"])
        line = f"`{line} --config.seed=SEED --workdir DIR`" if line else "by no config file that is at hand"
        commands.append(f"{number}. seeds {seeds}: {line}")
    return table(header, body) + "\n\nCommands:\n\n" + "\n".join(commands)


def rows(groups: list[Group]) -> list[dict[str, Any]]:
    """One row for each run, for CSV."""
    reference = reference_results()
    names = ("validation_accuracy", "best_validation_accuracy", "validation_loss", "train_loss", "steps", "seed")
    timing = ("step_time_median_s", "images_per_second", "wall_time_s", "device", "commit")
    return [
        {
            "path": str(run.path),
            "data": group.config.get("data.name"),
            "setup": setup_of(group.config),
            "method": method_of(group.config),
            "not_as_the_reference": "; ".join(deviations(group.config, reference)),
            **{name: run.results.get(name) for name in (*names, *timing)},
        }
        for group in groups
        for run in group.runs
    ]


def write(groups: list[Group], problems: list[str], output: str) -> pathlib.Path:
    """Write RESULTS.md, docs/results.csv and, if there are runs, docs/training_curves.png (and SVG).

    Args:
      groups: The runs.
      problems: What to say of runs that cannot be used.
      output: A folder.

    Returns:
      The path of RESULTS.md. Of one that exists only the part between the markers is replaced, or added at the end.

    Raises:
      UserError: If the folder cannot be written.
    """
    folder = pathlib.Path(output)
    text = f"{BEGIN}\n\n{markdown(groups, problems)}\n"
    try:
        (folder / "docs").mkdir(parents=True, exist_ok=True)
        if groups:
            curves = {
                f"{i}: {_label(group)}": read_curves(group.runs[0].path) for i, group in enumerate(groups, start=1)
            }
            with figures.style():
                figures.save(draw_curves(curves, "First seed of each run"), folder / "docs" / "training_curves")
            text += "\n![Training curves](docs/training_curves.png)\n"
        table_rows = rows(groups)
        with (folder / "docs" / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table_rows[0]) if table_rows else ["path"])
            writer.writeheader()
            writer.writerows(table_rows)
        path = folder / "RESULTS.md"
        old = path.read_text() if path.exists() else f"# Results\n\n{BEGIN}\n{END}\n"
        if BEGIN not in old:
            old += f"\n{BEGIN}\n{END}\n"
        before, rest = old.split(BEGIN, 1)
        after = rest.split(END, 1)[-1]
        temporary = path.with_name("RESULTS.md.tmp")
        temporary.write_text(f"{before}{text}\n{END}{after}")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"--output={output} cannot be written ({error.strerror}); choose another folder") from error
    return path


def _label(group: Group) -> str:
    return f"{group.config.get('data.name')}, {method_of(group.config)}"
