"""What is released says one version, and brings its types."""

import re
from importlib.metadata import metadata, version
from importlib.resources import files
from pathlib import Path

import pytest

import moesteer
from as_user import Run

ROOT = Path(__file__).parent.parent


def test_one_version_everywhere(run: Run):
    told = run("--version").out
    assert told == f"moesteer {moesteer.__version__}\n"
    assert version("moesteer") == moesteer.__version__
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited is not None
    assert newest is not None
    assert cited[1] == newest[1] == moesteer.__version__


def test_types_come_along():
    assert files(moesteer).joinpath("py.typed").is_file()


@pytest.mark.parametrize("name", ["SECURITY.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"])
def test_what_a_release_needs_is_there(name: str):
    assert (ROOT / name).is_file()


def test_metadata():
    about = metadata("moesteer")
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in about.get_all("Classifier", [])
