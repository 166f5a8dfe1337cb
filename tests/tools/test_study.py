"""Studies: the study file, runs that go on where they stopped, and statistics against scipy's."""

import json
import re
from pathlib import Path

import pytest
from scipy import stats

from memdlm_dist.errors import UserError
from memdlm_dist.evaluation.study import arms, run_queue, study_report, study_results
from memdlm_dist.evaluation.study.paired import difference, first_step_below
from memdlm_dist.evaluation.study.run_queue import Run
from memdlm_dist.evaluation.study.study_results import ArmResult, RunResult, StudyResults
from tests.support.zygote import ROOT
from tools import evaluate, exposure_bias, study

MEMORY_STUDY = ROOT / "launch/memory_study.toml"
DEBUG = """
config = "train_configs/debug.toml"
against = "plain"
flags = "--training.steps 2 --validation.enable --validation.steps 1 --debug.seed {seed} --data.shuffle_seed=1{seed}"
[arms.plain]
flags = "--parametric_memory.no_enable"
[arms.memory]
label = "with memory"
flags = "--optimizer.lr 0.002"
"""


def test_differences_are_those_of_scipy():
    a, b = {0: 0.5, 1: 0.7, 2: 0.4, 7: 0.9}, {0: 0.4, 1: 0.75, 2: 0.2, 3: 9.0}
    for confidence in (0.95, 0.9917):
        expected = stats.ttest_rel([0.5, 0.7, 0.4], [0.4, 0.75, 0.2]).confidence_interval(confidence)
        result = difference(a, b, confidence)  # of the seeds that both have
        assert result.pairs == 3
        assert [result.mean - result.half_width, result.mean + result.half_width] == pytest.approx(list(expected))
    assert difference({0: 1.0}, {0: 0.75}, 0.95).text(2) == "+0.25" and difference({0: 1.0}, {1: 1.0}, 0.95) is None


def test_steps_to_reach_a_loss():
    steps, losses = [0, 50, 100, 150], [2.0, 1.0, 0.6, 0.8]
    assert first_step_below(steps, losses, 0.8) == pytest.approx(75)
    assert first_step_below(steps, losses, 2.5) == 0 and first_step_below(steps, losses, 0.5) is None


def test_overrides_replace_each_other():
    first = {"checkpoint.enable": None, "training.steps": "3", "data.no_shuffle": None}
    second = {"checkpoint.no_enable": None, "training.steps": "4", "data.shuffle": None}
    assert arms.merge(first, second) == second
    assert arms.merge(first, {"training.steps": "5"}) == {**first, "training.steps": "5"}


def test_the_memory_study_is_complete():
    read = arms.read(MEMORY_STUDY)
    runs = [Run(arm, 3) for arm in read.arms]
    run_queue.check(read, runs[::4], list(read.evaluations))  # parses configurations; all take longer
    parsers = {"evaluate.py": evaluate.parser(), "exposure_bias.py": exposure_bias.parser()}
    for name, command in run_queue.commands(read, runs[1], Path("RUN"), list(read.evaluations)).items():
        if name != run_queue.TRAINING:
            parsed, overrides = parsers[Path(command[1]).name].parse_known_args(command[2:])
            assert parsed.checkpoint in ("RUN/checkpoint", ["RUN/checkpoint"]) and parsed.output == Path(f"RUN/{name}")
            assert "--debug.seed=3" in overrides and all(word.startswith("--") for word in overrides)
    # Every arm is in exactly one list of the script, as docs/study.md registered them: 22, and 29 others.
    script = (ROOT / "launch/memory_study.sh").read_text()
    lists = re.findall(r"^(main|rest|sums|largest)\+?=,?(\S+)$", script, re.M)
    main = [arm for name, text in lists if name == "main" for arm in text.split(",")]
    others = [arm for name, text in lists if name != "main" for arm in text.split(",")]
    assert sorted(main + others) == sorted(read.arms) and (len(main), len(others)) == (22, 29)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("against = ", "againts = "), "has the unknown key againts; the keys are config, flags"),
        (('against = "plain"', 'against = "plane"'), "compares plain with plane, which is not an arm"),
        (('config = "train_configs/debug.toml"', ""), "lacks config; add it"),
        (("[arms.plain]", "= 3"), "is not valid TOML"),
        (("--optimizer.lr 0.002", "surplus --optimizer.lr 0.002"), "arms.memory.flags in .* has 'surplus'"),
        (("label", "color"), "unknown key arms.memory.color"),
        (("[arms.memory]", '[arms."a/b"]'), "has the name 'a/b', which cannot be a folder's"),
        (("[arms.plain]", "[evaluations]\ne = 'train.py x'\n[arms.plain]"), "does not begin with evaluate.py needle"),
        (("--optimizer.lr 0.002", "--optimizer.lr '0.002"), "cannot be split into words"),
        (("--optimizer.lr 0.002", "--optimizer.rate 0.002"), "The arm memory cannot run: .*optimizer.rate"),
        (("--validation.enable", ""), "The arm plain measures no held-out loss; set validation.enable"),
    ],
)  # fmt: skip
def test_mistakes_in_a_study_file(change, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = DEBUG.replace(*change)
    assert text != DEBUG
    path = tmp_path / "study.toml"
    path.write_text(text)
    assert study.main(["run", str(path), "--output", str(tmp_path / "runs"), "--seeds", "0,1"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.startswith("error: ") and error.count("\n") == 1, error
    assert not (tmp_path / "runs").exists()


def test_runs_go_on_where_they_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("WORLD_SIZE", "3")  # of this process; every run is a process of its own
    path, output = tmp_path / "study.toml", tmp_path / "runs"
    # The second arm fails: its data do not exist.
    path.write_text(DEBUG.replace("--optimizer.lr 0.002", "--data.train nowhere"))
    command = ["run", str(path), "--output", str(output), "--seeds", "4"]
    assert study.main(command) == 1
    done = capsys.readouterr()
    assert "memory-4: failed: error: There are no shards in nowhere" in done.out and "memory-4" in done.err
    assert re.search(r"plain-4: held-out loss \d\.\d{4} \(", done.out) and "1 runs written to" in done.out
    # A second call starts only what is missing.
    assert study.main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out == "2 runs, 1 of them complete\nmemory-4: training\n"
    assert study.main([*command, "--arms", "plain"]) == 0
    assert capsys.readouterr().out.startswith("1 runs, 1 of them complete\n1 runs written to")
    read = study_results.read(output / study_results.RESULTS)
    run = read.of("plain")[4]
    assert list(read.of("plain")) == [4] and run.steps == [0, 2] and len(run.off) == 2 and not run.on
    config = (output / "plain-4/study.log").read_text()
    assert "--debug.seed=4 --data.shuffle_seed=14 --parametric_memory.no_enable" in config
    # Other flags are other runs.
    path.write_text(DEBUG.replace("--training.steps 2", "--training.steps 3"))
    assert study.main(command) == 2
    assert "plain-4 has the training of other flags than the study file has now" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluations_of_a_study(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path, output = tmp_path / "study.toml", tmp_path / "runs"
    questions = "--tasks multi_value --lengths 192 --samples 2 --new-tokens 4 --values 1 --digits 2"
    path.write_text(
        DEBUG.replace("--validation.enable", "--checkpoint.enable --validation.enable")
        + f'[evaluations]\nwithin = "evaluate.py needle {questions}"\n'
        'faster = "evaluate.py needle --memory on --parametric_memory.learning_rate 1 ' + questions + '"\n'
        'exposure = "exposure_bias.py --samples 2 --ratios 0.5,0.9"\n'
    )
    assert study.main(["run", str(path), "--output", str(output)]) == 0, capsys.readouterr()
    read = study_results.read(output / study_results.RESULTS)
    for arm in ("plain", "memory"):
        run = read.of(arm)[0]
        assert [row[:4] for row in run.scores["within"]] == [["multi_value", 192, m, 2] for m in ("off", "on")]
        assert [row[2] for row in run.scores["faster"]] == ["on"]
        assert run.scores["faster"][0][5] != run.scores["within"][1][5]  # another inner rate
        assert [row[:2] for row in run.exposure["exposure"]] == [[m, r] for m in ("off", "on") for r in (0.5, 0.9)]
        assert set(run.seconds) == {"training", "within", "faster", "exposure"}
        needle = json.loads((output / f"{arm}-0/within/needle.json").read_text())
        assert run.scores["within"][0][5] == pytest.approx(needle["scores"][0]["answer_nll"], abs=1e-5)
    capsys.readouterr()
    assert study.main(["report", str(output / study_results.RESULTS), "--plots", str(tmp_path / "plots")]) == 0
    assert capsys.readouterr().out.count("written to") == 4 == len(list((tmp_path / "plots").glob("*.png")))


def _study(losses: dict[str, dict[int, float]]) -> StudyResults:
    """Build results with final losses by arm and seed; all other numbers follow from the loss."""
    runs = []
    for arm, by_seed in losses.items():
        for seed, loss in by_seed.items():
            on = [] if arm == "plain" else [1.0, loss / 2]
            scores = [["t", length, memory, 10, loss / 2, loss] for length in (64, 128) for memory in ("off", "on")]
            exposure = [[memory, 0.5, 9, 2.0, 2 * loss, loss] for memory in ("off", "on")]
            runs.append(
                RunResult(
                    arm, seed, [0, 10], [2.0, loss], on, {"within": scores}, {"exposure": exposure}, {"training": 3.0}
                )
            )
    table = {arm: ArmResult(arm, "plain") for arm in losses}
    return StudyResults("x.toml", table, runs, tuple(losses))


def test_tables_and_choice_of_runs(tmp_path, capsys):
    losses = {"plain": {0: 0.5, 1: 0.6}, "a": {0: 0.7, 1: 0.9}, "b": {0: 0.4, 1: 0.5}}
    whole = _study(losses)
    text = study_report.tables(whole.select(["a", "b"]), 0.95)
    cells = {line.split("|")[1].strip(): [x.strip() for x in line.split("|")[2:-1]] for line in text.splitlines()[4:6]}
    interval = stats.ttest_rel([0.7, 0.9], [0.5, 0.6]).confidence_interval(0.95)
    expected = f"+0.2500 ({interval.low:+.4f}, {interval.high:+.4f})"
    assert cells["a"] == ["2", "0.8000 ± 0.1414", "plain", expected, "0.4000 ± 0.0707", "never", "3 ± 0"]
    assert cells["b"][5] == "9"  # (2 - 0.5) / (2 - 0.4) and (2 - 0.6) / (2 - 0.5) of 10 steps
    assert re.search(r"\| a +\| all +\| 40\.0 ± 7\.1 +\| \+12\.5 \(-19", text)  # accuracy in per cent
    assert re.search(
        r"\| a +\| off +\| 0\.800 ± 0\.141 +\| 2\.000 ± 0\.000 +\|", text
    )  # R_EB, and at the same positions
    assert "-0.4000" in study_report.tables(whole.select(["b"], [1], against="a"), 0.95)
    path = tmp_path / "study.json"
    for seeds, arm, message in (([0], "c", "There is no arm 'c'"), ([3], "a", "has no run with these seeds")):
        with pytest.raises(UserError, match=message):
            whole.select([arm], seeds)
    path.write_text(json.dumps({"config": "x", "arms": {}, "runs": [{"arm": 1}]}))
    assert study.main(["report", str(path)]) == 2 and "is not a study's results" in capsys.readouterr().err
