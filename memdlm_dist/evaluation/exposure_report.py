"""What the exposure bias is measured on, and how it is shown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data.dataset import check_cards, open_dataset
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.exposure import Point, Row, split_response
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.training.backbone import get_shard_requirements


def load_rows(
    config: JobConfig, model: TrainedModel, data: Sequence[str] | None, most: int, prompt_share: float
) -> list[Row]:
    """Read the first samples with a response, `most` at most.

    Args:
        data: folders of shards; data.validation if None.
        prompt_share: of packed text, what is taken for the prompt.

    Raises:
        UserError: if there is none.
    """
    locations = list(data or config.data.validation)
    if not locations:
        raise UserError("There are no samples: data.validation is empty; give --data a folder of shards.")
    check_cards(locations, get_shard_requirements(config, model.mask_id))
    dataset = open_dataset(config.data, locations, [], batch_size=1, shuffle=False)
    samples = (dataset[i] for i in range(min(dataset.size, most)))
    rows = [split_response(sample["tokens"], sample["labels"], model.eos_id, prompt_share) for sample in samples]
    found = [row for row in rows if row is not None]
    if not found:
        raise UserError(f"No sample of {', '.join(locations)} holds a response.")
    return found


def line(name: str, memory: str, point: Point) -> list[str]:
    losses = (point.static, point.sequential, point.same_positions, point.exposure_bias, point.at_same_positions)
    return [f"{name}, memory {memory}", f"{point.ratio:g}", *(f"{x:.4f}" for x in losses)]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot losses, and their ratio, over the mask ratios."""
    figure, (losses, ratio) = report.pyplot().subplots(1, 2, figsize=(11, 4))
    for number, result in enumerate(results):
        label = f"{result['name']}, memory {result['memory']}"
        x = [point["ratio"] for point in result["points"]]
        static, sequential = ([point[key] for point in result["points"]] for key in ("static", "sequential"))
        losses.plot(x, static, "--", color=f"C{number}")
        losses.plot(x, sequential, "-", color=f"C{number}", label=label)
        ratio.plot(x, [s / t for s, t in zip(sequential, static, strict=True)], "-o", color=f"C{number}", label=label)
    losses.set(xlabel="mask ratio", ylabel="nats per token", title="sequential (solid) and static (dashed) loss")
    ratio.set(xlabel="mask ratio", ylabel="sequential / static", title="exposure bias")
    losses.legend(fontsize=8)
    ratio.axhline(1, color="grey", linewidth=0.5)
    report.save(figure, path)
