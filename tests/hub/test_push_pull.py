"""Push and pull, against a Hub on loopback."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from made_evaluation import SECRET, evaluation
from safetensors.numpy import save_file

from fake_hub import FakeHub
from made_profiles import directed, full
from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.hub.pull import pull
from moesteer.hub.push import lay_out, push
from moesteer.profile import Profile

REPO = "me/steering"
# How huggingface_hub hands a file to its HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<:DeprecationWarning")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    full().save(tmp_path / "full.safetensors")
    return tmp_path / "full.safetensors"


@pytest.fixture
def laid(saved: Path, tmp_path: Path) -> Path:
    lay_out(saved, REPO, tmp_path / "laid")
    return tmp_path / "laid"


# --- there and back -------------------------------------------------------------------------------


def test_what_is_pulled_is_what_was_laid_out(hub: FakeHub, laid: Path, tmp_path: Path):
    address = push(laid, REPO)
    assert address.startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert not hub.repos[REPO].private
    commit, files = hub.repos[REPO].at("main")
    del files[".gitattributes"]
    assert files == {path.name: path.read_bytes() for path in laid.iterdir()}
    out = tmp_path / "back.safetensors"
    pulled = pull(REPO, out)
    assert out.read_bytes() == (laid / "profile.safetensors").read_bytes()
    assert pulled.commit == commit
    assert Profile.load(out).fingerprint == full().fingerprint
    assert any(asked.startswith("PUT /lfs/") for asked in hub.asked)  # as safetensors do
    assert sum("/commit/" in asked for asked in hub.asked) == 1  # all at once


def test_a_second_push_is_a_second_commit(hub: FakeHub, laid: Path, tmp_path: Path):
    first = push(laid, REPO).rpartition("/")[2]
    directed().save(tmp_path / "d.safetensors")
    lay_out(tmp_path / "d.safetensors", REPO, tmp_path / "other")
    push(tmp_path / "other", REPO)
    assert pull(REPO, tmp_path / "now.safetensors").profile.fingerprint == directed().fingerprint
    then = pull(REPO, tmp_path / "then.safetensors", revision=first)
    assert then.commit == first
    assert then.profile.fingerprint == full().fingerprint


def test_private(hub: FakeHub, laid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    push(laid, REPO, private=True)
    assert hub.repos[REPO].private
    assert pull(REPO, tmp_path / "mine.safetensors").profile.steers
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(MoesteerError, match=r"no repository me/steering, or it is private.*log in"):
        pull(REPO, tmp_path / "theirs.safetensors")
    assert not (tmp_path / "theirs.safetensors").exists()


def test_a_public_repository_does_not_become_private_by_itself(hub: FakeHub, laid: Path):
    push(laid, REPO)
    with pytest.raises(MoesteerError, match="exists and is public"):
        push(laid, REPO, private=True)
    assert len(hub.repos[REPO].commits) == 2


def test_a_repository_of_something_else_is_left_alone(hub: FakeHub, laid: Path):
    hub.make(REPO, {"README.md": b"mine", "model.safetensors": b"weights"})
    with pytest.raises(MoesteerError, match=r"no repository of a profile.* model\.safetensors"):
        push(laid, REPO)
    assert len(hub.repos[REPO].commits) == 1


def test_an_empty_repository_is_filled(hub: FakeHub, laid: Path):
    hub.make(REPO, {"README.md": b"", ".gitattributes": b""})
    push(laid, REPO)
    assert hub.repos[REPO].at("main")[1]["README.md"].startswith(b"---\n")


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (None, REPO, "does not know who you are: log in"),
        ("hf_wrong", REPO, "does not accept your token"),
        ("hf_reader", REPO, r"may not do this with me/steering \(this token may only read\)"),
        ("hf_me", "others/steering", "may not do this with others/steering"),
    ],
)
def test_without_permission(
    hub: FakeHub,
    laid: Path,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    repo: str,
    words: str,
):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(MoesteerError, match=words):
        push(laid, repo)
    assert hub.repos == {}


def test_metadata_that_the_hub_refuses(hub: FakeHub, saved: Path, tmp_path: Path):
    lay_out(saved, REPO, tmp_path / "x", license="do-as-you-like")
    with pytest.raises(MoesteerError, match=r'does not take the card.*"license" must be one of'):
        push(tmp_path / "x", REPO)
    assert [*hub.repos[REPO].at("main")[1]] == [".gitattributes"]


@pytest.mark.parametrize("status", [500, 503, 404])
def test_a_hub_out_of_order(hub: FakeHub, laid: Path, tmp_path: Path, status: int):
    hub.broken = status
    with pytest.raises(MoesteerError, match=f"answered {status} for me/steering: out of order"):
        push(laid, REPO)
    with pytest.raises(MoesteerError, match=f"answered {status} for me/steering: out of order"):
        pull(REPO, tmp_path / "p.safetensors")


def test_no_network(laid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_me")
    with pytest.raises(MoesteerError, match=r"offline mode is on\. Unset HF_HUB_OFFLINE"):
        push(laid, REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    with pytest.raises(MoesteerError, match=r"127.0.0.1:9 can't be reached: .*refused"):
        push(laid, REPO)
    with pytest.raises(MoesteerError, match=r"127.0.0.1:9 can't be reached: .*refused"):
        pull(REPO, tmp_path / "p.safetensors")


def test_no_hub_at_all(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What answers, but in another language."""
    from huggingface_hub import constants

    hub.make(REPO, {"profile.safetensors": b""})
    monkeypatch.setattr(constants, "ENDPOINT", f"{hub.endpoint}/lfs")
    with pytest.raises(MoesteerError, match="answered 404"):
        pull(REPO, tmp_path / "p.safetensors")


def test_no_such_repository_revision_or_profile(hub: FakeHub, tmp_path: Path):
    out = tmp_path / "p.safetensors"
    with pytest.raises(MoesteerError, match="has no repository me/steering"):
        pull(REPO, out)
    hub.make(REPO, {"pytorch_model.bin": pickle.dumps("never read"), "README.md": b""})
    with pytest.raises(MoesteerError, match=r"no profile.safetensors, only README.md, pytorch_mod"):
        pull(REPO, out)
    with pytest.raises(MoesteerError, match="has no such revision"):
        pull(REPO, out, revision="v2")
    assert not any("resolve" in asked for asked in hub.asked)  # nothing was fetched
    assert not out.exists()


class Trap:
    """What unpickling it would do."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_only_a_profile_lands(hub: FakeHub, tmp_path: Path):
    out = tmp_path / "p.safetensors"
    full().save(out)
    before = out.read_bytes()
    weights = tmp_path / "w.safetensors"
    save_file({"weight": np.zeros(3)}, weights)
    for bad, words in (
        (pickle.dumps(Trap()), "profile.safetensors is not a readable profile"),
        (before[:-5], "profile.safetensors is not a readable profile"),
        (b"", "profile.safetensors is not a readable profile"),
        (weights.read_bytes(), "is a safetensors file, but not a profile of moesteer"),
        (before.replace(b'"exact"', b'"other"').replace(b"paper", b"pqper"), "rule"),
    ):
        hub.make(REPO, {"profile.safetensors": bad})
        with pytest.raises(MoesteerError, match=words) as refusal:
            pull(REPO, out)
        assert str(refusal.value).startswith(f"{REPO}: profile.safetensors")
        assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.safetensors", "w.safetensors"]


# --- what is laid out -----------------------------------------------------------------------------


def test_no_results_but_shares(saved: Path, tmp_path: Path):
    run = evaluation(tmp_path / "run", Profile.load(saved))
    lay_out(saved, REPO, tmp_path / "laid", runs=[run])
    for path in (tmp_path / "laid").iterdir():
        data = path.read_bytes()
        assert SECRET.encode() not in data
        assert str(tmp_path).encode() not in data


def test_folders_that_hold_something(saved: Path, tmp_path: Path):
    (tmp_path / "laid").mkdir()
    (tmp_path / "laid" / "notes.txt").write_text("mine")
    with pytest.raises(MoesteerError, match=r"holds notes\.txt; give an empty folder"):
        lay_out(saved, REPO, tmp_path / "laid")
    with pytest.raises(MoesteerError, match="is a file"):
        lay_out(saved, REPO, saved)
    with pytest.raises(MoesteerError, match="does not exist"):
        lay_out(saved, REPO, tmp_path / "no" / "laid")


def test_a_model_without_a_name_is_warned_of(tmp_path: Path):
    Profile(((1, 2),)).save(tmp_path / "p.safetensors")
    with pytest.warns(MoesteerWarning, match="names no model.*--base-model"):
        lay_out(tmp_path / "p.safetensors", REPO, tmp_path / "laid")
