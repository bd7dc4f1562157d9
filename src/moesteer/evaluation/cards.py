"""Task cards: TOML files that say what is asked, who judges, and which outcome counts.

    name = "towns"                          what the task is called
    title = "Answers from the document"
    about = "…"                             what is measured, how, after whom
    outcome = "right"                       the outcome whose share is the task's value
    role = "target"                         or "price": what steering must not cost
    harmless = true                         replies may be shown in reports
    max_new_tokens = 512

    [prompts]
    source = "towns.jsonl"                  a file, a data set (ORG/NAME:split), or testbed:NAME
    template = "Document: {context}\\nQuestion: {question}"
    needs = "…"                             which columns, where they come from, which licence

    [[judges]]
    kind = "contains"                       one of KINDS, with its own settings
    column = "answer"

May have: behaviour, combine, depends_on, `[prompts]` system and columns (this card's name of a
column = "the file's"), and `[[changes]]`, by which the judges are judged (judge_check.py).
"""

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from moesteer.chat import NO_OPTIONS
from moesteer.contrast import Message
from moesteer.errors import MoesteerError
from moesteer.evaluation.changes import CHANGES
from moesteer.evaluation.judges import KINDS, Context, Settings
from moesteer.evaluation.task import Item, Judge
from moesteer.evaluation.templates import fill, placeholders
from moesteer.records import Record, Text, check_record, check_text, read_records, read_text

if TYPE_CHECKING:
    from moesteer.engines.base import Engine

SHIPPED = Path(__file__).parent.parent / "tasks"
SPLITS = ("fit", "dev", "test", "all")
DEV_SHARE = 0.25
"""Of the user's own prompts; the others are `test`."""

Combine = Literal["first", "majority", "all"]


@dataclass(frozen=True)
class JudgeSpec:
    """A kind of judge and its checked settings."""

    kind: str
    settings: Settings


@dataclass(frozen=True)
class Prompts:
    """Where prompts come from and how they are asked; see the file's head."""

    source: str
    template: str
    needs: str
    system: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ChangeSpec:
    """A controlled change of replies with outcomes `of`; they become `to`, or stay (None)."""

    mode: str
    of: tuple[str, ...]
    to: str | None
    column: str | None


@dataclass(frozen=True)
class Card:
    """A task; `outcomes` are all that its judges can give, `where` the file it was read from."""

    name: str
    title: str
    about: str
    outcome: str
    outcomes: tuple[str, ...]
    role: Literal["target", "price"]
    harmless: bool
    max_new_tokens: int
    prompts: Prompts
    judges: tuple[JudgeSpec, ...]
    combine: Combine
    behaviour: str | None
    depends_on: tuple[str, ...]
    changes: tuple[ChangeSpec, ...]
    where: str

    @property
    def testbed(self) -> str | None:
        """The testbed's name of the prompts, None where they are the user's."""
        name = self.prompts.source.removeprefix("testbed:")
        return name if name != self.prompts.source else None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template and the judges read."""
        asked = placeholders(self.prompts.template + (self.prompts.system or ""))
        read = [name for judge in self.judges for name in judge.settings.columns]
        return tuple(dict.fromkeys((*asked, *read)))


# --- reading cards ------------------------------------------------------------------------------


def _a_template(text: str) -> str:
    placeholders(text)
    return text


_Template = Annotated[Text, AfterValidator(_a_template)]
_Outcomes = Annotated[list[Text], Field(min_length=1)]


class _PromptsForm(Record):
    source: Text
    template: _Template
    needs: Text
    system: _Template | None = None
    columns: dict[str, Text] = Field(default_factory=dict)


class _ChangeForm(Record):
    mode: Text
    of: _Outcomes | None = None
    to: Text | None = None
    column: Text | None = None


class _CardForm(Record):
    name: Text
    title: Text
    about: Text
    outcome: Text
    role: Literal["target", "price"]
    harmless: bool
    max_new_tokens: Annotated[int, Field(ge=1)]
    prompts: dict[str, Any]
    judges: Annotated[list[dict[str, Any]], Field(min_length=1)]
    combine: Combine = "first"
    behaviour: Text | None = None
    depends_on: list[Text] = Field(default_factory=list)
    changes: list[dict[str, Any]] = Field(default_factory=list)


def all_cards() -> list[Card]:
    """The cards that come with moesteer: the testbed's first, then by name."""
    paths = sorted(SHIPPED.glob("*.toml"), key=lambda p: (not p.stem.startswith("testbed"), p.stem))
    return [read_card(path) for path in paths]


def read_card(card: str | Path) -> Card:
    """A card by its name among those that come with moesteer, or by its TOML file.

    Raises MoesteerError, with file and field, for a card that can't be used.
    """
    path = Path(card)
    if path.suffix != ".toml":
        path = SHIPPED / f"{card}.toml"
        if not path.is_file() or "/" in str(card):
            names = ", ".join(sorted(p.stem for p in SHIPPED.glob("*.toml")))
            raise MoesteerError(
                f"there is no task {str(card)!r}; there are {names}, and your own cards"
                " (FILE.toml)."
            )
    where = str(card) if path == Path(card) else path.name
    try:
        raw = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise MoesteerError(f"{where}: not TOML: {error}") from None
    return _checked(raw, where)


def _checked(raw: dict[str, Any], where: str) -> Card:
    form = check_record(_CardForm, raw, where)
    prompts = check_record(_PromptsForm, form.prompts, f"{where}: [prompts]")
    judges = tuple(
        _judge_spec(table, f"{where}: [[judges]] {number}")
        for number, table in enumerate(form.judges, start=1)
    )
    outcomes = tuple(dict.fromkeys(o for judge in judges for o in judge.settings.outcomes))
    if form.outcome not in outcomes:
        raise MoesteerError(
            f"{where}: outcome is {form.outcome!r}, which no judge gives; they give"
            f" {', '.join(outcomes)}."
        )
    changes = tuple(
        _change_spec(table, outcomes, f"{where}: [[changes]] {number}")
        for number, table in enumerate(form.changes, start=1)
    )
    modes = tuple(change.mode for change in changes)
    for mode in form.depends_on:
        if mode not in modes:
            raise MoesteerError(
                f"{where}: depends_on names {mode!r}, which is none of the card's [[changes]]:"
                f" {', '.join(modes) or 'it has none'}."
            )
    return Card(
        name=form.name,
        title=form.title,
        about=form.about.strip(),
        outcome=form.outcome,
        outcomes=outcomes,
        role=form.role,
        harmless=form.harmless,
        max_new_tokens=form.max_new_tokens,
        prompts=Prompts(
            prompts.source, prompts.template, prompts.needs.strip(), prompts.system, prompts.columns
        ),
        judges=judges,
        combine=form.combine,
        behaviour=form.behaviour,
        depends_on=tuple(form.depends_on),
        changes=changes,
        where=where,
    )


def _judge_spec(table: dict[str, Any], where: str) -> JudgeSpec:
    kind = table.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise MoesteerError(f"{where}: kind is {kind!r}; there are {', '.join(KINDS)}.")
    given = {key: value for key, value in table.items() if key != "kind"}
    settings = check_record(KINDS[kind], given, f"{where} ({kind})")
    if len(set(settings.outcomes)) < len(settings.outcomes):
        raise MoesteerError(
            f"{where} ({kind}): its outcomes are {', '.join(settings.outcomes)}; two of the same"
            " name would be counted as one. Give each its own."
        )
    return JudgeSpec(kind, settings)


def _change_spec(table: dict[str, Any], outcomes: tuple[str, ...], where: str) -> ChangeSpec:
    form = check_record(_ChangeForm, table, where)
    if form.mode not in CHANGES:
        raise MoesteerError(f"{where}: mode is {form.mode!r}; there are {', '.join(CHANGES)}.")
    for outcome in (*(form.of or ()), *filter(None, (form.to,))):
        if outcome not in outcomes:
            raise MoesteerError(
                f"{where}: {outcome!r} is no outcome of the judges; they give"
                f" {', '.join(outcomes)}."
            )
    if (form.column is None) == CHANGES[form.mode].needs_column:
        raise MoesteerError(
            f"{where}: the change {form.mode} {'needs' if form.column is None else 'takes no'}"
            " column."
        )
    return ChangeSpec(form.mode, tuple(form.of or outcomes), form.to, form.column)


# --- prompts ------------------------------------------------------------------------------------


def read_items(card: Card, split: str = "test", data: str | None = None) -> list[Item]:
    """The prompts of a split, rendered by the card's template.

    `data` is the user's own JSONL or CSV file or data set, in place of the card's source. The
    user's prompts have two splits: `dev`, a quarter of them by a hash of the prompt, and `test`,
    the others; the testbed has `fit`, too. `all` is all of them.

    Raises MoesteerError where the data or a column is missing: it says what the task needs and
    how to give it.
    """
    if split not in SPLITS:
        raise MoesteerError(f"there is no split {split!r}; there are {', '.join(SPLITS)}.")
    if card.testbed is not None:
        if data is not None:
            raise MoesteerError(
                f"the task {card.name} has its prompts built in; leave out --data for it."
            )
        return [item for one in _each(split) for item in _testbed_items(card, card.testbed, one)]
    if split == "fit":
        raise MoesteerError(
            f"the prompts of {card.name} have the splits dev and test; fit is for contrast pairs."
        )
    items = items_from(card, data or card.prompts.source)
    chosen = [item for item in items if split in ("all", _split_of(item))]
    if not chosen:
        raise MoesteerError(
            f"{data or card.prompts.source}: none of its {len(items)} prompts belongs to the split"
            f" {split}; give more prompts, or take the split all."
        )
    return chosen


def items_from(card: Card, source: str, more: Sequence[str] = ()) -> list[Item]:
    """All records of a file or data set as items; `more` are columns that must be there, too."""
    try:
        records = read_records(source, required=(), optional=_csv_columns(source))
    except MoesteerError as error:
        raise MoesteerError(f"{error}. {what_it_needs(card)}") from None
    return [_item(card, record, where, more) for where, record in records]


def what_it_needs(card: Card) -> str:
    """What data the task takes, and how it is given."""
    needs = " ".join(card.prompts.needs.split()).rstrip(".")
    return f"The task {card.name} needs: {needs}. Give your prompts with --data {card.name}=FILE."


def with_prompts(item: Item, card: Card) -> Item:
    """The item asked by the card's template."""
    texts = [("user", card.prompts.template)]
    if card.prompts.system is not None:
        texts.insert(0, ("system", card.prompts.system))
    messages = tuple(Message(role, fill(text, item.columns)) for role, text in texts)
    for message in messages:
        check_text(message.content, item.source)
    return replace(item, messages=messages)


def _each(split: str) -> tuple[str, ...]:
    return ("fit", "dev", "test") if split == "all" else (split,)


def _testbed_items(card: Card, task: str, split: str) -> list[Item]:
    from moesteer.testbed.world import TASKS, probes

    if task not in TASKS:
        raise MoesteerError(
            f"{card.where}: the testbed has no prompts {task!r}; it has {', '.join(TASKS)}."
        )
    return [
        with_prompts(
            Item(
                (), {"prompt": probe.prompt, **probe.expected}, f"testbed:{task}:{split}:{number}"
            ),
            card,
        )
        for number, probe in enumerate(probes(task, split), start=1)
    ]


def _csv_columns(source: str) -> tuple[str, ...]:
    """The header of a CSV file, whose other columns may stand beside those that are read."""
    import csv

    path = Path(source)
    if path.suffix.lower() != ".csv" or not path.is_file():
        return ()
    rows = csv.reader(read_text(path).splitlines())
    names = [name.strip() for name in next((row for row in rows if row), ())]
    return tuple(dict.fromkeys(names))


def _item(card: Card, record: Mapping[str, object], where: str, more: Sequence[str]) -> Item:
    names = card.prompts.columns
    columns = {key: text for key, value in record.items() if (text := _as_text(value)) is not None}
    for name in (*card.columns, *more):
        theirs = names.get(name, name)
        if theirs not in columns:
            raise MoesteerError(
                f"{where}: no text in the column {theirs!r}; there are"
                f" {', '.join(record) or 'none'}. {what_it_needs(card)} Columns of other names:"
                " copy the card and set [prompts] columns = {" + f'{name} = "yours"' + "}."
            )
        columns[name] = columns[theirs]
    return with_prompts(Item((), columns, where), card)


def _as_text(value: object) -> str | None:
    """A value as the text of a column; a list has a line each, choices a lettered line each."""
    match value:
        case str():
            return value if value.strip() else None
        case bool() | int() | float():
            return str(value)
        case {"label": [*labels], "text": [*texts]} if len(labels) == len(texts):
            return "\n".join(f"{a}) {b}" for a, b in zip(labels, texts, strict=True)) or None
        case [*values] if all(isinstance(v, str | int | float) for v in values):
            return "\n".join(map(str, values)) or None
        case _:
            return None


def _split_of(item: Item) -> str:
    digest = hashlib.blake2b(item.prompt.encode(), digest_size=8).digest()
    return "dev" if int.from_bytes(digest, "big") / 2**64 < DEV_SHARE else "test"


# --- judges -------------------------------------------------------------------------------------


def make_judges(
    card: Card, engine: "Engine | None" = None, chat_options: Mapping[str, object] = NO_OPTIONS
) -> list[Judge]:
    """The card's judges, loaded; MoesteerError where one can't be had."""
    context = Context(engine, chat_options)
    return [spec.settings.judge(context) for spec in card.judges]
