"""lm-evaluation-harness 0.4.13: its command line is a private module, its method to override a private name."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lm_eval._cli import HarnessCLI
from lm_eval.api.model import TemplateLM


def command_line() -> Any:
    """Return the harness's own command line, which reads `sys.argv`."""
    return HarnessCLI()


class TokenLM(TemplateLM):
    """The harness's template for models that score token ids."""

    @abstractmethod
    def loglikelihoods(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each text given its context, and whether greedy decoding gives it.

        Args:
            requests: (the two texts, context's token ids, text's token ids) each.
        """

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del disable_tqdm, kwargs
        return self.loglikelihoods(requests)
