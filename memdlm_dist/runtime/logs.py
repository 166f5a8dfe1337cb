"""Log lines that say which node and rank they are from."""

import logging
import os
import sys


def start_logging(level: int = logging.INFO) -> None:
    """Log to standard output, torchtitan's lines too, each with its node and rank (of torchrun's environment)."""
    os.environ["KINETO_LOG_LEVEL"] = "5"  # torch.profiler's own lines, as torchtitan has it
    node, rank = os.environ.get("GROUP_RANK", "0"), os.environ.get("RANK", "0")
    form = f"[node {node} rank {rank}] %(asctime)s - %(levelname)s - %(message)s"
    logging.basicConfig(stream=sys.stdout, level=level, format=form, force=True)
