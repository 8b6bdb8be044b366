"""Print a table of finished runs: the settings that vary, and the accuracy over seeds.

    simplest-vit report runs/

Runs on the same data whose configs differ only in the seed share a row.
"""

from simplest_vit import cli
from simplest_vit.errors import UserError
from simplest_vit.files import local_path


def main() -> None:
    """Run the command."""
    usage = "simplest-vit report FOLDER..."

    def report(arguments: list[str]) -> None:
        if not arguments:
            raise UserError(f"no folder given; usage: {usage}")
        from simplest_vit.analysis.report import find_runs, group_runs, markdown

        runs, problems = find_runs([local_path(folder) for folder in arguments])
        groups, repeated = group_runs(runs)
        print(markdown(groups, problems + repeated))

    cli.run(report, usage, required=(), positional=True)
