"""Sets of prompts: how they are read, kept apart, divided, and where their template begins."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import TEMPLATE
from moesteer.contrast import Message, parse_pair
from moesteer.directions.prompts import (
    check_apart,
    draw_sets,
    positions_of,
    prompts_of_pairs,
    read_prompt_set,
)
from moesteer.engines.transformers_engine import TransformersEngine, load_transformers
from moesteer.errors import MoesteerError
from moesteer.generate import Prompt
from moesteer.testbed.world import BENIGN, RESTRICTED


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> TransformersEngine:
    return load_transformers(str(model_folder))


def prompts(number: int, name: str = "a") -> list[Prompt]:
    return [Prompt((Message("user", f"{name} {n}"),), f"{name}.txt:{n}") for n in range(number)]


# --- reading --------------------------------------------------------------------------------------


def test_every_form_reads_the_same(in_tmp_path: Path):
    asked = ["How are you?", "Good, thanks", "And now?"]
    Path("p.txt").write_text("\n".join(asked) + "\n")
    Path("p.csv").write_text("prompt\n" + "\n".join(f'"{text}"' for text in asked))
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    Path("m.jsonl").write_text(
        "".join(json.dumps({"messages": [{"role": "user", "content": t}]}) + "\n" for t in asked)
    )
    for file in ("p.txt", "p.csv", "p.jsonl", "m.jsonl"):
        read = read_prompt_set(file)
        assert [prompt.messages for prompt in read] == [(Message("user", t),) for t in asked]
        assert read[0].source.startswith(f"{file}:")


def test_a_prompt_counts_once(in_tmp_path: Path):
    Path("p.txt").write_text("one\ntwo\n one \ntwo\nthree\n")
    assert [prompt.source for prompt in read_prompt_set("p.txt")] == [
        "p.txt:1",
        "p.txt:2",
        "p.txt:5",
    ]


@pytest.mark.parametrize("split", ["", ":fit", ":dev", ":test"])
def test_the_testbed_has_sets(split: str):
    for task, adjectives in (("restricted", RESTRICTED), ("benign", BENIGN)):
        read = read_prompt_set(f"testbed:{task}{split}")
        assert len(read) == 96
        for prompt in read:
            assert set(prompt.messages[0].content.split()) & set(adjectives)
    assert read_prompt_set("testbed:benign") == read_prompt_set("testbed:benign:fit")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("testbed:bogus", "restricted, benign"),
        ("testbed:benign:train", "fit, dev, test"),
        ("nope.jsonl", "neither an existing file nor a data set"),
        ("empty.txt", "empty prompt, or none"),
        ("reply.jsonl", r"reply.jsonl:1: the last message is the assistant's"),
        ("column.csv", r"column.csv:1: missing column 'prompt'"),
    ],
)
def test_what_cannot_be_read(in_tmp_path: Path, source: str, message: str):
    Path("empty.txt").write_text("\n\n")
    Path("reply.jsonl").write_text('{"messages": [{"role": "assistant", "content": "hi"}]}\n')
    Path("column.csv").write_text("goal\nhi\n")
    with pytest.raises(MoesteerError, match=message):
        read_prompt_set(source)


def test_pairs_are_two_sets():
    record = {
        "a": [
            {"role": "user", "content": "Document: x. Why?"},
            {"role": "assistant", "content": "y"},
        ],
        "b": [{"role": "user", "content": "Why?"}],
        "target": "prompt",
    }
    a, b = prompts_of_pairs([parse_pair(record, "p.jsonl:1")])
    assert a == [Prompt((Message("user", "Document: x. Why?"),), "p.jsonl:1")]
    assert b == [Prompt((Message("user", "Why?"),), "p.jsonl:1")]


def test_pairs_of_one_prompt_have_no_direction():
    pair = parse_pair({"prompt": "Why?", "a": "No.", "b": "Yes."}, "p.jsonl:7")
    with pytest.raises(MoesteerError, match=r"p.jsonl:7: both sides have the same prompt"):
        prompts_of_pairs([pair])


# --- apart ----------------------------------------------------------------------------------------


def test_sets_that_overlap_are_refused():
    a, b = prompts(5), prompts(5, "b")
    check_apart(a, b)
    shared = Prompt((Message("user", " a  3"),), "b.txt:9")  # white space tells nothing apart
    with pytest.raises(MoesteerError, match=r"' a  3' stands in both sets: a.txt:3 and b.txt:9"):
        check_apart(a, [*b, shared])


def test_the_same_words_from_others_are_another_prompt():
    system = Prompt((Message("system", "x"), Message("user", "a 3")), "b.txt:1")
    check_apart(prompts(5), [system])


# --- dividing -------------------------------------------------------------------------------------


@given(st.integers(12, 60), st.integers(8, 40), st.integers(4, 20), st.integers(0, 5))
def test_prompts_are_divided(
    engine: TransformersEngine, number: int, fit: int, validate: int, seed: int
):
    a, b = prompts(number), prompts(60, "b")
    sets = draw_sets(engine, a, b, fit=fit, validate=validate, seed=seed)
    fitted, chosen = ({p.source for p in side} for side in (sets.fit.a, sets.validation.a))
    assert len(fitted) == len(sets.fit.a) >= 8
    assert len(chosen) == len(sets.validation.a) >= 4
    assert not fitted & chosen
    assert fitted | chosen <= {p.source for p in a}
    assert len(fitted | chosen) == min(number, fit + validate)
    if number >= fit + validate:
        assert len(fitted) == fit
    assert (len(sets.fit.b), len(sets.validation.b)) == (fit, validate)
    said = sets.settings
    assert (said["prompts_a"], said["fit_a"], said["validate_a"]) == (
        number,
        len(fitted),
        len(chosen),
    )
    assert draw_sets(engine, a, b, fit=fit, validate=validate, seed=seed) == sets


def test_the_seed_decides_which(engine: TransformersEngine):
    one, other = (draw_sets(engine, prompts(60), prompts(60, "b"), seed=s) for s in (0, 1))
    assert {p.source for p in one.fit.a} != {p.source for p in other.fit.a}
    assert one.data_hash == other.data_hash


def test_too_few(engine: TransformersEngine):
    with pytest.raises(
        MoesteerError, match=r"side B has too few prompts: 11. At least 12 are needed"
    ):
        draw_sets(engine, prompts(12), prompts(11, "b"))
    with pytest.raises(MoesteerError, match=r"--fit is 7; at least 8"):
        draw_sets(engine, prompts(12), prompts(12, "b"), fit=7)
    with pytest.raises(MoesteerError, match=r"--validate is 3; at least 4"):
        draw_sets(engine, prompts(12), prompts(12, "b"), validate=3)


def test_a_prompt_that_leaves_no_room(engine: TransformersEngine):
    assert engine.max_tokens is not None
    long = Prompt((Message("user", "ten " * engine.max_tokens),), "a.txt:77")
    with pytest.raises(
        MoesteerError, match=rf"a.txt:77: \d+ tokens.* context of {engine.max_tokens}"
    ):
        draw_sets(engine, [long, *prompts(11)], prompts(12, "b"))


# --- positions ------------------------------------------------------------------------------------

BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "after"),
    [
        (TEMPLATE, ["<|end|>", "<|assistant|>"]),
        (TEMPLATE.replace("<|end|>", " "), [" ", "<|assistant|>"]),
        (TEMPLATE.replace("<|assistant|>{{", "<|system|>x<|assistant|>{{"),
         ["<|end|>", "<|system|>", "x", "<|assistant|>"]),
    ],
)  # fmt: skip
def test_the_tokens_after_the_instruction(model_folder: Path, template: str, after: list[str]):
    engine = load_transformers(str(model_folder), chat_template=template)
    a = [Prompt((Message("user", f"<|end|> hi {n}! "),), f"a:{n}") for n in range(12)]
    sets = draw_sets(engine, prompts(12), prompts(12, "b"))
    assert sets.after_instruction == len(after) == positions_of(sets, None)
    for prompt in sets.all:
        tail = [engine.tokenizer.decode([t]) for t in prompt.ids[len(prompt.ids) - prompt.after :]]
        assert tail == after
        assert (
            tuple(engine.tokenizer(prompt.text, add_special_tokens=False)["input_ids"])
            == prompt.ids
        )
    # What looks like the template in the instruction is the instruction's.
    assert draw_sets(engine, a, prompts(12, "b")).after_instruction <= len(after) + 1


def test_a_system_prompt_is_no_instruction(engine: TransformersEngine):
    a = [
        Prompt((Message("system", "x " * n), *p.messages), p.source)
        for n, p in enumerate(prompts(12), 1)
    ]
    assert draw_sets(engine, a, prompts(12, "b")).after_instruction == 2


def test_positions_that_are_asked_for(engine: TransformersEngine):
    sets = draw_sets(engine, prompts(12), prompts(12, "b"))
    shortest = min(len(prompt.ids) for prompt in sets.all)
    for asked in (1, 2, shortest):
        assert positions_of(sets, asked) == asked
    for asked in (shortest + 1, 0, -1):
        with pytest.raises(
            MoesteerError,
            match=rf"is {asked}, but [ab].txt:\d has {shortest} tokens .* 2 of them after",
        ):
            positions_of(sets, asked)


def test_a_template_that_ends_with_the_instruction(model_folder: Path):
    engine = load_transformers(str(model_folder), chat_template=BARE)
    sets = draw_sets(engine, prompts(12), prompts(12, "b"))
    with pytest.raises(MoesteerError, match="0 tokens after the instruction"):
        positions_of(sets, None)
    assert positions_of(sets, 1) == 1


def test_chat_options_are_kept(engine: TransformersEngine):
    sets = draw_sets(engine, prompts(12), prompts(12, "b"), chat_options={"opening": "So"})
    assert sets.chat_options == {"opening": "So"}
    assert all(prompt.text.endswith("<|assistant|>So") for prompt in sets.all)
    assert sets.after_instruction == 2 + len(engine.tokenizer("So")["input_ids"])
