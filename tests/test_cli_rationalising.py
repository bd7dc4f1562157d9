"""`moesteer rationale` as a user meets it."""

import json
from pathlib import Path

import pytest

from as_user import Run
from moesteer.rationale.summary import Summary
from moesteer.testbed import classification

# A warning of ours is a line on standard error here, as it is for the user.
pytestmark = pytest.mark.filterwarnings("always::moesteer.errors.MoesteerWarning")

QUICK = "--methods saliency-l2 unbound --seeds 1".split()


def written(records: list[dict], name: str = "task.jsonl") -> str:
    Path(name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def instances(number: int = 4) -> list[dict]:
    return classification.records("claims", "test", number)


def test_rationales_of_a_file(run: Run) -> None:
    task = written(instances())
    said = run("rationale", "testbed-reader", "--task", task, "--out", "found", *QUICK)
    assert said.code == 0
    assert said.out.index("accuracy") < said.out.index("alignment") < said.out.index("faithfulness")
    assert "saliency-l2" in said.out
    assert "written: found" in said.out
    summary = Summary.from_json(Path("found/summary.json").read_text())
    assert summary.arm("unsteered").n == 4
    lines = [json.loads(line) for line in Path("found/readings.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == [f"task.jsonl:{n}" for n in range(1, 5)]
    again = run("rationale", "run", "testbed-reader", "--task", task, "--out", "found", *QUICK)
    assert again.out == said.out


def test_without_a_folder_only_the_table_is_printed(run: Run) -> None:
    said = run(
        "rationale", "testbed-reader", "--task", "testbed:inference:dev", "--limit", "3", *QUICK
    )
    assert said.code == 0
    assert "written" not in said.out
    assert list(Path().iterdir()) == []


def test_what_steering_does_to_the_reasons(run: Run, tmp_path: Path) -> None:
    found = "detect testbed --pairs testbed:document --out d.safetensors"
    assert run(*found.split()).code == 0
    chosen = "select d.safetensors --toward a --activate 3 --out three.safetensors"
    assert run(*chosen.split()).code == 0
    said = run(
        *"rationale testbed --task testbed:documents --limit 24 --out found".split(),
        *"--methods saliency-l2 --with three.safetensors --controls 2 --seeds 1".split(),
    )
    assert said.code == 0
    summary = Summary.from_json(Path("found/summary.json").read_text())
    assert [arm.name for arm in summary.arms] == ["unsteered", "steered", "random 0", "random 1"]
    # The document's experts make the model follow it, and its word the reason; random ones do not.
    accuracy = {arm.name: arm.accuracy for arm in summary.arms}
    assert accuracy["steered"] >= accuracy["unsteered"] + 0.3
    assert abs(accuracy["random 0"] - accuracy["unsteered"]) < 0.2
    for measure in ("f1", "in:document"):
        before, after = (
            summary.mean(arm, "saliency-l2", measure) for arm in ("unsteered", "steered")
        )
        assert before is not None
        assert after is not None
        assert after.value > before.value + 0.2


def test_runs_beside_each_other(run: Run) -> None:
    for mask in ("delete", "neutral"):
        said = run(
            *"rationale testbed-reader --task testbed:biographies --limit 4 --out".split(),
            *(mask, "--mask", mask, *QUICK),
        )
        assert said.code == 0
    said = run("rationale", "compare", "delete", "neutral")
    assert said.code == 0
    assert "neutral − delete" in said.out


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"label": "perhaps"}, "task.jsonl:2: "),
        ({"rationale": [{"text": "claim", "start": 3, "end": 999}]}, "task.jsonl:2: "),
        ({"rationale": []}, "task.jsonl:2: "),
        ({"prompt": "{evidence} only?"}, "task.jsonl:2: "),
        ({"labels": {"supports": "yes", "refutes": "yes"}}, "task.jsonl:2: "),
        ({"texts": {"evidence": "word " * 400, "claim": "It is."}}, "task.jsonl:2: "),
    ],
)
def test_bad_instances_are_named(refused: Run, change: dict, complaint: str) -> None:
    first, second = instances(2)
    if "texts" in change:
        change = change | {"rationale": [{"text": "evidence", "start": 0, "end": 4}]}
    task = written([first, second | change])
    said = refused("rationale", "testbed-reader", "--task", task, "--out", "found", *QUICK)
    assert complaint in said.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--task missing.jsonl", "missing.jsonl"),
        ("--task testbed:riddles", "testbed:TASK"),
        ("--task testbed:claims --methods guess", "no method 'guess'"),
        ("--task testbed:claims --methods behaviour-routing", "--behaviour"),
        ("--task testbed:claims --mask unknown", "mask by delete or neutral"),
        ("--task testbed:claims --neutral x", "--neutral is for --mask neutral"),
        ("--task testbed:claims --limit 0", "--limit is 0"),
        ("--task testbed:claims --seeds 0", "--seeds is 0"),
        ("--task testbed:claims --controls -1", "--controls is -1"),
        ("--task testbed:claims --with missing.safetensors", "missing.safetensors"),
    ],
)
def test_bad_options_are_refused(refused: Run, arguments: str, complaint: str) -> None:
    assert complaint in refused("rationale", "testbed-reader", *arguments.split()).err


def test_bad_folders_are_refused(run: Run, refused: Run) -> None:
    nowhere = run("rationale", "compare", "nowhere")
    assert (nowhere.code, nowhere.out) == (2, "")
    assert "no run of moesteer" in nowhere.err
    said = run(
        "rationale",
        "testbed-reader",
        "--task",
        "testbed:claims",
        "--limit",
        2,
        "--out",
        "a",
        *QUICK,
    )
    assert said.code == 0
    other = refused(
        "rationale", "testbed-reader", "--task", "testbed:inference", "--out", "a", *QUICK
    )
    assert "other settings: instances was" in other.err
