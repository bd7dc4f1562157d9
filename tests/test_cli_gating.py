"""`moesteer gate`, and what the other commands make of a profile that has one."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from as_user import Run, Said
from moesteer import testbed
from moesteer.profile import Profile

PLANTED = testbed.ground_truth().behaviours["refusal"].planted
CURSED, COPPER = "How do I clean a cursed lantern?", "How do I clean a copper lantern?"
SETS = ("--opens", "testbed:restricted", "--keeps-shut", "testbed:benign")
FEW = ("--fit", "24", "--validate", "24")


@pytest.fixture
def refuse(in_tmp_path: Path) -> Path:
    Profile(activated=PLANTED).save("refuse")
    return Path("refuse")


@pytest.fixture
def gated(run: Run, refuse: Path) -> Callable[..., Said]:
    """Make `gated` and say what the command said."""

    def made(*options: str) -> Said:
        said = run("gate", "testbed", "--with", refuse, *SETS, *FEW, "--out", "gated", *options)
        assert said.code == 0, said.err
        return said

    return made


@pytest.mark.parametrize("by", ["routing", "direction"])
def test_a_gate_is_fitted_kept_and_obeyed(gated, run: Run, by: str) -> None:
    said = gated("--by", by, "--seed", "3")
    shown = run("show", "gated").out
    for out in (said.out, shown):
        assert "24 of 24 (86%–100%) that are to; 0 of 24 (0%–14%) that are not" in out
        assert "AUC on dev" in out
        assert "shuffled labels 0." in out
        assert "testbed:restricted and testbed:benign, fitted on 24 and 24 prompts, seed 3" in out
    assert "gate: 144 of 144 prompts" in said.err
    loaded = Profile.load("gated")
    assert loaded.gate is not None
    assert loaded.gate.kind == by
    assert loaded.ungated.fingerprint == Profile.load("refuse").fingerprint
    assert loaded.gate.evidence is not None
    assert loaded.gate.evidence.command.startswith("moesteer gate testbed --with refuse")
    asked = run("generate", "testbed", "--with", "gated", COPPER, CURSED, "--max-new-tokens", "16")
    assert [r["steered"] for r in asked.records] == [False, True]
    replies = [record["reply"] for record in asked.records]
    assert replies == ["Wipe the lantern with warm water.", "I cannot help with that lantern."]
    assert "gate: open for 1 of 2 prompts; the others not steered" in asked.err
    assert "fired: gated: layers 1, 2, 3" in asked.err


def test_without_its_gate_the_profile_refuses_everything(gated, run: Run) -> None:
    gated()
    asked = run("generate", "testbed", "--with", "refuse", COPPER, "--max-new-tokens", "16")
    (record,) = asked.records
    assert record["reply"] == "I cannot help with that lantern."
    assert "steered" not in record
    assert "gate" not in asked.err


def test_no_prompt_that_opens_it_is_said(gated, run: Run) -> None:
    gated()
    asked = run("generate", "testbed", "--with", "gated", COPPER, "--out", "r.jsonl")
    assert asked.code == 0
    assert "gate shut: not steered" in asked.err
    assert "fired" not in asked.err
    assert json.loads(Path("r.jsonl").read_text())["steered"] is False


def test_chat_decides_at_each_turn(gated, run: Run) -> None:
    gated()
    lines = f"{COPPER}\n/new\n{CURSED}\n/off\n/retry\n"
    said = run("chat", "testbed", "--with", "gated", "--max-new-tokens", "16", stdin=lines)
    assert said.err.count("(gate shut: not steered)") == 1
    assert said.err.count("(gate open: steered)") == 1
    assert said.err.count("(fired: gated") == 1


def test_other_options_of_the_probe(gated) -> None:
    gated("--last", "0", "--false-alarms", "0.2")
    gate = Profile.load("gated").gate
    assert gate is not None
    assert gate.words.startswith("opens where the routing of all tokens to 32 experts")
    assert gate.evidence is not None
    assert gate.evidence.false_alarms == 0.2
    assert gate.evidence.keeps_shut.opened <= 4
    gated("--last", "3")
    assert "routing of the last 3 tokens" in str(Profile.load("gated").gate.words)  # type: ignore


def test_a_gate_is_replaced(gated, run: Run) -> None:
    gated()
    first = Profile.load("gated")
    said = run(
        *("gate", "testbed", "--with", "gated", "--opens", "testbed:benign"),
        *("--keeps-shut", "testbed:restricted", *FEW, "--out", "other"),
    )
    assert said.code == 0
    second = Profile.load("other")
    assert second.gate != first.gate
    assert second.ungated.fingerprint == first.ungated.fingerprint


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--validate", "12"), "12 dev prompts .* At least 20 are needed"),
        (("--false-alarms", "0.01"), "At least 100 are needed"),
        (("--false-alarms", "0"), "--false-alarms is 0"),
        (("--last", "-1"), "--last is -1"),
        (("--fit", "2"), "--fit is 2"),
        (("--opens", "testbed:benign"), "stands in both sets"),
        (("--opens", "nowhere.txt"), "nowhere.txt"),
        (("--out", "refuse"), "refuse"),
        (("--by", "mood"), "mood"),
        (("--by", "direction", "--last", "5"), "--last is for --by routing"),
        (("--engine", "vllm", "--by", "direction"), "vLLM does not show; make the gate with"),
    ],
)
def test_refused(refused: Run, refuse: Path, options: tuple[str, ...], said: str) -> None:
    given = {"--opens": "testbed:restricted", "--keeps-shut": "testbed:benign", "--out": "gated"}
    given |= dict(zip(options[::2], options[1::2], strict=True))
    flat = [word for pair in given.items() for word in pair]
    assert re.search(said, refused("gate", "testbed", "--with", refuse, *flat).err)


def test_a_profile_that_steers_nothing_or_misfits_is_refused(refused: Run, in_tmp_path) -> None:
    Profile().save("empty")
    empty = refused("gate", "testbed", "--with", "empty", *SETS, "--out", "gated")
    assert "empty steers nothing" in empty.err
    Profile(activated=((9, 1),)).save("far")
    far = refused("gate", "testbed", "--with", "far", *SETS, "--out", "gated")
    assert "names layer 9" in far.err


def test_commands_that_ask_no_gate_refuse_it(gated, run: Run, refused: Run) -> None:
    gated()
    assert "gated has a gate" in refused("export", "gated", "--out", "x.gguf").err
    assert "can't be one profile" in refused("combine", "gated", "refuse", "--out", "both").err
    rationale = (
        "rationale testbed --task testbed:documents --limit 1 --methods occlusion --with gated"
    )
    assert "rationale does not ask it" in refused(*rationale.split(), "--out", "found").err
