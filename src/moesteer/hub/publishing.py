"""A profile as anyone may read it: what only its maker's machine knows stays there.

A path tells of people, projects and machines. Of every path in the commands and sources of a
profile its last part is left; a model that was loaded from a folder is called by its name on the
Hub, where that is given, or else by its folder's own name.
"""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from moesteer.errors import MoesteerError
from moesteer.gate import GateEvidence
from moesteer.model_facts import UNKNOWN, ModelFacts
from moesteer.profile import Evidence, Profile
from moesteer.report.verdict import TESTBED

DATA_FILES = {".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".gz", ".toml", ".pkl"}
DATA_SET = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")
"""ORG/NAME[:split], as in `moesteer.records`."""
PATH_IN_WORDS = re.compile(r"(?<![^\s\"'(=])(?:~|\.{0,2})/[^\s\"'),;]+")


def published(profile: Profile, base_model: str | None) -> Profile:
    """The profile without paths; its model is called `base_model`, where that is known.

    It steers alike: the fingerprint is the same.
    """
    model, gate = profile.model, profile.gate
    renamed: dict[str, str] = {}
    if model is not None:
        renamed[model.id] = base_model or _last_part(model.id)
        model = replace(model, id=renamed[model.id])
    if gate is not None:
        gate = replace(gate, evidence=_without_paths(gate.evidence, renamed))
    seen = _without_paths(profile.evidence, renamed)
    return replace(profile, model=model, evidence=seen, gate=gate)


Seen = TypeVar("Seen", Evidence, GateEvidence)


def _without_paths(seen: Seen | None, renamed: Mapping[str, str]) -> Seen | None:
    if seen is None:
        return None
    source = bare_source(seen.source)
    same = {part: part for part in source.split(" and ")}
    return replace(seen, source=source, command=bare_command(seen.command, {**same, **renamed}))


def base_model_of(profile: Profile, given: str | None) -> str | None:
    """The name on the Hub of the model that a profile steers, None where that is not known.

    Known is what was loaded from the Hub, at some commit; anything else is what is `given`.
    MoesteerError where both are known and differ, and where the model comes with moesteer.
    """
    if given is not None:
        check_repo(given, "--base-model")
    found = profile.model
    if given is not None and is_bundled(profile):
        assert found is not None
        raise MoesteerError(
            f"{profile.name} was made on {found.id}, which comes with moesteer and is not on the"
            " Hub; leave out --base-model."
        )
    if found is None or not _is_on_hub(found):
        return given
    if given not in (None, found.id):
        raise MoesteerError(
            f"{profile.name} was made on {found.id}, revision {found.revision}, and not on {given};"
            " --base-model is for models that were loaded from a folder."
        )
    return found.id


def is_bundled(profile: Profile) -> bool:
    """Whether it steers one of the models that come with moesteer, which are not on the Hub."""
    return profile.model is not None and profile.model.id in TESTBED


def check_repo(name: str, what: str = "the repository") -> None:
    """MoesteerError unless a name can be one on the Hub: OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError("a name on the Hub is OWNER/NAME")
    except HFValidationError as error:
        raise MoesteerError(f"{what} is {name!r}: {str(error).rstrip('.')}.") from None


def bare_command(commands: str, renamed: Mapping[str, str]) -> str:
    """Commands joined by &&, each path in them without its folders.

    `renamed` says what to write for some words: the model's name, and sources, which may have a
    slash without being paths.
    """

    def bare(word: str) -> str:
        if word in renamed:
            return renamed[word]
        if "/" not in word:
            return word
        if word[0] in '{["':
            try:
                return json.dumps(bare_json(json.loads(word)), ensure_ascii=False)
            except ValueError:  # no JSON after all
                pass
        name, equals, value = word.partition("=")
        # KEY=VALUE and --OPTION=KEY=VALUE; the key may be a card in some folder.
        if equals and ("/" not in name or name.endswith(".toml")):
            return f"{_last_part(name)}={bare(value)}"
        return _last_part(word)

    def bare_json(value: object) -> object:
        if isinstance(value, dict):
            return {bare(name): bare_json(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [bare_json(inner) for inner in value]
        return bare(value) if isinstance(value, str) else value

    lines = []
    for line in commands.split(" && "):
        try:
            words = shlex.split(line)
        except ValueError:  # && within quotes
            words = line.split()
        written = [bare(word) for word in words]
        lines.append(line if written == words else shlex.join(written))
    return " && ".join(lines)


def bare_source(source: str) -> str:
    """Where pairs or prompts came from: files without their folders, data sets as they are."""
    parts = []
    for part in source.split(" and "):
        is_file = Path(part.partition(":")[0]).suffix in DATA_FILES
        is_data_set = DATA_SET.fullmatch(part) and not is_file
        parts.append(part if is_data_set else _last_part(part))
    return " and ".join(parts)


def bare_words(text: str) -> str:
    """A sentence whose paths, as far as they look like some, have lost their folders."""
    return PATH_IN_WORDS.sub(lambda found: _last_part(found[0]), text)


def _is_on_hub(model: ModelFacts) -> bool:
    """A model from the Hub has a commit; a folder has none, nor have the bundled models."""
    return model.revision is not None and model.id != UNKNOWN and not Path(model.id).exists()


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
