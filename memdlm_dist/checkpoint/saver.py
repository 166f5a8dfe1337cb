"""The process that writes checkpoints in the background with `checkpoint.async_mode = "async_with_pinned_mem"`."""

from typing import Any

from memdlm_dist.compat.torch import SaverProcess
from memdlm_dist.runtime.preemption import outlive_stop_request, starting_waiters


class Saver(SaverProcess):
    """DCP's process, which finishes its save when every process of the job is asked to stop.

    The rank then saves its last step through it, or waits for the save that is under way.
    """

    def __init__(self, *arguments: Any, **named: Any):
        with starting_waiters():
            super().__init__(*arguments, **named)

    @staticmethod
    def serve(group: Any, pipe: Any) -> None:
        outlive_stop_request()
        SaverProcess.serve(group, pipe)
