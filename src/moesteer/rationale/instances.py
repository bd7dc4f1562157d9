"""Classification instances with a human rationale: read, and checked at the border."""

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal

from pydantic import Field

from moesteer.errors import MoesteerError, MoesteerWarning
from moesteer.records import Record, Text, check_record, read_records, shorten

Way = Literal["with_label", "with_label_top_var", "afterwards", "afterwards_top_var"]
_ASKED: dict[Way, set[str]] = {
    "with_label": {"prompt"},
    "with_label_top_var": {"prompt", "count"},
    "afterwards": set(),
    "afterwards_top_var": {"count"},
}
"""The names in braces of each way of asking for words."""


@dataclass(frozen=True)
class TextSpan:
    """Characters `start` up to `end` of one of an instance's texts."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Instance:
    """Texts to classify, by name; the right label; and which of the texts' characters tell it.

    labels: how each label is said, by its name. prompt: what the user says, with the texts' names
    in braces. ask: how the words that tell are asked for, by name of `prompting.DEFAULT_ASK`.
    """

    source: str
    texts: dict[str, str]
    label: str
    labels: dict[str, str]
    rationale: tuple[TextSpan, ...]
    prompt: str
    ask: dict[str, str]


def read_instances(source: str) -> list[Instance]:
    """Read instances from a JSONL or CSV file, from a data set, or built-in ones.

    `source` is a file or a data set (`ORG/NAME` or `ORG/NAME:split`) of our own records (see
    `parse_instance`), or with the columns of e-SNLI, of FEVER as ERASER has it (with its folder
    `docs` beside the file) or of MedicalBios; or `testbed:TASK[:SPLIT]`, of the split test where
    none is named.

    Raises MoesteerError, with file and line, for anything that cannot be used. Instances of the
    three sets that nobody marked a word of are left out, and a warning counts them.
    """
    # They build on this file.
    from moesteer.rationale.sources import e_snli, fever, medical_bios

    if source.startswith("testbed:"):
        from moesteer.testbed.data import built_in_instances

        return [parse_instance(record, where) for where, record in built_in_instances(source)]
    records = read_records(source, required=e_snli.REQUIRED, optional=e_snli.OPTIONAL)
    columns = records[0][1].keys()
    if columns >= set(e_snli.REQUIRED):
        return _converted(records, e_snli.converted, source)
    if columns >= set(fever.REQUIRED):
        docs = Path(source).parent / "docs"
        return _converted(records, partial(fever.converted, docs=docs), source)
    if columns >= set(medical_bios.REQUIRED):
        return _converted(records, medical_bios.converted, source)
    return [parse_instance(record, where) for where, record in records]


def parse_instance(record: Mapping[str, object], source: str) -> Instance:
    """Check one record; `source` stands before every error.

    A record is `{"texts": {name: text, …}, "label": name, "labels": {name: words, …}, "rationale":
    [{"text": name, "start": 3, "end": 9}, …], "prompt": template}`: characters counted from 0,
    the end exclusive; in the template each text's name once, in braces, and every brace that is
    meant doubled. It may have "ask": how the words that tell are asked for.

    Raises MoesteerError where it is malformed, where the template and the texts don't fit, where
    the label or a span's text is unknown or a span lies outside its text, and where the words of
    one label are, or begin with, another's.
    """
    given = check_record(_Given, record, source)
    try:
        _check_template(given)
        _check_labels(given)
        spans = tuple(_checked_span(span, given.texts) for span in given.rationale)
    except MoesteerError as error:
        raise MoesteerError(f"{source}: {error}") from None
    return Instance(
        source, given.texts, given.label, given.labels, spans, given.prompt, {**given.ask}
    )


def filled(instance: Instance) -> tuple[str, dict[str, int]]:
    """What the user says, and where in it each text begins, in reading order."""
    said, places = "", {}
    for literal, name, _, _ in Formatter().parse(instance.prompt):
        said += literal
        if name is not None:
            places[name] = len(said)
            said += instance.texts[name]
    return said, places


def instances_hash(instances: Iterable[Instance]) -> str:
    """SHA-256 (hex) of what the instances say, in their order; not of where they were read."""
    canonical = json.dumps([astuple(instance)[1:] for instance in instances])
    return hashlib.sha256(canonical.encode()).hexdigest()


# -- sets with columns of their own --------------------------------------------------------------


def _converted(
    records: list[tuple[str, dict[str, object]]],
    convert: Callable[[Mapping[str, object], str], dict[str, object] | str],
    source: str,
) -> list[Instance]:
    """The instances, without those for which `convert` gives a reason instead of a record."""
    instances: list[Instance] = []
    left_out: Counter[str] = Counter()
    first: dict[str, str] = {}
    for where, record in records:
        found = convert(record, where)
        if isinstance(found, str):
            left_out[found] += 1
            first.setdefault(found, where)
        else:
            instances.append(parse_instance(found, where))
    if not left_out:
        return instances
    reasons = "; ".join(
        f"{count}: {reason} (first at {first[reason]})" for reason, count in left_out.most_common()
    )
    said = f"{source}: {left_out.total()} of {len(records)} instances can't be used ({reasons})"
    if not instances:
        raise MoesteerError(f"{said}; none is left")
    warnings.warn(f"{said}; they are left out.", MoesteerWarning, stacklevel=3)
    return instances


# -- our own record ------------------------------------------------------------------------------


class _Span(Record):
    text: str
    start: int
    end: int


class _Given(Record):
    texts: Annotated[dict[str, Text], Field(min_length=1)]
    label: str
    labels: Annotated[dict[str, Text], Field(min_length=2)]
    rationale: Annotated[list[_Span], Field(min_length=1)]
    prompt: Text
    ask: dict[Way, Text] = Field(default_factory=dict)


def _check_template(given: _Given) -> None:
    """Every text once in the prompt; in the ways of asking what belongs there."""
    names = _names(given.prompt, "prompt")
    for name in dict.fromkeys((*names, *given.texts)):
        if name not in given.texts:
            raise MoesteerError(
                f"the prompt has {shorten('{' + name + '}')}, but the texts are"
                f" {', '.join(given.texts)}; double a brace that is meant as one"
            )
        if names.count(name) != 1:
            raise MoesteerError(
                f"the prompt has the text {shorten(name)} {names.count(name)} times; it must stand"
                " there once, as its name in braces"
            )
    for way, words in given.ask.items():
        names = _names(words, way)
        if len(names) != len(_ASKED[way]) or set(names) != _ASKED[way]:
            wanted = " and ".join(f"{{{name}}}" for name in sorted(_ASKED[way])) or "no names"
            raise MoesteerError(f"ask.{way} must have {wanted} in braces, and nothing else")


def _names(template: str, what: str) -> list[str]:
    """The names in braces."""
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise MoesteerError(
            f"{what} has a brace too many or too few ({error}); double one that is meant as one"
        ) from None
    for _, name, form, conversion in parts:
        if form or conversion:
            raise MoesteerError(f"{what}: {shorten(name or '')} must stand alone in its braces")
    return [name for _, name, _, _ in parts if name is not None]


def _check_labels(given: _Given) -> None:
    if given.label not in given.labels:
        raise MoesteerError(
            f"the label {shorten(given.label)} is none of the labels {', '.join(given.labels)}"
        )
    for (name, words), (other, more) in combinations(given.labels.items(), 2):
        shorter, longer = sorted((words.strip(), more.strip()), key=len)
        if re.match(rf"{re.escape(shorter)}(?!\w)", longer):
            raise MoesteerError(
                f"the words of the labels {name} and {other} are the same or begin alike"
                f" ({shorten(words)}, {shorten(more)}), so they can't be told apart; choose others"
            )


def _checked_span(span: _Span, texts: Mapping[str, str]) -> TextSpan:
    if span.text not in texts:
        raise MoesteerError(
            f"the rationale marks the text {shorten(span.text)}, but the texts are"
            f" {', '.join(texts)}"
        )
    text, marked = texts[span.text], f"the rationale marks characters {span.start} up to {span.end}"
    if not 0 <= span.start < span.end <= len(text):
        raise MoesteerError(
            f"{marked} of the text {span.text}, which has {len(text)}; start counts from 0, end is"
            " exclusive"
        )
    if not text[span.start : span.end].strip():
        raise MoesteerError(f"{marked} of the text {span.text}: nothing there is visible")
    return TextSpan(span.text, span.start, span.end)
