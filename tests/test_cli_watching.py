"""`moesteer watch` and `watch fit` as a user meets them."""

import json
from pathlib import Path

import pytest

from as_user import Run
from moesteer.monitoring.reference_file import load_reference

WORDS = "one two three four five six seven eight nine ten".split()


@pytest.fixture
def ordinary(in_tmp_path: Path) -> str:
    lines = [f"Tell me {a} {b}." for a in WORDS for b in WORDS]
    (in_tmp_path / "ordinary.txt").write_text("\n".join(lines) + "\n")
    return "ordinary.txt"


def fit(run: Run, model: Path, *options: object) -> None:
    said = run("watch", "fit", model, *options, "--false-alarms", 0.1, "--out", "watch.safetensors")
    assert said.code == 0, said.err


def test_fitted_and_asked(run: Run, model_folder: Path, made: dict, ordinary: str) -> None:
    said = run(
        *("watch", "fit", model_folder, "--reference", ordinary, "--linked", made["chosen"]),
        *("--false-alarms", 0.1, "--seed", 4, "--out", "watch.safetensors"),
    )
    assert said.code == 0
    assert "over prompt tokens, fitted on 50 texts of ordinary.txt" in said.out
    assert "At most 10.00% false alarms; thresholds from 50 other texts" in said.out
    assert "linked share below" in said.out
    reference = load_reference(Path("watch.safetensors"))
    assert reference.origin.seed == 4
    assert reference.origin.command.startswith("moesteer watch fit")
    assert len(reference.origin.linked) == 2

    records = [{"prompt": "Tell me two nine.", "id": 7}, {"prompt": "?! " * 40, "id": 8}]
    Path("asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    said = run("watch", model_folder, "--by", "watch.safetensors", "--file", "asked.jsonl")
    assert said.code == 0
    near, far = said.records
    assert (near["id"], near["watch"], near["raised"]) == (7, "ok", [])
    assert (far["id"], far["watch"]) == (8, "alarm")
    assert "drift" in far["raised"]
    assert far["drift"] > near["drift"] > 0
    assert 0 <= near["linked"] <= 1
    assert "watch: 1 of 2 texts raise an alarm (50%" in said.err
    assert "1 texts are shorter or longer than any" in said.err

    to_file = ("--by", "watch.safetensors", "--file", "asked.jsonl", "--out", "said.jsonl")
    assert run("watch", model_folder, *to_file).out == ""
    assert Path("said.jsonl").read_text() == said.out
    asked = run("watch", model_folder, "Tell me two nine.", "--by", "watch.safetensors")
    assert asked.records[0]["drift"] == near["drift"]


def test_the_same_seed_gives_the_same_file(run: Run, model_folder: Path, ordinary: str) -> None:
    fit(run, model_folder, "--reference", ordinary)
    first = load_reference(Path("watch.safetensors"))
    fit(run, model_folder, "--reference", ordinary)
    again = load_reference(Path("watch.safetensors"))
    assert again.limits == first.limits
    assert again.drift.tolist() == first.drift.tolist()
    fit(run, model_folder, "--reference", ordinary, "--seed", 1)
    assert load_reference(Path("watch.safetensors")).drift.tolist() != first.drift.tolist()


def test_replies(run: Run, model_folder: Path, ordinary: str) -> None:
    generated = ("--file", ordinary, "--max-new-tokens", 6, "--out", "replies.jsonl")
    assert run("generate", model_folder, *generated).code == 0
    fit(run, model_folder, "--reference", "replies.jsonl", "--over", "reply")
    by = ("--by", "watch.safetensors")
    said = run("watch", model_folder, *by, "--file", "replies.jsonl")
    replies = [json.loads(line)["reply"] for line in Path("replies.jsonl").read_text().splitlines()]
    assert [record["reply"] for record in said.records] == replies
    assert sum(record["watch"] == "alarm" for record in said.records) <= 20
    Path("one.jsonl").write_text('{"prompt": "Tell me one.", "reply": ""}\n')
    said = run("watch", model_folder, *by, "--file", "one.jsonl")
    assert said.records[0]["watch"] == "unknown"
    assert said.records[0]["drift"] is None
    assert "watch: 0 of 0 texts raise an alarm (none" in said.err
    assert "1 texts are unknown" in said.err


def test_refused(run: Run, refused: Run, model_folder: Path, ordinary: str, made: dict) -> None:
    fitting = ("watch", "fit", model_folder, "--reference", ordinary, "--out", "new.safetensors")
    said = refused(*fitting, "--false-alarms", 0.01)
    assert "50 held-out reference texts are too few for 1 % false alarms" in said.err
    assert "which needs 99" in said.err
    assert "above 0, and at most 0.5" in refused(*fitting, "--false-alarms", 2).err
    assert "there is no such" in refused(*fitting, "--linked", "missing").err
    assert (
        "steers no experts"
        in refused(*fitting, "--false-alarms", 0.1, "--linked", made["scored"]).err
    )
    said = refused(*fitting, "--false-alarms", 0.1, "--over", "reply")
    assert "ordinary.txt:1: there is no reply to watch" in said.err
    assert "would overwrite" in refused(*fitting[:-1], ordinary).err

    asking = ("watch", model_folder, "Tell me one.", "--by")
    assert "no such file; `moesteer watch fit` writes one" in refused(*asking, "missing").err
    assert "no reference of `moesteer watch fit`" in refused(*asking, made["chosen"]).err
    fit(run, model_folder, "--reference", ordinary)
    said = refused("watch", "testbed", "Tell me one.", "--by", "watch.safetensors")
    assert "another tokenizer or chat template than testbed has now" in said.err
    said = refused(*asking, "watch.safetensors", "--chat-option", "tokenize=1")
    assert "prompt 1: the chat option 'tokenize' is set by moesteer" in said.err
