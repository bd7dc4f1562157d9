"""Writes docs/reference/commands.md from the commands' own signatures and docstrings.

python scripts/commands.py
"""

from pathlib import Path

from cyclopts.docs.markdown import generate_markdown_docs

from moesteer.cli import parser

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "commands.md"

INTRODUCTION = """\
# Commands

Written by `python scripts/commands.py` from the commands themselves; `moesteer COMMAND --help` says
the same. Exit codes: 0 done, 2 something that you can mend (said in one message, nothing
half-written), 130 interrupted.

"""


def page() -> str:
    """The page as it should stand in the folder."""
    told = generate_markdown_docs(parser(), generate_toc=False, usage_name="moesteer")
    _, _, commands = told.partition("\n## ")
    return INTRODUCTION + "## " + commands.rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
