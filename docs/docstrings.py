"""Makes Markdown of what is special in our docstrings, before the reference is built from them.

Examples stand free, without indentation. `Call arguments:` lists arguments as `Args:` does.
The choices of an argument become a list."""

import re

import griffe

_EXAMPLE = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
_TITLE = re.compile(r"^(Example|References?|Shape):(?= *\S|\n\n)", re.MULTILINE)
_CALL_ARGUMENTS = re.compile(r"^Call arguments:\n(?:    .*\n)+", re.MULTILINE)
_CHOICE = re.compile(r"^( +)(None|`\"\w+\"`): ", re.MULTILINE)
_ARGUMENT = re.compile(r"^    (\w+): ", re.MULTILINE)


class Markdown(griffe.Extension):
    """Rewrites each docstring."""

    def on_object(self, *, obj, **kwargs):
        """Called for each object that was read."""
        if obj.docstring:
            text = _EXAMPLE.sub(r"```pycon\n\g<0>\n```", obj.docstring.value)
            text = _TITLE.sub(r"**\1**", text)
            text = _CHOICE.sub(r"\n\1- \2: ", text)
            obj.docstring.value = _CALL_ARGUMENTS.sub(
                lambda section: _ARGUMENT.sub(r"    - `\1`: ", section[0]), text
            )
