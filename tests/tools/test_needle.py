"""Needle tasks: the prompt holds the answers, fits the length, and shares nothing with the other part."""

import json
import re

import pytest

from memdlm_dist.data.tokenizer import DiffusionTokenizer
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation.haystack import Haystack, belongs
from memdlm_dist.evaluation.needle import PEOPLE, PLACES, TASKS, THINGS, NeedleGenerator, Sample
from tests.support.needles import SMALL
from tests.support.zygote import ROOT
from tools import needle_data

LENGTHS = (400, 700)
TOKENIZER = str(ROOT / "tests/assets/debug/tokenizer")


@pytest.fixture(scope="module")
def tokenizer():
    return DiffusionTokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def parts(tokenizer):
    return {part: NeedleGenerator(tokenizer, Haystack.read(part), part, SMALL) for part in ("train", "heldout")}


@pytest.mark.parametrize("part", ["train", "heldout"])
@pytest.mark.parametrize("task", list(TASKS))
def test_samples_fit_and_hold_their_answers(parts, tokenizer, task, part):
    for length in LENGTHS:
        for index in range(8):
            sample = parts[part].sample(task, length, index)
            count = sum(map(len, tokenizer.encode_plain([sample.prompt, sample.response]))) + 1
            assert count <= length
            assert task == "repeat" or count > 0.8 * length  # whole sentences fill the rest
            assert sample.answers and all(answer in sample.prompt for answer in sample.answers)
            assert sample.response == f" {', '.join(sample.answers)}."
            assert sample.accuracy(sample.response) == 1 and sample.accuracy("nothing of the kind") == 0
            assert sample.prompt.endswith("Answer:")


def test_the_answers_are_right(parts):
    """Find each task's answers in the prompt by a second method."""
    needles = parts["train"]
    for index in range(20):
        sample = needles.sample("multi_value", 400, index)
        key = re.search(r"numbers of (\S+)\?", sample.prompt)[1]
        assert list(sample.answers) == re.findall(rf"magic number of {key} is (\d+)\.", sample.prompt)

        sample = needles.sample("variable_tracking", 400, index)
        number = re.search(r"variables are (\d+)\?", sample.prompt)[1]
        known = {}
        for name, value in re.findall(r"VAR ([A-Z]+) = (\w+)\.", sample.prompt):
            known[name] = known.get(value, value)
        assert list(sample.answers) == [name for name, value in known.items() if value == number]

        sample = needles.sample("common_words", 400, index)
        words = sample.prompt.split("\n")[1].split()
        counts = sorted((words.count(word) for word in set(words)), reverse=True)
        assert all(words.count(word) == SMALL.repeats for word in sample.answers) and counts[2] < SMALL.repeats

        sample = needles.sample("facts_1", 400, index)
        person = re.search(r"Where is (\w+)\?", sample.prompt)[1]
        assert sample.answers == (re.findall(rf"{person} went to the (\w+)\.", sample.prompt)[-1],)

        sample = needles.sample("facts_2", 400, index)
        thing = re.search(r"Where is the (\w+)\?", sample.prompt)[1]
        person = re.search(rf"(\w+) took the {thing}\.", sample.prompt)[1]
        after = sample.prompt.split(f"{person} took the {thing}.")[1]
        assert sample.answers == (re.findall(rf"{person} went to the (\w+)\.", after)[-1],)


def test_the_held_out_part_shares_nothing(parts):
    train, heldout = parts["train"].hay, parts["heldout"].hay
    assert not set(train.words) & set(heldout.words)
    assert not set(train.sentences) & set(heldout.sentences)
    asked = " ".join(parts["train"].sample(task, 400, i).prompt for task in ("facts_1", "facts_2") for i in range(60))
    for names in (PEOPLE, PLACES, THINGS):
        held = [name for i, name in enumerate(names) if i % 4 == 3]
        assert not [name for name in held if re.search(rf"(went|took).* {name}\.|{name} (went|took)", asked)]
    variables = re.findall(r"VAR ([A-Z]+) =", parts["heldout"].sample("variable_tracking", 400, 0).prompt)
    assert variables and all(belongs(name, "heldout") and not belongs(name, "train") for name in variables)


def test_samples_depend_on_their_key_alone(parts, tokenizer):
    again = NeedleGenerator(tokenizer, Haystack.read("train"), "train", SMALL)
    other = NeedleGenerator(tokenizer, Haystack.read("train"), "train", SMALL, seed=1)
    for task in TASKS:
        assert again.sample(task, 400, 5) == parts["train"].sample(task, 400, 5)
        assert len({s.sample(task, 400, i).prompt for s in (again, other) for i in (5, 6)}) == 4


def test_accuracy_counts_whole_words():
    sample = Sample("multi_value", 100, "", "", ("12", "345"))
    assert sample.accuracy(" 12, 345.") == 1
    assert sample.accuracy("it is 345") == 0.5
    assert sample.accuracy("123456") == 0


def corpus(out, *arguments):
    small = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SMALL).items()]
    return needle_data.main(
        ["--tokenizer", TOKENIZER, "--output", str(out), "--lengths", "400,450", "--samples", "2", *small, *arguments]
    )


def test_a_corpus_for_prepare_data(tmp_path, capsys):
    out = tmp_path / "needles.jsonl"
    assert corpus(out) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 2 * 2 * len(TASKS)
    assert {row["task"] for row in rows[: len(TASKS)]} == set(TASKS) and {row["length"] for row in rows} == {400, 450}
    assert all(row["prompt"].endswith("Answer:") and row["response"].startswith(" ") for row in rows)
    assert corpus(out) == 2 and "--overwrite" in capsys.readouterr().err
    assert corpus(out, "--overwrite", "--format", "text", "--tasks", "repeat,facts_1") == 0
    assert [set(json.loads(line)) for line in out.read_text().splitlines()] == [{"text", "task", "length"}] * 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tasks", "multi_value,riddles"], "no needle task 'riddles'"),
        (["--lengths", "30"], "but has a length of 30; choose a larger length"),
        (["--values", "0"], "The size values of the needle tasks must be from 1 to 1,000,000, but is 0."),
        (["--haystack", "/nowhere.txt"], "The haystack /nowhere.txt cannot be read"),
        (["--tokenizer", "/nowhere"], "There is no tokenizer.json in /nowhere"),
    ],
)
def test_mistakes_are_named(tmp_path, capsys, arguments, message):
    out = tmp_path / "needles.jsonl"
    assert corpus(out, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_too_short_a_haystack(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("One sentence is not enough for this.")
    with pytest.raises(UserError, match="give --haystack more text"):
        Haystack.read("train", [str(short)])
