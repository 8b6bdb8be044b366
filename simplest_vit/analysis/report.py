"""A table of finished runs: the settings that differ, and the accuracy over seeds."""

from typing import Any

from simplest_vit.analysis.runs import Group


def table(header: list[str], body: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def differences(groups: list[Group]) -> list[dict[str, Any]]:
    """Return, for each group, the fields that are not the same in all groups, by dotted name.

    Two seeds of each of two rates: `[{"optimizer.learning_rate": 1e-3}, {"optimizer.learning_rate": 2e-3}]`.
    """
    configs = [{"data": group.runs[0].data} | group.settings for group in groups]
    names = sorted({name for config in configs for name in config})
    varying = [name for name in names if any(config.get(name) != configs[0].get(name) for config in configs)]
    return [{name: config[name] for name in varying if name in config} for config in configs]


def markdown(groups: list[Group], problems: list[str]) -> str:
    """Return the report: a row for each group, the best first, and a line for each run that is not in it."""
    header = ["network, optimizer", "differs in", "accuracy", "best", "steps", "time", "device", "commit"]
    rows = []
    for group, own in zip(groups, differences(groups), strict=True):
        results = group.runs[0].results
        seconds = [run.results.get("wall_time_s") for run in group.runs]
        known = [value for value in seconds if value is not None]
        rows.append(
            (
                group.mean(),
                [
                    f"{group.config.get('model.name')}, {group.config.get('optimizer.name')}",
                    ", ".join(f"{name}={value}" for name, value in own.items()) or "-",
                    group.summary(),
                    group.summary("best_validation_accuracy"),
                    str(results["steps"]),
                    f"{sum(known) / len(known):.0f} s" if known else "-",
                    str(results.get("device", "-")),
                    str(results.get("commit") or "-")[:10],
                ],
            )
        )
    rows.sort(key=lambda row: -row[0])
    parts = [table(header, [cells for _, cells in rows]) if rows else "no finished run"]
    if problems:
        parts.append("Not in the table:\n\n" + "\n".join(f"- {problem}" for problem in problems))
    return "\n\n".join(parts)
