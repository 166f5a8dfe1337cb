"""Rendering of chat templates in a separate process, because a template is untrusted code and may never end.

The process renders in Jinja's sandbox, with limits on memory and time. Extensions, filters and variables are those of
Hugging Face's `apply_chat_template`, so that its templates give the same text and the same response spans.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from datetime import datetime
from typing import Any, NamedTuple

import jinja2
from jinja2 import ext, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

TIMEOUT_SECONDS = 10  # per rendering
_MEMORY = 1 << 30  # bytes
_MISPLACED = "a generation block is inside a macro, a call, a filter, a variable or another generation block"


class Rendering(NamedTuple):
    """Text of a conversation, and (start, end) of each generation block in it, counted in characters."""

    text: str
    spans: list[tuple[int, int]]


class TemplateProcess:
    """Chat template that another process renders.

    Attributes:
        has_generation_blocks: the template marks responses by `{% generation %} ... {% endgeneration %}`.

    Args:
        source: the template's Jinja source.
        constants: variables of every rendering.
        max_length: maximum number of characters of a rendering.

    Raises:
        jinja2.TemplateError: if the template cannot be parsed.
    """

    def __init__(self, source: str, constants: dict[str, Any], max_length: int):
        self._setup = {"source": source, "constants": constants, "max_length": max_length, "seconds": TIMEOUT_SECONDS}
        self._end: weakref.finalize | None = None
        self.has_generation_blocks: bool = self._start()["has_generation_blocks"]

    def render(self, **values: Any) -> Rendering:
        """Render the template with variables that can be written as JSON.

        Raises:
            jinja2.TemplateError: if the template raises an error, or exceeds a limit.
        """
        if self._process.poll() is not None:
            self._start()
        answer = self._send(values)
        return Rendering(answer["text"], [(start, end) for start, end in answer["spans"]])

    def _start(self) -> dict[str, Any]:
        if self._end is not None:
            self._end()  # ends the previous process
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            return self._send(self._setup)
        except jinja2.TemplateError:
            self._end()
            raise

    def _send(self, question: dict[str, Any]) -> dict[str, Any]:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):  # the process ended without an answer
            status = process.wait()
            timed_out = status == -signal.SIGALRM
            problem = (
                f"rendering takes longer than {TIMEOUT_SECONDS} s"
                if timed_out
                else f"the rendering process ended with status {status}"
            )
            raise jinja2.TemplateError(problem) from None
        if "problem" in answer:
            raise jinja2.TemplateError(answer["problem"])
        return dict(answer)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()


def _serve() -> None:
    """Answer each line of standard input with one line: the first parses the template, each further one renders it."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    renderer, max_length, seconds = None, 0, TIMEOUT_SECONDS
    answer: dict[str, Any]
    for line in sys.stdin:
        question = json.loads(line)
        signal.alarm(seconds)  # ends this process after `seconds`
        try:
            if renderer is None:
                max_length, seconds = question["max_length"], question["seconds"]
                renderer = _Renderer(question["source"], question["constants"])
                answer = {"has_generation_blocks": renderer.generation.is_used}
            else:
                text, spans = renderer.render(question)
                if len(text) > max_length:
                    raise jinja2.TemplateError(f"rendering writes more than {max_length:,} characters")
                text.encode()
                answer = {"text": text, "spans": spans}
        except MemoryError:
            answer = {"problem": f"rendering needs more than {_MEMORY:,} bytes of memory"}
        except UnicodeEncodeError:  # half a surrogate pair
            answer = {"problem": "rendering is not valid Unicode"}
        except Exception as error:  # a template can raise anything
            answer = {"problem": str(error) if isinstance(error, jinja2.TemplateError) else repr(error)[:200]}
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


class _Environment(ImmutableSandboxedEnvironment):
    # Jinja evaluates intercepted operators at rendering. Otherwise it folds constants such as 'x' * 10 ** 9 at parsing.
    intercepted_binops = frozenset(("*", "**"))


class _Generation(ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, which writes its body unchanged.

    Attributes:
        is_used: the template contains a generation block.
        body: text of a block that the template has rendered but not written yet.
    """

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.is_used = False
        self.body: str | None = None

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse a block as a call of `_render` with the block's body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.is_used = True
        return nodes.CallBlock(self.call_method("_render", lineno=line), [], [], body, lineno=line)

    def _render(self, caller: Callable[[], str]) -> str:
        body = caller()
        if self.body is not None:
            raise jinja2.TemplateError(_MISPLACED)
        self.body = body
        return body


class _Renderer:
    """Template in a sandboxed environment with the contents of Hugging Face's."""

    def __init__(self, source: str, constants: dict[str, Any]):
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, ext.loopcontrols])
        environment.globals |= {**constants, "raise_exception": _refuse, "strftime_now": _strftime_now}
        environment.filters["tojson"] = _to_json
        generation = environment.extensions[_Generation.identifier]
        assert isinstance(generation, _Generation)
        self.generation = generation
        self._template = environment.from_string(source)

    def render(self, values: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and the spans of its generation blocks.

        Raises:
            jinja2.TemplateError: if a generation block is not written directly, so that its position is unknown.
        """
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        length = 0
        self.generation.body = None
        for piece in self._template.generate(tools=None, documents=None, **values):
            if (body := self.generation.body) is not None:
                if piece != body:
                    raise jinja2.TemplateError(_MISPLACED)
                spans.append((length, length + len(piece)))
                self.generation.body = None
            pieces.append(piece)
            length += len(piece)
        if self.generation.body is not None:
            raise jinja2.TemplateError(_MISPLACED)
        return "".join(pieces), spans


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(time_format: str) -> str:
    return datetime.now().strftime(time_format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not Jinja's own filter, which escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    _serve()
