"""The one exception for what a user can get wrong."""

import re


class UserError(ValueError):
    """A mistake in a configuration, a path, a shard, a checkpoint or a launch.

    Its message is one sentence that names the offending thing and the remedy. Entry points print
    that sentence and exit with `EXIT_STATUS`; every other exception keeps its traceback. What another library says,
    at its end, may have lines and a full stop of its own: the message has one line and one full stop.
    """

    def __init__(self, message: str):
        super().__init__(re.sub(r"(?<!\.)\.\.$", ".", re.sub(r"\s*\n\s*", " ", message.strip())))


EXIT_STATUS = 2


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
