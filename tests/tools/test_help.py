"""`--help` of every tool and subcommand: its purpose, its examples, its groups of options."""

import argparse
import importlib
import re
import shlex
import subprocess

import pytest

from tests.support.zygote import ROOT

SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.s[hb]*"))
TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: command for action in actions for name, command in action.choices.items()}


def parsers(name: str) -> dict[str, argparse.ArgumentParser]:
    """Return a tool's parsers by subcommand; some tools need no subcommand, and have a parser for each other one."""
    module = importlib.import_module(f"tools.{name}")
    alone = {"bench": ["decode", "prepare", "write"], "prepare_data": ["inspect", "merge"]}.get(name, [])
    others = {command: getattr(module, f"{command}_parser")() for command in alone}
    return {"": module.parser(), **subcommands(module.parser()), **others}


def examples(text: str) -> list[list[str]]:
    """Return the example command lines of a help text, split into words."""
    lines = re.findall(r"^  ((?:echo .* \| )?(?:python|bash) .*)$", text.replace("\\\n", ""), re.MULTILINE)
    return [shlex.split(line.split(" | ")[-1], comments=True) for line in lines]


@pytest.mark.parametrize("name", TOOLS)
def test_help_has_purpose_examples_and_groups(name):
    script = f"launch/{name}.sh" if (ROOT / f"launch/{name}.sh").exists() else f"tools/{name}.py"
    for command, parser in parsers(name).items():
        where = f"{name} {command}"
        purpose, blank, *rest = parser.description.splitlines()
        assert 20 < len(purpose) <= 120 and purpose.endswith(".") and not blank, where
        assert len(parser.format_usage().splitlines()) <= 3, where
        assert parser.format_help().startswith(f"usage: {name}."), where

        command_lines = examples(parser.description)
        assert command_lines, f"{where} has no example"
        for _, tool, *arguments in command_lines:
            assert tool == script and (not command or arguments[0] == command), where
            for path in (word for word in arguments if word.endswith(".toml")):
                assert (ROOT / path).is_file(), f"{where}: {path}"
            words = arguments[1:] if command else arguments
            _, rest = parser.parse_known_args(words)  # exits on an option that is misspelt or missing
            assert all("." in word for word in rest if word.startswith("--")), f"{where}: {rest}"

        # The first two groups are argparse's own: positional arguments and options.
        unnamed, named = parser._action_groups[:2], parser._action_groups[2:]
        alone = [action for group in unnamed for action in group._group_actions]
        assert [action.dest for action in alone] == ["help"], where
        assert all(group.title and group._group_actions for group in named), where
        for action in (action for group in named for action in group._group_actions):
            if isinstance(action, argparse._SubParsersAction):
                assert all(choice.help for choice in action._choices_actions), where
                continue
            text = action.help or ""
            stated = re.search(r"\(default: ([\d.]+)\)", text)
            assert not stated or action.default in (None, float(stated[1])), f"{where} {action.dest}: {text}"
            assert len(text) > 10 and not text.startswith(("of ", "default", "what ", "how ")), f"{where} {action.dest}"


def test_help_of_launch_scripts():
    assert len(SCRIPTS) == 10
    for script in SCRIPTS:
        done = subprocess.run(["bash", script, "-h"], cwd=ROOT, capture_output=True, text=True, check=True)
        purpose, _, usage, *lines = done.stdout.splitlines()
        assert 20 < len(purpose) <= 120 and purpose.endswith("."), script
        assert usage.startswith("Usage: ") and not any(line.startswith(("#", "SBATCH", "set ")) for line in lines), (
            script
        )
        assert any(re.match(rf"  ([A-Z_]+=\S+ )*(bash|sbatch .*) ?{script}", line) for line in lines), script
        assert len(lines) > 5 and max(map(len, done.stdout.splitlines())) <= 120, script
