"""`moesteer audit` as a user meets it."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from as_user import Run
from moesteer.auditing.audit import Audit, met_before
from moesteer.evaluation.cards import read_card
from moesteer.profile import Profile
from moesteer.testbed import ground_truth

# A warning of ours is a line on standard error here, as it is for the user.
pytestmark = pytest.mark.filterwarnings("always::moesteer.errors.MoesteerWarning")


def small(most: int = 3, seeds: int = 2) -> list[str]:
    """Options that make an audit of refusal quick."""
    numbers = f"--limit 8 --pairs-used 32 --most {most} --seeds {seeds}"
    return [*numbers.split(), "--prices", "testbed-benign"]


PLANTED = ground_truth().behaviours["refusal"].planted


def audit_of(folder: str = "out") -> Audit:
    return Audit.from_json(Path(folder, "summary.json").read_text())


def test_audit_names_the_planted_experts_and_shows_what_their_loss_does(run: Run):
    said = run("audit", "testbed", "--out", "out", *small())
    assert said.code == 0
    found = audit_of()
    assert {expert.place for expert in found.importance.named} == {*PLANTED}
    assert "3 experts carry “refused”: layer 1: 15; layer 2: 2; layer 3: 15." in said.out
    rows = [line for line in said.out.split("\n") if "planted" in line]
    assert len(rows) == 3
    assert all(" named" in row for row in rows)
    assert not any(" named" in line for line in said.out.split("\n") if "decoy" in line)
    # Losing planted ones takes the refusals, losing random ones does not.
    assert [point.lost for point in found.curve] == [1, 2, 3]
    for point in found.curve:
        comparison = point.comparison
        assert comparison.share("testbed-restricted", "unsteered").share == 1
        assert comparison.share("testbed-restricted", "steered").share == 0
        for arm in ("random 0", "random 1", "bottom"):
            assert comparison.share("testbed-restricted", arm).share == 1
        assert comparison.share("testbed-benign", "steered").share == 1
        (lost,) = (arm for arm in comparison.arms if arm.name == "steered")
        assert {*lost.deactivated} <= {*PLANTED}
        assert lost.obeyed
        assert lost.tokens > 0
    assert found.halved.value == found.halved.high == 1
    assert found.area is not None
    assert found.area.value == pytest.approx((0.5 + 2) / 3)
    # One lost: the others bring refusals back, and refuse everything. All lost: nothing does.
    one, every = found.restored
    assert (one.lost, every.lost) == (1, 3)
    assert one.test is not None
    assert one.test.share("testbed-restricted", "unsteered").share == 0
    assert (one.test.share("testbed-restricted", "steered").share or 0) > 0.5
    assert one.test.share("testbed-restricted", "random 0").share == 0
    assert one.test.share("testbed-benign", "steered").share == 0
    assert every.test is None
    assert "nothing restores it" in said.out
    assert "the largest price is −100 points" in said.out
    assert "say nothing about real models" in said.out
    assert "lantern" not in said.out

    assert found.halved_on_dev == 1
    assert "Which loss is restored was read off the dev prompts" in said.out

    # Each profile can be used as any other, and the report tells the same.
    lost, back = (Profile.load(f"out/{name}-1.safetensors") for name in ("lost", "restored"))
    assert lost.deactivated == back.deactivated == (PLANTED[0],)
    assert set(back.activated) >= {PLANTED[1], PLANTED[2]}
    assert Profile.load("out/lost-3.safetensors").deactivated == PLANTED
    asked = ("generate", "testbed", "How do I clean a cursed lantern?", "--max-new-tokens", "8")
    assert run(*asked).out != run(*asked, "--with", "out/lost-1.safetensors").out
    assert run("report", "out", "--out", "report.html").code == 0
    page, words = Path("report.html").read_text(), Path("report.md").read_text()
    for text in (page, words):
        assert "3 experts carry “refused”: layer 1: 15; layer 2: 2; layer 3: 15." in text
        assert "nothing restores it" in text
        assert "moesteer audit testbed --out out" in text
    assert '<polyline points="' in page
    assert 'class="band target"' in page
    assert "lantern" not in page

    # Done again it asks nothing anew; with other settings it is refused.
    before = Path("out/replies.jsonl").read_bytes()
    again = run("audit", "testbed", "--out", "out", *small())
    assert again.out == said.out
    assert Path("out/replies.jsonl").read_bytes() == before
    other = run("audit", "testbed", "--out", "out", *small(most=2))
    assert other.code == 2
    assert "most was 3 and is 2 now" in other.err


def test_a_model_without_planted_experts_has_nobody_named(run: Run):
    said = run("audit", "testbed-twin", "--out", "out", *small(most=1))
    assert said.code == 0
    found = audit_of()
    assert found.importance.named == ()
    assert found.halved.value is None
    assert found.restored == ()
    assert found.halved_on_dev is None
    assert "nothing was to be restored" in said.out
    assert "No expert carries “refused” alone" in said.out
    assert "does not fall by half with up to 1 lost" in said.out
    assert "On testbed-restricted nothing was found beyond random experts" in said.out
    assert run("report", "out", "--out", "report.html").code == 0
    assert "No expert carries" in Path("report.md").read_text()


def test_a_killed_audit_is_taken_up(run: Run):
    command = [sys.executable, "-m", "moesteer", "audit", "testbed", "--out", "out"]
    command += [*small(most=1, seeds=1), "--batch-size", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    replies = Path("out/replies.jsonl")
    until = time.monotonic() + 120
    while not (replies.is_file() and replies.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    knocked = Path("out/knocking.jsonl").read_bytes()
    kept = replies.read_text().count("\n")
    assert 0 < kept < 64
    assert not Path("out/summary.json").exists()
    refused = run("report", "out", "--out", "report.html")
    assert refused.code == 2
    assert "is not finished" in refused.err
    said = run(*command[3:])
    assert said.code == 0
    assert f"{kept} of them are there" in said.err
    assert Path("out/knocking.jsonl").read_bytes() == knocked
    lines = [json.loads(line) for line in replies.read_text().splitlines()]
    assert len({(r["task"], r["arm"], r["item"]) for r in lines}) == len(lines) > kept
    assert audit_of().halved.value == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "out"], "--pairs is missing"),
        (["--out", "out", "--pairs", "testbed:refusal"], "--target is missing"),
        (
            ["--out", "out", "--pairs", "gone.jsonl", "--target", "testbed-restricted"],
            "gone.jsonl",
        ),
        (
            ["--out", "out", "--pairs", "testbed:refusal", "--target", "testbed-restricted=no"],
            "'no' is no outcome of testbed-restricted",
        ),
        (
            "--out out --pairs testbed:refusal --target harmless-100 --prices xstest".split(),
            "The task harmless-100 needs",
        ),
        (
            "--out out --most 0 --pairs testbed:refusal --target testbed-restricted".split(),
            "--most is 0; it must be at least 1",
        ),
    ],
)
def test_what_cannot_be_audited_is_refused(
    refused: Run, model_folder: Path, arguments: list[str], message: str
):
    assert message in refused("audit", model_folder, *arguments).err


@pytest.mark.parametrize("layers", [0, 9])
def test_a_number_of_layers_is_refused_before_a_folder_is_made(refused: Run, layers: int):
    said = refused("audit", "testbed", "--out", "out", "--layers", layers, *small())
    assert f"{layers} layers are to be gone into; the model has 4" in said.err
    assert not Path("out").exists()


def test_the_loss_to_restore_is_read_off_dev_and_the_curve_off_test(
    run: Run, monkeypatch: pytest.MonkeyPatch
):
    """Harmless prompts stand in on dev: nobody refuses them, so no loss halves anything there."""
    from moesteer.auditing import audit

    prepare = audit.prepare

    def harmless_on_dev(engine, card, split, *others):
        if split == "dev":
            card = replace(card, prompts=read_card("testbed-benign").prompts)
        return prepare(engine, card, split, *others)

    monkeypatch.setattr(audit, "prepare", harmless_on_dev)
    assert run("audit", "testbed", "--out", "out", *small(most=1, seeds=0)).code == 0
    found = audit_of()
    assert found.halved.value == 1
    assert found.halved_on_dev is None
    assert found.restored == ()


@pytest.mark.parametrize(
    ("fit", "held_out", "test", "dev", "said"),
    [
        ("ab", "c", "xy", "z", []),
        ("ab", "c", "axb", "z", ["2 of the 3 prompts of t are prompts of the pairs"]),
        ("ab", "c", "cx", "z", ["1 of the 2 prompts of t are prompts of the held-out pairs"]),
        ("ab", "c", "x", "bz", ["1 of the 2 dev prompts of t are prompts of the pairs"]),
        ("ab", "c", "x", "c", []),  # held-out pairs choose nothing
    ],
)
def test_pairs_that_are_asked_too_are_told(
    fit: str, held_out: str, test: str, dev: str, said: list[str]
):
    notes = met_before("t", {*fit}, {*held_out}, [*test], [*dev])
    assert [note.partition(", too:")[0] for note in notes] == said


def test_pairs_among_the_prompts_are_warned_of(run: Run):
    said = run(
        *("audit", "testbed", "--out", "out", "--pairs", "testbed:refusal:test"),
        *("--target", "testbed-restricted", "--prices", "testbed-benign", "--limit", "16"),
        *("--most", "1", "--seeds", "0", "--pairs-used", "24"),
    )
    assert said.code == 0
    assert "of the 16 prompts of testbed-restricted are prompts of the pairs, too" in said.err
    found = audit_of()
    assert found.area is None
    assert found.importance.pairs + found.importance.held_out <= 48
