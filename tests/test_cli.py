"""The commands as a user meets them: on a tiny random MoE model, with all that can go wrong.

Most run in this process, which is fast; what depends on the process (imports, signals, pipes) in
one of its own.
"""

import errno
import gzip
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from conftest import write_model
from moesteer import __version__
from moesteer.cli import COMMANDS, main
from moesteer.files import sole_writer
from moesteer.profile import Profile

RANKING = Path(__file__).parent / "data" / "rankings" / "pandas-2.3.3-protocol5-totals.pkl"


@dataclass(frozen=True)
class Said:
    code: object
    out: str
    err: str

    @property
    def records(self) -> list[dict]:
        return [json.loads(line) for line in self.out.split("\n") if line]


Run = Callable[..., Said]


@pytest.fixture
def run(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run a command in a folder of its own."""

    def run(*arguments: object, stdin: str = "") -> Said:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        monkeypatch.setattr("sys.argv", ["moesteer", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(run: Run, in_tmp_path: Path) -> Run:
    """Run a command that must fail in the user's words: exit 2, one message, nothing written."""

    def refused(*arguments: object, stdin: str = "") -> Said:
        def files() -> dict[Path, bytes]:
            return {p: p.read_bytes() for p in in_tmp_path.rglob("*") if p.is_file()}

        before = files()
        said = run(*arguments, stdin=stdin)
        assert said.code == 2
        assert said.err.startswith("moesteer: ")
        assert said.err.count("moesteer: ") == 1
        assert "Traceback" not in said.err
        assert said.out == ""
        assert files() == before
        return said

    return refused


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> dict[str, Path]:
    """A profile with all scores and one with experts chosen, both detected once."""
    from moesteer.contrast import read_pairs
    from moesteer.detection.detect import detect
    from moesteer.detection.selecting import select_experts
    from moesteer.engines.transformers_engine import load_transformers

    folder = tmp_path_factory.mktemp("profiles")
    pairs = folder / "pairs.jsonl"
    lines = [
        {"prompt": f"Tell me {n}.", "a": f"Yes, sure: {n}", "b": f"No, never {n}"}
        for n in range(12)
    ]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scored = detect(load_transformers(str(model_folder)), read_pairs(pairs))
    paths = {"scored": folder / "scored.safetensors", "chosen": folder / "chosen.safetensors"}
    scored.save(paths["scored"])
    select_experts(scored, activate=2, deactivate=3, toward="a").save(paths["chosen"])
    return paths


def in_own_process(*arguments: object, code: str | None = None, stdin: str = "", **options):
    start = ["-m", "moesteer"] if code is None else ["-c", code]
    command = [sys.executable, *start, *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, **options)


# --- help -----------------------------------------------------------------------------------------


def test_overview_names_every_command(run: Run):
    for arguments in ((), ("--help",), ("-h",)):
        said = run(*arguments)
        assert said.code == 0
        for name in COMMANDS:
            assert f"\n  {name} " in said.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command(run: Run, name: str):
    said = run(*name.split(), "--help")
    assert said.code == 0
    assert f"Usage: moesteer {name}" in said.out
    for parameter in COMMANDS[name].__annotations__:
        if parameter not in ("return", "model", "profile", "prompts", "source"):
            assert parameter.strip("_").replace("_", "-") in said.out.lower()


def test_version(run: Run):
    assert run("--version").out == f"moesteer {__version__}\n"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_imports_nothing_heavy(option: str):
    code = (
        "import sys; from moesteer.cli import main; main(sys.argv[1:]);"
        "print([m for m in ('torch', 'transformers', 'cyclopts', 'rich', 'numpy', 'pydantic')"
        " if m in sys.modules])"
    )
    said = in_own_process(option, code=code)
    assert said.returncode == 0
    assert said.stdout.endswith("[]\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bogus",), ('"bogus"', "detect", "--help")),
        (("pairs", "bogus"), ('"bogus"', "refusal", "document")),
        (("show",), ("PROFILE",)),
        (("show", "p", "--jsn"), ("--jsn", "--json")),
        (("detect", "m", "--out", "o"), ("--pairs",)),
        (("detect", "m", "--pairs", "p", "--out", "o", "--toward", "c"), ('"c"', '"a", "b"')),
        (("detect", "m", "--pairs", "p", "--out", "o", "--activate", "x"), ("--activate", '"x"')),
        (("generate", "m", "hi", "--dtype", "float99"), ("float99", "bfloat16")),
        (("import-ranking", "r", "--out", "o"), ("--top-k",)),
    ],
)
def test_wrong_words(refused: Run, arguments: tuple[str, ...], words: tuple[str, ...]):
    said = refused(*arguments)
    for word in words:
        assert word in said.err


# --- the road from pairs to replies ---------------------------------------------------------------


def test_from_pairs_to_replies(run: Run, model_folder: Path, pairs_file: Path):
    said = run("detect", model_folder, "--pairs", pairs_file, "--out", "all.safetensors")
    assert said.code == 0
    assert "written: all.safetensors" in said.out
    assert "tokens" in said.err  # progress is no result
    assert Profile.load("all.safetensors").activated == ()

    command = ("--activate", 2, "--deactivate", 3, "--toward", "a")
    assert run("select", "all.safetensors", *command, "--out", "some.safetensors").code == 0
    said = run(
        *("detect", model_folder, "--pairs", pairs_file, *command, "--out", "at-once.safetensors")
    )
    assert said.code == 0
    chosen, at_once = Profile.load("some.safetensors"), Profile.load("at-once.safetensors")
    assert len(chosen.activated) == 2
    assert len(chosen.deactivated) == 3
    assert (at_once.activated, at_once.deactivated) == (chosen.activated, chosen.deactivated)
    assert chosen.toward == at_once.toward == "a"

    shown = run("show", "some.safetensors", "--top", 3)
    assert shown.code == 0
    layer, expert = sorted(chosen.activated)[0]
    assert f"layer {layer}: {expert}" in shown.out
    assert "12 from" in shown.out
    assert shown.out.count("activated") >= 2
    as_json = json.loads(run("show", "some.safetensors", "--json").out)
    assert as_json["activated"] == [list(expert) for expert in chosen.activated]
    assert as_json["deactivated"] == [list(expert) for expert in chosen.deactivated]
    assert as_json["evidence"]["pairs"] == 12
    assert len(as_json["scores"]) == 4 * 8

    said = run(
        "generate", model_folder, "hello", "--with", "some.safetensors", "--max-new-tokens", 3
    )
    assert said.code == 0
    (record,) = said.records
    assert record["prompt"] == "hello"
    assert record["profile"] == "some.safetensors"
    assert "fired" in said.err
    assert sorted(p.name for p in Path().iterdir()) == [
        "all.safetensors",
        "at-once.safetensors",
        "pairs.jsonl",
        "some.safetensors",
    ]  # no lock and no checkpoint remains


def test_detection_is_reproducible(run: Run, model_folder: Path, pairs_file: Path):
    for out in ("one", "two"):
        run("detect", model_folder, "--pairs", pairs_file, "--out", out)
    one, two = (json.loads(run("show", out, "--json").out)["scores"] for out in ("one", "two"))
    assert one == two


def test_detection_counts_what_the_router_chose(run: Run, model_folder: Path, pairs_file: Path):
    # Against transformers' own record of the router's logits, token by token.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run("detect", model_folder, "--pairs", pairs_file, "--out", "p")
    scores = Profile.load("p").scores
    assert scores is not None
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rates = []
    for side in ("a", "b"):
        selected, tokens = np.zeros((4, 8)), 0
        for line in pairs_file.read_text().splitlines():
            pair = json.loads(line)
            before = f"<|user|>{pair['prompt']}<|end|><|assistant|>"
            prefix, reply = (tokenizer(t).input_ids for t in (before, pair[side]))
            ids = [*prefix, *reply, *tokenizer("<|end|>").input_ids]
            with torch.no_grad():
                logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
            tokens += len(reply)
            for layer, of_layer in enumerate(logits):
                for chosen in of_layer.topk(3).indices[len(prefix) : len(prefix) + len(reply)]:
                    selected[layer, chosen.numpy()] += 1
        rates.append(selected / tokens)
    np.testing.assert_allclose(scores.rate_a, rates[0], atol=1e-12)
    np.testing.assert_allclose(scores.value, rates[0] - rates[1], atol=1e-12)


def test_top_1_counts_one_expert_a_token(run: Run, model_folder: Path, pairs_file: Path):
    run("detect", model_folder, "--pairs", pairs_file, "--out", "p", "--detector", "top-1")
    profile = Profile.load("p")
    assert profile.scores is not None
    np.testing.assert_allclose(profile.scores.rate_a.sum(-1), 1)
    assert profile.evidence is not None
    assert profile.evidence.counted == "top-1"


def test_every_detector(run: Run, refused: Run, model_folder: Path, pairs_file: Path):
    from moesteer.detection.detectors import DETECTORS

    listed = run("detect", "--help").out
    for name, detector in DETECTORS.items():
        assert name in listed
        detect = ("detect", model_folder, "--pairs", pairs_file, "--out", name)
        assert run(*detect, "--detector", name).code == 0
        evidence = Profile.load(name).evidence
        assert evidence is not None
        assert (evidence.detector, evidence.counted) == (name, detector.counted)
        assert detector.title in run("show", name).out
    said = refused("detect", "no-model", "--pairs", "p", "--out", "p", "--detector", "magic")
    assert "no detector 'magic'" in said.err
    assert ", ".join(DETECTORS) in said.err


def test_matched_spans(run: Run, model_folder: Path, pairs_file: Path):
    detect = ("detect", model_folder, "--pairs", pairs_file, "--out")
    assert run(*detect, "given").code == 0
    assert run(*detect, "matched", "--match-spans").code == 0
    given, matched = (Profile.load(name).evidence for name in ("given", "matched"))
    assert given is not None
    assert matched is not None
    assert (given.spans, matched.spans) == ("as given", "matched")
    assert given.tokens_a != given.tokens_b
    assert matched.tokens_a == matched.tokens_b <= min(given.tokens_a, given.tokens_b)
    assert "matched in length and position" in run("show", "matched").out
    assert "matched in length" not in run("show", "given").out


@pytest.mark.filterwarnings("default")
def test_sides_of_very_unequal_length_are_warned_of(run: Run, model_folder: Path):
    pair = {"prompt": "How?", "a": "No.", "b": "First you do this, then you do that, and so on."}
    Path("pairs.jsonl").write_text(json.dumps(pair) + "\n")
    detect = ("detect", model_folder, "--pairs", "pairs.jsonl", "--out", "p")
    assert "moesteer: warning: the targets are 2 tokens of A and 47 of B" in run(*detect).err
    assert "warning" not in run(*detect, "--match-spans").err


def test_what_is_shown_of_certainty(run: Run, model_folder: Path, pairs_file: Path):
    run("detect", model_folder, "--pairs", pairs_file, "--out", "p")
    profile = Profile.load("p")
    assert profile.scores is not None
    assert profile.evidence is not None
    shown = run("show", "p", "--top", 40).out
    found = int((profile.scores.q < 0.05).sum())
    assert f"{found} of 32 experts differ between the sides (q < 0.05)" in shown
    assert f"rank correlation of split halves {profile.evidence.stability:.2f}" in shown
    said = json.loads(run("show", "p", "--json").out)
    assert said["evidence"]["stability"] == profile.evidence.stability
    for expert in said["scores"]:
        place = expert["layer"], expert["expert"]
        assert expert["p"] == profile.scores.p[place]
        assert expert["q"] == profile.scores.q[place]


def test_built_in_pairs_and_chat_options(run: Run, model_folder: Path):
    arguments = ("--pairs", "testbed:refusal:dev", "--chat-option", "opening=Well", "--out", "p")
    assert run("detect", model_folder, *arguments).code == 0
    profile = Profile.load("p")
    evidence = profile.evidence
    assert evidence is not None
    assert evidence.source == "testbed:refusal:dev"
    assert profile.chat_options == {"opening": "Well"}
    assert evidence.pairs > 10


# --- pairs ----------------------------------------------------------------------------------------


def test_pairs_refusal(run: Run):
    Path("asked.jsonl").write_text('{"prompt": "How?", "reply": "So."}\n')
    Path("no.txt").write_text("Never.\n")
    assert run("pairs", "refusal", "asked.jsonl", "--out", "p", "--refusals", "no.txt").code == 0
    (pair,) = [json.loads(line) for line in Path("p").read_text().splitlines()]
    assert (pair["a"], pair["b"]) == ("Never.", "So.")


def test_pairs_document(run: Run, model_folder: Path):
    Path("asked.csv").write_text("document,question\nThe sky is green.,What is green?\n")
    assert run("pairs", "document", "asked.csv", "--out", "p.jsonl").code == 0
    assert run("detect", model_folder, "--pairs", "p.jsonl", "--out", "p").code == 0
    evidence = Profile.load("p").evidence
    assert evidence is not None
    assert evidence.tokens_a == evidence.tokens_b  # only the question counts
    assert "–" in run("show", "p").out  # no interval from one pair


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "pairs.jsonl: holds no records"),
        ('{"prompt": "x", "a": "y", "b": "z"}\n{"prompt": "x"\n', "pairs.jsonl:2: not JSON"),
        ('\n{"prompt": "x", "a": "y"}\n', "pairs.jsonl:2: missing key 'b'"),
        ('{"prompt": "x", "a": "y", "b": ""}\n', "pairs.jsonl:1: b holds no visible character"),
        ('{"prompt": "x", "a": "y", "b": "y"}\n', "pairs.jsonl:1: a and b are the same"),
        ('["x"]\n', "pairs.jsonl:1: not an object"),
        (
            '{"prompt": "x", "a": "y", "b": "z", "target": "q"}\n',
            "pairs.jsonl:1: side a: the target text 'q' does not occur",
        ),
    ],
)
def test_pairs_that_are_none(refused: Run, model_folder: Path, content: str, said: str):
    Path("pairs.jsonl").write_text(content)
    assert said in refused("detect", model_folder, "--pairs", "pairs.jsonl", "--out", "p").err


def test_no_pairs_file(refused: Run, model_folder: Path):
    said = refused("detect", model_folder, "--pairs", "nope.jsonl", "--out", "p")
    assert "nope.jsonl: neither an existing file nor a data set" in said.err
    said = refused("detect", model_folder, "--pairs", "testbed:nope", "--out", "p")
    assert "refusal, document, digits" in said.err
    assert "missing key 'reply'" in refused(*make_one_sided(), "--out", "p").err


def make_one_sided() -> tuple[str, ...]:
    Path("asked.jsonl").write_text('{"prompt": "How?"}\n')
    return "pairs", "refusal", "asked.jsonl"


def test_a_reply_over_the_context_length(refused: Run, model_folder: Path):
    pair = {"prompt": "x", "a": "yes " * 2000, "b": "no"}
    Path("pairs.jsonl").write_text(json.dumps(pair))
    said = refused("detect", model_folder, "--pairs", "pairs.jsonl", "--out", "p")
    assert "pairs.jsonl:1: side a: the target ends at token" in said.err
    assert "limit of 2560 tokens" in said.err


# --- choosing and showing -------------------------------------------------------------------------


def test_more_experts_than_there_are(refused: Run, made: dict[str, Path]):
    base = ("select", made["scored"], "--out", "p", "--toward", "b")
    assert "have a score of that sign" in refused(*base, "--activate", 40).err
    assert "can't be negative" in refused(*base, "--activate", -1).err
    said = refused(*base, "--activate", 12)
    assert "experts are activated in layer" in said.err
    assert "k = 3" in said.err


def test_no_side_to_steer_toward(refused: Run, model_folder: Path, pairs_file: Path):
    said = refused("detect", model_folder, "--pairs", pairs_file, "--out", "p", "--activate", 1)
    assert "--activate" in said.err
    assert "--toward" in said.err
    refused("detect", model_folder, "--pairs", pairs_file, "--out", "p", "--toward", "a")


def test_import_ranking(run: Run, refused: Run):
    assert run("import-ranking", RANKING, "--top-k", 1, "--out", "r").code == 0
    assert run("select", "r", "--activate", 1, "--toward", "b", "--out", "b").code == 0
    assert json.loads(run("show", "b", "--json").out)["activated"] == [[3, 0]]
    assert "+0.550 … +0.550" not in run("show", "r").out  # there is no interval to show
    assert "--top-k is 7" in refused("import-ranking", RANKING, "--top-k", 7, "--out", "x").err


def test_a_hostile_ranking_runs_nothing(refused: Run):
    class Hostile:
        def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
            return os.system, ("touch ran",)

    Path("bad.pkl").write_bytes(pickle.dumps(Hostile()))
    Path("bad.pkl.gz").write_bytes(gzip.compress(pickle.dumps(Hostile())))
    for name in ("bad.pkl", "bad.pkl.gz"):
        said = refused("import-ranking", name, "--top-k", 1, "--out", "p")
        assert "system" in said.err
    assert not Path("ran").exists()


@pytest.fixture
def damaged(made: dict[str, Path], in_tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the profile with something wrong."""

    def damage(what: str) -> Path:
        path = in_tmp_path / f"{what}.safetensors"
        if what == "truncated":
            path.write_bytes(made["chosen"].read_bytes()[:-100])
            return path
        with safe_open(made["chosen"], framework="numpy") as file:
            header = json.loads(file.metadata()["moesteer"])
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        match what:
            case "schema":
                header["schema"] = 99
            case "nan":
                arrays["value"][1, 2] = np.nan
            case "layer":
                header["activated"] = [[17, 0]]
            case "expert":
                header["activated"] = [[1, 8]]
            case "surplus":
                header |= {"activated": [[1, e] for e in range(4)], "deactivated": []}
            case "both":
                header["deactivated"] = header["activated"]
            case "config":
                header["model"]["config_hash"] = "0123"
        save_file(arrays, path, metadata={"moesteer": json.dumps(header)})
        return path

    return damage


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", ("not a readable profile",)),
        ("schema", ("schema 99", "reads schema 2")),
        ("nan", ("value of expert (1, 2) is nan",)),
        ("layer", ("layer 17", "0–3")),
        ("expert", ("(1, 8) does not exist", "0–7")),
        ("surplus", ("4 experts are activated in layer 1 (0, 1, 2, 3)", "k = 3")),
        ("both", ("both activated and deactivated",)),
    ],
)
@pytest.mark.parametrize("command", ["show", "select", "generate", "chat"])
def test_a_profile_with_something_wrong(
    refused: Run, damaged: Callable[[str], Path], what: str, words: tuple[str, ...], command: str
):
    path = damaged(what)
    arguments = {
        "show": (path, "--json"),
        "select": (path, "--activate", 1, "--toward", "a", "--out", "p"),
        "generate": ("no-model", "hi", "--with", path),  # said before a model is loaded
        "chat": ("no-model", "--with", path),
    }[command]
    said = refused(command, *arguments)
    assert path.name in said.err
    for word in words:
        assert word in said.err


def test_a_profile_of_another_model(
    refused: Run, model_folder: Path, damaged: Callable[[str], Path], tmp_path_factory
):
    for command in (("generate", model_folder, "hi"), ("chat", model_folder)):
        said = refused(*command, "--with", damaged("config"))
        assert "config hash is 0123 in the profile and" in said.err


def test_a_profile_of_another_training_of_the_model(
    refused: Run, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
):
    other = write_model(tmp_path_factory.mktemp("models") / "other", seed=1)
    said = refused("generate", other, "hi", "--with", made["chosen"])
    assert "has norm" in said.err
    assert "in the profile and" in said.err


def test_what_is_no_profile(refused: Run, model_folder: Path):
    assert "no such profile file" in refused("show", "nope").err
    weights = model_folder / "model.safetensors"
    assert "not a profile of moesteer" in refused("show", weights).err
    assert "not a readable profile" in refused("show", model_folder / "config.json").err


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


# --- doctor, and models that can't be used --------------------------------------------------------


def test_doctor(run: Run, model_folder: Path):
    for more, tested_on in (((), "a tiny random model"), (("--load",), "the loaded weights")):
        said = run("doctor", model_folder, *more)
        assert said.code == 0
        assert "qwen3_moe" in said.out
        assert "4 (0–3)" in said.out
        assert "8 a layer, k = 3" in said.out
        assert f"passed on {tested_on}" in said.out


def test_doctor_reads_the_config_alone(run: Run):
    # A Mixtral of full size, but without weights, tokenizer or network.
    config = {"model_type": "mixtral", "quantization_config": {"quant_method": "mxfp4"}}
    Path("big").mkdir()
    Path("big/config.json").write_text(json.dumps(config))
    said = run("doctor", "big")
    assert said.code == 0
    assert "32 (0–31)" in said.out
    assert "mxfp4" in said.out
    assert "--load" in said.out


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ('{"model_type": "llama", "num_hidden_layers": 2}', ("llama", "Mixture-of-Experts")),
        ('{"model_type": "nonesuch"}', ("nonesuch", "does not recognize")),
        ('{"model_type": "clip"}', ("clip", "not a causal LM")),
        ("{}", ("model_type",)),
        ("{nope", ("not a valid JSON",)),
        (None, ("there is no m/config.json",)),
    ],
)
def test_doctor_of_what_is_no_moe(refused: Run, config: str | None, words: tuple[str, ...]):
    Path("m").mkdir()
    if config is not None:
        Path("m/config.json").write_text(config)
    said = refused("doctor", "m")
    for word in words:
        assert word in said.err
    assert len(said.err) < 400


@pytest.mark.parametrize("command", ["detect", "generate", "chat"])
def test_models_that_cannot_be_used(refused: Run, pairs_file: Path, command: str):
    more: tuple = ("--pairs", pairs_file, "--out", "p") if command == "detect" else ()
    more = ("hi",) if command == "generate" else more
    assert "./nope holds no model" in refused(command, "./nope", *more).err
    assert "org/nope can't be read as a model" in refused(command, "org/nope", *more).err
    Path("dense").mkdir()
    Path("dense/config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    assert "not a Mixture-of-Experts model" in refused(command, "dense", *more).err
    Path("unknown").mkdir()
    Path("unknown/config.json").write_text('{"model_type": "nonesuch"}')
    assert "nonesuch" in refused(command, "unknown", *more).err


def test_a_model_without_weights(refused: Run, model_folder: Path):
    shutil.copytree(model_folder, "m")
    Path("m/model.safetensors").unlink()
    assert "m can't be loaded" in refused("generate", "m", "hi").err


# --- what can happen to an output -----------------------------------------------------------------

WRITERS = ["detect", "select", "import-ranking", "generate", "pairs refusal"]


@pytest.fixture
def writer(
    model_folder: Path, made: dict[str, Path], pairs_file: Path
) -> Callable[[str], list[object]]:
    """The arguments of a command that writes, up to --out."""

    def arguments(name: str) -> list[object]:
        match name:
            case "detect":
                return ["detect", model_folder, "--pairs", pairs_file]
            case "select":
                return ["select", made["scored"], "--activate", 1, "--toward", "a"]
            case "import-ranking":
                return ["import-ranking", RANKING, "--top-k", 1]
            case "generate":
                return ["generate", model_folder, "hi", "--max-new-tokens", 2]
            case _:
                Path("asked.jsonl").write_text('{"prompt": "How?", "reply": "So."}\n')
                return ["pairs", "refusal", "asked.jsonl"]

    return arguments


@pytest.mark.parametrize("name", WRITERS)
def test_outputs_that_cannot_be_written(
    refused: Run, writer: Callable[[str], list[object]], name: str
):
    for out, said in (
        ("missing/out", "the folder missing does not exist"),
        (".", "is a folder"),
        ("/dev/null", "not an ordinary file"),
        ("n" * 300, "File name too long"),
    ):
        assert said in refused(*writer(name), "--out", out).err


@pytest.mark.parametrize("command", ["detect", "generate"])
def test_an_output_is_checked_before_the_work(refused: Run, pairs_file: Path, command: str):
    more = ("--pairs", pairs_file) if command == "detect" else ("hi",)
    said = refused(command, "./no-model", *more, "--out", "missing/out")
    assert "the folder missing does not exist" in said.err


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_file(
    run: Run,
    writer: Callable[[str], list[object]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
):
    arguments = writer(name)
    Path("out").write_text("old")
    before = set(Path().iterdir())

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        said = run(*arguments, "--out", "out")
    assert said.code == 2
    assert "moesteer: out could not be written: the disk is full" in said.err
    assert "Traceback" not in said.err
    assert Path("out").read_text() == "old"
    # Replies that are paid for wait in a file beside it until they can be written.
    kept = {Path(".out.lines.partial")} if name == "generate" else set()
    assert set(Path().iterdir()) == before | kept
    assert run(*arguments, "--out", "out").code == 0
    assert set(Path().iterdir()) == before
    assert Path("out").read_bytes() != b"old"


def test_two_runs_on_one_output(run: Run, model_folder: Path, pairs_file: Path):
    arguments = ("detect", model_folder, "--pairs", pairs_file, "--out", "p")
    with sole_writer(Path("p")):
        said = run(*arguments)
        assert said.code == 2
        assert f"p is being written by another run (process {os.getpid()})" in said.err
        assert not Path("p").exists()
    assert run(*arguments).code == 0


STOPPED = """
import os, signal, sys
from moesteer.detection import counts
from moesteer.engines.transformers_engine import TransformersEngine

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
how = getattr(signal, sys.argv.pop(1))
counts.BATCH_TOKENS, counts.CHECKPOINT_SECONDS = 100, 0 if how == signal.SIGKILL else 30
count, batches = TransformersEngine.count_selections, []

def counting(self, conversations, counted):
    batches.append(len(conversations))
    if len(batches) == 5:
        os.kill(os.getpid(), how)
    return count(self, conversations, counted)

TransformersEngine.count_selections = counting
from moesteer.cli import main
main()
"""


@pytest.mark.parametrize("signal", ["SIGINT", "SIGKILL"])
def test_an_interrupted_run_goes_on(
    run: Run, model_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, signal: str
):
    from moesteer.engines.transformers_engine import TransformersEngine

    arguments = ("detect", model_folder, "--pairs", pairs_file, "--out")
    Path("p").write_text("old")
    stopped = in_own_process(signal, *arguments, "p", code=STOPPED)
    assert Path("p").read_text() == "old"
    assert "Traceback" not in stopped.stderr
    if signal == "SIGINT":
        assert stopped.returncode == 130
        assert "moesteer: interrupted" in stopped.stderr
    else:
        assert stopped.returncode == -9

    counted: list[int] = []
    count = TransformersEngine.count_selections

    def counting(engine: TransformersEngine, conversations, how):
        counted.append(len(conversations))
        return count(engine, conversations, how)

    monkeypatch.setattr("moesteer.detection.counts.BATCH_TOKENS", 100)
    monkeypatch.setattr(TransformersEngine, "count_selections", counting)
    assert run(*arguments, "p").code == 0
    resumed, counted = counted, []
    assert run(*arguments, "whole").code == 0
    assert len(counted) > 5
    assert resumed == counted[4:]  # four batches were done and are not done again
    p, whole = Profile.load("p").scores, Profile.load("whole").scores
    assert p is not None
    assert whole is not None
    for key, array in vars(p).items():
        np.testing.assert_array_equal(array, getattr(whole, key))
    assert sorted(path.name for path in Path().iterdir()) == ["p", "pairs.jsonl", "whole"]


@pytest.mark.parametrize("temperature", [0, 2])
def test_an_interrupted_generation_goes_on(
    run: Run, model_folder: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
):
    from moesteer.engines.transformers_engine import TransformersEngine

    asked: list[str] = []
    generate = TransformersEngine.generate

    def asking(engine: TransformersEngine, prompts, *more, **options):
        if asked[-1:] == ["stop here"]:
            raise KeyboardInterrupt
        asked.extend(prompt.removeprefix("<|user|>").partition("<")[0] for prompt in prompts)
        return generate(engine, prompts, *more, **options)

    monkeypatch.setattr("moesteer.generate.GROUP", 1)
    monkeypatch.setattr(TransformersEngine, "generate", asking)
    prompts = ["one", "two", "three", "stop here", "four", "five"]
    arguments = ("generate", model_folder, *prompts, "--batch-size", 2, "--max-new-tokens", 8)
    arguments = (*arguments, "--temperature", temperature, "--out")
    Path("p").write_text("old")
    said = run(*arguments, "p")
    assert said.code == 130
    assert "moesteer: interrupted" in said.err
    assert Path("p").read_text() == "old"
    assert asked == prompts[:4]
    asked.clear()
    assert run(*arguments, "p").code == 0
    assert asked == prompts[4:]
    monkeypatch.setattr(TransformersEngine, "generate", generate)
    assert run(*arguments, "whole").code == 0
    assert Path("p").read_text() == Path("whole").read_text()
    assert len(Path("p").read_text().splitlines()) == 6
    assert sorted(path.name for path in Path().iterdir()) == ["p", "whole"]


# --- as a program among programs ------------------------------------------------------------------


def test_as_a_program(model_folder: Path, made: dict[str, Path], tmp_path: Path):
    arguments = ("generate", model_folder, "--with", made["chosen"], "--max-new-tokens", 3)
    said = in_own_process(*arguments, stdin="one\ntwo\n", cwd=tmp_path)
    assert said.returncode == 0
    assert [json.loads(line)["prompt"] for line in said.stdout.splitlines()] == ["one", "two"]
    progress, fired = said.stderr.splitlines()  # and no bars or warnings of others
    assert progress.startswith("generate: 2 of 2 prompts")
    assert fired.startswith("fired: chosen.safetensors")
    refused = in_own_process("show", "nope", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "moesteer: nope: there is no such profile file.\n"


def test_a_closed_pipe_is_no_error(made: dict[str, Path]):
    command = [sys.executable, "-m", "moesteer", "show", str(made["scored"]), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as shown:
        assert shown.stdout is not None
        assert shown.stderr is not None
        shown.stdout.close()
        assert shown.stderr.read() == b""
    assert shown.returncode == 0


def test_a_profile_says_which_command_made_it(run: Run, model_folder: Path, pairs_file: Path):
    run("detect", model_folder, "--pairs", pairs_file, "--out", "p q")
    evidence = Profile.load("p q").evidence
    assert evidence is not None
    assert evidence.command == f"moesteer detect {model_folder} --pairs {pairs_file} --out 'p q'"
