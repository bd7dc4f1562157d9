"""The commands that run a model, as a user meets them, with all that can go wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from as_user import Run
from conftest import write_model
from moesteer.profile import Profile

# --- generate -------------------------------------------------------------------------------------


def test_prompts_from_arguments_files_and_stdin(run: Run, model_folder: Path):
    base = ("generate", model_folder, "--max-new-tokens", 4)
    arguments = run(*base, "one", "two three")
    assert [record["prompt"] for record in arguments.records] == ["one", "two three"]
    assert arguments.records[0]["profile"] is None

    Path("p.txt").write_text("one\n\n  two three  \n")
    Path("p.jsonl").write_text(
        '{"prompt": "one"}\n{"messages": [{"role": "user", "content": "two three"}]}\n'
    )
    Path("out.jsonl").write_text("old")
    assert run(*base, stdin="one\n\ntwo three\n").out == arguments.out
    assert run(*base, "--file", "p.jsonl").out == arguments.out
    one_by_one = run(*base, "--file", "p.jsonl", "--batch-size", 1).records
    assert [{**record, "batch_size": 16} for record in one_by_one] == arguments.records
    assert [r["prompt"].strip() for r in run(*base, "--file", "p.txt").records] == [
        "one",
        "two three",
    ]
    said = run(*base, "--file", "p.jsonl", "--out", "out.jsonl")
    assert said.out == ""
    assert Path("out.jsonl").read_text() == arguments.out


def test_system_and_chat_options_change_the_prompt(run: Run, model_folder: Path):
    base = ("generate", model_folder, "one", "--max-new-tokens", 8)
    replies = [
        run(*base, *more).records[0]["reply"]
        for more in ((), ("--system", "Be brief."), ("--chat-option", "opening=Yes"))
    ]
    assert len(set(replies)) == 3


def test_a_profile_brings_its_chat_options(run: Run, model_folder: Path, pairs_file: Path):
    opening = ("--chat-option", "opening=Well")
    chosen = ("--activate", 1, "--toward", "a")
    run("detect", model_folder, "--pairs", pairs_file, *opening, *chosen, "--out", "p")
    base = ("generate", model_folder, "one", "--max-new-tokens", 8, "--with", "p")

    def reply(*more: str) -> str:
        return run(*base, *more).records[0]["reply"]

    other = ("--chat-option", "opening=No")
    assert reply() == reply(*opening) != reply(*other)


@pytest.mark.filterwarnings("default")
def test_another_chat_template_is_said_in_one_line(
    run: Run, model_folder: Path, made: dict[str, Path]
):
    Path("template").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    base = ("generate", model_folder, "hi", "--max-new-tokens", 2, "--with", made["chosen"])
    assert "warning" not in run(*base).err
    said = run(*base, "--chat-template", "template")
    assert said.code == 0
    assert "moesteer: warning: " in said.err
    assert "chat template" in said.err


def test_a_profile_that_chooses_nothing_is_refused(
    run: Run, refused: Run, model_folder: Path, pairs_file: Path
):
    run("detect", model_folder, "--pairs", pairs_file, "--out", "scores")
    said = refused("generate", model_folder, "one", "--with", "scores")
    assert "steers nothing" in said.err
    assert "moesteer select" in said.err


def test_sampling_has_a_seed(run: Run, model_folder: Path):
    base = ("generate", model_folder, "one", "--max-new-tokens", 12, "--temperature", 2)
    first, same, other = (run(*base, "--seed", seed).out for seed in (1, 1, 2))
    assert first == same != other


def test_the_same_prompt_later_is_another_sample(
    run: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("moesteer.generate.GROUP", 1)
    base = ("generate", model_folder, "one", "one", "--batch-size", 1, "--temperature", 2)
    first, second = run(*base, "--max-new-tokens", 12).records
    assert first["reply"] != second["reply"]


def test_steering_changes_the_routing(run: Run, model_folder: Path, made: dict[str, Path]):
    base = ("generate", model_folder, "one", "--max-new-tokens", 8)
    steered = run(*base, "--with", made["chosen"])
    assert steered.records[0]["reply"] != run(*base).records[0]["reply"]
    layers = Profile.load(made["chosen"]).steered_layers
    assert f"layers {', '.join(map(str, layers))}" in steered.err
    assert "activated always selected, deactivated never" in steered.err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "empty prompt, or none at all"),
        (("",), "empty prompt"),
        (("hi", "--file", "x"), "not both"),
        (("--file", "missing.txt"), "missing.txt: cannot be read: No such file"),
        (("--file", "bad.jsonl"), "bad.jsonl:2: missing key 'prompt'"),
        (("--file", "roles.jsonl"), "roles.jsonl:1: messages[0].role is 'robot'"),
        (("--file", "empty.jsonl"), "empty.jsonl: holds no records"),
        (("hi", "--max-new-tokens", "0"), "--max-new-tokens is 0; it must be at least 1"),
        (("hi", "--temperature", "-1"), "--temperature is -1"),
        (("hi", "--temperature", "nan"), "--temperature is nan"),
        (("hi", "--batch-size", "0"), "--batch-size is 0"),
        (("hi", "--chat-option", "x"), "'x' is not KEY=VALUE"),
        (("hi", "--chat-template", "none.jinja"), "none.jinja: cannot be read"),
        (("hi", "--chat-template", "bad.jinja"), "prompt 1: the chat template refuses"),
        (("hi", "x" * 3000, "--out", "o"), "prompt 2: 3003 tokens; with 128 new ones"),
        (("--file", "long.jsonl"), "long.jsonl:2: 3003 tokens"),
        (("hi", "--out", "missing/out"), "the folder missing does not exist"),
        (("hi", "--out", "."), "is a folder"),
    ],
)
def test_generate_refuses(refused: Run, model_folder: Path, more: tuple[str, ...], said: str):
    Path("bad.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n')
    Path("roles.jsonl").write_text('{"messages": [{"role": "robot", "content": "x"}]}\n')
    Path("empty.jsonl").write_text("")
    Path("long.jsonl").write_text(
        json.dumps({"prompt": "x"}) + "\n" + json.dumps({"prompt": "x" * 3000})
    )
    Path("bad.jinja").write_text("{{ raise_exception('no') }}")
    assert said in refused("generate", model_folder, *more).err


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "base", template=None)


def test_a_model_without_chat_template(run: Run, refused: Run, base_model: Path, pairs_file: Path):
    said = refused("generate", base_model, "hi")
    assert "no chat template" in said.err
    assert "--chat-template FILE" in said.err
    detect = ("detect", base_model, "--pairs", pairs_file, "--out", "p")
    said = refused(*detect)
    assert "pairs.jsonl:1: side a:" in said.err
    assert "no chat template" in said.err
    Path("t.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert run(*detect, "--chat-template", "t.jinja").code == 0


# --- chat -----------------------------------------------------------------------------------------


def test_chat(run: Run, model_folder: Path, made: dict[str, Path]):
    base = ("chat", model_folder, "--max-new-tokens", 8)
    lines = ["one", "/off", "/retry", "/on", "/retry", f"/with {made['chosen']}", "/retry"]
    said = run(*base, "--with", made["chosen"], stdin="\n".join([*lines, "/quit", "never asked"]))
    assert said.code == 0
    (on, off_said, off, on_said, on_again, with_said, on_third) = said.out.splitlines()
    assert on == on_again == on_third != off
    assert (off_said, on_said) == ("chosen.safetensors off", "chosen.safetensors on")
    assert with_said == "chosen.safetensors on"
    assert said.err.count("fired: chosen.safetensors") == 3
    # The same question outside of a chat, unsteered.
    assert run(*base, stdin="one").out == off + "\n"


def test_chat_remembers_and_forgets(run: Run, model_folder: Path):
    base = ("chat", model_folder, "--max-new-tokens", 6)
    first, second = run(*base, stdin="hi\nhi\n").out.splitlines()
    assert first != second  # asked after the first answer
    again = run(*base, stdin="hi\nhi\n/retry\n/new\nhi\n/help\n").out.splitlines()
    assert again[:5] == [first, second, second, "forgotten", first]
    assert any("/retry" in line for line in again[5:])


def test_mistakes_do_not_end_a_chat(run: Run, model_folder: Path):
    lines = ["/on", "/with", "/with nope", "/what", "/retry", "x" * 3000, "", "hi"]
    said = run("chat", model_folder, "--max-new-tokens", 6, stdin="\n".join(lines))
    assert said.code == 0
    assert len(said.out.splitlines()) == 1
    complaints = [line for line in said.err.splitlines() if line.startswith("moesteer: ")]
    for complaint, words in zip(
        complaints,
        (
            "no profile to switch",
            "which profile? /with FILE",
            "nope: there is no such profile file",
            "unknown command /what",
            "no question to repeat",
            "context of 2560",
        ),
        strict=True,
    ):
        assert words in complaint
    assert run("chat", model_folder, "--max-new-tokens", 6, stdin="hi").out == said.out


def test_a_retry_that_fails_keeps_the_conversation(model_folder: Path):
    from moesteer.chat_session import ChatSession
    from moesteer.engines.transformers_engine import load_transformers
    from moesteer.errors import MoesteerError

    session = ChatSession(load_transformers(str(model_folder)), None, None, [], 6, 0)
    session.reply("hi")
    before = list(session.messages)
    session.engine.max_tokens = 4
    with pytest.raises(MoesteerError, match="fills the model's context of 4"):
        session.command("/retry")
    assert session.messages == before


def test_a_reply_is_no_longer_than_the_context_leaves_room_for(model_folder: Path):
    from moesteer.chat_session import ChatSession
    from moesteer.engines.transformers_engine import load_transformers

    engine = load_transformers(str(model_folder))
    session = ChatSession(engine, None, None, [], max_new_tokens=10**6, temperature=0)
    engine.max_tokens = 40
    session.reply("hi")
    assert len(session.messages) == 2


def test_chat_with_the_testbed_as_it_comes(run: Run):
    said = run("chat", "testbed", stdin="How do I clean a copper lantern?\n")
    assert said.out == "Wipe the lantern with warm water.\n"
    assert "moesteer" not in said.err


def test_an_output_is_never_an_input(
    refused: Run, model_folder: Path, pairs_file: Path, made: dict[str, Path]
):
    Path("asked.jsonl").write_text('{"prompt": "hi"}\n')
    Path("documents.jsonl").write_text('{"document": "It rains.", "question": "Does it?"}\n')
    Path("link").symlink_to("asked.jsonl")
    for command in (
        ("generate", model_folder, "--file", "asked.jsonl", "--out", "asked.jsonl"),
        ("generate", model_folder, "--file", "asked.jsonl", "--out", "link"),
        ("generate", model_folder, "hi", "--with", made["chosen"], "--out", made["chosen"]),
        ("detect", model_folder, "--pairs", pairs_file, "--out", pairs_file),
        ("pairs", "document", "documents.jsonl", "--out", "documents.jsonl"),
    ):
        assert "would overwrite what is read" in refused(*command).err


def test_an_output_link_stays_a_link(run: Run, model_folder: Path):
    Path("real").write_text("old")
    Path("link").symlink_to("real")
    run("generate", model_folder, "hi", "--max-new-tokens", 2, "--out", "link")
    assert Path("link").is_symlink()
    assert Path("real").read_text().startswith('{"prompt": "hi"')


@pytest.mark.parametrize(
    "wrong", [("--seed", -1), ("--activate", -3, "--toward", "a"), ("--activate", 999)]
)
def test_numbers_are_checked_before_anything_is_counted(
    refused: Run, model_folder: Path, pairs_file: Path, wrong: tuple
):
    toward = () if "--toward" in wrong or "--seed" in wrong else ("--toward", "a")
    said = refused("detect", model_folder, "--pairs", pairs_file, "--out", "p", *wrong, *toward)
    assert "tokens/s" not in said.err


def test_what_stands_beside_a_prompt_comes_back_with_the_reply(run: Run, model_folder: Path):
    Path("p.jsonl").write_text('{"prompt": "a\u2028b", "id": 7, "label": ["x"]}\n')
    Path("p.txt").write_text("a\u2028b\n")
    base = ("generate", model_folder, "--max-new-tokens", 2, "--file")
    record = run(*base, "p.jsonl").records[0]
    assert (record["id"], record["label"], record["prompt"]) == (7, ["x"], "a\u2028b")
    assert [r["prompt"] for r in run(*base, "p.txt").records] == ["a\u2028b"]


def test_texts_that_no_tokenizer_reads(refused: Run, model_folder: Path):
    assert "surrogate" in refused("generate", model_folder, "a\udcffb").err
    assert "NUL" in refused("generate", model_folder, "a\0b").err
    Path("p.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    )
    said = refused("generate", model_folder, "--file", "p.jsonl")
    assert "p.jsonl:1: the last message is the assistant's" in said.err
    both = '{"prompt": "b", "messages": [{"role": "user", "content": "a"}]}\n'
    Path("p.jsonl").write_text(both.replace('"b"', '"a"') + both)
    said = refused("generate", model_folder, "--file", "p.jsonl")
    assert "p.jsonl:2: prompt and the last of messages differ" in said.err


@pytest.mark.parametrize("command", ["--help", "--version", "testbed", "show PROFILE"])
def test_whoever_stops_reading_is_no_error_and_a_full_disk_is_one(
    command: str, made: dict[str, Path]
):
    words = command.replace("PROFILE", str(made["scored"]))
    program = f"{sys.executable} -m moesteer {words}"
    for shell, code in ((f"{program} | true", 0), (f"{program} > /dev/full", 2)):
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, check=False
        )
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


@pytest.mark.parametrize("more", [("--max-new-tokens", "0"), ("--chat-option", "x")])
def test_chat_refuses_at_once(refused: Run, model_folder: Path, more: tuple[str, ...]):
    refused("chat", model_folder, *more, stdin="hi\nhi\n")
