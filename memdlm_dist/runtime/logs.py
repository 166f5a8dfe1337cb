"""Log format with node and rank."""

import logging
import os
import sys


def start_logging(level: int = logging.INFO) -> None:
    """Configure the root logger, torchtitan's lines included: standard output, each line with node and rank."""
    os.environ["KINETO_LOG_LEVEL"] = "5"  # silences torch.profiler, as torchtitan does
    node, rank = os.environ.get("GROUP_RANK", "0"), os.environ.get("RANK", "0")
    line_format = f"[node {node} rank {rank}] %(asctime)s - %(levelname)s - %(message)s"
    logging.basicConfig(stream=sys.stdout, level=level, format=line_format, force=True)
