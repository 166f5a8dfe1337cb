"""The documented commands of the paper's evaluations, at a small size on texts of the hub's form that we make."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from memdlm_dist.data.tokenizer import train
from memdlm_dist.evaluation.harness import main
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.prompt_memory import MemorySettings
from tests.support.zygote import ROOT
from tests.workers.reading import arguments_of

datasets = pytest.importorskip("datasets")
manager = pytest.importorskip("lm_eval.tasks.manager")
harness_model = pytest.importorskip("memdlm_dist.evaluation.harness_model")

PLACES = ("kitchen", "garden", "cellar")
SENTENCES = " ".join(f"Nobody saw number {n} of the old lamps again." for n in range(40))
QUESTION = {
    "input": f"Mary went to the {PLACES[0]}. {SENTENCES} Mary went to the {PLACES[1]}.",
    "question": "Where is Mary?",
    "target": PLACES[1],
}
PASSAGE = {
    "context": SENTENCES,
    "question": "What did nobody see again?",
    "answers": ["Paragraph 3 or 段落3: the old lamps"],  # retrieval tasks read the number
    "all_classes": ["lamps", "chairs"],
}


def load_dataset(path, name=None, split=None, **_):
    """Stand in for `datasets.load_dataset`: the columns of the hub's data sets, with three rows."""
    rows = {
        "baber/paul_graham_essays": {"text": [SENTENCES] * 3},
        "RMT-team/babilong-1k-samples": {key: [value] * 3 for key, value in QUESTION.items()},
        "Xnhyacinth/LongBench": {key: [value] * 3 for key, value in PASSAGE.items()},
    }[path]
    data = datasets.Dataset.from_dict(rows)
    return data if split else datasets.DatasetDict(test=data)


def documented() -> dict[str, list[str]]:
    """Return the arguments of the commands in docs/evaluation.md by name."""
    text = (ROOT / "docs/evaluation.md").read_text()
    block = text.split("```bash\nMEMORY=")[1].split("```")[0].replace("\\\n", " ")
    memory, *lines = block.splitlines()
    commands, name = {}, ""
    for line in filter(None, lines):
        if line.startswith("# "):
            name = line.removeprefix("# ")
        else:
            commands[name] = shlex.split(line.replace("$MEMORY", memory))[3:]
    return commands


def table() -> dict[str, tuple[int, int]]:
    """Return shots and new tokens of the documented evaluations by the name of their tasks."""
    text = (ROOT / "docs/evaluation.md").read_text().split("| blocks, steps | memory |\n")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[1:]]
    for row in rows:
        assert row[5:] == ["one block, one token a step", "on the prompt, anchor ratio 0.2, loss weights 1"]
    return {row[1].split("`")[1]: (int(row[2]), int(row[4])) for row in rows}


# Small lengths and one question; the rest is the documented command.
RULER = ["niah_multivalue", "ruler_vt", "ruler_cwe"]
BABILONG = [f"babilong_qa{n}" for n in range(1, 6)]
REDUCED = {
    "RULER": (("[4096, 8192]", "[2000]"), {task: task for task in RULER}),
    "BABILong": (("2k", "1k"), {task: "babilong_longctx" for task in BABILONG}),
    "LongBench": (
        ("max_length=8192", "max_length=400"),
        {f"longbench_{task}": "longbench" for task in ("hotpotqa", "samsum", "lcc", "passage_retrieval_zh")},
    ),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return the folder of a tokenizer that knows RULER's texts, whose examples of 500 tokens it would exceed."""
    from lm_eval.tasks.ruler import cwe_utils, vt_utils

    chain = vt_utils.generate_input_output(50, 1, 4)[0]
    folder = tmp_path_factory.mktemp("tokenizer")
    train([chain] * 20 + [cwe_utils.TEMPLATE] * 20, 512, folder)
    return folder


@pytest.mark.parametrize("name, block_causal", [*((name, False) for name in REDUCED), ("BABILong", True)])
def test_a_published_evaluation_starts_from_its_documented_command(
    name, block_causal, trained, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    build = manager.TaskIndex.build

    def build_small(roots):
        """Index the folder of the evaluation alone: all of the harness's tasks take 5 s."""
        return build([root / name.lower() for root in roots])

    monkeypatch.setattr(manager.TaskIndex, "build", staticmethod(build_small))
    monkeypatch.setattr("nltk.download", lambda *_, **__: True)
    if name == "RULER":
        from lm_eval.tasks.ruler import prepare_niah

        monkeypatch.setattr(prepare_niah, "download_nltk_resources", lambda: None)
        monkeypatch.setattr(prepare_niah, "cached_sent_tokenize", lambda text: re.split(r"(?<=[.!?])\s+", text))
    asked, decodings, serve = {}, set(), harness_model.serve

    def record(model, requests, decoding, slots, memory, *rest):
        assert memory == MemorySettings(anchor_ratio=0.2) and model._objective.plan.loss_weight == "uniform"
        asked.update({tuple(request.prompt): request.new_tokens for request in requests})
        decodings.add(replace(decoding, threshold=decoding.threshold or None))
        return serve(model, requests, replace(decoding, threshold=0.0), slots, memory, *rest)  # one step a block

    monkeypatch.setattr(harness_model, "serve", record)
    (old, new), tasks = REDUCED[name]
    run = [f"config={arguments_of(trained)[1]}", f"checkpoint={trained}/run/checkpoint", "model.flavor=tiny"]
    model = ",".join([*run, "parametric_memory.layer_fraction=0.5", f"model.hf_assets_path={tokenizer}"])
    text = shlex.join(documented()[name])
    assert text.count("config=CONFIG.toml") == 1 and old in text
    if block_causal:
        others = re.search(r"replace `block_size=N` by\s+`(.*?)`", (ROOT / "docs/evaluation.md").read_text())[1]
        text = re.sub(r"block_size=\d+", others, text)
    arguments = shlex.split(text.replace("config=CONFIG.toml", model).replace(old, new))
    output = tmp_path / "results"
    assert main([*arguments, "--limit", "1", "--output_path", str(output), "--log_samples"]) == 0
    (results,) = map(json.loads, map(Path.read_text, output.rglob("results_*.json")))
    for task, row in tasks.items():
        shots, new_tokens = table()[row]
        assert results["n-samples"][task]["effective"] == 1 and results["n-shot"][task] == shots
        (sample,) = [json.loads(line) for file in output.rglob(f"samples_{task}_*.jsonl") for line in file.open()]
        assert isinstance(sample["resps"][0][0], str)
        request = sample["arguments"]["gen_args_0"]
        assert request["arg_1"]["max_gen_toks"] == new_tokens
        if name == "BABILong":
            examples = results["configs"][task]["fewshot_config"]["samples"]
            assert [example["input"] in request["arg_0"] for example in examples] == [True, True, False][
                : len(examples)
            ]
            assert QUESTION["input"] in request["arg_0"]
        if name == "LongBench":
            assert SENTENCES in request["arg_0"]
    most = max(asked.values())
    assert set(asked.values()) == {new_tokens for shots, new_tokens in map(table().get, tasks.values())}
    (decoding,) = decodings
    if block_causal:
        assert decoding == Decoding(32, threshold=0.95, attention="block_causal", cache="prefix")
    else:
        assert decoding == Decoding(block_size=most), "one block, one token a step"
    if name == "LongBench":
        assert all(len(prompt) + new_tokens <= 400 for prompt, new_tokens in asked.items())
