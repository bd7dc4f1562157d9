"""`moesteer push` and `pull`, as a user meets them."""

import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from as_user import Run, in_own_process
from fake_hub import FakeHub
from moesteer.profile import Profile
from moesteer.runs import open_run

# How huggingface_hub hands a file to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")


def test_there_and_back(run: Run, hub: FakeHub, made: dict[str, Path], model_folder: Path):
    named = ("--base-model", "org/tiny", "--license", "apache-2.0")
    said = run("push", made["chosen"], "me/chosen", *named)
    assert said.code == 0, said.err
    assert f"pushed: {hub.endpoint}/me/chosen/commit/" in said.out
    assert "README.md: " in said.out
    assert "org/tiny (qwen3_moe)" in said.out  # what is published is shown
    assert str(model_folder) not in said.out
    assert not list(Path().iterdir())  # nothing is left behind

    said = run("pull", "me/chosen", "--out", "p.safetensors")
    assert said.code == 0, said.err
    commit, files = hub.repos["me/chosen"].at("main")
    assert f"written: p.safetensors, from me/chosen at commit {commit}" in said.out
    assert "activated" in said.out
    assert Path("p.safetensors").read_bytes() == files["profile.safetensors"]
    mine, theirs = Profile.load("p.safetensors"), Profile.load(made["chosen"])
    assert mine.fingerprint == theirs.fingerprint

    said = run("generate", model_folder, "Tell me.", "--with", "p.safetensors")
    assert said.code == 0, said.err
    assert "fired: p.safetensors" in said.err


@pytest.mark.filterwarnings("default::moesteer.errors.MoesteerWarning")
def test_a_dry_run_uploads_nothing_and_hides_the_folder(
    run: Run, hub: FakeHub, made: dict[str, Path], model_folder: Path
):
    said = run("push", made["chosen"], "me/chosen", "--dry-run", "laid")
    assert said.code == 0
    assert "written: laid; nothing was uploaded" in said.out
    assert f"names {model_folder}, no model of the Hub" in said.err
    assert "--base-model" in said.err
    assert hub.asked == []
    assert ModelCard.load("laid/README.md").data.to_dict()["tags"][0] == "moesteer"
    for path in Path("laid").iterdir():
        for folder in (model_folder, made["chosen"].parent):
            assert str(folder).encode() not in path.read_bytes()


def test_refusals(refused: Run, hub: FakeHub, made: dict[str, Path]):
    chosen = made["chosen"]
    assert "--private" in refused("push", chosen, "me/x", "--private", "--dry-run", "laid").err
    assert "OWNER/NAME" in refused("push", chosen, "chosen", "--dry-run", "laid").err
    assert "no such profile" in refused("push", "no.safetensors", "me/x").err
    with open_run("run", "writers", {}, {}):
        pass
    said = refused("push", chosen, "me/x", "--run", "run", "--dry-run", "laid")
    assert "run is a run of `writers`; a card shows" in said.err
    assert "has no repository me/none" in refused("pull", "me/none", "--out", "p").err
    assert "does not exist" in refused("pull", "me/none", "--out", "no/p").err
    hub.make("me/weights", {"model.safetensors": b"weights"})
    assert "holds no profile" in refused("pull", "me/weights", "--out", "p").err


def test_the_hub_that_the_environment_names(hub: FakeHub, made: dict[str, Path], tmp_path: Path):
    """In a process of its own, where huggingface_hub reads the environment itself."""
    hub.make("me/chosen", {"profile.safetensors": made["chosen"].read_bytes()})
    online = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
    pulled = in_own_process("pull", "me/chosen", "--out", "p", env=online, cwd=tmp_path)
    assert (pulled.returncode, pulled.stderr) == (0, "")
    assert (tmp_path / "p").read_bytes() == made["chosen"].read_bytes()
    offline = {**online, "HF_HUB_OFFLINE": "1"}
    pulled = in_own_process("pull", "me/chosen", "--out", "q", env=offline, cwd=tmp_path)
    assert pulled.returncode == 2
    assert pulled.stderr.startswith(f"moesteer: {hub.endpoint} was not asked: offline mode is on")
