"""Run every code block of pages, as a reader would: in order, in an empty folder.

    python scripts/run_blocks.py [PAGE …]      all pages of docs/ and the README without any

| block | |
|---|---|
| bash | run by `bash -e`; `moesteer` is the one beside this Python |
| python | run in one namespace a page |
| output | must be what the block before it printed; a line or a part of one left out is written … |

Other blocks (text, json, toml) are not run: there stands what needs another model, a GPU or vLLM.
"""

import atexit
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
HERE = "--here"
"""What the process is told that runs one page, in the folder that it is started in."""

ON_VLLM = ("vllm.md", "serving.md")
"""Pages whose blocks run in vLLM's own environment, when they are named."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line that it begins at."""

    language: str
    text: str
    line: int


def main(names: Sequence[str]) -> None:
    """Run the pages' blocks, each page in a process and a folder of its own; 1 where one fails."""
    if names[:1] == [HERE]:
        sys.exit(run_page(Path(names[1])))
    pages = [Path(name).resolve() for name in names] or [
        ROOT / "README.md",
        *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name not in ON_VLLM),
    ]
    failed = 0
    for page in pages:
        if not any(runs(block) for block in blocks(page.read_text(encoding="utf-8"))):
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, __file__, HERE, page], cwd=folder)
        failed += done.returncode != 0
        told = "failed" if done.returncode else "ran"
        print(
            f"{os.path.relpath(page, ROOT)}: {told} in {time.monotonic() - started:.0f} s",
            flush=True,
        )
    if failed:
        sys.exit(f"{failed} of {len(pages)} pages have a block that fails.")


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order, also those in lists and admonitions."""
    for token in MarkdownIt().parse(text):
        if token.type == "fence":
            language = token.info.split()[0] if token.info.strip() else ""
            yield Block(language, token.content, (token.map or [0])[0] + 1)


def runs(block: Block) -> bool:
    return block.language in ("bash", "python")


def run_page(page: Path) -> int:
    """Run one page's blocks in the current folder; 1 where one fails, and nothing after it."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["COLUMNS"] = "120"
    names: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page.read_text(encoding="utf-8")):
        where = f"{page.name}:{block.line}"
        if block.language == "output":
            if not shows(block.text, printed):
                print(f"{where}: this is not what was printed, which is:\n{printed}")
                return 1
        elif block.language == "python":
            try:
                printed = run_python(block, page, names)
            except Exception as error:
                print(f"{where}: {type(error).__name__}: {error}")
                return 1
        elif block.language == "bash":
            code, printed, complaints = run_bash(block)
            if code:
                print(f"{where}: exit {code}\n{printed}{complaints}")
                return 1
    return 0


def run_bash(block: Block) -> tuple[int, str, str]:
    """Exit status and both outputs; what runs on in the background ends with this process."""
    shell = subprocess.Popen(
        ["bash", "-e", "-c", block.text],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(end_session, shell.pid)
    printed, complaints = shell.communicate()
    return shell.returncode, printed, complaints


def end_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGTERM)


def run_python(block: Block, page: Path, names: dict[str, object]) -> str:
    """What the block prints; its names stay for the next."""
    code = compile("\n" * block.line + block.text, str(page), "exec")  # errors name the page's line
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return out.getvalue()


def shows(told: str, printed: str) -> bool:
    """Whether what a page shows is part of what was printed, whole lines, … standing for anything.

    Spaces at the ends of lines don't count.
    """
    lines = [line.rstrip() for line in told.rstrip().split("\n")]
    anything = r"(?:.|\n)*?"
    pattern = "\n".join(
        re.escape(line).replace(re.escape("…"), anything if line.strip() == "…" else ".*?") + r"\ *"
        for line in lines
    )
    return re.search(rf"^{pattern}$", printed, re.MULTILINE) is not None


if __name__ == "__main__":
    main(sys.argv[1:])
