"""TOML section [data]."""

from dataclasses import dataclass, field


@dataclass
class Data:
    """Streams of tokenised shards, written by tools/prepare_data.py."""

    train: list[str] = field(default_factory=list)
    """Folders or URLs (s3://, gs://, ...) of training shards; several are mixed. URLs are cached in cache_folder."""

    proportions: list[float] = field(default_factory=list)
    """Share of each training stream in an epoch, in the order of `train`; empty: read each stream once per epoch."""

    validation: list[str] = field(default_factory=list)
    """Folders or URLs of held-out shards."""

    cache_folder: str = "./outputs/cache"
    """Folder on each node in which shards of remote streams are cached."""

    cache_limit: str = ""
    """Maximum size of the cache, such as 200gb; empty for no limit."""

    shuffle: bool = True
    """Shuffle the samples, in a new order every epoch."""

    shuffle_seed: int = 9176
    """Seed of the shuffle."""

    group_by_length: bool = False
    """Bring fine-tuning rows of similar length together, in a new order every epoch; needs rows that prepare_data.py
    padded to a multiple of --pad-multiple."""

    mask_prompt: bool = False
    """Mask and score prompts, too, in training and validation: all tokens are maskable but padding that is not scored
    anyway. False: only the tokens that prepare_data.py marked, which are the responses of fine-tuning rows."""

    num_canonical_nodes: int = 1
    """Canonical nodes of streaming (independent paths through the shards); 1: same order on any number of ranks.
    With rows of different lengths every node reads all shards."""

    validate_hash: str = "xxh64"
    """Checksum that is verified when a shard is first read; empty to skip the check."""

    download_retry: int = 6
    """Number of attempts of a download, with waits of 1, 2, 4, ... seconds between them; 6 span half a minute."""

    download_timeout: float = 60.0
    """Timeout of one download in seconds."""
