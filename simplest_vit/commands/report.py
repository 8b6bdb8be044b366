"""Print a table of finished runs for each data set: the settings that differ, and the accuracy over seeds.

simplest-vit report runs/
"""

from simplest_vit import cli
from simplest_vit.errors import UserError
from simplest_vit.files import local_path


def main() -> None:
    """Run the command."""
    usage = "simplest-vit report FOLDER..."

    def program(arguments: list[str]) -> None:
        if not arguments:
            raise UserError(f"no folder given; usage: {usage}")
        from simplest_vit.analysis.report import report

        print(report(map(local_path, arguments)))

    cli.run(program, usage, required=(), positional=True)
