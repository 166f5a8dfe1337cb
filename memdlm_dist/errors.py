"""The one exception for what a user can get wrong."""

import re


class UserError(ValueError):
    """A mistake in a configuration, a path, a shard, a checkpoint or a launch.

    Its message is one sentence that names the offending thing and the remedy. Entry points print
    that sentence and exit with `EXIT_STATUS`; every other exception keeps its traceback. What other libraries say,
    quoted in it, may have several lines and full stops of its own: the message has one line and one full stop.
    """

    def __init__(self, message: str):
        message = re.sub(r"\s+", " ", message.strip())
        super().__init__(re.sub(r"(?<!\.)\.(?=\)|;|\.$)", "", message))


EXIT_STATUS = 2


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds."""
    if not condition:
        raise UserError(message)
