"""The words of docstrings and messages, beyond ruff's pydocstyle rules."""

import ast
import functools
import re
from pathlib import Path

FOLDERS = ("memdlm_dist", "tools", "launch", "docs", "tests")
# Words that open a clause about something unnamed: "Of each sample ...", "What the run ...".
CLAUSE_OPENERS = {"of", "what", "whether", "by", "that", "told", "how", "where", "who", "as", "which", "when"}


def docstrings(tree: ast.Module) -> list[ast.Constant]:
    """Return all docstrings: of modules, classes and functions, and those below a dataclass field."""
    scopes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, scopes)]
    values = [statement.value for body in bodies for statement in body if isinstance(statement, ast.Expr)]
    return [value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]


def first_word(text: str) -> str:
    """Return the first word of a docstring, in lower case."""
    match = re.search(r"[A-Za-z]+", text)
    return match.group().lower() if match else ""


@functools.cache
def sources(root: Path) -> dict[str, ast.Module]:
    """Parse all Python files of the repository."""
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
    return {str(path.relative_to(root)): ast.parse(path.read_text()) for path in paths}


def test_the_check_itself():
    tree = ast.parse(
        '"""Module."""\nclass A:\n    x: int\n    """Of x."""\n    def f(self):\n        """Return x."""\n'
    )
    assert sorted(first_word(value.value) for value in docstrings(tree)) == ["module", "of", "return"]


def test_no_docstring_opens_with_a_clause(root):
    wrong = [
        f"{path}:{value.lineno}: {value.value.splitlines()[0]}"
        for path, tree in sources(root).items()
        for value in docstrings(tree)
        if first_word(value.value) in CLAUSE_OPENERS
    ]
    assert not wrong and len(sources(root)) > 200, "\n".join(wrong)


def test_messages_end_with_one_full_stop(root):
    strings = [
        (path, node)
        for path, tree in sources(root).items()
        if path.startswith(("memdlm_dist/", "tools/"))
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    wrong = [f"{path}:{node.lineno}: {node.value}" for path, node in strings if re.search(r"[\w)']\.\.$", node.value)]
    assert not wrong, "\n".join(wrong)


def test_pages_are_in_the_index(root: Path):
    index = (root / "README.md").read_text()
    assert all(f"docs/{page.name}" in index for page in (root / "docs").glob("*.md"))
