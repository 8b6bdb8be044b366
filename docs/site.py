"""Add README.md and RESULTS.md, which stand at the top of the repository, to the site as its first pages."""

import pathlib
import re

from mkdocs.structure.files import File

_TOP = {"README.md": "index.md", "RESULTS.md": "results.md"}
_REPOSITORY = re.compile(r"\[([^\]]+)\]\((?!https?:|#)(?![\w/.-]+\.(?:md|png))[^)]*\)")


def on_files(files, config):
    """Add the two pages to the site's files."""
    for source, target in _TOP.items():
        content = (pathlib.Path(config.config_file_path).parent / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at the site's pages, and leave the text alone of links to files that are only in the repository."""
    markdown = markdown.replace("(docs/", "(").replace("(../", "(")
    for source, target in _TOP.items():
        markdown = markdown.replace(f"({source}", f"({target}")
    markdown = re.sub(r"\[([^\]]+)\]\((?:CONTRIBUTING|CHANGELOG|benchmarks/README)\.md[^)]*\)", r"\1", markdown)
    return _REPOSITORY.sub(r"\1", markdown)
