"""Needle tasks: questions about facts that are hidden in real text, of any length and for any tokenizer.

After RULER (Hsieh et al. 2024, arXiv 2404.06654: multi-value retrieval, variable tracking, common words) and
BABILong (Kuratov et al. 2024, arXiv 2406.10149: facts about people and things among sentences of other text). All
texts are our own. Sample i of a task is a function of (seed, part, task, length, i) alone.
"""

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation.haystack import Haystack, Part, belongs


@dataclass(frozen=True)
class Sizes:
    """How much a task asks for. The defaults are RULER's; short contexts need smaller ones."""

    values: int = 4  # multi_value: numbers of the key in question
    distractors: int = 0  # multi_value: numbers of other keys
    digits: int = 7  # of a number
    hops: int = 4  # variable_tracking: assignments from one variable to the next
    letters: int = 5  # of a variable's name
    common: int = 10  # common_words: words to be found
    repeats: int = 30  # common_words: how often they stand in the list
    rare_repeats: int = 3  # common_words: how often the others do
    facts: int = 6  # facts_1, facts_2: statements about people and things
    words: int = 20  # repeat: words to be said again


class QuestionSpec(NamedTuple):
    """What a task hides and asks."""

    instruction: str
    needles: Sequence[str]  # in the order in which they must stand
    question: str
    answers: Sequence[str]
    filler: Callable[[], Iterator[str]] | None = None  # what to fill with instead of the haystack's sentences
    scattered: bool = True  # needles among the filler; False: shuffled with it


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: ends where the response begins.
        response: the answers, as training shows them.
        answers: the strings that must occur in a right response.
    """

    task: str
    length: int
    prompt: str
    response: str
    answers: tuple[str, ...]

    def accuracy(self, response: str) -> float:
        """Share of the answers that occur in a response as whole words: RULER's string match."""
        found = "".join(c if c.isalnum() else " " for c in response.lower()).split()
        return sum(answer.lower() in found for answer in self.answers) / len(self.answers)


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _names(
    "Mary John Daniel Sandra Julie Fred Bill Jeff Anna Peter Laura Simon Carol Frank Helen Oscar Nora Victor Alice "
    "Henry Clara Martin Rosa Hugo Emma Walter Lucy Edgar Irene Felix Grace Ralph Diana Arthur Vera Bruno"
)
PLACES = _names(
    "kitchen garden office bedroom hallway bathroom cellar attic library garage school cinema park station market "
    "museum harbour tower chapel bakery stable theatre factory hospital"
)
THINGS = _names(
    "apple football milk lamp letter hammer basket bottle mirror guitar candle blanket umbrella compass kettle ladder "
    "camera pillow wallet needle ribbon whistle anchor feather"
)

# Pieces of the filler that are tried before a context counts as full.
_MISFITS = 12
# Riddles that are drawn before a length counts as too short.
_REDRAWS = 20


def _of(part: Part, names: Sequence[str]) -> list[str]:
    """Every fourth name is the held-out part's."""
    return [name for i, name in enumerate(names) if (i % 4 == 3) == (part == "heldout")]


def _different(draw: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _numbers(rng: random.Random, sizes: Sizes, count: int) -> list[str]:
    return _different(lambda: str(rng.randrange(10 ** (sizes.digits - 1), 10**sizes.digits)), count)


def _multi_value(rng: random.Random, sizes: Sizes, hay: Haystack, part: Part) -> QuestionSpec:
    keys = _different(lambda: "-".join(rng.sample(hay.words, 2)), 1 + sizes.distractors)
    numbers = _numbers(rng, sizes, sizes.values + sizes.distractors)
    owners = [keys[0]] * sizes.values + keys[1:]
    pairs = list(zip(owners, numbers, strict=True))
    rng.shuffle(pairs)
    return QuestionSpec(
        "Remember the magic numbers in this text.",
        [f"A magic number of {key} is {number}." for key, number in pairs],
        f"Which are the magic numbers of {keys[0]}?",
        [number for key, number in pairs if key == keys[0]],
    )


def _variable_tracking(rng: random.Random, sizes: Sizes, hay: Haystack, part: Part) -> QuestionSpec:
    def name() -> str:
        while True:
            letters = "".join(rng.choices(string.ascii_uppercase, k=sizes.letters))
            if belongs(letters, part):
                return letters

    names = _different(name, sizes.hops + 1)
    (number,) = _numbers(rng, sizes, 1)
    assignments = [f"VAR {b} = {a}." for a, b in pairwise(names)]
    return QuestionSpec(
        "Follow the variables in this text.",
        [f"VAR {names[0]} = {number}.", *assignments],
        f"Which variables are {number}?",
        names,
    )


def _common_words(rng: random.Random, sizes: Sizes, hay: Haystack, part: Part) -> QuestionSpec:
    chosen = _different(lambda: rng.choice(hay.words), sizes.common)

    def rare() -> Iterator[str]:
        others = [word for word in hay.words if word not in chosen]
        rng.shuffle(others)
        for word in others:
            yield from [word] * sizes.rare_repeats

    return QuestionSpec(
        "Remember the most common words of this list.",
        chosen * sizes.repeats,
        f"Which are the {sizes.common} most common words?",
        chosen,
        filler=rare,
        scattered=False,
    )


def _facts(rng: random.Random, sizes: Sizes, part: Part, about_thing: bool) -> QuestionSpec:
    people, places, things = (_of(part, names) for names in (PEOPLE, PLACES, THINGS))
    actors = rng.sample(people, min(len(people), max(2, sizes.facts // 3)))
    at: dict[str, str] = {}
    statements = []
    for _ in range(sizes.facts):
        person, place = rng.choice(actors), rng.choice(places)
        at[person] = place
        statements.append(f"{person} went to the {place}.")
    if not about_thing:
        person = rng.choice(list(at))
        return QuestionSpec("Remember where people are.", statements, f"Where is {person}?", [at[person]])
    # The thing is where its bearer went last: two facts to join.
    bearer, thing = rng.choice(list(at)), rng.choice(things)
    last = max(i for i, statement in enumerate(statements) if statement.startswith(bearer))
    statements.insert(rng.randint(0, last), f"{bearer} took the {thing}.")
    return QuestionSpec("Remember where people and things are.", statements, f"Where is the {thing}?", [at[bearer]])


def _repeat(rng: random.Random, sizes: Sizes, hay: Haystack, part: Part) -> QuestionSpec:
    words = _different(lambda: rng.choice(hay.words), sizes.words)
    return QuestionSpec("Remember these words.", words, "Which words, in order?", words, filler=lambda: iter(()))


TASKS: dict[str, Callable[[random.Random, Sizes, Haystack, Part], QuestionSpec]] = {
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "facts_1": lambda rng, sizes, hay, part: _facts(rng, sizes, part, about_thing=False),
    "facts_2": lambda rng, sizes, hay, part: _facts(rng, sizes, part, about_thing=True),
    # The simplest use of a context, and the densest: every token of the response stands in the prompt.
    "repeat": _repeat,
}


@dataclass(frozen=True)
class NeedleGenerator:
    """Makes samples of one part for one tokenizer.

    Args:
        part: "heldout" uses keys, names and text that "train" never does.
    """

    tokenizer: DiffusionTokenizer
    hay: Haystack
    part: Part
    sizes: Sizes = Sizes()
    seed: int = 0

    def sample(self, task: str, length: int, index: int) -> Sample:
        """Sample `index` of a task: prompt, response and end-of-text make at most `length` tokens, and nearly so many.

        Raises:
            UserError: if the length cannot hold what the task hides.
        """
        rng = random.Random(f"{self.seed}/{self.part}/{task}/{length}/{index}")
        spec, response, spare = self._spec(rng, task, length)
        filler = spec.filler() if spec.filler else self._sentences(rng)
        filling = self._fill(filler, spare)
        order = self._places(rng, spec, len(filling))
        while True:
            prompt = _prompt(spec, _merge(spec.needles, filling, order))
            if not filling or self._count(prompt, response) <= length:
                return Sample(task, length, prompt, response, tuple(spec.answers))
            filling.pop()
            order = [place for place in order if place != len(filling)]

    def _spec(self, rng: random.Random, task: str, length: int) -> tuple[QuestionSpec, str, int]:
        """One that fits, its response, and how many tokens are left to fill; words differ in their tokens."""
        needs = []
        for _ in range(_REDRAWS):
            spec = TASKS[task](rng, self.sizes, self.hay, self.part)
            response = f" {', '.join(spec.answers)}."
            needs.append(self._count(_prompt(spec, spec.needles), response))
            if needs[-1] <= length:
                return spec, response, length - needs[-1]
        raise UserError(
            f"The task {task} needs {min(needs)} tokens or more with this tokenizer, but --lengths gives it {length}; "
            "raise that, or ask for less (--help lists the sizes)."
        )

    def _fill(self, filler: Iterator[str], spare: int) -> list[str]:
        """Pieces of the filler that make `spare` tokens, or nearly so many: those that do not fit are passed over."""
        filling: list[str] = []
        misfits = 0
        for piece in filler:
            count = len(self.tokenizer.encode_plain([" " + piece])[0])
            if count <= spare:
                filling.append(piece)
                spare -= count
            else:
                misfits += 1
            if spare <= 0 or misfits == _MISFITS:
                break
        return filling

    def _sentences(self, rng: random.Random) -> Iterator[str]:
        """The haystack from a random place on, over and over."""
        place = rng.randrange(len(self.hay.sentences))
        while True:
            yield self.hay.sentences[place]
            place = (place + 1) % len(self.hay.sentences)

    @staticmethod
    def _places(rng: random.Random, spec: QuestionSpec, fillers: int) -> list[int]:
        """The order of the pieces: numbers of the filler, or -1 for the next needle."""
        needles = [-1] * len(spec.needles)
        if spec.scattered:
            order = list(range(fillers))
            for place in sorted((rng.randint(0, fillers) for _ in needles), reverse=True):
                order.insert(place, -1)
            return order
        order = [*needles, *range(fillers)]
        rng.shuffle(order)
        return order

    def _count(self, prompt: str, response: str) -> int:
        return sum(map(len, self.tokenizer.encode_plain([prompt, response]))) + 1


def _merge(needles: Sequence[str], filling: Sequence[str], order: Sequence[int]) -> list[str]:
    coming = iter(needles)
    return [next(coming) if place < 0 else filling[place] for place in order]


def _prompt(spec: QuestionSpec, pieces: Sequence[str]) -> str:
    return f"{spec.instruction}\n{' '.join(pieces)}\n{spec.question} Answer:"
