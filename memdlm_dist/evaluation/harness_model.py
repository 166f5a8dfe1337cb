"""A checkpoint as a model of the lm-evaluation-harness (extra [eval])."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from tqdm import tqdm

from memdlm_dist.compat.lm_eval import TokenLM
from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation.retrieval import MEMORY
from memdlm_dist.inference.likelihood import Pass, passes
from memdlm_dist.inference.sampler import Decoding
from memdlm_dist.inference.trained_model import ANCHOR_RATIO, TrainedModel, sampler
from memdlm_dist.method import fast_weights

NAME = "memdlm"
_NEW_TOKENS = 256  # where a task does not say


@register_model(NAME)
class HarnessModel(TokenLM):
    """Answers the harness's requests, each rank a part of them.

    To the harness there is one rank: all run it with all requests, share the work out here, and have all results.

    Args, as --model_args key=value:
        config: TOML file of the run that trained the model.
        checkpoint: as everywhere; the run's newest one by default.
        memory: off or on: each prompt, or context, is written into fast weights of its own first.
        anchor_ratio: share of a prompt's tokens that the memory's anchor masks.
        block_size, steps: of decoding; as many steps per block as tokens by default.
        mc_samples: forward passes for the likelihood of one text; all are computed if there are no more.
        check_greedy: find out whether a text is what greedy decoding gives, one pass for each token of it.
        max_length: longer prompts lose their beginning; none do by default.
        others: keys of the configuration, section.key.
    """

    def __init__(
        self,
        config: str | None = None,
        checkpoint: str | None = None,
        memory: str = "off",
        anchor_ratio: float = ANCHOR_RATIO,
        block_size: int = 32,
        steps: int | None = None,
        mc_samples: int = 128,
        check_greedy: bool = True,
        max_length: int | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **overrides: Any,
    ):
        super().__init__()
        del max_batch_size, device  # the layout of the configuration decides
        if not config:
            raise UserError("--model_args must name the run's configuration: --model_args config=FILE.toml.")
        memory = {"False": "off", "True": "on"}.get(str(memory), str(memory))
        if memory not in MEMORY:
            raise UserError(f"The model argument memory must be off or on, not {memory}.")
        if not str(batch_size).isdigit() or not int(batch_size):
            raise UserError(f"--batch_size must be a positive number, not {batch_size}.")
        if unknown := [key for key in overrides if "." not in key]:
            raise UserError(f"There is no model argument {unknown[0]}; keys of the configuration are section.key.")
        flags = [part for key, value in overrides.items() for part in (f"--{key}", str(value))]
        self._model = TrainedModel(parse_config.parse(["--job.config_file", config, *flags]), checkpoint)
        self._memory, self._anchor_ratio = MEMORY[memory], float(anchor_ratio)
        self._decoding = Decoding(block_size=int(block_size), steps=int(steps) if steps else None, seed=int(seed))
        self._samples, self._check_greedy, self._seed = int(mc_samples), bool(check_greedy), int(seed)
        self._max_length, self._batch_size = max_length, int(batch_size)
        self.memory_seconds = 0.0

    @property
    def eot_token_id(self) -> int:
        return self._model.eos_id

    @property
    def tokenizer_name(self) -> str:
        """By which the harness keeps cached requests apart."""
        return str(self._model.tokenizer.tokenizer_path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with nothing added."""
        del add_special_tokens, kwargs
        return self._model.tokenizer.encode_plain([string])[0]

    def _prompt(self, ids: list[int], room: int) -> list[int]:
        """The end of a prompt that leaves room for so many tokens, where a longest length was given."""
        if self._max_length is None or len(ids) + room <= self._max_length:
            return ids
        return ids[max(0, len(ids) + room - int(self._max_length)) :]

    def _progress(self, total: int, what: str) -> tqdm:
        return tqdm(total=total, desc=what, disable=torch.distributed.get_rank() != 0)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """A response to each prompt, up to the first of the task's stop strings."""
        del disable_tqdm
        # Requests that decode alike go together; the longest first, so that what does not fit fails at once.
        alike: dict[tuple[int, float], list[int]] = {}
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for number, request in enumerate(requests):
            options = request.args[1]
            temperature = float(options.get("temperature") or 0) if options.get("do_sample", True) else 0.0
            alike.setdefault((int(options.get("max_gen_toks", _NEW_TOKENS)), temperature), []).append(number)
        found = [""] * len(requests)
        with self._progress(len(requests), "Generating") as bar:
            for (new_tokens, temperature), numbers in alike.items():
                numbers.sort(key=lambda number: -len(prompts[number]))
                decoding = replace(self._decoding, temperature=temperature)
                texts = self._spread(numbers, self._responder(prompts, new_tokens, decoding), bar)
                for number, text in zip(numbers, texts, strict=True):
                    found[number] = _until(text, requests[number].args[1].get("until"))
                    self.cache_hook.add_partial("generate_until", requests[number].args, found[number])
        return found

    def _responder(
        self, prompts: list[list[int]], new_tokens: int, decoding: Decoding
    ) -> Callable[[list[int], list[int]], list[str]]:
        def respond(numbers: list[int], _: list[int]) -> list[str]:
            batch = [self._prompt(prompts[number], new_tokens) for number in numbers]
            made = self._model.generate(batch, new_tokens, decoding, self._memory, self._anchor_ratio, numbers)
            self.memory_seconds += made.memory_seconds
            return [self._model.tokenizer.decode(response) for response in made.responses]

        return respond

    def _spread(self, items: Sequence[Any], work: Callable[[list[Any], list[int]], list[Any]], bar: tqdm) -> list[Any]:
        return self._model.data_parallel.map_batches(items, self._batch_size, work, bar.update)

    def loglikelihoods(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        pairs = [(self._prompt(context, len(text)), text) for _, context, text in requests]
        bounds = self._bounds(pairs)
        greedy = self._greedy(pairs) if self._check_greedy else [False] * len(pairs)
        found = list(zip(bounds, greedy, strict=True))
        for (key, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def _bounds(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """The likelihood bound of every text given its context, in nats."""
        todo: list[Pass] = []
        for number, (_, text) in enumerate(pairs):
            todo += passes(number, len(text), self._samples, self._seed)
        totals = [0.0] * len(pairs)
        with self._progress(len(todo), "Likelihoods") as bar:
            nlls = self._spread(todo, lambda batch, _: self._nll(pairs, batch), bar)
        for one, nll in zip(todo, nlls, strict=True):
            totals[one.text] -= one.weight * nll
        return totals

    def _nll(self, pairs: Sequence[tuple[list[int], list[int]]], batch: Sequence[Pass]) -> list[float]:
        """The sum of the NLL of each pass's masked tokens."""
        texts = [one.text for one in batch]
        whole = [[*pairs[number][0], *pairs[number][1]] for number in texts]
        start = self._model.canvas(whole, 0)
        target_BL = torch.zeros_like(start.open_BL)
        for row, one in enumerate(batch):
            target_BL[row, torch.tensor(one.masked) + len(pairs[one.text][0])] = True
        noisy_BL = torch.where(target_BL, self._model.mask_id, start.tokens_BL)
        fast = self._adapt([pairs[number][0] for number in texts], texts)
        return self._model.nll(noisy_BL, target_BL, start.tokens_BL, start.attended_BL, fast).tolist()

    def _adapt(self, contexts: Sequence[list[int]], texts: Sequence[int]) -> fast_weights.FastWeights | None:
        """Each row's fast weights; rows with the same text share what is written once."""
        if not self._memory:
            return None
        different = list(dict.fromkeys(texts))
        first = [texts.index(text) for text in different]
        adapted = self._model.adapt([contexts[row] for row in first], self._anchor_ratio, different)
        self.memory_seconds += adapted.seconds
        return fast_weights.select(adapted.fast, [different.index(text) for text in texts], len(different))

    def _greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Whether each text is what greedy decoding makes of its context, a token at a step."""
        decoding = Decoding(block_size=max((len(text) for _, text in pairs), default=1), stop_at_eos=False)

        def check(batch: list[tuple[list[int], list[int]]], ids: list[int]) -> list[bool]:
            contexts = [context for context, _ in batch]
            start = self._model.canvas(contexts, [len(text) for _, text in batch], ids)
            fast = self._adapt(contexts, ids)
            tokens_BL = sampler.finished(self._model.denoise(start, decoding, fast), start)
            return [
                tokens[response].tolist() == text
                for tokens, response, (_, text) in zip(tokens_BL, start.response_BL, batch, strict=True)
            ]

        with self._progress(len(pairs), "Greedy") as bar:
            return self._spread(pairs, check, bar)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The bound of whole documents, cut into pieces of the longest length; none sees the piece before it."""
        del disable_tqdm
        length = int(self._max_length or self._model.trained_length) - 1
        pairs, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for first in range(0, len(ids), length):
                pairs.append(([self.prefix_token_id], ids[first : first + length]))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, bound in zip(owners, self._bounds(pairs), strict=True):
            totals[number] += bound
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def close(self) -> None:
        """Leave the process group."""
        self._model.close()


def _until(text: str, stops: str | list[str] | None) -> str:
    """A text up to the first of the stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.split(stop)[0]
    return text
