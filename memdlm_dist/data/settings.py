"""The [data] section."""

from dataclasses import dataclass, field


@dataclass
class Data:
    """Streams of tokenised shards, as tools/prepare_data.py writes them."""

    train: list[str] = field(default_factory=list)
    """Folders or URLs of training shards, several to mix (s3://, gs://, ... are cached in cache_folder)."""

    proportions: list[float] = field(default_factory=list)
    """Share of each training stream in an epoch, in the order of `train`; empty takes each stream once."""

    validation: list[str] = field(default_factory=list)
    """Folders or URLs of held-out shards."""

    cache_folder: str = "./outputs/cache"
    """Where shards of remote streams are kept on each node."""

    cache_limit: str = ""
    """Largest size of the cache, such as 200gb; empty for no limit."""

    shuffle: bool = True
    """Shuffle the samples anew every epoch."""

    shuffle_seed: int = 9176
    """Seed of the shuffle."""

    num_canonical_nodes: int = 1
    """Independent paths through the shards. With 1 the order does not depend on the number of ranks."""

    validate_hash: str = "xxh64"
    """Checksum that each shard must match when it is first read; empty to skip the check."""

    download_retry: int = 6
    """How often to try a download, with waits of 1, 2, 4, ... seconds between: 6 bridge half a minute."""

    download_timeout: float = 60.0
    """Seconds that one download may take."""
