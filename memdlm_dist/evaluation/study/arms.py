"""Study file: arms of a study, which are runs of one configuration with different flags, and what is measured on them.

A TOML file with these keys:

- config: TOML file of the runs.
- flags: flags --section.key value of all runs; {seed} stands for the seed of a run.
- against: arm that others are compared with.
- [evaluations]: name = command of tools/, without model and output, such as "evaluate.py needle --lengths 112".
- [arms.NAME]: flags, and optionally against (another arm than the study's) and label.
"""

import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memdlm_dist.errors import UserError, require

# Tools whose results a study can hold, by the words of their command, with the result file that they write.
RESULT_FILES = {
    ("evaluate.py", "needle"): "needle.json",
    ("exposure_bias.py",): "exposure_bias.json",
}
TRAINING = "training"  # name of a run's training, beside the names of its evaluations
# Overrides of the configuration by key; None: the flag takes no value.
Overrides = Mapping[str, str | None]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.]*")
_TAKEN = (TRAINING, "checkpoint", "tb", "comm_traces")  # of a training's own output


@dataclass(frozen=True)
class Evaluation:
    """Evaluation of a trained model by one of the project's tools.

    Attributes:
        tool: words of the command, a key of `RESULT_FILES`.
        arguments: arguments of the tool, without overrides of the configuration.
        overrides: overrides of the configuration, by key.
    """

    name: str
    tool: tuple[str, ...]
    arguments: tuple[str, ...]
    overrides: Overrides


@dataclass(frozen=True)
class Arm:
    """One setting of a study.

    Attributes:
        overrides: overrides of the configuration, by key, with those of all arms; {seed} stands for the seed.
        against: name of the arm that this one is compared with; its own name for that arm itself.
        label: name in tables and plots.
    """

    name: str
    overrides: Overrides
    against: str
    label: str


@dataclass(frozen=True)
class Study:
    """Arms with a common configuration, and evaluations of their models."""

    config: str
    arms: Mapping[str, Arm]
    evaluations: Mapping[str, Evaluation]

    def select(self, kind: str, names: Sequence[str] | None) -> list[str]:
        """Return the chosen names of arms or evaluations, all of them for None.

        Args:
            kind: "arms" or "evaluations".
            names: names to choose.

        Raises:
            UserError: if a name is unknown.
        """
        known: Mapping[str, Any] = getattr(self, kind)
        for name in names or []:
            require(name in known, f"--{kind} names {name!r}, which the study lacks; it has {', '.join(known)}.")
        return list(dict.fromkeys(known if names is None else names))


def read(path: Path) -> Study:
    """Read a study file.

    Raises:
        UserError: if the file is missing or malformed.
    """
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise UserError(f"The study file {path} cannot be read ({error}); check the path.") from None
    except ValueError as error:
        raise UserError(f"The study file {path} is not valid TOML ({error}); correct it.") from None
    _check_keys(path, "", content, {"config": str, "flags": str, "against": str, "evaluations": dict, "arms": dict})
    for key in ("config", "against", "arms"):
        require(key in content, f"The study file {path} lacks {key}; add it.")
    common, _ = _split(path, "flags", content.get("flags", ""))
    arms: dict[str, Arm] = {}
    for name, table in content["arms"].items():
        where = f"arms.{name}"
        _check_name(path, name)
        require(isinstance(table, dict), f"{where} in {path} is not a table; write [{where}].")
        _check_keys(path, f"{where}.", table, {"flags": str, "against": str, "label": str})
        own, rest = _split(path, f"{where}.flags", table.get("flags", ""))
        require(not rest, f"{where}.flags in {path} has {' '.join(rest)!r}; write --section.key value.")
        against = table.get("against", name if name == content["against"] else content["against"])
        arms[name] = Arm(name, merge(common, own), against, table.get("label", name.replace("_", " ")))
    for arm in arms.values():
        require(arm.against in arms, f"{path} compares {arm.name} with {arm.against}, which is not an arm; add it.")
    require(content["against"] in arms, f"against in {path} is {content['against']!r}, which is not an arm; add it.")
    evaluations = {name: _evaluation(path, name, command) for name, command in content.get("evaluations", {}).items()}
    return Study(content["config"], arms, evaluations)


def _evaluation(path: Path, name: str, command: Any) -> Evaluation:
    """Parse one command of [evaluations]."""
    where = f"evaluations.{name}"
    _check_name(path, name)
    require(
        isinstance(command, str), f"{where} in {path} is not a text; write a command, such as 'evaluate.py needle'."
    )
    overrides, words = _split(path, where, command)
    for tool in RESULT_FILES:
        if tuple(words[: len(tool)]) == tool:
            return Evaluation(name, tool, tuple(words[len(tool) :]), overrides)
    tools = " or ".join(" ".join(tool) for tool in RESULT_FILES)
    raise UserError(f"{where} in {path} is {command!r}, which does not begin with {tools}; correct it.")


def _check_name(path: Path, name: str) -> None:
    require(
        _NAME.fullmatch(name) is not None,
        f"{path} has the name {name!r}, which cannot be a folder's; use letters, digits, _ and .",
    )


def _check_keys(path: Path, prefix: str, table: Mapping[str, Any], types: Mapping[str, type]) -> None:
    for key, value in table.items():
        require(key in types, f"{path} has the unknown key {prefix}{key}; the keys are {', '.join(types)}.")
        require(isinstance(value, types[key]), f"{prefix}{key} in {path} is not a {types[key].__name__}; correct it.")


def _split(path: Path, where: str, text: str) -> tuple[dict[str, str | None], list[str]]:
    """Split a command line into overrides of the configuration, by key, and all other words."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"{where} in {path} cannot be split into words ({error}); correct its quotes.") from None
    overrides: dict[str, str | None] = {}
    rest: list[str] = []
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if not word.startswith("--") or "." not in word.partition("=")[0]:
            rest.append(word)
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        overrides[key] = value if equals else None
        if not equals and at < len(words) and not words[at].startswith("--"):
            overrides[key] = words[at]
            at += 1
    return overrides, rest


def merge(*overrides: Overrides) -> dict[str, str | None]:
    """Return overrides of the configuration in which later ones replace earlier ones.

    --section.no_key replaces --section.key, and the other way round.
    """
    result: dict[str, str | None] = {}
    for each in overrides:
        for key, value in each.items():
            section, _, name = key.rpartition(".")
            result.pop(f"{section}.{name.removeprefix('no_') if name.startswith('no_') else 'no_' + name}", None)
            result[key] = value
    return result
