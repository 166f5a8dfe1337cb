"""generate.py, exposure_bias.py, evaluate.py and the harness on a small trained model, as users call them."""

import io
import json
import subprocess
import sys

import pytest
import torch

from memdlm_dist.config import parse_config
from memdlm_dist.evaluation.exposure import Row, measure, split_response
from memdlm_dist.evaluation.harness import main as harness_command
from memdlm_dist.inference.trained_model import TrainedModel
from memdlm_dist.method import trajectory
from memdlm_dist.method.trajectory import IGNORE_INDEX
from tests.support.needles import SMALL
from tests.support.zygote import ROOT
from tests.workers.reading import BOLD, arguments_of
from tools import evaluate, exposure_bias, generate

SIZES = [f"--{name.replace('_', '-')}={value}" for name, value in vars(SMALL).items()]
PICTURE = b"\x89PNG"


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
    assert status == 0 and "memory" in err and "5 steps" in err
    status, plain, err = call(generate.main, "--prompt", "def read(self):", "--new-tokens", "5", "--json")
    made = json.loads(plain)
    assert made["memory"] == "off" and made["memory_seconds"] == 0 and made["steps"] <= 5 and not err
    assert made["text"] == "def read(self):" + made["response"]
    status, again, _ = call(
        generate.main, "--prompt", "def read(self):", "--new-tokens", "5", "--json", "--memory", "on"
    )
    assert json.loads(again)["memory_seconds"] > 0

    (tmp_path / "prompt.txt").write_text("def read(self):")
    _, out, _ = call(generate.main, "--file", str(tmp_path / "prompt.txt"), "--new-tokens", "5")
    assert out == made["response"] + "\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"def read(self):")))
    assert call(generate.main, "--new-tokens", "5")[1] == out
    asked = iter(["def read(self):", "  ", "import"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(asked, None) or (_ for _ in ()).throw(EOFError))
    _, out, _ = call(generate.main, "--interactive", "--new-tokens", "5", "--json")
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == ["def read(self):", "import"]


def test_generate_fills_in(call, monkeypatch):
    _, out, _ = call(generate.main, "--prompt", "for [MASK] in [MASK][MASK]:", "--json")
    made = json.loads(out)
    assert made["text"].startswith("for") and " in" in made["text"] and made["text"].endswith(":")
    assert made["response"] == "" and made["steps"] == 3
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, out, _ = call(generate.main, "--prompt", "for [MASK] in [MASK][MASK]:")
    assert out.count("\x1b[1m") >= 3 and "░" in out and made["text"] in out.splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", "x", "--new-tokens", "0"], "nothing to fill in"),
        (["--prompt", "x", "--checkpoint", "/nowhere"], "no checkpoint that can be used in /nowhere"),
        (["--file", "/nowhere.txt"], "The prompt /nowhere.txt cannot be read"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature must not be negative"),
        (["--prompt", "x", "--anchor-ratio", "0"], "--anchor-ratio must be above 0"),
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
            "--batch-size", "2", "--output", folder, "--seed", seed, *SIZES, command=["needle"],
        )  # fmt: skip
        assert status == 0 and "memory on: decoding" in text and "writing the memory" in text
    results = json.loads((tmp_path / "a/needle.json").read_text())
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
    assert status == 2 and "--lengths gives it 20" in err

    report = str(tmp_path / "report")
    assert evaluate.main(["compare", f"one={out[0]}", f"two={out[0]},{out[1]}", "--output", report]) == 0
    table = capsys.readouterr().out
    assert "one, memory off (1)" in table and "two, memory on (2)" in table and "repeat 300" in table
    assert (tmp_path / "report/comparison.png").read_bytes().startswith(PICTURE)
    results["settings"]["seed"] = 5
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


def test_exposure_bias_tool(call, trained, tmp_path):
    checkpoint = str(trained / "run/checkpoint")
    status, out, _ = call(
        exposure_bias.main, "--checkpoint", checkpoint, f"{checkpoint}/step-2", "--names", "a", "b", "--samples", "3",
        "--ratios", "0.5,0.9", "--prompt-share", "0.9", "--output", str(tmp_path),
    )  # fmt: skip
    assert status == 0 and "R_EB" in out
    results = json.loads((tmp_path / "exposure_bias.json").read_text())
    points = {(result["name"], result["memory"]): result["points"] for result in results["results"]}
    assert len(points) == 4 and points["a", "off"] == points["b", "off"] != points["a", "on"]
    assert [point["ratio"] for point in points["a", "off"]] == [0.5, 0.9]
    assert (tmp_path / "exposure_bias.png").read_bytes().startswith(PICTURE)


@pytest.mark.parametrize("memory", [False, True])
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


def harness(trained, *arguments, ranks=1):
    keys = ["config=train_configs/debug.toml", f"checkpoint={trained}/run/checkpoint", "memory=on", "model.flavor=tiny",
            "parametric_memory.layer_fraction=0.5", f"parallelism.tensor_parallel_degree={ranks}"]  # fmt: skip
    runner = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *runner, "-m", "memdlm_dist.evaluation.harness", "--model_args", ",".join(keys), *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=500,
    )  # fmt: skip


@pytest.mark.slow
def test_the_harness_runs_its_own_tasks(trained, tmp_path):
    """Run RULER's needle in repeated noise, generated by the harness with the run's tokenizer, on two ranks."""
    done = harness(
        trained, "--tasks", "niah_single_1", "--limit", "3", "--batch_size", "2", "--gen_kwargs", "max_gen_toks=4",
        "--metadata", '{"max_seq_lengths": [400]}', "--output_path", str(tmp_path), "--log_samples", ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "|niah_single_1|" in done.stdout and done.stdout.count("|niah_single_1|") == 1
    (results,) = tmp_path.rglob("results_*.json")
    assert json.loads(results.read_text())["n-samples"]["niah_single_1"]["effective"] == 3
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    assert all(isinstance(json.loads(line)["resps"][0][0], str) for line in samples.read_text().splitlines())


@pytest.mark.parametrize(
    "model_args, message",
    [
        ("memory=on", "error: --model_args must name the run's configuration"),
        ("config=/nowhere.toml", "error: The configuration file /nowhere.toml does not exist"),
    ],
)
def test_the_harness_names_mistakes(monkeypatch, capsys, model_args, message):
    monkeypatch.setattr(sys, "argv", ["harness"])
    assert harness_command(["--tasks", "niah_single_1", "--model_args", model_args]) == 2
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
