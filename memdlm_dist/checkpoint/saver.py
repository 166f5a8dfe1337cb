"""Process that writes checkpoints in the background with `checkpoint.async_mode = "async_with_pinned_mem"`."""

from typing import Any

from memdlm_dist.compat.torch import SaverProcess
from memdlm_dist.runtime.preemption import outlive_stop_request, starting_waiters


class Saver(SaverProcess):
    """DCP's saver process, which survives a stop request to the whole job and finishes its save.

    After a stop request the rank still saves its last step through this process, or waits for the save in progress.
    """

    def __init__(self, *arguments: Any, **named: Any):
        with starting_waiters():
            super().__init__(*arguments, **named)

    @staticmethod
    def serve(group: Any, pipe: Any) -> None:
        """Run the body of the process: ignore the first stop request, then serve save requests from `pipe`."""
        outlive_stop_request()
        SaverProcess.serve(group, pipe)
