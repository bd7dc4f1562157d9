"""What a published profile still says of the machine that it was made on: nothing."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_profiles import EVIDENCE, MODEL, directed, full
from moesteer.errors import MoesteerError
from moesteer.gate import AreaUnderCurve, Gate, GateEvidence, Opened, RoutingProbe
from moesteer.hub.publishing import (
    bare_command,
    bare_source,
    bare_words,
    base_model_of,
    check_repo,
    published,
)
from moesteer.profile import Profile

LOCAL = "/home/someone/secret models/olmoe"


def local() -> Profile:
    """Made on a folder, from files in other folders."""
    command = f"moesteer detect '{LOCAL}' --pairs ~/plans/pairs.jsonl --out=../out/p.safetensors"
    seen = replace(EVIDENCE, source="/data/acme/pairs.jsonl", command=command)
    return replace(full(), model=replace(MODEL, id=LOCAL, revision=None), evidence=seen)


def test_paths_lose_their_folders():
    bare = published(local(), None)
    assert bare.model is not None
    assert bare.evidence is not None
    assert bare.model.id == "olmoe"
    assert bare.evidence.source == "pairs.jsonl"
    assert bare.evidence.command == (
        "moesteer detect olmoe --pairs pairs.jsonl --out=p.safetensors"
    )
    for word in ("/", "someone", "secret", "plans", "acme", ".."):
        told = bare.to_json().replace("softmax → top-k", "")
        assert word not in told, word


def test_a_name_on_the_hub_takes_the_place_of_a_folder():
    bare = published(local(), "org/olmoe-7b")
    assert bare.model is not None
    assert bare.evidence is not None
    assert bare.model.id == "org/olmoe-7b"
    assert bare.evidence.command.startswith("moesteer detect org/olmoe-7b --pairs pairs.jsonl")


@pytest.mark.parametrize("profile", [local(), full(), directed(), Profile(((1, 2),))])
def test_it_steers_alike(profile: Profile):
    bare = published(profile, None)
    assert bare.fingerprint == profile.fingerprint
    assert bare.chat_options == profile.chat_options
    if profile.scores is not None:
        assert bare.scores is profile.scores


def test_what_has_no_paths_stays_as_it_is():
    assert published(full(), "org/model") == full()


def test_a_gates_origin_loses_its_folders_too():
    once = Opened(3, 4, 0.3, 0.9)
    curve = AreaUnderCurve(0.9, 0.8, 1.0)
    seen = GateEvidence(
        source="/data/acme/a.txt and /data/acme/b.txt",
        data_hash="hash",
        fit_opens=4,
        fit_keeps_shut=4,
        false_alarms=0.1,
        opens=once,
        keeps_shut=once,
        auc=curve,
        shuffled=curve,
        random=curve,
        seed=0,
        command="moesteer gate /data/acme/p.safetensors --opens /data/acme/a.txt",
    )
    gate = Gate(RoutingProbe(((1, 2),), (1.0,)), 0.5, seen)
    bare = published(replace(full(), gate=gate), None)
    assert bare.gate is not None
    assert bare.gate.evidence is not None
    assert bare.gate.evidence.source == "a.txt and b.txt"
    assert bare.gate.evidence.command == "moesteer gate p.safetensors --opens a.txt"
    assert bare.gate.does == gate.does


@pytest.mark.parametrize(
    ("source", "bare"),
    [
        ("testbed:refusal:dev", "testbed:refusal:dev"),
        ("org/set:train", "org/set:train"),
        ("org/set", "org/set"),
        ("data/pairs.jsonl", "pairs.jsonl"),
        ("./a.txt and ~/b.jsonl", "a.txt and b.jsonl"),
        ("/x/y/", "y"),
        ("../org/set", "set"),
    ],
)
def test_sources(source: str, bare: str):
    assert bare_source(source) == bare


def test_commands_keep_names_on_the_hub_and_options():
    command = (
        "moesteer detect org/m --pairs org/set:train --data towns=/x/t.jsonl"
        " --chat-option enable_thinking=false --position=-1"
        " && moesteer select /tmp/s.safetensors --toward a --out 'my files/p.safetensors'"
    )
    renamed = {"org/m": "org/m", "org/set:train": "org/set:train"}
    assert bare_command(command, renamed) == (
        "moesteer detect org/m --pairs org/set:train --data towns=t.jsonl"
        " --chat-option enable_thinking=false --position=-1"
        " && moesteer select s.safetensors --toward a --out p.safetensors"
    )


@pytest.mark.parametrize(
    ("word", "bare"),
    [
        ("--data=towns=/x/t.jsonl", "--data=towns=t.jsonl"),
        ("--data=/home/me/card.toml=/x/t.jsonl", "--data=card.toml=t.jsonl"),
        ("/home/me/card.toml=/x/t.jsonl", "card.toml=t.jsonl"),
        ("--engine-option=draft=org/m", "--engine-option=draft=org/m"),
        ('x={"a":"/p/q","n":[1,"/r/s",null]}', 'x={"a": "q", "n": [1, "s", null]}'),
        ('--engine-option=x={"/k/a":{"b":"~/p/q"}}', '--engine-option=x={"a": {"b": "q"}}'),
        ('x={"a":"n=/p/q"}', 'x={"a": "n=q"}'),
        ('x="/p/ü"', 'x="ü"'),
        ('x={"a":"/home/me', "x=me"),
        ('x={"a":"b"}', 'x={"a":"b"}'),
        ('x={"m":"org/m"}', 'x={"m": "org/m"}'),
    ],
)
def test_values_in_a_word_lose_their_folders_and_nothing_else(word: str, bare: str):
    import shlex

    told = bare_command(shlex.join(["moesteer", "detect", word]), {"org/m": "org/m"})
    assert shlex.split(told) == ["moesteer", "detect", bare]


def test_a_command_that_no_shell_would_take_is_still_bare():
    assert bare_command("moesteer x 'a && /home/b c", {}).count("/") == 0


words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)


@given(st.lists(words, max_size=5))
def test_no_folder_survives_in_any_command(parts: list[str]):
    import json
    import shlex

    path = "/home/someone/" + "/".join(parts) + "/file"
    given = [path, f"--out={path}", f"--data=k={path}", "x=" + json.dumps({path: [path]})]
    bare = bare_command(shlex.join(["moesteer", "detect", *given]), {})
    assert "someone" not in bare
    assert "/" not in bare


def test_sentences():
    said = "no result lies in /home/me/checks (or ./here/too), and 50/50 is a share, yes/no"
    assert bare_words(said) == "no result lies in checks (or too), and 50/50 is a share, yes/no"


# --- whose model ----------------------------------------------------------------------------------


def test_a_model_of_the_hub_is_known_by_its_commit():
    assert base_model_of(full(), None) == "org/model"
    assert base_model_of(full(), "org/model") == "org/model"
    assert base_model_of(local(), None) is None
    assert base_model_of(local(), "org/olmoe") == "org/olmoe"
    assert base_model_of(Profile(((1, 2),)), None) is None


def test_an_adapter_in_a_folder_is_no_model_of_the_hub(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """It has the commit of its base model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert base_model_of(full(), None) is None


def test_another_name_for_a_known_model_is_refused():
    with pytest.raises(MoesteerError, match="made on org/model, revision abc, and not on org/o"):
        base_model_of(full(), "org/other")
    bundled = replace(full(), model=replace(MODEL, id="testbed", revision=None))
    assert base_model_of(bundled, None) is None
    with pytest.raises(MoesteerError, match="comes with moesteer and is not on the Hub"):
        base_model_of(bundled, "org/other")


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "/home/me", "a b/c", "org/-x-", "a/b.git"])
def test_names_that_can_be_no_repository(name: str):
    with pytest.raises(MoesteerError, match="the repository is"):
        check_repo(name)
