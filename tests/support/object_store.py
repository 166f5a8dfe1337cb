"""S3 server (moto) on loopback behind a proxy that can simulate an outage."""

import contextlib
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from memdlm_dist.runtime.single_process import free_port

BUCKET = "memdlm"


class Proxy:
    """TCP proxy of a local port; `shut` closes all connections and refuses new ones until `open`."""

    def __init__(self, port: int):
        self.port, self._target_port, self._pairs = free_port(), port, []
        self.open()

    def open(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for pair in self._pairs:
            for end in pair:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._pairs.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                pair = (client, socket.create_connection(("127.0.0.1", self._target_port)))
            except OSError:  # the server has ended
                client.close()
                continue
            self._pairs.append(pair)
            threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(client: socket.socket, server: socket.socket) -> None:
    with selectors.DefaultSelector() as selector, client, server:
        selector.register(client, selectors.EVENT_READ, server)
        selector.register(server, selectors.EVENT_READ, client)
        with contextlib.suppress(OSError):
            while True:
                for key, _ in selector.select():
                    data = key.fileobj.recv(1 << 16)
                    if not data:
                        return
                    key.data.sendall(data)


@dataclass
class ObjectStore:
    proxy: Proxy
    environment: dict[str, str]

    def shut_for(self, seconds: float) -> None:
        """Simulate an outage of some seconds."""
        self.proxy.shut()
        timer = threading.Timer(seconds, self.proxy.open)
        timer.daemon = True
        timer.start()


@contextlib.contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Start moto's S3 server with one empty bucket; `environment` sets the endpoint of boto3 and s3fs."""
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as server:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            proxy = Proxy(port)
            environment = {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}", "AWS_ACCESS_KEY_ID": "someone",
                "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
            }  # fmt: skip
            os.environ.update(environment)
            import s3fs

            s3fs.S3FileSystem.clear_instance_cache()  # instances of an earlier store
            s3fs.S3FileSystem().mkdir(BUCKET)
            yield ObjectStore(proxy, environment)
        finally:
            server.kill()
