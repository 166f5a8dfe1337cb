"""A server with the part of the Hugging Face hub's protocol that downloads use, for tests without a network."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Server of repositories: `org/name` -> (file -> content), or -> the error that the hub gives."""

    daemon_threads = True

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes] | str]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.downloaded: list[str] = []  # files, in the order of their requests
        self.described: list[str] = []  # repositories whose lists of files were requested

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].rstrip("/")
        api = re.fullmatch(
            r"/api/(?:models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(/.+)?)?", path
        )
        resolve = re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or resolve
        files = self.server.repositories.get(match[1] if match else "", "RepoNotFound")
        if api and api[2] in (None, "revision"):
            self.server.described.append(api[1])
        if isinstance(files, str):
            self._answer(403 if files == "GatedRepo" else 401, X_Error_Code=files, X_Error_Message=files)
        elif api and api[3] not in (None, "main", COMMIT):
            self._answer(404, X_Error_Code="RevisionNotFound")
        elif api and api[4]:  # no repository has subfolders
            self._answer(404, X_Error_Code="EntryNotFound")
        elif api and api[2] == "tree":
            self._answer_json([_description(name, content) for name, content in files.items()])
        elif api and api[2] == "paths-info":
            form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self._answer_json([_description(name, files[name]) for name in form.get("paths", []) if name in files])
        elif api:
            self._answer_json({"id": api[1], "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]})
        elif resolve and resolve[3] in files:
            content = files[resolve[3]]
            if self.command == "GET":
                self.server.downloaded.append(resolve[3])
            self._answer(200, content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        else:
            self._answer(404, X_Error_Code="EntryNotFound")

    def _answer_json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    do_HEAD = do_POST = do_GET


def _description(name: str, content: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha256(content).hexdigest()}


@contextmanager
def serving(repositories: Mapping[str, Mapping[str, bytes] | str]) -> Iterator[HubServer]:
    """Serve repositories until the end of the context."""
    server = HubServer(repositories)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, as a repository."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
