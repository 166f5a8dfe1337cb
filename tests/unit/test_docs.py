"""The commands, configurations and pictures of the documentation."""

import importlib
import re
import runpy
import shlex
from pathlib import Path
from xml.etree import ElementTree

import pytest

from memdlm_dist.config import parse_config
from memdlm_dist.runtime.entry_point import parse_with_overrides


def blocks(root: Path, language: str) -> list[tuple[str, str]]:
    """Return (page, text) of all fenced blocks in a language."""
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    return [
        (page.name, block)
        for page in pages
        for block in re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)
    ]


def commands(root: Path) -> list[tuple[str, list[str]]]:
    """Return (page, words) of all shell commands, shell variables replaced and optional parts left out."""
    found = []
    variables: dict[str, str] = {}
    for page, block in blocks(root, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if assignment := re.fullmatch(r'([A-Z]+)=("[^"]*"|\S*)\s*(#.*)?', line):
                variables[assignment[1]] = assignment[2].strip('"')
                continue
            line = re.sub(r"\$([A-Z]+)", lambda name: variables[name[1]], line)
            line = re.sub(r"(?<=\s)\[[a-z-][^\]]*\](?=\s|$)", "", line)  # optional; "[MASK]" is a token
            words = [word for word in shlex.split(line, comments=True) if word != "..."]
            if words:
                found.append((page, words))
    return found


def check_keys(root: Path, words: list[str], overrides: list[str]) -> None:
    """Parse a command's configuration, or the debug one in place of CONFIG.toml, with its overrides."""
    named = [root / word for word in words if word.endswith(".toml") and word.startswith("train_configs/")]
    parse_config.parse(["--job.config_file", str((named or [root / "train_configs/debug.toml"])[0]), *overrides])


def test_commands_of_tools_can_be_parsed(root, capsys):
    parsed = 0
    for page, words in commands(root):
        named = [i for i, word in enumerate(words) if re.fullmatch(r"tools/\w+\.py", word)]
        if not named:
            continue
        name, argv = Path(words[named[0]]).stem, words[named[0] + 1 :]
        module, parser = importlib.import_module(f"tools.{name}"), "parser"
        if argv and hasattr(module, f"{argv[0]}_parser"):
            parser, argv = f"{argv[0]}_parser", argv[1:]
        elif name == "bench" and argv and argv[0].endswith(".toml"):
            argv = argv[1:]  # the bench takes its configuration from the argument list itself
        try:
            _, overrides = parse_with_overrides(getattr(module, parser)(), argv)
        except SystemExit:
            pytest.fail(f"{page}: {shlex.join(words)}: {capsys.readouterr().err}")
        check_keys(root, words, overrides)
        parsed += 1
    assert parsed > 30


def test_overrides_of_training_commands_exist(root):
    checked = 0
    for _, words in commands(root):
        if any(re.fullmatch(r"launch/(train|multinode|quickstart)\.sh", word) for word in words):
            first = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
            check_keys(root, words, words[first:])
            checked += first < len(words)
    assert checked > 2


def test_configurations_can_be_parsed(root, tmp_path):
    found = blocks(root, "toml")
    for i, (_, block) in enumerate(found):
        path = tmp_path / f"{i}.toml"
        path.write_text(block)
        parse_config.parse(["--job.config_file", str(path)])
    assert found


def test_pictures_are_those_of_the_script(root):
    script = runpy.run_path(str(root / "docs" / "draw_pictures.py"))
    for name, draw in script["PICTURES"].items():
        drawn = draw()
        assert (root / "docs" / "pictures" / name).read_text() == drawn, "run python docs/draw_pictures.py"
        ElementTree.fromstring(drawn)
    assert {room for layer in script["room_layers"]() for room in layer} == set(script["ROOMS"]) - {"tools"}
