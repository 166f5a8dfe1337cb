"""Continuous batching: a queue of requests, answered in the slots of one decoder.

A row leaves its slot as soon as it is finished, and the next request of the queue enters. A response does not depend on
the other requests, their order or the number of slots: row ids key all random numbers.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memdlm_dist.errors import require
from memdlm_dist.inference.canvas import until
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.predictor import Predictor
from memdlm_dist.inference.prompt_memory import AdaptedMemory, MemorySettings


class Request(NamedTuple):
    """Prompt to respond to.

    Attributes:
        prompt: token ids; [MASK]s among them are filled in too.
        new_tokens: number of [MASK]s to append.
        id: row id, which keys the row's random numbers and the memory's.
    """

    prompt: Sequence[int]
    new_tokens: int
    id: int

    @property
    def length(self) -> int:
        """Number of tokens of the row."""
        return len(self.prompt) + self.new_tokens


class Response(NamedTuple):
    """Response to a request, as token ids.

    Attributes:
        prompt: the prompt with its [MASK]s filled in.
        response: tokens after the prompt, up to end-of-text.
    """

    prompt: list[int]
    response: list[int]


@dataclass(frozen=True)
class Served:
    """Responses in the order of the requests. Passes and seconds are the largest of the data-parallel ranks.

    Attributes:
        responses: one response per request.
        tokens: number of tokens in the responses and of [MASK]s filled in prompts.
        passes: forward passes of the model.
        memory_seconds: time of the memory's inner loops.
        memory_steps: inner steps; a step serves all rows that are written together.
        decoding_seconds: time of everything else.
    """

    responses: list[Response]
    tokens: int
    passes: int
    memory_seconds: float
    memory_steps: int
    decoding_seconds: float


class _Server:
    """Queue of this data-parallel rank's requests, and the requests in the slots.

    All ranks take every step together: a rank whose queue is empty takes part in the collectives of the others.
    """

    def __init__(
        self,
        model: Predictor,
        requests: Sequence[Request],
        decoding: Decoding,
        slots: int,
        memory: MemorySettings | AdaptedMemory | None,
        on_response: Callable[[int, Response], object],
    ):
        ranks = model.data_parallel
        self._model, self._requests, self._on_response = model, requests, on_response
        self._slots = max(1, min(slots, -(-len(requests) // ranks.dp_size)))
        longest = max((request.length for request in requests), default=1)
        length = -(-max(longest, 1) // model.length_multiple) * model.length_multiple
        self._decoder, self._memory = model.slots(decoding, self._slots, length, memory)
        self._in_slot: dict[int, int] = {}  # slot -> number of its request
        self._queue: deque[int] = deque()
        self.responses: dict[int, Response] = {}
        # The longest first, so that one that does not fit into memory fails at once.
        order = sorted(range(len(requests)), key=lambda number: -requests[number].length)
        for number in map(order.__getitem__, ranks.share(len(order))):
            request = requests[number]
            if request.new_tokens or model.mask_id in request.prompt:
                self._queue.append(number)
            else:
                self._hand_over(number, Response([*request.prompt], []))

    @property
    def passes(self) -> int:
        """Number of forward passes of the model so far."""
        return self._decoder.passes

    @property
    def memory_seconds(self) -> float:
        """Time of the memory's inner loops so far."""
        return self._memory.seconds if self._memory is not None else 0.0

    @property
    def memory_steps(self) -> int:
        """Inner steps so far."""
        return self._memory.steps if self._memory is not None else 0

    def run(self) -> None:
        """Answer all requests."""
        self._admit()
        while self._decoder.step():
            self._release()
            self._admit()

    def _admit(self) -> None:
        """Move requests from the queue into the free slots, and write their memory."""
        free = [slot for slot in range(self._slots) if slot not in self._in_slot][: len(self._queue)]
        entering = {slot: self._queue.popleft() for slot in free}
        requests = [self._requests[number] for number in entering.values()]
        if self._memory is not None and self._model.data_parallel.maximum(len(requests)):
            self._memory.enter(free, [request.prompt for request in requests], [request.id for request in requests])
        if not entering:
            return
        start = self._model.canvas(
            [request.prompt for request in requests],
            [request.new_tokens for request in requests],
            [request.id for request in requests],
        )
        self._decoder.load(free, start)
        self._in_slot |= entering

    def _release(self) -> None:
        """Free the slots of finished rows and hand over their responses."""
        finished = [slot for slot in self._in_slot if self._decoder.is_finished(slot)]
        if not finished:
            return
        for slot, tokens in zip(finished, self._decoder.tokens(finished), strict=True):
            number = self._in_slot.pop(slot)
            length = len(self._requests[number].prompt)
            self._hand_over(number, Response(tokens[:length], until(tokens[length:], {self._model.eos_id})))

    def _hand_over(self, number: int, response: Response) -> None:
        self.responses[number] = response
        self._on_response(number, response)


def serve(
    model: Predictor,
    requests: Sequence[Request],
    decoding: Decoding,
    slots: int = 8,
    memory: MemorySettings | AdaptedMemory | None = None,
    on_response: Callable[[int, Response], object] = lambda number, response: None,
) -> Served:
    """Answer requests; data-parallel ranks divide them, and all return all responses.

    Args:
        model: the model.
        requests: prompts, equal on all ranks.
        decoding: settings of decoding.
        slots: rows that each data-parallel rank decodes at a time.
        memory: settings, with which fast weights are adapted to each prompt first; or the memory of one prompt, which
            all responses read. None: no memory.
        on_response: callback, called on the rank that made a response with the request's number and the response.

    Raises:
        UserError: as `Predictor.reader` does, or if the memory is that of several prompts.
    """
    require(
        not isinstance(memory, AdaptedMemory) or len(memory.prompts) == 1,
        "Requests can only share the memory of one prompt; adapt to one prompt, or give the settings of the memory.",
    )
    if requests:
        firsts = [request.prompt[:1] for request in requests]
        model.check_first(model.canvas(firsts, [min(1, request.new_tokens) for request in requests]).open_BL)
    began = time.perf_counter()
    server = _Server(model, requests, decoding, slots, memory, on_response)
    server.run()
    seconds = time.perf_counter() - began - server.memory_seconds
    counts = (server.passes, server.memory_seconds, server.memory_steps, seconds)
    of_ranks = model.data_parallel.gather((server.responses, counts))
    merged = {number: response for responses, _ in of_ranks for number, response in responses.items()}
    responses = [merged[number] for number in range(len(requests))]
    masks = sum(request.prompt.count(model.mask_id) for request in requests)
    passes, memory_seconds, memory_steps, seconds = map(max, zip(*(counts for _, counts in of_ranks), strict=True))
    return Served(
        responses,
        masks + sum(len(response.response) for response in responses),
        int(passes),
        memory_seconds,
        int(memory_steps),
        seconds,
    )
