"""The one error a user can mend.

Anything that is wrong with what the user gave (a file, a model, an option) is raised as
`MoesteerError` with a message that says what is wrong, where (file and line, layer and expert, both
numbers) and what to do. The command line prints it without a traceback and exits with 2; every
other exception is a defect of ours and keeps its traceback.
"""


class MoesteerError(Exception):
    """What the user gave cannot be used; the message says what, where and what to do."""


class DidNotFire(MoesteerError):  # noqa: N818 - it reads as what it says
    """A profile was applied, yet nothing proves that it steered."""


class MoesteerWarning(UserWarning):
    """A result can be had, but something about it may not be what the user thinks."""
