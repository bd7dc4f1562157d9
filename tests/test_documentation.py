"""The pages: written from the code where they say so, and how their blocks are run and compared.

The blocks themselves are run by `make docs`.
"""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN_BLOCKS = runpy.run_path(str(ROOT / "scripts" / "run_blocks.py"))
LANGUAGES = {"bash", "python", "output", "text", "json", "toml", "console"}


def test_the_page_of_commands_is_current() -> None:
    """`make reference` writes it."""
    script = ROOT / "scripts" / "commands.py"
    code = f"import runpy; print(runpy.run_path({str(script)!r})['page'](), end='')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    page = ROOT / "docs" / "reference" / "commands.md"
    assert page.read_bytes() == done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is(page: Path) -> None:
    """A block without a language would silently not be run."""
    blocks = list(RUN_BLOCKS["blocks"](page.read_text(encoding="utf-8")))
    assert {block.language for block in blocks} <= LANGUAGES, [
        block.line for block in blocks if block.language not in LANGUAGES
    ]


@pytest.mark.parametrize(
    ("told", "printed", "same"),
    [
        ("a\nb", "x\na\nb  \ny\n", True),
        ("a\nb", "a\nc\nb\n", False),
        ("a\n…\nb", "a\nc\nd\nb\n", True),
        ("took … s", "took 12 s\n", True),
        ("took … s", "took 12 s more\n", False),
        ("a", "ab\n", False),
        ("1.0 (95%)", "1x0 (95%)\n", False),
    ],
)
def test_what_a_page_shows_is_compared(told: str, printed: str, same: bool) -> None:
    assert RUN_BLOCKS["shows"](told, printed) is same


@pytest.mark.parametrize(
    ("page", "code"),
    [
        ("```bash\necho one > file\n```\n\n```python\nprint(open('file').read())\n```\n\n"
         "```output\none\n```\n", 0),
        ("```python\nx = 1\n```\n- in a list\n\n    ```python\n    assert x == 2\n    ```\n", 1),
        ("```bash\nfalse\ntrue\n```\n", 1),
        ("```bash\necho one\n```\n```output\ntwo\n```\n", 1),
        ("```text\nfalse\n```\n", 0),
    ],
)  # fmt: skip
def test_blocks_are_run_in_order(page: str, code: int, tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(page)
    script = ROOT / "scripts" / "run_blocks.py"
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
