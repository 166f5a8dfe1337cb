"""Needle tasks: questions about facts hidden in real text, for any length and any tokenizer.

The tasks follow RULER (Hsieh et al. 2024, arXiv 2404.06654: multi-value retrieval, variable tracking, common words) and
BABILong (Kuratov et al. 2024, arXiv 2406.10149: facts about people and things between sentences of other text). The
wording is ours. Sample i of a task is a function of (seed, part, task, length, i), given tokenizer, haystack and sizes.
"""

import random
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError, require
from memdlm_dist.evaluation.haystack import Haystack, Part, belongs


@dataclass(frozen=True)
class Sizes:
    """Sizes of the tasks. The defaults are RULER's; short contexts need smaller sizes."""

    values: int = 4  # multi_value: magic numbers of the key that the question asks for
    distractors: int = 0  # multi_value: other keys, with one magic number each
    digits: int = 7  # digits of a number
    hops: int = 4  # variable_tracking: assignments of one variable to another
    letters: int = 5  # letters of a variable's name
    common: int = 10  # common_words: number of common words
    repeats: int = 30  # common_words: occurrences of each common word
    rare_repeats: int = 3  # common_words: occurrences of each other word
    facts: int = 6  # facts_1, facts_2: statements about people's places; facts_2 adds one about a thing
    words: int = 20  # repeat: words to repeat

    def __post_init__(self) -> None:
        for field in fields(self):
            least = 0 if field.name == "distractors" else 1
            most = 100 if field.name in ("digits", "letters") else 10**6
            value = getattr(self, field.name)
            require(
                least <= value <= most,
                f"The size {field.name} of the needle tasks must be from {least} to {most:,}, but is {value}.",
            )


class QuestionSpec(NamedTuple):
    """Question of a task, with its needles and answers, before filler is added to the prompt."""

    instruction: str
    needles: Sequence[str]  # their order is kept if scattered
    question: str
    answers: Sequence[str]
    filler: Callable[[], Iterator[str]] | None = None  # pieces of filler text; None: sentences of the haystack
    scattered: bool = True  # True: needles at random positions in the filler; False: needles and filler shuffled


@dataclass(frozen=True)
class Sample:
    """Sample of a needle task.

    Attributes:
        task: key of `TASKS`.
        length: requested number of tokens of prompt and response.
        prompt: instruction, text and question.
        response: the true response, a sentence with all answers.
        answers: strings that a correct response contains.
    """

    task: str
    length: int
    prompt: str
    response: str
    answers: tuple[str, ...]

    def accuracy(self, response: str) -> float:
        """Return the fraction of the answers that occur in a response; RULER's string match, but of whole words."""
        words = "".join(c if c.isalnum() else " " for c in response.lower()).split()
        return sum(answer.lower() in words for answer in self.answers) / len(self.answers)


def _split(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _split(
    "Mary John Daniel Sandra Julie Fred Bill Jeff Anna Peter Laura Simon Carol Frank Helen Oscar Nora Victor Alice "
    "Henry Clara Martin Rosa Hugo Emma Walter Lucy Edgar Irene Felix Grace Ralph Diana Arthur Vera Bruno"
)
PLACES = _split(
    "kitchen garden office bedroom hallway bathroom cellar attic library garage school cinema park station market "
    "museum harbour tower chapel bakery stable theatre factory hospital"
)
THINGS = _split(
    "apple football milk lamp letter hammer basket bottle mirror guitar candle blanket umbrella compass kettle ladder "
    "camera pillow wallet needle ribbon whistle anchor feather"
)

# A prompt counts as full after this many pieces of filler were too long for the remaining space.
_MAX_MISFITS = 12
# A length counts as too short after this many drawn questions did not fit.
_MAX_DRAWS = 20


def _names_of(part: Part, names: Sequence[str]) -> list[str]:
    """Return the names of one part; every fourth name is held out."""
    return [name for i, name in enumerate(names) if (i % 4 == 3) == (part == "heldout")]


def _draw_distinct(draw: Callable[[], str], count: int) -> list[str]:
    """Call `draw` until it has returned `count` different strings.

    Raises:
        UserError: if there are hardly that many.
    """
    drawn: dict[str, None] = {}
    for _ in range(100 * count + 1000):
        if len(drawn) == count:
            break
        drawn[draw()] = None
    require(
        len(drawn) == count,
        f"The sizes of a needle task need {count} different words, names or numbers like {next(iter(drawn))!r}, and "
        "there are not enough; choose smaller sizes, or more digits or letters.",
    )
    return list(drawn)


def _draw_numbers(rng: random.Random, sizes: Sizes, count: int) -> list[str]:
    return _draw_distinct(lambda: str(rng.randrange(10 ** (sizes.digits - 1), 10**sizes.digits)), count)


def _multi_value(rng: random.Random, sizes: Sizes, hay: Haystack, part: Part) -> QuestionSpec:
    keys = _draw_distinct(lambda: "-".join(rng.sample(hay.words, 2)), 1 + sizes.distractors)
    numbers = _draw_numbers(rng, sizes, sizes.values + sizes.distractors)
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

    names = _draw_distinct(name, sizes.hops + 1)
    (number,) = _draw_numbers(rng, sizes, 1)
    assignments = [f"VAR {b} = {a}." for a, b in pairwise(names)]
    return QuestionSpec(
        "Follow the variables in this text.",
        [f"VAR {names[0]} = {number}.", *assignments],
        f"Which variables are {number}?",
        names,
    )


def _common_words(rng: random.Random, sizes: Sizes, hay: Haystack, part: Part) -> QuestionSpec:
    chosen = _draw_distinct(lambda: rng.choice(hay.words), sizes.common)

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
    people, places, things = (_names_of(part, names) for names in (PEOPLE, PLACES, THINGS))
    actors = rng.sample(people, min(len(people), max(2, sizes.facts // 3)))
    last_place: dict[str, str] = {}
    statements = []
    for _ in range(sizes.facts):
        person, place = rng.choice(actors), rng.choice(places)
        last_place[person] = place
        statements.append(f"{person} went to the {place}.")
    if not about_thing:
        person = rng.choice(list(last_place))
        return QuestionSpec("Remember where people are.", statements, f"Where is {person}?", [last_place[person]])
    # The thing is at the bearer's last place: the answer combines two facts.
    bearer, thing = rng.choice(list(last_place)), rng.choice(things)
    last = max(i for i, statement in enumerate(statements) if statement.startswith(bearer))
    statements.insert(rng.randint(0, last), f"{bearer} took the {thing}.")
    return QuestionSpec(
        "Remember where people and things are.", statements, f"Where is the {thing}?", [last_place[bearer]]
    )


def _repeat(rng: random.Random, sizes: Sizes, hay: Haystack, part: Part) -> QuestionSpec:
    words = _draw_distinct(lambda: rng.choice(hay.words), sizes.words)
    return QuestionSpec("Remember these words.", words, "Which words, in order?", words, filler=lambda: iter(()))


TASKS: dict[str, Callable[[random.Random, Sizes, Haystack, Part], QuestionSpec]] = {
    "multi_value": _multi_value,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "facts_1": lambda rng, sizes, hay, part: _facts(rng, sizes, part, about_thing=False),
    "facts_2": lambda rng, sizes, hay, part: _facts(rng, sizes, part, about_thing=True),
    # The simplest use of a context: the response copies the prompt's words, and there is no filler.
    "repeat": _repeat,
}


# Lower bounds of the tokens of a question.
_LEAST_TOKENS: dict[str, Callable[[Sizes], int]] = {
    "multi_value": lambda sizes: sizes.values + sizes.distractors,
    "variable_tracking": lambda sizes: sizes.hops,
    "common_words": lambda sizes: sizes.common * sizes.repeats,
    "facts_1": lambda sizes: sizes.facts,
    "facts_2": lambda sizes: sizes.facts,
    "repeat": lambda sizes: sizes.words,
}


@dataclass(frozen=True)
class NeedleGenerator:
    """Generator of the samples of one part for one tokenizer.

    Attributes:
        tokenizer: counts the tokens.
        hay: haystack of the same part.
        part: "heldout" uses keys, names and text that "train" never uses.
        sizes: sizes of the tasks.
        seed: seed of the samples.
    """

    tokenizer: DiffusionTokenizer
    hay: Haystack
    part: Part
    sizes: Sizes = Sizes()
    seed: int = 0

    def sample(self, task: str, length: int, index: int) -> Sample:
        """Generate sample `index` of a task, with at most `length` tokens of prompt, response and end-of-text.

        Filler extends the prompt until little space is left; the task "repeat" has no filler.

        Raises:
            UserError: if `length` is too short for the task's needles.
        """
        rng = random.Random(f"{self.seed}/{self.part}/{task}/{length}/{index}")
        spec, response, spare = self._spec(rng, task, length)
        filler = spec.filler() if spec.filler else self._sentences(rng)
        pieces = self._collect_filler(filler, spare)
        order = self._draw_order(rng, spec, len(pieces))
        while True:
            prompt = _prompt(spec, _merge(spec.needles, pieces, order))
            if not pieces or self._count(prompt, response) <= length:
                return Sample(task, length, prompt, response, tuple(spec.answers))
            # Pieces may need more tokens in context than alone: drop the last one and count again.
            pieces.pop()
            order = [number for number in order if number != len(pieces)]

    def _spec(self, rng: random.Random, task: str, length: int) -> tuple[QuestionSpec, str, int]:
        """Draw a question that fits into `length` tokens.

        Random words and names differ in their number of tokens, so a question that is too long is drawn again.

        Returns:
            The question, its response, and the number of tokens left for filler.

        Raises:
            UserError: if no question fits.
        """
        needs = [_LEAST_TOKENS[task](self.sizes)]
        # Only draw what may fit: huge sizes would take forever.
        for _ in range(_MAX_DRAWS if needs[0] <= length else 0):
            spec = TASKS[task](rng, self.sizes, self.hay, self.part)
            response = f" {', '.join(spec.answers)}."
            needs.append(self._count(_prompt(spec, spec.needles), response))
            if needs[-1] <= length:
                return spec, response, length - needs[-1]
        least = min(needs[1:] or needs)
        raise UserError(
            f"The task {task} needs {least:,} tokens or more with this tokenizer, but has a length of {length}; choose "
            "a larger length, or make the task smaller (docs/evaluation.md#run-the-needle-tasks)."
        )

    def _collect_filler(self, filler: Iterator[str], spare: int) -> list[str]:
        """Collect pieces of filler, at most `spare` tokens in total; skip pieces that do not fit into the rest."""
        pieces: list[str] = []
        misfits = 0
        for piece in filler:
            count = len(self.tokenizer.encode_plain([" " + piece])[0])
            if count <= spare:
                pieces.append(piece)
                spare -= count
            else:
                misfits += 1
            if spare <= 0 or misfits == _MAX_MISFITS:
                break
        return pieces

    def _sentences(self, rng: random.Random) -> Iterator[str]:
        """Yield the haystack's sentences endlessly, starting at a random one."""
        position = rng.randrange(len(self.hay.sentences))
        while True:
            yield self.hay.sentences[position]
            position = (position + 1) % len(self.hay.sentences)

    @staticmethod
    def _draw_order(rng: random.Random, spec: QuestionSpec, fillers: int) -> list[int]:
        """Draw the order of needles and filler; an entry is the index of a filler piece, or -1 for the next needle."""
        needles = [-1] * len(spec.needles)
        if spec.scattered:
            order = list(range(fillers))
            for position in sorted((rng.randint(0, fillers) for _ in needles), reverse=True):
                order.insert(position, -1)
            return order
        order = [*needles, *range(fillers)]
        rng.shuffle(order)
        return order

    def _count(self, prompt: str, response: str) -> int:
        """Return the number of tokens of prompt, response and end-of-text."""
        return sum(map(len, self.tokenizer.encode_plain([prompt, response]))) + 1


def _merge(needles: Sequence[str], pieces: Sequence[str], order: Sequence[int]) -> list[str]:
    """Return needles and pieces of filler in an order drawn by `_draw_order`."""
    remaining = iter(needles)
    return [next(remaining) if number < 0 else pieces[number] for number in order]


def _prompt(spec: QuestionSpec, pieces: Sequence[str]) -> str:
    return f"{spec.instruction}\n{' '.join(pieces)}\n{spec.question} Answer:"
