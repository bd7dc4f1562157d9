"""`moesteer play`: what it refuses, before it loads anything. The page: tests/playground/."""

import socket
import sys
from pathlib import Path

import pytest

from as_user import Run


def test_other_engines_and_split_models_are_refused(refused: Run):
    assert "leave out --engine vllm" in refused("play", "testbed", "--engine", "vllm").err
    for way in ("--tensor-parallel", "--expert-parallel"):
        assert "one process" in refused("play", "testbed", way, 2).err


def test_other_hosts_need_a_password(refused: Run, in_tmp_path: Path):
    assert "--password-file" in refused("play", "testbed", "--host", "0.0.0.0").err
    (in_tmp_path / "empty").touch()
    said = refused("play", "testbed", "--host", "0.0.0.0", "--password-file", "empty")
    assert "empty holds no password" in said.err
    said = refused("play", "testbed", "--password-file", "missing")
    assert "missing can't be read" in said.err


def test_a_port_that_is_taken_is_refused(refused: Run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("play", "testbed", "--port", port)
    assert f"127.0.0.1:{port} can't be had" in said.err
    assert "from 0 to 65535" in refused("play", "testbed", "--port", 70000).err


def test_a_host_that_can_be_none_is_refused(refused: Run, in_tmp_path: Path):
    (in_tmp_path / "secret").write_text("open sesame")
    said = refused("play", "testbed", "--host", "é" * 80, "--password-file", "secret")
    assert "is no name of a machine" in said.err


def test_profiles_are_checked_first(refused: Run, made: dict[str, Path]):
    assert "no such profile file" in refused("play", "testbed", "--with", "none").err
    said = refused("play", "testbed", "--with", made["chosen"], made["scored"], "--port", 0)
    assert "does not fit testbed" in said.err


def test_without_gradio_it_says_what_to_install(refused: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'moesteer[playground]'" in refused("play", "testbed").err
