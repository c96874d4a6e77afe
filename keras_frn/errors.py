"""Errors and warnings about an argument, which a caller may have under another name."""

__all__ = ["ArgumentError", "ArgumentWarning", "format_count"]


class _About(Exception):
    def __init__(self, argument: str, text: str) -> None:
        super().__init__(argument, text)
        self.argument, self.text = argument, text

    def __str__(self) -> str:
        return f"`{self.argument}` {self.text}"


class ArgumentError(_About, ValueError):
    """A `ValueError` about an argument: its name, and what is wrong with it.

    Who passes on a value that its own user calls something else sets `argument`, as the command
    line does.
    """


class ArgumentWarning(_About, UserWarning):
    """A `UserWarning` about an argument, as `ArgumentError` is a `ValueError`."""


def format_count(number: int, noun: str) -> str:
    """As in "1 layer" and "2 layers"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
