"""The one error that is the user's: what was given cannot be converted, and why."""

import re


MOST_CHARACTERS = 4000
UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Refusal(ValueError):
    """`<where>: <what, with the value got and those allowed>. <how to fix>.`

    Names and values come from files of others: control characters are shown escaped, and what is endless is cut.
    """

    def __init__(self, message: str):
        super().__init__(shown(message))


def shown(message: str) -> str:
    """Text that changes nothing of a terminal, and has an end; where it is cut, the end is kept, which says the cure."""
    message = UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), str(message))
    if len(message) <= MOST_CHARACTERS:
        return message
    return f"{message[: MOST_CHARACTERS // 2]} ... {message[-MOST_CHARACTERS // 2 :]}"
