"""The one error that is the user's: what was given cannot be converted, and why."""


class Refusal(ValueError):
    """`<where>: <what, with the value got and those allowed>. <how to fix>.`"""
