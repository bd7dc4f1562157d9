"""Texts with {columns} in them: which there are, and how they are filled in."""

import string
from collections.abc import Mapping


def placeholders(template: str) -> tuple[str, ...]:
    """The names in braces, each once, in order; `{{` and `}}` are braces themselves.

    Raises ValueError for braces that hold anything but a name.
    """
    names = []
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"has braces that hold no name ({error}); write {{{{ for one") from None
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or form or conversion:
            raise ValueError(
                f"has {{{name}}}, which is no name of a column; write {{{{ for a brace"
            )
        names.append(name)
    return tuple(dict.fromkeys(names))


def fill(template: str, columns: Mapping[str, str]) -> str:
    """The template with its names replaced; what stands in a column is left as it is."""
    return template.format_map(columns)
