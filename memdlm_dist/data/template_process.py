"""Rendering of chat templates in a separate process, because a template is untrusted code and may never end.

The process renders in Jinja's sandbox, with limits on memory and time.
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

TIMEOUT_SECONDS = 10  # per rendering
_MEMORY = 1 << 30  # bytes


class TemplateProcess:
    """Chat template that another process renders.

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
        self._start()

    def render(self, **values: Any) -> str:
        """Render the template with variables that can be written as JSON.

        Raises:
            jinja2.TemplateError: if the template raises an error, or exceeds a limit.
        """
        if self._process.poll() is not None:
            self._start()
        return self._send(values)

    def _start(self) -> None:
        if self._end is not None:
            self._end()  # ends the previous process
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            self._send(self._setup)
        except jinja2.TemplateError:
            self._end()
            raise

    def _send(self, question: dict[str, Any]) -> str:
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
        return str(answer["text"])


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
    template, max_length, seconds = None, 0, TIMEOUT_SECONDS
    for line in sys.stdin:
        question = json.loads(line)
        signal.alarm(seconds)  # ends this process after `seconds`
        try:
            if template is None:
                max_length, seconds, text = question["max_length"], question["seconds"], ""
                template = _environment(question["constants"]).from_string(question["source"])
            else:
                text = template.render(**question)
            if len(text) > max_length:
                raise jinja2.TemplateError(f"rendering writes more than {max_length:,} characters")
            answer = {"text": text}
        except MemoryError:
            answer = {"problem": f"rendering needs more than {_MEMORY:,} bytes of memory"}
        except Exception as error:  # a template can raise anything
            answer = {"problem": str(error) if isinstance(error, jinja2.TemplateError) else repr(error)[:200]}
        signal.alarm(0)
        print(json.dumps(answer), flush=True)


class _Environment(ImmutableSandboxedEnvironment):
    # Jinja evaluates intercepted operators at rendering. Otherwise it folds constants such as 'x' * 10 ** 9 at parsing.
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
