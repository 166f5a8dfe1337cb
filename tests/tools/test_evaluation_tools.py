"""generate.py, exposure_bias.py, evaluate.py and the harness on a small trained model, as users call them."""

import io
import json
import os
import re
import shutil
import string
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from memdlm_dist.config import parse_config
from memdlm_dist.errors import UserError
from memdlm_dist.evaluation import harness_model, recall
from memdlm_dist.evaluation.exposure import Row, measure, split_response
from memdlm_dist.evaluation.harness import main as harness_command
from memdlm_dist.inference import canvas, decode_bench, prompt_file
from memdlm_dist.inference.decode_bench import Setting
from memdlm_dist.inference.decoding import Decoding
from memdlm_dist.inference.prompt_file import Prompt
from memdlm_dist.inference.prompt_memory import AS_PUBLISHED, MemorySettings
from memdlm_dist.inference.respond import respond_to_all
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.method import trajectory
from memdlm_dist.method.trajectory import IGNORE_INDEX
from tests.support.needles import SMALL
from tests.support.zygote import ROOT
from tests.workers.reading import BOLD, arguments_of
from tools import bench, evaluate, exposure_bias, generate

SIZES = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SMALL).items()]
# An inner loop after which the model of two training steps has learned much of a passage.
LONG = ["--parametric_memory.inner_epochs", "8", "--parametric_memory.learning_rate", "50",
        "--parametric_memory.gradient_clip", "0"]  # fmt: skip
PICTURE = b"\x89PNG"
DEBUG_TOKENS = Tokenizer.from_file("tests/assets/debug/tokenizer/tokenizer.json")


@pytest.fixture
def call(trained, capsys, monkeypatch):
    """Return a function that runs a tool's main on the trained model and returns status, output and errors."""
    monkeypatch.chdir(ROOT)
    config, *overrides = arguments_of(trained)[1:]

    def run(main, *arguments, command=()):
        status = main([*command, config, *arguments, *overrides, *BOLD])
        return status, *capsys.readouterr()

    return run


def test_generate(call, monkeypatch, tmp_path):
    status, out, err = call(generate.main, "--prompt", "def read(self):", "--new-tokens", "5", "--memory", "on")
    assert status == 0 and "memory" in err and "5 passes" in err
    status, plain, err = call(generate.main, "--prompt", "def read(self):", "--new-tokens", "5", "--json")
    made = json.loads(plain)
    assert made["memory"] == "off" and made["memory_seconds"] == 0 and made["passes"] <= 5 and not err
    assert made["text"] == "def read(self):" + made["response"]
    status, again, _ = call(
        generate.main, "--prompt", "def read(self):", "--new-tokens", "5", "--json", "--memory", "on"
    )
    assert json.loads(again)["memory_seconds"] > 0
    letters = [DEBUG_TOKENS.token_to_id(letter) for letter in string.ascii_uppercase]
    guide = ["--cfg-scale", "1.5", "--suppress-tokens", ",".join(str(i) for i in range(512) if i not in letters)]
    weights = ["--memory", "on", "--memory-weights", "schedule", "--temperature", "1"]
    made_with = [
        json.loads(call(generate.main, "--prompt", "def read(self):", "--new-tokens", "8", "--json", *flags)[1])
        for flags in ([*weights, *guide], [*weights[:2], *weights[4:], *guide], [*weights, *guide[2:]])
    ]
    assert len({answer["response"] for answer in made_with}) == 3, "each flag matters"
    assert all(len(answer["response"]) == 8 and answer["response"].isupper() for answer in made_with)

    (tmp_path / "prompt.txt").write_text("def read(self):")
    _, out, _ = call(generate.main, "--file", str(tmp_path / "prompt.txt"), "--new-tokens", "5")
    assert out == made["response"] + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def read(self):")))
    assert call(generate.main, "--new-tokens", "5")[1] == out
    asked = iter(["def read(self):", "  ", "import"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked, None) or (_ for _ in ()).throw(EOFError))
    _, out, _ = call(generate.main, "--interactive", "--new-tokens", "5", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["def read(self):", "import"]

    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|mask|>\n{% endfor %}")
    ids = DEBUG_TOKENS.encode("yes<|mask|>\nno").ids
    monkeypatch.setattr(canvas, "responses", lambda *_: [ids])
    assert call(generate.main, "--prompt", "x", "--chat-template", str(template))[1] == "yes\n", "the end of the turn"


def test_generate_fills_in(call, monkeypatch):
    _, out, _ = call(generate.main, "--prompt", "for [MASK] in [MASK][MASK]:", "--json")
    made = json.loads(out)
    assert made["text"].startswith("for") and " in" in made["text"] and made["text"].endswith(":")
    assert made["response"] == "" and made["passes"] == 3
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, out, _ = call(generate.main, "--prompt", "for [MASK] in [MASK][MASK]:")
    assert out.count("\x1b[1m") >= 3 and "░" in out and made["text"] in out.splitlines()[-1]


def test_generate_saves_and_loads_a_memory(call, tmp_path):
    path = tmp_path / "memory.safetensors"
    text = [
        "--prompt",
        "class Reader:\n    def close(self):\n        return",
        "--new-tokens",
        "6",
        "--temperature",
        "1",
    ]
    flags = ["--memory", "on", "--memory-chunk", "8", "--anchor-ratio", "0.5", "--save-memory", str(path)]
    status, written, err = call(generate.main, *text, *flags)
    assert (
        status == 0
        and f"Memory written to {path}." in err
        and re.search(r"\[memory 6 inner steps \S+ s, 6 passes", err)
    )
    assert call(generate.main, *text)[1] != written, "the memory is read"
    status, loaded, err = call(generate.main, *text, "--load-memory", str(path))
    assert (status, loaded) == (0, written) and re.match(r"Memory of a prompt of 19 tokens loaded.\n\[6 passes", err)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": text[1]}) + "\n" + json.dumps({"prompt": "import"}) + "\n")
    _, out, _ = call(generate.main, "--prompts", str(file), *text[2:], "--load-memory", str(path))
    answers = [json.loads(line) for line in out.splitlines()]
    assert answers[0]["response"] + "\n" == written and answers[0]["memory"] == answers[1]["memory"] == "loaded"
    assert answers[1]["memory_prompt"]["tokens"] == 19 and len(answers[1]["memory_prompt"]["sha256"]) == 64
    _, _, err = call(generate.main, *text[:3], "130", *flags[:4], "--min-tokens", "130", "--threshold", "0")
    assert err.startswith("warning: 149 tokens exceed training.seq_len = 128.\n"), "the pieces are short already"
    _, _, err = call(generate.main, *text[:3], "130", *flags[:2], "--min-tokens", "130", "--threshold", "0")
    assert err.startswith("warning: 149 tokens exceed training.seq_len = 128; --memory-chunk lets the inner loop read")
    saved = path.read_bytes()
    status, out, err = call(generate.main, *text, *flags)
    assert status == 2 and not out and f"{path} exists; choose another file, or pass --overwrite to replace it." in err
    # Only the memory, in place of the other one.
    only = ["--prompt", "import", "--new-tokens", "0", *flags[:2], *flags[-2:], "--overwrite"]
    status, out, err = call(generate.main, *only)
    assert status == 0 and not out and "0 passes" in err and path.read_bytes() != saved
    going_on = [*text, "--load-memory", str(path), "--memory-refresh", "block", "--memory-from", "present"]
    status, _, err = call(generate.main, *going_on, "--block-size", "2")
    assert status == 0 and "[memory 4 inner steps" in err, "two blocks after the first"


def test_generate_responds_to_a_file_of_prompts(call, trained, tmp_path):
    """The responses are those to each prompt alone, in the order of the file."""
    rows = [
        {"prompt": "import", "new_tokens": 3, "id": "short"},
        {"prompt": "def read(self):"},
        {"prompt": "for [MASK] in [MASK][MASK]:", "new_tokens": 0},
    ]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "new/responses.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content[:12] }} {{ m.content[12:] }}{% endfor %}")
    arguments = [
        "--prompts", str(file), "--new-tokens", "5", "--batch-size", "2", "--memory", "on", "--threshold", "0.3",
        "--cache", "dual", "--chat-template", str(template), "--min-tokens", "2", "--edit-threshold", "0",
        "--post-steps", "3",
    ]  # fmt: skip
    status, out, err = call(generate.main, *arguments, "--output", str(output))
    assert status == 0 and not out and "[3 prompts, " in err and " passes " in err and "3/3" in err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer.pop("id") for answer in answers] == ["short", 3, 5]
    status, _, err = call(generate.main, *arguments, "--output", str(output))
    assert status == 2 and f"{output} exists; choose another --output, or pass --overwrite" in err
    _, out, _ = call(generate.main, *arguments)
    assert [json.loads(line) for line in out.splitlines()] == [
        {"id": name, **answer} for name, answer in zip(["short", 3, 5], answers, strict=True)
    ]

    model = TrainedModel(parse_config.parse([*arguments_of(trained), *BOLD]))
    decoding = Decoding(threshold=0.3, min_tokens=2, edit_threshold=0.0, post_steps=3, cache="dual")
    for number, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        text = (row["prompt"][:12] + " " + row["prompt"][12:]).replace("[MASK]", model.tokenizer.mask_token)
        (prompt,) = model.tokenizer.encode_plain([text])
        made = model.generate([prompt], row.get("new_tokens", 5), decoding, AS_PUBLISHED, ids=[number])
        assert answer["response"] == model.tokenizer.decode(made.responses[0]) and answer["memory"] == "on"
        assert answer["prompt"] == row["prompt"] and answer["text"].endswith(answer["response"])
    assert re.fullmatch(r"for.* in.*:", answers[2]["text"], re.DOTALL) and "mask" not in answers[2]["text"]
    settings = {"memory": None, "chat_template": None, "slots": 1, "progress": list}
    with pytest.raises(UserError, match=r"^Line 7 of F has nothing to fill in \(no \[MASK\] and no new"):
        respond_to_all(model, [Prompt("Line 7 of F", "x", 0, 7)], decoding, new_tokens=None, **settings)
    template.write_text("{{ raise_exception('no') }}")
    with pytest.raises(UserError, match=r"^Line 7 of F: The chat template refuses the prompt \(no\)"):
        settings["chat_template"] = str(template)
        respond_to_all(model, [Prompt("Line 7 of F", "x", 3, 7)], decoding, new_tokens=None, **settings)
    model.close()


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "x"', "is not JSON (Expecting ',' delimiter"),
        (b'{"prompt": "\xff"}', "is not JSON ('utf-8' codec can't decode"),
        (b"[" * 10**5, "is not JSON (maximum recursion depth"),
        (b'"x"', 'is not a JSON object; write {"prompt": "..."}'),
        (b'{"text": "x"}', "has the unknown key 'text' (known: prompt, new_tokens, id); remove it"),
        (b'{"id": 1}', "has no prompt that can be read (prompt is missing or not a string); correct it"),
        (b'{"prompt": "\\ud800"}', "has no prompt that can be read (prompt is not valid Unicode); correct it"),
        (b'{"prompt": "x", "new_tokens": true}', "has new_tokens = True, which is not an integer of at least 0"),
        (b'{"prompt": "x", "id": [1]}', "has id = [1], which is neither a string nor an integer"),
    ],
)
def test_a_bad_line_of_a_file_of_prompts_is_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "x"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=re.escape(f"Line 3 of {file} {message}")) as raised:
        prompt_file.read(file)
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
    file.write_text("\n")
    with pytest.raises(UserError, match="has no prompts"):
        prompt_file.read(file)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "x", "--new-tokens", "0"], "nothing to fill in"),
        (["--prompts", "/nowhere.jsonl"], "The prompts /nowhere.jsonl cannot be read"),
        (["--prompt", "x", "--output", "out.jsonl"], "--output is for many prompts; name their file with --prompts"),
        (["--prompt", "x", "--memory-chunk", "8"], "--memory-chunk needs a memory of the prompt; add --memory on, or"),
        (["--prompt", "x", "--memory-refresh", "block"], "--memory-refresh needs a memory of the prompt; add --memory"),
        (["--prompt", "x", "--memory", "on", "--memory-chunk", "1"], "pieces must have at least 2 tokens, but have 1"),
        (
            ["--prompt", "x", "--memory", "on", "--memory-from", "present"],
            "from the present fast weights needs a refresh",
        ),
        (["--prompt", "x", "--save-memory", "m"], "--save-memory needs a memory of the prompt; add --memory on, or"),
        (
            ["--prompts", "x", "--memory", "on", "--save-memory", "m"],
            "--save-memory keeps the memory of one prompt; give that prompt with --prompt or --file",
        ),
        (
            ["--prompt", "x", "--memory", "on", "--save-memory", "/nowhere/m"],
            "The memory cannot be written to /nowhere/m (its folder does not exist); choose another file.",
        ),
        (
            ["--file", "LICENSE", "--memory", "on", "--save-memory", "./LICENSE", "--overwrite"],
            "--save-memory LICENSE is the file of the prompt; choose another file.",
        ),
        (
            ["--prompt", "x", "--memory", "on", "--load-memory", "m"],
            "--load-memory gives the memory, so the prompt is not",
        ),
        (
            ["--prompt", "x", "--load-memory", "m", "--memory-refresh", "block"],
            "A refresh from fresh fast weights would drop the loaded memory; start from the present fast weights (",
        ),
        (
            ["--prompt", "x", "--load-memory", "m", "--memory-chunk", "8"],
            "--memory-chunk has no effect on a loaded memory without --memory-refresh; omit it.",
        ),
        (
            ["--prompt", "x", "--load-memory", "/nowhere"],
            "The memory /nowhere cannot be read (rank 0: No such file",
        ),
        (["--prompt", "x", "--load-memory", "LICENSE"], "The memory LICENSE cannot be read ("),
        (["--prompt", "x", "--checkpoint", "/nowhere"], "no checkpoint that can be used in /nowhere"),
        (["--file", "/nowhere.txt"], "The prompt /nowhere.txt cannot be read"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature must not be negative"),
        (["--prompt", "x", "--anchor-ratio", "0"], "The anchor ratio must be above 0"),
        (["--prompt", "x", "--cfg-scale", "inf"], "--cfg-scale must be a finite number of at least 0, but is inf"),
        (
            ["--prompt", "x", "--threshold", "2"],
            "threshold must be a probability from 0 to 1, but is 2.0",
        ),
        (["--prompt", "x", "--min-tokens", "2"], "A minimum of 2 tokens per step needs a confidence threshold"),
        (["--prompt", "x", "--edit-threshold", "0.9"], "Editing above a confidence (0.9) needs a confidence threshold"),
        (
            ["--prompt", "x", "--threshold", "0.9", "--edit-threshold", "0.5", "--post-steps", "-1"],
            "The steps of editing after a complete block must be at least 0, but are -1",
        ),
        (["--prompt", "x", "--cache-refresh", "2"], "A cache refresh (every 2 steps) needs a cache"),
        (["--prompt", "x", "--suppress-tokens", "5,512"], "suppressed token 512 is outside the model's vocabulary"),
        (["--prompt", "x", "--parallelism.tensor_parallel_degree", "3"], "1 processes"),
        (["--prompt", "x", "--model.flavour", "tiny"], "did you mean model.flavor"),
    ],
)
def test_mistakes_are_one_sentence(call, arguments, message):
    status, _, err = call(generate.main, *arguments)
    assert status == 2 and message in err and err.startswith("error: ") and err.count("\n") == 1


def test_needle_evaluation_and_comparison(call, tmp_path, capsys):
    out = [str(tmp_path / name) for name in "ab"]
    for folder, seed in zip(out, "00", strict=True):
        status, text, _ = call(
            evaluate.main, "--tasks", "facts_1,repeat", "--lengths", "250,300", "--samples", "3", "--new-tokens", "6",
            "--batch-size", "2", "--output", folder, "--seed", seed, "--suppress-tokens", "9", *SIZES,
            command=["needle"],
        )  # fmt: skip
        assert status == 0 and re.search(
            r"^the memory adds \S+ points of accuracy for \S+ times the time \(48 passes and 16 inner steps in place "
            r"of 48 passes\)$", text, re.M,
        )  # fmt: skip
    results = json.loads((tmp_path / "a/needle.json").read_text())
    lines = [line.split() for line in text.splitlines()]
    assert "memory off: 0.0% of 12 questions in" in text and " ".join(lines[0]).endswith("seconds passes inner steps")
    for score in results["scores"]:
        assert score["passes"] == 12 and score["memory_steps"] == 4 * (score["memory"] == "on"), "two batches"
        (line,) = [line for line in lines if line[:3] == [score["task"], str(score["length"]), score["memory"]]]
        assert line[-2:] == [str(score["passes"]), str(score["memory_steps"])]
    assert [(s["task"], s["length"], s["memory"], s["samples"]) for s in results["scores"]] == [
        (task, length, memory, 3)
        for task in ("facts_1", "repeat") for length in (250, 300) for memory in ("off", "on")
    ]  # fmt: skip
    assert len(results["answers"]) == 24 and all(0 <= answer["accuracy"] <= 1 for answer in results["answers"])
    assert (tmp_path / "a/needle.png").read_bytes().startswith(PICTURE)
    status, _, err = call(evaluate.main, "--lengths", "250", "--output", out[0], *SIZES, command=["needle"])
    assert status == 2 and "--overwrite" in err
    status, _, err = call(
        evaluate.main, "--lengths", "20", "--output", str(tmp_path / "c"), *SIZES, command=["needle"]
    )  # fmt: skip
    assert status == 2 and "but has a length of 20; choose a larger length" in err
    refused = {
        ("--common", "1000000"): "The task common_words needs 6,000,000 tokens or more with this tokenizer",
        ("--memory", "off", "--memory-refresh", "block"): "--memory-refresh needs a memory of the prompt; add --memory",
    }
    for flags, message in refused.items():
        status, _, err = call(
            evaluate.main, "--lengths", "250", "--output", str(tmp_path / "c"), "--tasks", "common_words", *SIZES,
            *flags, command=["needle"],
        )  # fmt: skip
        assert status == 2 and message in err

    report = str(tmp_path / "report")
    assert evaluate.main(["compare", f"one={out[0]}", f"two={out[0]},{out[1]}", "--output", report]) == 0
    table = capsys.readouterr().out
    assert "one, memory off (1)" in table and "two, memory on (2)" in table and "repeat 300" in table
    assert (tmp_path / "report/comparison.png").read_bytes().startswith(PICTURE)
    settings = results["settings"]
    assert settings["memory_weights"] == "uniform" and settings["decoding"]["suppress_tokens"] == [9]
    # As of an earlier version.
    for key in ("memory_weights", "memory_chunk", "memory_refresh", "memory_from"):
        del settings[key]
    del settings["decoding"]["cfg_scale"]
    (tmp_path / "b/needle.json").write_text(json.dumps(results))
    assert evaluate.main(["compare", f"one={out[0]}", f"two={out[1]}", "--output", report, "--overwrite"]) == 0
    capsys.readouterr()
    settings["seed"] = 5
    (tmp_path / "b/needle.json").write_text(json.dumps(results))
    assert evaluate.main(["compare", f"one={out[0]}", f"two={out[1]}", "--output", report, "--overwrite"]) == 2
    assert "asked different questions" in capsys.readouterr().err


def test_losses_of_several_runs(tmp_path, capsys):
    for name, shift in (("a", 0.0), ("b", 0.2)):
        (tmp_path / name).mkdir()
        rows = [
            {"step": step, "validation/loss_memory_off": 3 + shift - step / 100, "validation/loss_memory_on": 2.5}
            for step in (0, 50)
        ]
        (tmp_path / name / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arms = f"x={tmp_path / 'a'},{tmp_path / 'b'}"
    assert evaluate.main(["losses", arms, "--output", str(tmp_path / "out")]) == 0
    assert "2.6000 ± 0.1414" in capsys.readouterr().out
    assert (tmp_path / "out/losses.png").read_bytes().startswith(PICTURE)
    assert evaluate.main(["losses", "x=/nowhere", "--output", str(tmp_path / "out"), "--overwrite"]) == 2
    assert "/nowhere/validation.jsonl cannot be read" in capsys.readouterr().err


def test_exposure_bias_tool(call, trained, tmp_path, capsys):
    checkpoint = str(trained / "run/checkpoint")
    status, out, _ = call(
        exposure_bias.main, "--checkpoint", checkpoint, f"{checkpoint}/step-2", "--names", "a", "b", "--samples", "3",
        "--ratios", "0.5,0.9", "--prompt-share", "0.9", "--memory-weights", "schedule", "--output", str(tmp_path),
    )  # fmt: skip
    assert status == 0 and "R_EB" in out
    results = json.loads((tmp_path / "exposure_bias.json").read_text())
    points = {(result["name"], result["memory"]): result["points"] for result in results["results"]}
    assert results["memory_weights"] == "schedule"
    assert len(points) == 4 and points["a", "off"] == points["b", "off"] != points["a", "on"]
    assert [point["ratio"] for point in points["a", "off"]] == [0.5, 0.9]
    assert (tmp_path / "exposure_bias.png").read_bytes().startswith(PICTURE)
    # The run's own folder is never a repository of the hub.
    overrides = [*arguments_of(trained)[1:], *BOLD, "--job.dump_folder", "missing"]
    assert exposure_bias.main([*overrides, "--output", str(tmp_path / "default")]) == 2
    assert "no checkpoint that can be used in missing/checkpoint; " in capsys.readouterr().err


def test_recall_tool(trained, capsys, monkeypatch):
    """The table shows that the memory of the passage itself lowers the loss most."""
    monkeypatch.chdir(ROOT)
    arguments = ["recall", *arguments_of(trained)[1:], *LONG]
    assert (
        evaluate.main([*arguments, "--pairs", "2", "--anchor-ratio", "0.5", "--shown", "1", "--batch-size", "1"]) == 0
    )
    out, err = capsys.readouterr()
    assert "2/2" in err
    first, _, header, *rows = out.splitlines()
    assert first.startswith("4 passages were read with 16 inner steps each (learning rate 50, anchor ratio 0.5)")
    assert header.split("  ")[0] == "memory" and header.endswith("nats per hidden token  likelier words in the passage")
    cells = [re.fullmatch(r"(off|of \D+?) +(\d\.\d{3}) +(-|\d\.\d of 8)", row).groups() for row in rows[:3]]
    assert [cell[0] for cell in cells] == ["off", "of another passage", "of the passage"] and cells[0][2] == "-"
    off, other, own = (float(cell[1]) for cell in cells)
    assert own < other - 0.2 and other < off - 0.1
    assert float(cells[2][2].split()[0]) > float(cells[1][2].split()[0])
    assert rows[3] == "" and re.match(r"-> likelier after reading \(\d of 8 are in it\): \S+, ", rows[-1])
    assert all(len(row) <= 100 for row in rows[4:-1]) and len(rows) in (6, 7)
    for flags, message in (
        (["--pairs", "9999"], r"--pairs 9999 needs 19998 samples, but there are \d+; lower --pairs\.\n"),
        (["--shown", "-1"], r"--shown must be at least 0, but is -1\.\n"),
    ):
        assert evaluate.main([*arguments, *flags]) == 2
        assert re.fullmatch(f"error: {message}", capsys.readouterr().err)


def test_recall_by_hand(trained):
    """Compare with one passage and one memory at a time, of passages with different lengths."""
    texts = [
        "def read(self, size):\n    return self.data[:size]",
        "import torch\n\nfor name in names:\n    model = name",
    ]
    with TrainedModel(parse_config.parse([*arguments_of(trained), *LONG])) as model:
        passages = model.tokenizer.encode_plain(texts)
        assert len(passages[0]) != len(passages[1])
        measured = recall.measure(model, [tuple(passages)], batch_size=1, memory=MemorySettings(0.5), seed=3)
        fast = [model.adapt([passage], MemorySettings(0.5), [i]).fast for i, passage in enumerate(passages)]
        for i, (passage, found) in enumerate(zip(passages, measured, strict=True)):
            start = model.canvas([passage], 0, [i])
            u = trajectory.draw(3, 1, start.ids_B, start.attended_BL).u_BL
            hidden = torch.zeros_like(start.attended_BL)
            hidden[0, 1 + u[0, 1:].argsort()[: (len(passage) - 1) // 2]] = True
            assert found.text == texts[i] and found.hidden == hidden.sum()
            shown, clean = torch.where(hidden, model.mask_id, start.tokens_BL), start.tokens_BL
            mean = {}
            for memory, weights in ((recall.OFF, None), (recall.OTHER, fast[1 - i]), (recall.OWN, fast[i])):
                nll = model.nll(shown, hidden, clean, start.attended_BL, weights).item()
                assert found.nll[memory] == pytest.approx(nll, rel=1e-4), memory
                probability = model.logits(shown, hidden, start.attended_BL, weights).softmax(1).mean(0)
                mean[memory] = {}
                for token, token_id in DEBUG_TOKENS.get_vocab().items():
                    if re.fullmatch("Ġ?[A-Za-z]{3,}", token):
                        word = token.removeprefix("Ġ")
                        mean[memory][word] = mean[memory].get(word, 0) + probability[token_id].item()
            inside = {token.removeprefix("Ġ") for token in DEBUG_TOKENS.encode(texts[i]).tokens}
            for memory in (recall.OTHER, recall.OWN):
                rise = {word: mean[memory][word] - mean[recall.OFF][word] for word in mean[memory]}
                best = sorted(rise.values(), reverse=True)[:8]
                assert [rise[word] for word in found.words[memory]] == pytest.approx(best, rel=1e-3)
                assert found.found[memory] == len(inside & set(found.words[memory]))
            # The memories differ by more than the tolerance.
            off, other, own = found.nll.values()
            assert own < 0.98 * other and own < 0.98 * off and abs(other / off - 1) > 0.002


def test_the_bench_of_decoding(call, trained, tmp_path):
    path, sizes = tmp_path / "decode.json", ["--prompt-tokens", "24", "--new-tokens", "8", "--block-size", "4"]
    status, out, _ = call(
        bench.main, *sizes, "--batch-size", "2", "--rounds", "1", "--threshold", "0", "--cache", "dual",
        "--json", str(path), command=["decode"],
    )  # fmt: skip
    assert status == 0 and "agreement" in out and "2 prompts of 24 tokens, 8 new tokens" in out
    result = json.loads(path.read_text())
    rows = {(row["memory"], row["cache"], row["threshold"]): row for row in result["settings"]}
    assert set(rows) == {(m, c, t) for m in ("off", "on") for c in ("none", "dual") for t in (None, 0)}
    # A confidence is never 0, so each of the two blocks takes one pass.
    assert all(row["passes"] == (8 if key[2] is None else 2) for key, row in rows.items())
    for memory in ("off", "on"):
        plain = rows[memory, "none", None]
        assert plain["agreement"] == plain["over_plain"] == 1 and result["memory_seconds"] > 0
        assert plain["tokens_per_second"] == pytest.approx(16 / plain["seconds"])
    status, _, err = call(bench.main, *sizes, "--threshold", "1.5", command=["decode"])
    assert status == 2 and "threshold must be a probability" in err
    # Cached passes that read everything again give the tokens of the plain loop; fewer passes do not.
    config = parse_config.parse([*arguments_of(trained), *BOLD])
    with TrainedModel(config) as model:
        (prompt,) = decode_bench.prompts(config, model, 1, 24)
        assert len(prompt) == 24 and model.eos_id not in prompt
        with torch.no_grad():  # after two training steps every position has the same most probable token
            for parameter in model.model.parameters():
                parameter.mul_(6)
        settings = [
            Setting(), Setting("prefix", cache_refresh=1), Setting("dual", 1.0, cache_refresh=1),
            Setting("prefix"), Setting("none", 0.0),
        ]  # fmt: skip
        measured = decode_bench.measure(model, [prompt], settings, new_tokens=16, block_size=8, rounds=2)["settings"]
        with pytest.raises(UserError, match="need 240000 tokens of text"):
            decode_bench.prompts(config, model, 10, 24000)
    assert [row["passes"] for row in measured] == [16, 16, 16, 16, 2]
    agreement = [row["agreement"] for row in measured]
    assert agreement[:3] == [1, 1, 1] and max(agreement[3:]) < 1


@pytest.mark.parametrize("memory", [None, AS_PUBLISHED])
def test_exposure_bias_by_hand(trained, memory):
    """Compare with the definition, one row and one token at a time; both sum the same logits in float32."""
    model = TrainedModel(parse_config.parse([*arguments_of(trained), *BOLD]))
    row = Row([5, 6, 7, 8, 9], [20, 21, 22, 23])
    (point,) = measure(model, [row], memory, ratios=[0.25])
    start = model.canvas([row.prompt], 4)
    attended, fast = start.attended_BL, model.adapt([row.prompt]).fast if memory else None
    clean = torch.tensor([[*row.prompt, *row.response]])

    def nll(visible, masked):
        shown = torch.where(masked, model.mask_id, visible)
        logits = model.logits(shown, masked, attended, fast)
        return torch.nn.functional.cross_entropy(logits, clean[masked]).item()

    u = trajectory.draw(0, 0, start.ids_B, start.response_BL).u_BL
    static = start.response_BL & (u == u[start.response_BL].min())
    filled, masked = start.tokens_BL.clone(), start.response_BL.clone()
    for _ in range(3):
        logits = model.logits(filled, masked, attended, fast)
        logits[:, model.mask_id] = -torch.inf
        confidence, token = logits.softmax(-1).max(-1)
        position = masked[0].nonzero()[confidence.argmax(), 0]
        filled[0, position], masked[0, position] = token[confidence.argmax()], False
    expected = [nll(clean, static), nll(filled, masked), nll(clean, masked)]
    # The model's own tokens change the loss by 1e-4 and 2e-4, more than the tolerance.
    assert abs(expected[1] / expected[2] - 1) > 3e-5
    assert [point.static, point.sequential, point.same_positions] == pytest.approx(expected, rel=1e-6)
    assert point.tokens == 1 and point.exposure_bias == pytest.approx(expected[1] / expected[0], rel=1e-6)
    (everything,) = measure(model, [row], memory, ratios=[1.0])
    assert everything.static == everything.sequential == everything.same_positions
    model.close()


def test_rows_of_shards():
    tokens = torch.tensor([1, 2, 3, 4, 0, 0, 0])
    labels = torch.tensor([IGNORE_INDEX, IGNORE_INDEX, 3, 4, 0, 0, 0])
    assert split_response(tokens, labels, eos_id=0) == Row([1, 2], [3, 4, 0])
    assert split_response(tokens, tokens, eos_id=0) == Row([1, 2, 3], [4, 0, 0, 0])
    assert split_response(tokens, torch.full_like(tokens, IGNORE_INDEX), eos_id=0) is None


DEBUG = "config=train_configs/debug.toml"


def harness(trained, *arguments, ranks=1, keys=()):
    settings = [DEBUG, f"checkpoint={trained}/run/checkpoint", "memory=on", "model.flavor=tiny",
                "parametric_memory.layer_fraction=0.5", *keys]  # fmt: skip
    runner = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    # Not the address of a process group of this process.
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, *runner, "-m", "memdlm_dist.evaluation.harness", "--model_args", ",".join(settings),
         *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=500, env=environment,
    )  # fmt: skip


QUESTIONS = {
    "train": [{"question": "Is 2 prime?", "answer": 0}],
    "test": [{"question": "Is 4 prime?", "answer": 1}, {"question": "Is 5 prime?\n", "answer": 0}],
}
# Trims no blanks, ends with blanks, and writes special tokens; refuses two turns of the same role.
TEMPLATE = (
    "{{ eos_token }}{% for m in messages %}{% if not loop.first and m.role == loop.previtem.role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]\n\n{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)


@pytest.fixture
def chat_model(trained, tmp_path, monkeypatch):
    """Return the harness's model on a tokenizer with a chat template and a BOS token."""
    pytest.importorskip("lm_eval")
    from memdlm_dist.evaluation.harness_model import HarnessModel

    monkeypatch.chdir(ROOT)
    folder = shutil.copytree("tests/assets/debug/tokenizer", tmp_path / "tokenizer")
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    pieces.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    overrides = {
        "model.flavor": "tiny",
        "parametric_memory.layer_fraction": "0.5",
        "compile.enable": False,
        "model.hf_assets_path": str(folder),
    }
    model = HarnessModel(
        "train_configs/debug.toml", f"{trained}/run/checkpoint", mc_samples=2, check_greedy=False, batch_size=2,
        threshold="0.01", min_tokens="2", edit_threshold="0.005", post_steps="3", cache="dual", cache_refresh=3,
        attention="full", **overrides
    )  # fmt: skip
    yield model
    model.close()


def test_the_harness_applies_the_chat_template_as_transformers_does(chat_model, monkeypatch):
    """Few-shot examples, system instruction, and a response whose beginning the task gives; two kinds of requests."""
    import datasets
    import transformers
    from lm_eval import evaluator, tasks

    rows = {part: datasets.Dataset.from_list(rows) for part, rows in QUESTIONS.items()}
    task = {
        "custom_dataset": lambda **_: rows, "test_split": "test", "fewshot_split": "train",
        "doc_to_text": "{{question}}", "doc_to_choice": ["yes", "no"], "doc_to_target": "answer",
        "target_delimiter": " ",
    }  # fmt: skip
    generate = {
        **task, "task": "generate", "output_type": "generate_until", "doc_to_target": "{{['yes', 'no'][answer]}}",
        "doc_to_choice": None, "generation_kwargs": {"max_gen_toks": 2, "until": ["\n"]},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    choose = {**task, "task": "choose", "output_type": "multiple_choice"}
    begin = {**choose, "task": "begin", "gen_prefix": "It is"}
    seen = []

    def record(owner, name):
        original = getattr(owner, name)

        def call(self, values, *arguments, **options):
            seen.append(values)
            return original(self, values, *arguments, **options)

        monkeypatch.setattr(owner, name, call)

    record(harness_model, "serve")
    record(type(chat_model), "loglikelihoods")
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # takes a second
    oracle = transformers.AutoTokenizer.from_pretrained(chat_model.tokenizer_name.partition(":")[0])
    plain = {text: oracle(text, add_special_tokens=False).input_ids for text in ("yes", "no", " yes", " no")}
    for multiturn in (True, False):
        seen.clear()
        evaluator.simple_evaluate(
            chat_model, tasks=[generate, choose, begin], num_fewshot=1, system_instruction="Be brief.",
            apply_chat_template=True, fewshot_as_multiturn=multiturn, bootstrap_iters=0,
            task_manager=tasks.TaskManager(include_defaults=False),
        )  # fmt: skip

        def conversations(answer, *last, multiturn=multiturn):
            for row in QUESTIONS["test"]:
                turns = [("user", "Is 2 prime?"), ("assistant", answer), ("user", row["question"]), *last]
                if not multiturn:
                    turns = [("user", f"Is 2 prime? {answer}\n\n{row['question']}"), *last]
                yield [{"role": role, "content": content} for role, content in [("system", "Be brief."), *turns]]

        asked = [oracle.apply_chat_template(chat, add_generation_prompt=True) for chat in conversations("yes")]
        begun = [
            oracle.apply_chat_template(chat, continue_final_message=True)
            for chat in conversations("It is yes", ("assistant", "It is"))
        ]
        requests, pairs = seen
        assert [request.prompt for request in requests] == asked
        assert [(context, text) for _, context, text in pairs] == [
            *((context, plain[text]) for context in asked for text in ("yes", "no")),
            *((context, plain[text]) for context in begun for text in (" yes", " no")),
        ]
        assert all(context.count(0) == (5 if multiturn else 3) for context in asked), "<|endoftext|> is one token"
    with pytest.raises(UserError, match=r"refuses a conversation of the task \(roles must alternate\); choose another"):
        chat_model.apply_chat_template([{"role": "user", "content": "x"}] * 2)
    with pytest.raises(UserError, match="loglikelihood_rolling have no conversation to render; omit"):
        chat_model.loglikelihood_rolling([])


def test_the_harness_decodes_requests_of_different_lengths_and_temperatures(chat_model):
    from lm_eval.api.instance import Instance

    settings = [(3, 0.0), (9, 1.0), (5, 0.0), (2, 1.0), (4, 0.0)]
    requests = [
        Instance("generate_until", {}, ("x = " * number, {"max_gen_toks": n, "do_sample": True, "temperature": t}), 0)
        for number, (n, t) in enumerate(settings, 1)
    ]
    decoding, model = chat_model._decoding, chat_model._model
    assert decoding == Decoding(
        threshold=0.01, min_tokens=2, edit_threshold=0.005, post_steps=3, cache="dual", cache_refresh=3
    )
    for number, answer in enumerate(chat_model.generate_until(requests)):
        n, t = settings[number]
        prompt = chat_model.tok_encode(requests[number].args[0])
        made = model.generate([prompt], n, replace(decoding, temperature=t), ids=[number])
        assert answer == model.tokenizer.decode(made.responses[0]) and answer
    for setting, message in (
        ({"threshold": "x"}, "argument threshold must be a number"),
        ({"edit_threshold": "x", "threshold": 0.5}, "argument edit_threshold must be a number"),
        ({"cache": "all"}, "not all"),
        ({"memory_refresh": "block"}, "The model argument memory_refresh needs a memory of the prompt; add memory=on"),
        ({"memory_chunk": "x"}, "argument memory_chunk must be an integer"),
    ):
        with pytest.raises(UserError, match=message):
            type(chat_model)("train_configs/debug.toml", **setting)


def test_the_harness_truncates_responses_and_keys_its_cache(chat_model, tmp_path):
    encode = chat_model.tok_encode
    response = encode("yes. No.<|mask|>yes")
    assert chat_model.response_text(response, None) == "yes. No.yes"
    assert chat_model.response_text(response, ["<|mask|>", "<|endoftext|>"]) == "yes. No."
    assert chat_model.response_text(response, ".") == "yes"
    names = {chat_model.tokenizer_name}
    for end in ("", "<|mask|>\n"):
        file = tmp_path / "own.jinja"
        file.write_text("{% for m in messages %}{{ m.content }}" + end + "{% endfor %}")
        chat_model.chat_template(str(file))
        names.add(chat_model.tokenizer_name)
        assert chat_model.response_text(response, []) == ("yes. No." if end else "yes. No.yes")
    assert len(names) == 3, "the content of a template is part of the cache's key"


@pytest.mark.slow
def test_the_harness_runs_its_own_tasks_on_any_layout(trained, tmp_path):
    """Run RULER's needle in repeated noise, generated by the harness with the run's tokenizer.

    With a chat template, a threshold, an exact cache, and the memory in pieces; the responses are those of one rank.
    """
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}<|endoftext|>{% endfor %}")
    layouts = {"one": (1, ""), "tp2": (2, "tensor_parallel_degree"), "dp2": (2, "data_parallel_shard_degree")}
    responses = {}
    for name, (ranks, degree) in layouts.items():
        keys = ["block_size=4", "threshold=0.01", "cache=prefix", "cache_refresh=1", "memory_chunk=128"]
        keys += [f"parallelism.{degree}=2"] if degree else []
        done = harness(
            trained, "--tasks", "niah_single_1", "--limit", "3", "--batch_size", "1", "--gen_kwargs", "max_gen_toks=6",
            "--metadata", '{"max_seq_lengths": [400]}', "--output_path", str(tmp_path / name), "--log_samples",
            "--apply_chat_template", str(template), ranks=ranks, keys=keys,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("|niah_single_1|") == 1, "rank 0 alone prints"
        (results,) = (tmp_path / name).rglob("results_*.json")
        assert json.loads(results.read_text())["n-samples"]["niah_single_1"]["effective"] == 3
        (samples,) = (tmp_path / name).rglob("samples_*.jsonl")
        responses[name] = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert responses["one"] == responses["tp2"] == responses["dp2"] and len(responses["one"]) == 3


@pytest.mark.parametrize(
    "model_args, message",
    [
        ("memory=on", "error: --model_args must name the run's configuration"),
        ("config=/nowhere.toml", "error: The configuration file /nowhere.toml does not exist"),
        (
            f"{DEBUG} --apply_chat_template",
            "error: The tokenizer in ./tests/assets/debug/tokenizer has no chat template",
        ),
        (f"{DEBUG} --apply_chat_template llada", "which the chat template llada needs"),
        (f"{DEBUG} --apply_chat_template x", "error: --apply_chat_template names no template ('x' is neither"),
        (f"{DEBUG} --fewshot_as_multiturn", "error: --fewshot_as_multiturn needs --apply_chat_template; set both, or"),
    ],
)
def test_the_harness_names_mistakes(root, monkeypatch, capsys, model_args, message):
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["harness"])
    assert harness_command(["--tasks", "niah_single_1", "--model_args", *model_args.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("task", ["ruler_cwe", "ruler_fwe"])
def test_the_harness_runs_more_of_its_tasks(trained, task):
    done = harness(
        trained, "--tasks", task, "--limit", "2", "--batch_size", "2", "--gen_kwargs", "max_gen_toks=4",
        "--metadata", '{"max_seq_lengths": [2048]}',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"|{task}" in done.stdout
