"""Log lines that say which node and rank they are from."""

import logging
import os

from torchtitan.tools.logging import init_logger


def start_logging() -> None:
    """torchtitan's log on standard output, each line with its node and rank (of torchrun's environment)."""
    init_logger()
    node, rank = os.environ.get("GROUP_RANK", "0"), os.environ.get("RANK", "0")
    form = logging.Formatter(f"[node {node} rank {rank}] %(asctime)s - %(levelname)s - %(message)s")
    for handler in logging.getLogger().handlers:
        handler.setFormatter(form)
