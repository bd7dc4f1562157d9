"""Records from outside: JSONL, CSV and data sets, read and checked at the border.

Every error names its place, file and line, and says what to do.
"""

import csv
import importlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from moesteer.errors import MoesteerError


def read_records(
    source: str | Path, *, required: Sequence[str], optional: Sequence[str] = ()
) -> list[tuple[str, dict[str, object]]]:
    """Read the objects of a JSONL file, the rows of a CSV file or of a data set.

    Returns (where, record) for each, where = "file:line" (the line a CSV row begins at) or
    "data set:split:row". `required` and `optional` name the columns a CSV file may have; an empty
    cell of an optional column, and an empty value in a data set, count as absent. What a record
    holds is not checked here: see `check_record`.

    Raises MoesteerError where the source cannot be read or holds no records.
    """
    path = Path(source)
    found = _DATA_SET.fullmatch(source) if isinstance(source, str) else None
    if path.is_file():
        match path.suffix.lower():
            case ".jsonl":
                records = list(_jsonl(read_text(path), source))
            case ".csv":
                records = list(_csv(read_text(path), source, required, optional))
            case _:
                raise MoesteerError(
                    f"{source}: cannot tell the format; the file's name must end in .jsonl or .csv"
                )
    elif found and not path.exists():
        records = list(_data_set(str(source), *found.groups()))
    else:
        raise MoesteerError(
            f"{source}: neither an existing file nor a data set (a data set is ORG/NAME or "
            "ORG/NAME:split)"
        )
    if not records:
        raise MoesteerError(f"{source}: holds no records; it needs at least one line")
    return records


def read_text(path: Path) -> str:
    """The text of a UTF-8 file (a byte-order mark is dropped), or a MoesteerError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise MoesteerError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MoesteerError(
            f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


# ORG/NAME[:split]; a name that ends like a file is a file that is missing.
_DATA_SET = re.compile(
    r"([\w.-]+/(?![\w.-]*\.(?:jsonl?|ndjson|csv|tsv|txt|gz|parquet)(?::|$))[\w.-]+)(?::([\w.-]+))?"
)


def _jsonl(text: str, source: str | Path) -> Iterator[tuple[str, dict[str, object]]]:
    # Not splitlines(): JSON strings may hold U+2028 and the like.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{source}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MoesteerError(
                f"{where}: not JSON ({error.msg}, column {error.colno}); give one object a line"
            ) from None
        except (ValueError, RecursionError) as error:
            raise MoesteerError(f"{where}: JSON that cannot be read ({error})") from None
        if not isinstance(record, dict):
            raise MoesteerError(
                f"{where}: not an object but {shorten(line.strip())}; give one object a line, "
                'such as {"prompt": …}'
            )
        yield where, record


def _csv(
    text: str, source: str | Path, required: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str, dict[str, object]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    while True:
        where = f"{source}:{reader.line_num + 1}"
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise MoesteerError(f"{where}: CSV that cannot be read ({error})") from None
        if row is None:
            return
        if not row:
            continue
        if columns is None:
            columns = [name.strip() for name in row]
            _check_columns(columns, where, required, optional)
            continue
        if len(row) != len(columns):
            raise MoesteerError(
                f"{where}: {len(row)} cells for {len(columns)} columns; put quotes around a text "
                "that holds a comma"
            )
        cells = zip(columns, row, strict=True)
        yield where, {name: cell for name, cell in cells if cell or name not in optional}


def _check_columns(
    columns: list[str], where: str, required: Sequence[str], optional: Sequence[str]
) -> None:
    known = (*required, *optional)
    wrong = [f"missing column {name!r}" for name in required if name not in columns]
    wrong += [f"unknown column {shorten(name)}" for name in columns if name not in known]
    wrong += [f"column {name!r} twice" for name in known if columns.count(name) > 1]
    if wrong:
        raise MoesteerError(f"{where}: {'; '.join(wrong[:3])}; {_wanted(required, optional)}")


def _data_set(source: str, name: str, split: str | None) -> Iterator[tuple[str, dict[str, object]]]:
    try:
        # An optional package: a plain import would trouble type checkers where it is absent.
        load_dataset: Any = importlib.import_module("datasets").load_dataset
    except ImportError:
        raise MoesteerError(
            f"{source}: no such file, and to read it as a data set the package `datasets` is "
            'missing: pip install "moesteer[data]"'
        ) from None
    try:
        data = load_dataset(name, split=split)
    except Exception as error:  # whatever that library, the network or the disk may raise
        raise MoesteerError(
            f"{source}: no such file, and reading it as a data set failed: {first_line(error)}"
        ) from error
    if split is None:
        if len(data) != 1:
            raise MoesteerError(
                f"{source}: has the splits {', '.join(data)}; choose one, as in "
                f"{name}:{next(iter(data), 'train')}"
            )
        split, data = next(iter(data.items()))
    for number, row in enumerate(data, start=1):
        where = f"{name}:{split}:{number}"
        yield where, {key: value for key, value in row.items() if value is not None}


def _visible_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL character; remove it")
    if not text.strip():
        raise ValueError("holds no visible character")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("is not valid Unicode (half of a surrogate pair)")
    return text


Text = Annotated[str, AfterValidator(_visible_text)]


def check_text(text: str, source: str) -> None:
    """MoesteerError, beginning with `source`, for a text that no tokenizer could read."""
    try:
        _visible_text(text)
    except ValueError as error:
        raise MoesteerError(f"{source}: the text {error}") from None


class Record(BaseModel):
    """The form of one record from outside: no unknown keys, no conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)


_R = TypeVar("_R", bound=Record)


def check_record(form: type[_R], record: Mapping[str, object], source: str) -> _R:
    """The record in its form, or a MoesteerError of one line that begins with `source`."""
    try:
        return form.model_validate(dict(record))
    except ValidationError as error:
        fields = form.model_fields
        required = [name for name, field in fields.items() if field.is_required()]
        optional = [name for name, field in fields.items() if not field.is_required()]
        wrong = list(dict.fromkeys(_complaint(detail) for detail in error.errors()))
        raise MoesteerError(
            f"{source}: {'; '.join(wrong[:3])}; {_wanted(required, optional)}"
        ) from None


def _complaint(detail: Mapping[str, Any]) -> str:
    first, *rest = detail["loc"]
    if first == "target":
        return (
            "target must be reply, prompt, last_user, a text, "
            '{"a": text, "b": text} or {"last": text}'
        )
    key = str(first) + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in rest)
    match detail["type"]:
        case "missing":
            return f"missing key {key!r}"
        case "extra_forbidden":
            return f"unknown key {shorten(key)}"
        case "value_error":
            return f"{key} {detail['ctx']['error']}"
        case "literal_error":
            return f"{key} is {shorten(str(detail['input']))}, not {detail['ctx']['expected']}"
        case _:
            return f"{key}: {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _wanted(required: Sequence[str], optional: Sequence[str]) -> str:
    has = f"has {', '.join(required)}" if required else ""
    may = f"may have {', '.join(optional)}" if optional else ""
    return f"a record {' and '.join(filter(None, (has, may)))}"


def shorten(text: str) -> str:
    """The text for an error message: quoted, on one line, of bounded length."""
    return repr(text if len(text) <= 60 else text[:40] + " … " + text[-17:])


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
