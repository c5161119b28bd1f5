"""What is the user's to mend, as one line that says how."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. `turboquant` prints the message, one line, and exits with code 2."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def first_paragraph(error: BaseException, limit: int = 250) -> str:
    """The beginning of another library's error message; some go on for a page.

    >>> first_paragraph(OSError("x has no config.json. Is it\\na model?\\n\\nMore at https://…"))
    'x has no config.json. Is it a model?'
    """
    text = " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
