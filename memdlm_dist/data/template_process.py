"""Chat templates rendered in a process of their own: a template is somebody else's program, and may never end.

The process has Jinja's sandbox, a limit of memory and an alarm clock, and no other work.
"""

import contextlib
import json
import resource
import signal
import subprocess
import sys
import weakref
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 10  # of one rendering
_MEMORY = 1 << 30  # bytes


class TemplateProcess:
    """A template that is rendered by another process.

    Args:
        source: of the template, for Jinja.
        constants: what it can name besides the values of a rendering.
        max_length: characters of a rendering, at most.

    Raises:
        jinja2.TemplateError: if the template cannot be read.
    """

    def __init__(self, source: str, constants: dict[str, Any], max_length: int):
        self._first = {"source": source, "constants": constants, "max_length": max_length, "seconds": SECONDS}
        self._end: weakref.finalize | None = None
        self._start()

    def render(self, **values: Any) -> str:
        """Render the template with values that JSON can hold.

        Raises:
            jinja2.TemplateError: if the template raises an error, or reaches a limit.
        """
        if self._process.poll() is not None:
            self._start()
        return self._ask(values)

    def _start(self) -> None:
        if self._end is not None:
            self._end()  # of the process before it
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self._ask(self._first)
        except jinja2.TemplateError:
            self._end()
            raise

    def _ask(self, question: dict[str, Any]) -> str:
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
        except (OSError, ValueError):  # it ended without an answer
            status = process.wait()
            late = status == -signal.SIGALRM
            problem = f"it takes longer than {SECONDS} s" if late else f"its process ended with status {status}"
            raise jinja2.TemplateError(problem) from None
        if "problem" in answer:
            raise jinja2.TemplateError(answer["problem"])
        return str(answer["text"])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(OSError):
            pipe.close()


def _serve() -> None:
    """Answer each line of standard input with a line: first whether the template can be read, then renderings."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    template, max_length, seconds = None, 0, SECONDS
    for line in sys.stdin:
        question = json.loads(line)
        signal.alarm(seconds)  # ends this process
        try:
            if template is None:
                max_length, seconds, text = question["max_length"], question["seconds"], ""
                template = _environment(question["constants"]).from_string(question["source"])
            else:
                text = template.render(**question)
            if len(text) > max_length:
                raise jinja2.TemplateError(f"it writes more than {max_length:,} characters")
            answer = {"text": text}
        except MemoryError:
            answer = {"problem": f"it needs more than {_MEMORY:,} bytes of memory"}
        except Exception as error:  # whatever the template does
            answer = {"problem": str(error) if isinstance(error, jinja2.TemplateError) else repr(error)[:200]}
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


class _Environment(ImmutableSandboxedEnvironment):
    # Jinja computes what it intercepts while it renders, not already while it reads the template.
    intercepted_binops = frozenset(("*", "**"))


def _environment(constants: dict[str, Any]) -> ImmutableSandboxedEnvironment:
    def refuse(text: str) -> str:
        raise jinja2.TemplateError(text)

    environment = _Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {**constants, "raise_exception": refuse}
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    return environment


if __name__ == "__main__":
    _serve()
