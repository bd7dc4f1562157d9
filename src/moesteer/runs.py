"""A run folder: what one long command made, from which settings, so that it can be taken up.

    run.json       which command made it, on which model, from which settings, with which versions
    *.jsonl        results, a line each, which only grow

A run that was interrupted is taken up by the same command with the same settings. Anything else in
its place (another command's run, another model, other settings, another version of the format) is
refused, with the first difference.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesteer.errors import MoesteerError
from moesteer.files import append_lines, complete_lines, sole_writer, write_text

RUN_SCHEMA = 1
ABOUT = "run.json"


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


def check_place(path: Path) -> None:
    """MoesteerError where no folder of results can be."""
    if path.exists() and not path.is_dir():
        raise MoesteerError(f"{path} is a file; give a folder for the results.")
    if not path.parent.is_dir():
        raise MoesteerError(f"{path} can't be made: the folder {path.parent} does not exist.")


@contextmanager
def open_run(
    folder: str | Path, kind: str, settings: Mapping[str, Any], about: Mapping[str, Any]
) -> Iterator[Run]:
    """Start a run in `folder`, made where it is missing, or take up the one that is there.

    Holds the folder's lock meanwhile. Raises MoesteerError where the folder holds something else,
    or another run of other settings.
    """
    path = Path(folder)
    check_place(path)
    settings = json.loads(json.dumps(settings))
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise MoesteerError(f"{path} can't be made: {error.strerror}.") from None
    with sole_writer(path / ABOUT):
        if (path / ABOUT).exists():
            run = read_run(path)
            _check_same(run, kind, settings)
        else:
            if foreign := sorted(p.name for p in path.iterdir() if not p.name.startswith(".")):
                raise MoesteerError(
                    f"{path} holds {foreign[0]}, but no run of moesteer; give an empty folder."
                )
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


def _check_same(run: Run, kind: str, settings: Mapping[str, Any]) -> None:
    if run.kind != kind:
        raise MoesteerError(
            f"{run.folder} holds a run of `{run.kind}`, not of `{kind}`; give another folder."
        )
    for key in sorted({*run.settings, *settings}):
        there, here = run.settings.get(key), settings.get(key)
        if there != here:
            raise MoesteerError(
                f"{run.folder} holds a run with other settings: {key} was {_short(there)} and is"
                f" {_short(here)} now. Repeat that one to go on with it, or give another folder."
            )


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:60] + " … " + text[-15:]


def _drop_half_line(path: Path) -> None:
    """A line that a killed run left half-written would run into the next one."""
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        with path.open("rb+") as stream:
            stream.truncate(data.rfind(b"\n") + 1)
