"""A run folder: what one long command made, from which settings, so that it can be taken up.

    run.json       which command made it, on which model, from which settings, with which versions
    *.jsonl        results, a line each, which only grow

A run that was interrupted is taken up by the same command with the same settings. Anything else in
its place (another command's run, another model, other settings, another version of the format) is
refused, with the first difference. How a profile among the settings was made (the command as it was
typed, the versions) decides nothing and is not compared.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesteer.errors import MoesteerError
from moesteer.files import append_lines, complete_lines, sole_writer, write_text

RUN_SCHEMA = 1
ABOUT = "run.json"
PROVENANCE = ("command", "versions")


@dataclass(frozen=True)
class Run:
    """An open or finished run.

    `settings` decide its results and must be the same when it is taken up; `about` is told beside
    them (command, versions, date).
    """

    folder: Path
    kind: str
    settings: Mapping[str, Any]
    about: Mapping[str, Any]

    def lines(self, name: str, *keys: str) -> list[dict[str, Any]]:
        """The records of `NAME.jsonl`; half a line, which a killed run may leave, is not read.

        Raises MoesteerError for a line that is no object, or lacks one of `keys`.
        """
        path = self.folder / f"{name}.jsonl"
        records = []
        for number, line in enumerate(complete_lines(path), start=1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise MoesteerError(f"{path}:{number} is not JSON: {error.msg}.") from None
            if not isinstance(record, dict):
                raise MoesteerError(f"{path}:{number} is not a JSON object.")
            if lacking := [key for key in keys if key not in record]:
                raise MoesteerError(f"{path}:{number} lacks {lacking[0]!r}; delete the line.")
            records.append(record)
        return records

    def add(self, name: str, records: list[dict[str, Any]]) -> None:
        """Add records to `NAME.jsonl`, for good."""
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        append_lines(self.folder / f"{name}.jsonl", lines)


def check_place(path: Path, kind: str) -> None:
    """MoesteerError where no run of this kind can be, whatever its settings."""
    if path.exists() and not path.is_dir():
        raise MoesteerError(f"{path} is a file; give a folder for the results.")
    if not path.parent.is_dir():
        raise MoesteerError(f"{path} can't be made: the folder {path.parent} does not exist.")
    if (path / ABOUT).exists():
        if (run := read_run(path)).kind != kind:
            raise MoesteerError(
                f"{path} holds a run of `{run.kind}`, not of `{kind}`; give another folder."
            )
    elif foreign := sorted(p.name for p in path.glob("[!.]*")):
        raise MoesteerError(
            f"{path} holds {foreign[0]}, but no run of moesteer; give an empty folder."
        )


@contextmanager
def open_run(
    folder: str | Path,
    kind: str,
    settings: Mapping[str, Any],
    about: Mapping[str, Any],
    growing: Sequence[str] = (),
) -> Iterator[Run]:
    """Start a run in `folder`, made where it is missing, or take up the one that is there.

    `growing` names the settings that are held by name, such as tasks: there may be more of them
    than there were. Holds the folder's lock meanwhile. Raises MoesteerError where the folder holds
    something else, or another run of other settings.
    """
    path = Path(folder)
    check_place(path, kind)
    settings = json.loads(json.dumps(settings))
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise MoesteerError(f"{path} can't be made: {error.strerror}.") from None
    with sole_writer(path / ABOUT):
        check_place(path, kind)  # another may have begun meanwhile
        there = read_run(path) if (path / ABOUT).exists() else None
        if there is not None:
            _check_same(there, settings, growing)
        if there is not None and all(
            there.settings.get(key) == settings.get(key) for key in growing
        ):
            run = there
        else:
            run = Run(path, kind, settings, dict(about))
            text = {"schema": RUN_SCHEMA, "kind": kind, "settings": settings, "about": run.about}
            write_text(path / ABOUT, json.dumps(text, ensure_ascii=False, indent=1) + "\n")
        for file in path.glob("*.jsonl"):
            _drop_half_line(file)
        yield run


def read_run(folder: str | Path) -> Run:
    """A run's settings and what is told of it; MoesteerError where the folder holds none."""
    path = Path(folder) / ABOUT
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MoesteerError(f"{folder} is no run of moesteer: it has no {ABOUT}.") from None
    except (OSError, ValueError) as error:
        raise MoesteerError(f"{path} can't be read: {error}.") from None
    schema = raw.get("schema") if isinstance(raw, dict) else None
    if schema != RUN_SCHEMA:
        raise MoesteerError(
            f"{folder} is a run of format {schema}; this version of moesteer reads format"
            f" {RUN_SCHEMA}. Run the command again with another folder."
        )
    try:
        return Run(Path(folder), str(raw["kind"]), dict(raw["settings"]), dict(raw["about"]))
    except (KeyError, TypeError, ValueError):
        raise MoesteerError(f"{path} lacks kind, settings or about.") from None


def _has_grown(there: object, here: object) -> bool:
    """Whether all that was there is here, and more."""
    return isinstance(there, dict) and isinstance(here, dict) and there.items() < here.items()


def _check_same(run: Run, settings: Mapping[str, Any], growing: Sequence[str]) -> None:
    grown = {k: settings[k] for k in growing if _has_grown(run.settings.get(k), settings.get(k))}
    if difference := _first_difference({**run.settings, **grown}, settings):
        where, there, here = difference
        raise MoesteerError(
            f"{run.folder} holds a run with other settings: {where} was {_short(there)} and is"
            f" {_short(here)} now. Repeat that one to go on with it, or give another folder."
        )


def _first_difference(there: Any, here: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """What differs, by its keys, and both values; what is only told is passed over."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*there, *here}.difference(PROVENANCE if where else ())):
            inner = f"{where}.{key}" if where else key
            if found := _first_difference(there.get(key), here.get(key), inner):
                return found
        return None
    return None if there == here else (where, there, here)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:60] + " … " + text[-15:]


def _drop_half_line(path: Path) -> None:
    """A line that a killed run left half-written would run into the next one."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("rb+") as stream:
            stream.truncate(data.rfind(b"\n") + 1)
