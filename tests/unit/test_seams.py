"""Private names of other projects stay in compat/, imports patch nothing, and docs links resolve."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

OURS = ("memdlm_dist", "tools", "launch")
OTHERS = "torch|torchtitan|torchdata|streaming|lm_eval|tokenizers|tyro|fsspec|transformers|safetensors"
# An underscored module or name in an import, or an underscored attribute of a module.
PRIVATE = (
    re.compile(rf"^\s*(?:from|import) (?:{OTHERS})(?:\.\w+)*\._\w+", re.M),
    re.compile(rf"^\s*from (?:{OTHERS})[\w.]* import (?:[^#\n]*[ (,])?_\w+", re.M),
    re.compile(rf"\b(?:{OTHERS})(?:\.\w+)*\._[a-z]\w*"),
)


def sources(root):
    for folder in OURS:
        yield from (path for path in sorted((root / folder).rglob("*.py")))


def test_private_names_of_other_projects_are_in_compat_alone(root):
    found = []
    for path in sources(root):
        text = path.read_text()
        if "compat" not in path.parts:
            found += [f"{path.relative_to(root)}: {match[0].strip()}" for p in PRIVATE for match in p.finditer(text)]
    assert not found
    seams = "\n".join(path.read_text() for path in (root / "memdlm_dist/compat").glob("*.py"))
    assert all(pattern.search(seams) for pattern in PRIVATE), "every pattern matches something in compat/"


def test_the_package_is_its_rooms(root):
    assert sorted(path.name for path in (root / "memdlm_dist").glob("*.py")) == ["__init__.py", "errors.py", "train.py"]
    names = Counter(path.name for path in sources(root) if path.name != "__init__.py")
    assert not [name for name, count in names.items() if count > 1]


IMPORTING = """
import importlib, pkgutil, sys, types
sys.modules.setdefault("streaming.vision", types.ModuleType("streaming.vision"))  # beside a CPU build of torch
import torch, torchtitan.train
from torchtitan.models.moe import utils
from torchtitan.protocols import model_converter, train_spec
from streaming.base.shared import prefix
from streaming.base.storage.download import DOWNLOADER_MAPPINGS

def state():
    return [
        torch.histc, torch._utils._get_available_device_type, vars(torch.cpu).copy(),
        torchtitan.train.CheckpointManager, utils.generate_permute_indices, prefix._each_prefix_int,
        dict(DOWNLOADER_MAPPINGS), dict(train_spec._extra_train_specs),
        dict(model_converter._registry_model_converter_cls),
    ]

before = state()
import memdlm_dist
for module in pkgutil.walk_packages(memdlm_dist.__path__, "memdlm_dist."):
    if module.name != "memdlm_dist.train":  # an entry point, which prepares the machine
        importlib.import_module(module.name)
assert state() == before, [a for a, b in zip(state(), before) if a != b]
assert len([name for name in sys.modules if name.startswith("memdlm_dist.")]) > 80
"""


def test_importing_patches_nothing(root):
    pytest.importorskip("lm_eval")
    done = subprocess.run([sys.executable, "-c", IMPORTING], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def heading_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub derives from a page's headings."""
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def test_links_of_the_documentation_lead_somewhere(root):
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    broken, count = [], 0
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.S)):
            if "://" in target:
                continue
            count += 1
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            if not linked.exists() or (anchor and anchor not in heading_anchors(Path(linked).read_text())):
                broken.append(f"{page.name}: {target}")
    assert not broken and count > 20
    assert len((root / "README.md").read_text().splitlines()) <= 200
