"""joblib: names of its vendored process pool."""

from joblib.externals.loky.process_executor import BrokenProcessPool

# Raised if a worker process ends before its job does, such as one that the kernel killed for its memory.
WORKER_ENDED = BrokenProcessPool

__all__ = ["WORKER_ENDED"]
