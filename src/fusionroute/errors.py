"""Errors for people: one line that says what is wrong, both values where two disagree, and what to do.

The command line prints the message alone and exits with `exit_code`; a library user catches `FusionRouteError`.
"""

from collections.abc import Mapping


class FusionRouteError(Exception):
    """Something the user can put right: a file, a digest, a tokenizer, a lack of disk."""

    exit_code = 1


class UsageError(FusionRouteError):
    """The call itself is wrong: an unknown expert, a prompt that does not fit, two options that exclude each other."""

    exit_code = 2


def require(settings: object, rules: Mapping[str, bool], what: str = "") -> None:
    """Check fields of `settings`: rules that begin with the field's name, and whether each holds.

    Raises:
        UsageError: the first that does not, with the field's value, after `what`.
    """
    for rule, holds in rules.items():
        if not holds:
            raise UsageError(f"{what}{rule}, not {getattr(settings, rule.split()[0])}")


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or its kind if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
