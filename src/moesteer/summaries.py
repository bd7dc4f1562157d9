"""What a run found, as one JSON object with the number of its format: its summary.

A summary is a frozen dataclass. A file of another format, or of another form, is refused.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from moesteer.errors import MoesteerError


def as_json(summary: Any, schema: int) -> str:
    """The dataclass as one JSON object, with the schema's number."""
    return json.dumps({"schema": schema, **asdict(summary)}, ensure_ascii=False, indent=1)


Form = TypeVar("Form")


def from_json(form: type[Form], text: str, where: str | Path, schema: int, what: str) -> Form:
    """A summary of the given form and schema; MoesteerError, beginning with `where`, otherwise."""
    from pydantic import TypeAdapter, ValidationError

    try:
        raw = json.loads(text)
    except ValueError as error:
        raise MoesteerError(f"{where} is not JSON: {error}.") from None
    there = raw.pop("schema", None) if isinstance(raw, dict) else None
    if there != schema:
        raise MoesteerError(
            f"{where} is {what} of format {there}; this version of moesteer reads format {schema}."
            " Run the command again with another folder."
        )
    try:
        return TypeAdapter(form).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise MoesteerError(f"{where}: {place}: {first['msg']}.") from None
