"""Compare finished runs with the published results of the PyTorch reference.

    simplest-vit report runs/

Prints the tables and writes RESULTS.md (its part between two markers, the rest of the file stays), docs/results.csv and
docs/training_curves.png to --output.
"""

from absl import flags

from simplest_vit import cli
from simplest_vit.errors import UserError


def main() -> None:
    """Run the command."""
    output = flags.DEFINE_string("output", ".", "Folder to write RESULTS.md and docs/ to.")
    usage = "simplest-vit report FOLDER..."

    def report(arguments: list[str]) -> None:
        if not arguments:
            raise UserError(f"no runs named; usage: {usage}")
        from simplest_vit.analysis.report import markdown, write
        from simplest_vit.analysis.runs import find_runs, group_by_config

        runs, problems = find_runs(arguments)
        groups = group_by_config(runs)
        print(markdown(groups, problems))
        print(f"\nwritten: {write(groups, problems, output.value)}")

    cli.run(report, usage, required=(), positional=True)
