"""Options of the command line that need more than their type: KEY=VALUE texts, least numbers."""

from collections.abc import Sequence

from moesteer.errors import MoesteerError


def parse_options(
    pairs: Sequence[str], what: str, example: str
) -> dict[str, bool | int | float | str]:
    """KEY=VALUE texts as a dictionary: true, false and numbers get their type.

    `what` and `example` are for the MoesteerError that says what is wrong.
    """
    options: dict[str, bool | int | float | str] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (equals and key.isidentifier()):
            raise MoesteerError(f"{what} {pair!r} is not KEY=VALUE, like {example}")
        options[key] = _typed(text)
    return options


def _typed(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def check_least(least: int, **numbers: int | None) -> None:
    """MoesteerError for an option of this name whose number is below `least`."""
    for name, value in numbers.items():
        if value is not None and value < least:
            raise MoesteerError(
                f"--{name.replace('_', '-')} is {value}; it must be at least {least}."
            )
