"""lm-evaluation-harness 0.4.13: the private module of its command line, and private methods to override."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lm_eval._cli import HarnessCLI
from lm_eval.api.model import TemplateLM


def command_line() -> Any:
    """Return the harness's command line, which parses `sys.argv`."""
    return HarnessCLI()


class TokenLM(TemplateLM):
    """The harness's `TemplateLM` for models that score token ids, with public methods to override."""

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a context that is not empty, and of its continuation."""
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    @abstractmethod
    def loglikelihoods(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation given its context, and whether it is the greedy continuation.

        Args:
            requests: ((context, continuation), context token ids, continuation token ids) each.
        """

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.encode_pair(context, continuation)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, kwargs
        return self.loglikelihoods(requests)
