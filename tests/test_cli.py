"""The program as a whole: help, wrong words, and a program among programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import moesteer
from as_user import Run, in_own_process
from moesteer import __version__
from moesteer.cli import COMMANDS
from moesteer.profile import Profile

# --- help -----------------------------------------------------------------------------------------


def test_overview_names_every_command(run: Run):
    for arguments in ((), ("--help",), ("-h",)):
        said = run(*arguments)
        assert said.code == 0
        for name in COMMANDS:
            assert f"\n  {name} " in said.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(run: Run, name: str):
    said = run(*name.split(), "--help")
    assert said.code == 0
    assert f"Usage: moesteer {name}" in said.out
    for parameter in COMMANDS[name].__annotations__:
        if parameter not in ("return", "model", "profile", "prompts", "source"):
            assert parameter.strip("_").replace("_", "-") in said.out.lower()


def test_version(run: Run):
    assert run("--version").out == f"moesteer {__version__}\n"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_imports_nothing_heavy(option: str):
    code = (
        "import sys; from moesteer.cli import main; main(sys.argv[1:]);"
        "print([m for m in ('torch', 'transformers', 'cyclopts', 'rich', 'numpy', 'pydantic')"
        " if m in sys.modules])"
    )
    said = in_own_process(option, code=code)
    assert said.returncode == 0
    assert said.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bogus",), ('"bogus"', "detect", "--help")),
        (("pairs", "bogus"), ('"bogus"', "refusal", "document")),
        (("show",), ("PROFILE",)),
        (("show", "p", "--jsn"), ("--jsn", "--json")),
        (("detect", "m", "--out", "o"), ("--pairs",)),
        (("detect", "m", "--pairs", "p", "--out", "o", "--toward", "c"), ('"c"', '"a", "b"')),
        (("detect", "m", "--pairs", "p", "--out", "o", "--activate", "x"), ("--activate", '"x"')),
        (("generate", "m", "hi", "--seed", "1.5"), ("--seed is 1.5", "whole number")),
        (("generate", "m", "hi", "--batch-size", "1e0.5"), ("--batch-size",)),
        (("generate", "m", "hi", "--dtype", "float99"), ("float99", "bfloat16")),
        (("import-ranking", "r", "--out", "o"), ("--top-k",)),
    ],
)
def test_wrong_words(refused: Run, arguments: tuple[str, ...], words: tuple[str, ...]):
    said = refused(*arguments)
    for word in words:
        assert word in said.err


def test_only_the_program_knows_its_commands():
    root = Path(moesteer.__file__).parent
    above = {root / "cli.py", *root.glob("commands/*.py")}
    files = set(root.rglob("*.py")) - above
    assert len(files) > 100
    assert [file for file in files if "moesteer.commands" in file.read_text()] == []


# --- as a program among programs ------------------------------------------------------------------


def test_as_a_program(model_folder: Path, made: dict[str, Path], tmp_path: Path):
    arguments = ("generate", model_folder, "--with", made["chosen"], "--max-new-tokens", 3)
    said = in_own_process(*arguments, stdin="one\ntwo\n", cwd=tmp_path)
    assert said.returncode == 0
    assert [json.loads(line)["prompt"] for line in said.stdout.splitlines()] == ["one", "two"]
    progress, fired = said.stderr.splitlines()  # and no bars or warnings of others
    assert progress.startswith("generate: 2 of 2 prompts")
    assert fired.startswith("fired: chosen.safetensors")
    refused = in_own_process("show", "nope", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "moesteer: nope: there is no such profile file.\n"


def test_a_closed_pipe_is_no_error(made: dict[str, Path]):
    command = [sys.executable, "-m", "moesteer", "show", str(made["scored"]), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
        assert shown.stdout is not None
        assert shown.stderr is not None
        shown.stdout.close()
        assert shown.stderr.read() == b""
    assert shown.returncode == 0


def test_a_profile_says_which_command_made_it(run: Run, model_folder: Path, pairs_file: Path):
    run("detect", model_folder, "--pairs", pairs_file, "--out", "p q")
    evidence = Profile.load("p q").evidence
    assert evidence is not None
    assert evidence.command == f"moesteer detect {model_folder} --pairs {pairs_file} --out 'p q'"
