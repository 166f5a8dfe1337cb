"""Worker for torchrun: local rank 1 fails on a missing configuration while rank 0 is busy."""

import os
import sys
import time

if os.environ["LOCAL_RANK"] == "1":
    from memdlm_dist import train

    sys.exit(train.main(["--job.config_file", "no/such.toml"]))
time.sleep(120)
