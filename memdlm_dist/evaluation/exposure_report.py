"""Samples, table rows and plot of the exposure bias."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memdlm_dist.config.job_config import JobConfig
from memdlm_dist.data.dataset import TokenDataset, open_dataset
from memdlm_dist.data.row_shape import check_cards
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation import report
from memdlm_dist.evaluation.exposure import Point, Row, split_response
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.training.backbone import get_shard_requirements


def open_samples(config: JobConfig, model: TrainedModel, data: Sequence[str] | None) -> TokenDataset:
    """Open the samples of the folders `data`, or of data.validation if None, in order.

    Raises:
        UserError: if no data is configured, or the shards do not fit the model.
    """
    locations = list(data or config.data.validation)
    if not locations:
        raise UserError("There are no samples: data.validation is empty; give --data a folder of shards.")
    check_cards(locations, get_shard_requirements(config, model.mask_id))
    return open_dataset(config.data, locations, [], batch_size=1, shuffle=False)


def load_rows(
    config: JobConfig, model: TrainedModel, data: Sequence[str] | None, max_samples: int, prompt_share: float
) -> list[Row]:
    """Read prompts and responses from the first `max_samples` samples; samples without a response are skipped.

    Args:
        config: the run's configuration.
        model: the model to measure.
        data: folders of shards; data.validation if None.
        max_samples: maximum number of samples to read.
        prompt_share: fraction of packed text to use as the prompt.

    Raises:
        UserError: if no data is configured or no sample has a response.
    """
    dataset = open_samples(config, model, data)
    samples = (dataset[i] for i in range(min(dataset.size, max_samples)))
    rows = [split_response(sample["tokens"], sample["labels"], model.eos_id, prompt_share) for sample in samples]
    responses = [row for row in rows if row is not None]
    if not responses:
        locations = ", ".join(data or config.data.validation)
        raise UserError(f"No sample of {locations} has a response; give --data shards with responses.")
    return responses


def line(name: str, memory: str, point: Point) -> list[str]:
    """Return the table row of one point: name and memory setting, mask ratio, the three losses, the two ratios."""
    losses = (point.static, point.sequential, point.same_positions, point.exposure_bias, point.at_same_positions)
    return [f"{name}, memory {memory}", f"{point.ratio:g}", *(f"{x:.4f}" for x in losses)]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Plot losses and exposure bias against the mask ratio.

    Args:
        results: dicts with name, memory and points, as in the JSON of the results.
        path: PNG file to write.
    """
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
