"""Model class of the lm-evaluation-harness for our checkpoints (requires the [eval] extra)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from tqdm import tqdm

from memdlm_dist.compat.lm_eval import TokenLM
from memdlm_dist.config import parse_config
from memdlm_dist.data import chat
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation import harness_chat
from memdlm_dist.evaluation.harness_arguments import as_flags, as_integer, as_number, as_token_ids
from memdlm_dist.evaluation.retrieval import MEMORY
from memdlm_dist.inference import canvas, sampler
from memdlm_dist.inference.decoding import Cache, Decoding, DecodingAttention
from memdlm_dist.inference.likelihood import Pass, passes
from memdlm_dist.inference.memory_arguments import flags_of
from memdlm_dist.inference.predictor import MEMORY_WEIGHTS
from memdlm_dist.inference.prompt_memory import ANCHOR_RATIO, MemorySettings, Refresh, Start
from memdlm_dist.inference.serving import Request, serve
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.method import fast_weight_tree, fast_weights

NAME = "memdlm"
_NEW_TOKENS = 256  # for tasks without max_gen_toks


@register_model(NAME)
class HarnessModel(TokenLM):
    """Checkpoint that answers the harness's requests, distributed over the data-parallel ranks.

    The harness sees a single rank: every rank runs it with all requests, computes its share of them here, and gets all
    results.

    Args, as --model_args key=value:
        config: TOML file of the run that trained the model.
        checkpoint: folder or URL of a checkpoint; the run's newest one by default.
        adapter: folder or hub repository of an adapter in PEFT's format; none by default.
        memory: off or on; on adapts a separate set of fast weights to each prompt or context first.
        anchor_ratio: fraction of the prompt's tokens that the anchor masks.
        memory_weights: uniform or schedule: the loss weights of the inner steps, see `TrainedModel`.
        memory_chunk: tokens of the pieces in which the inner loop reads a prompt; the whole prompt by default.
        memory_refresh, memory_from: none or block, and fresh or present: whether the inner loop runs again before each
            further block of a response, and with which fast weights it starts; see `MemorySettings`. Likelihoods have
            no blocks, so their memory is never refreshed.
        block_size, steps: tokens per block and steps per block in decoding; one step per token by default.
        threshold: confidence above which decoding keeps predictions, also with a number of steps; none by default.
        min_tokens: tokens that a step keeps at least, with a threshold and without steps.
        edit_threshold, post_steps: confidence above which decoding replaces tokens of the present block, none by
            default, and the most steps in a block after its last [MASK]; see `Decoding`.
        cache, cache_refresh: none, prefix or dual: keys and values that decoding takes from earlier passes, and the
            steps between two passes that read the whole text; see `Decoding`.
        attention: full or block_causal, see `Decoding`.
        cfg_scale: scale of classifier-free guidance in decoding, see `Decoding`.
        suppress_tokens: ids of tokens that decoding never predicts, joined by colons, because the harness separates its
            arguments by commas.
        mc_samples: forward passes per text for its likelihood bound. The bound is exact, over all sets of masked
            tokens, if there are at most mc_samples sets.
        check_greedy: compare each text with greedy decoding of its context, one forward pass per token.
        max_length: length in tokens to which prompts are truncated on the left; unlimited by default.
        seed: seed of decoding and of the likelihood's masks.
        batch_size: sequences per forward pass and rank; responses that a rank decodes at a time.
        overrides: keys of the configuration, section.key.
    """

    def __init__(
        self,
        config: str | None = None,
        checkpoint: str | None = None,
        adapter: str | None = None,
        memory: str = "off",
        anchor_ratio: float = ANCHOR_RATIO,
        memory_weights: str = MEMORY_WEIGHTS,
        memory_chunk: int | None = None,
        memory_refresh: str | None = "none",
        memory_from: str = "fresh",
        block_size: int = 32,
        steps: int | None = None,
        threshold: float | None = None,
        min_tokens: int = 1,
        edit_threshold: float | None = None,
        post_steps: int | None = None,
        cache: str | None = "none",
        cache_refresh: int = 0,
        attention: str = "full",
        cfg_scale: float = 0.0,
        suppress_tokens: str | int = "",
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
        del max_batch_size, device  # the harness passes them; the layout decides the device
        if not config:
            raise UserError("--model_args must name the run's configuration: --model_args config=FILE.toml.")
        memory = {"False": "off", "True": "on"}.get(str(memory), str(memory))
        if memory not in MEMORY:
            raise UserError(f"The model argument memory must be off or on, not '{memory}'.")
        if not str(batch_size).isdigit() or not int(batch_size):
            raise UserError(f"--batch_size must be a positive integer, not '{batch_size}'.")
        if unknown := [key for key in overrides if "." not in key]:
            raise UserError(f"There is no model argument {unknown[0]}; write keys of the configuration as section.key.")
        flags = [flag for key, value in overrides.items() for flag in as_flags(key, value)]
        self._decoding = Decoding(
            block_size=as_integer("block_size", block_size),
            steps=None if steps is None else as_integer("steps", steps),
            threshold=None if threshold is None else as_number("threshold", threshold),
            min_tokens=as_integer("min_tokens", min_tokens),
            edit_threshold=None if edit_threshold is None else as_number("edit_threshold", edit_threshold),
            post_steps=None if post_steps is None else as_integer("post_steps", post_steps),
            cache=cast(Cache, "none" if cache is None else cache),  # the harness parses "none" as None
            cache_refresh=as_integer("cache_refresh", cache_refresh),
            attention=cast(DecodingAttention, attention.replace("-", "_")),
            seed=int(seed),
            cfg_scale=as_number("cfg_scale", cfg_scale),
            suppress_tokens=as_token_ids(suppress_tokens),
        )
        settings = MemorySettings(
            as_number("anchor_ratio", anchor_ratio),
            None if memory_chunk is None else as_integer("memory_chunk", memory_chunk),
            cast(Refresh, "none" if memory_refresh is None else memory_refresh),
            cast(Start, memory_from),
        )
        if not MEMORY[memory] and (unread := flags_of(settings)):
            name = unread[0].lstrip("-").replace("-", "_")
            raise UserError(f"The model argument {name} needs a memory of the prompt; add memory=on, or omit {name}.")
        parsed = parse_config.parse(["--job.config_file", config, *flags])
        self._model = TrainedModel(parsed, checkpoint, adapter, memory_weights=memory_weights, memory=MEMORY[memory])
        self._memory = settings if MEMORY[memory] else None
        self._samples, self._check_greedy, self._seed = int(mc_samples), bool(check_greedy), int(seed)
        self._max_length, self._batch_size = max_length, int(batch_size)
        self._chat: chat.ChatTemplate | None = None
        self._end_of_turn: int | None = None
        self.memory_seconds = 0.0

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self._model.eos_id

    @property
    def tokenizer_name(self) -> str:
        """Folder and fingerprints of tokenizer and chat template, part of the key of the harness's request cache.

        The harness asks for it only if it applies the chat template.
        """
        tokenizer = self._model.tokenizer
        return f"{tokenizer.tokenizer_path}:{tokenizer.fingerprint()}:{self._loaded_chat().fingerprint}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Load the template that `--apply_chat_template` chooses; return its name, for the harness's results."""
        name = harness_chat.template_name(chat_template)
        self._chat = harness_chat.load(name, self._model.tokenizer)
        self._end_of_turn = chat.end_of_turn(self._chat, self._model.tokenizer)
        return name

    def _loaded_chat(self) -> chat.ChatTemplate:
        if self._chat is None:  # `simple_evaluate` without an evaluation tracker does not call `chat_template`
            self.chat_template(True)
        assert self._chat is not None
        return self._chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation as a prompt: see `harness_chat.render`."""
        return harness_chat.render(self._loaded_chat(), chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return a text's token ids without special tokens."""
        del add_special_tokens, kwargs
        return self._model.tokenizer.encode_plain([string])[0]

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the token ids of a context and of its continuation.

        A chat template's prompt and its response are encoded separately, as in training; the harness would move blanks
        at the prompt's end into the response.
        """
        if self._chat is None:
            return super().encode_pair(context, continuation)
        return self.tok_encode(context), self.tok_encode(continuation)

    def _prompt(self, ids: list[int], room: int) -> list[int]:
        """Truncate a prompt on the left so that `room` more tokens fit into max_length."""
        if self._max_length is None or len(ids) + room <= self._max_length:
            return ids
        return ids[max(0, len(ids) + room - int(self._max_length)) :]

    def _progress_bar(self, total: int, label: str) -> tqdm:
        return tqdm(total=total, desc=label, disable=torch.distributed.get_rank() != 0)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return a response to each prompt, truncated at the first of the task's stop strings."""
        del disable_tqdm
        # Requests with the same temperature share a queue.
        queues: dict[float, list[int]] = {}
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        for number, request in enumerate(requests):
            options = request.args[1]
            temperature = float(options.get("temperature") or 0) if options.get("do_sample", True) else 0.0
            queues.setdefault(temperature, []).append(number)
        responses = [""] * len(requests)
        shares = [len(self._model.data_parallel.share(len(numbers))) for numbers in queues.values()]
        with self._progress_bar(sum(shares), "Generating") as bar:
            for temperature, numbers in queues.items():
                queue = []
                for number in numbers:
                    new_tokens = int(requests[number].args[1].get("max_gen_toks", _NEW_TOKENS))
                    queue.append(Request(self._prompt(prompts[number], new_tokens), new_tokens, number))
                served = serve(
                    self._model,
                    queue,
                    replace(self._decoding, temperature=temperature),
                    self._batch_size,
                    self._memory,
                    lambda number, response: bar.update(),
                )
                self.memory_seconds += served.memory_seconds
                for number, response in zip(numbers, served.responses, strict=True):
                    text = self.response_text(response.response, requests[number].args[1].get("until"))
                    responses[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return responses

    def response_text(self, ids: Sequence[int], stops: str | list[str] | None) -> str:
        """Return the text of a response, truncated at the first stop string or at the end of the turn.

        Text lacks special tokens, so a stop string that is a special token truncates the token ids.
        """
        stops = [stops] if isinstance(stops, str) else stops or []
        tokenizer = self._model.tokenizer
        stop_ids = {tokenizer.token_to_id(stop) for stop in stops} & tokenizer.special_ids
        text = str(tokenizer.decode(canvas.until(ids, {*stop_ids, self._end_of_turn})))
        for stop in filter(None, stops):
            text = text.split(stop)[0]
        return text

    def _map_batches(
        self, items: Sequence[Any], work: Callable[[list[Any], list[int]], list[Any]], bar: tqdm
    ) -> list[Any]:
        """Map `work`(items, their indices) over batches of items, distributed over the data-parallel ranks."""
        return self._model.data_parallel.map_batches(items, self._batch_size, work, bar.update)

    def loglikelihoods(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]]
    ) -> list[tuple[float, bool]]:
        """Return (likelihood bound in nats, is greedy) for each text given its context: see `TokenLM`."""
        pairs = [(self._prompt(context, len(text)), text) for _, context, text in requests]
        bounds = self._bounds(pairs)
        greedy = self._greedy(pairs) if self._check_greedy else [False] * len(pairs)
        answers = list(zip(bounds, greedy, strict=True))
        for (key, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _bounds(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Return the any-order bound on the log-likelihood of each text given its context, in nats.

        Args:
            pairs: (context, text), as token ids.

        Raises:
            UserError: with guidance, suppressed tokens or block-causal attention, which likelihoods do not have.
        """
        if self._decoding.cfg_scale or self._decoding.suppress_tokens or self._decoding.attention != "full":
            raise UserError(
                "A task scores likelihoods, which are the model's own with full attention (cfg_scale, suppress_tokens "
                "and attention change decoding alone); run the task without these model arguments."
            )
        all_passes: list[Pass] = []
        for number, (_, text) in enumerate(pairs):
            all_passes += passes(number, len(text), self._samples, self._seed)
        totals = [0.0] * len(pairs)
        with self._progress_bar(len(all_passes), "Likelihoods") as bar:
            nlls = self._map_batches(all_passes, lambda batch, _: self._nll(pairs, batch), bar)
        for text_pass, nll in zip(all_passes, nlls, strict=True):
            totals[text_pass.text] -= text_pass.weight * nll
        return totals

    def _nll(self, pairs: Sequence[tuple[list[int], list[int]]], batch: Sequence[Pass]) -> list[float]:
        """Return the summed NLL of the masked tokens of each pass, in nats."""
        texts = [text_pass.text for text_pass in batch]
        sequences = [[*pairs[number][0], *pairs[number][1]] for number in texts]
        start = self._model.canvas(sequences, 0)
        target_BL = torch.zeros_like(start.open_BL)
        for row, text_pass in enumerate(batch):
            target_BL[row, torch.tensor(text_pass.masked) + len(pairs[text_pass.text][0])] = True
        noisy_BL = torch.where(target_BL, self._model.mask_id, start.tokens_BL)
        fast = self._adapt([pairs[number][0] for number in texts], texts)
        return self._model.nll(noisy_BL, target_BL, start.tokens_BL, start.attended_BL, fast).tolist()

    def _adapt(self, contexts: Sequence[list[int]], texts: Sequence[int]) -> fast_weights.FastWeights | None:
        """Return the rows' fast weights; rows with the same text number share one set. None with the memory off."""
        if self._memory is None:
            return None
        unique_texts = list(dict.fromkeys(texts))
        first_rows = [texts.index(text) for text in unique_texts]
        adapted = self._model.adapt([contexts[row] for row in first_rows], self._memory, unique_texts)
        self.memory_seconds += adapted.seconds
        return fast_weight_tree.select(adapted.fast, [unique_texts.index(text) for text in texts], len(unique_texts))

    def _greedy(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[bool]:
        """Return whether greedy decoding of each context gives its text, with one token per step."""
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

        with self._progress_bar(len(pairs), "Greedy") as bar:
            return self._map_batches(pairs, check, bar)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the likelihood bound of each document, in nats.

        A document longer than the context length is split into chunks, which are scored independently.

        Raises:
            UserError: with a chat template, since a document is no conversation.
        """
        del disable_tqdm
        if self._chat:
            raise UserError(
                "Tasks of type loglikelihood_rolling have no conversation to render; omit --apply_chat_template."
            )
        length = int(self._max_length or self._model.trained_length) - 1
        pairs, documents = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for first in range(0, len(ids), length):
                pairs.append(([self.prefix_token_id], ids[first : first + length]))
                documents.append(number)
        totals = [0.0] * len(requests)
        for number, bound in zip(documents, self._bounds(pairs), strict=True):
            totals[number] += bound
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def close(self) -> None:
        """Leave the process group."""
        self._model.close()
