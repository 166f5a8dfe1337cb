"""Exception for user errors, printed as one sentence without a traceback."""

import re


class UserError(ValueError):
    """User error: a mistake in a configuration, a path, a shard, a checkpoint or a launch.

    The message is one sentence that names the problem and the remedy. Entry points print it and exit with
    `EXIT_STATUS`; all other exceptions keep their traceback. A message may end with another library's text, which can
    have line breaks and a full stop: the constructor reduces it to one line with one full stop.
    """

    def __init__(self, message: str):
        super().__init__(re.sub(r"(?<!\.)\.\.$", ".", re.sub(r"\s*\n\s*", " ", message.strip())))


EXIT_STATUS = 2


def require(condition: bool, message: str) -> None:
    """Raise `UserError` with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
