"""A web server on the loopback that drops connections and cuts answers, as a bad network does."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        number = self.server.count(self.path)
        if self.server.status:
            self.send_error(self.server.status)
        elif self.server.drop_every and number % self.server.drop_every == 0:
            self.server.dropped += 1
        elif (
            self.server.cut_every
            and (number + 1) % self.server.cut_every == 0
            and Path(self.translate_path(self.path)).is_file()
        ):
            self.server.cut += 1
            content = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


class FaultyServer(ThreadingHTTPServer):
    """Counts its answers; every `drop_every`-th is none, every `cut_every`-th ends in the middle; 0 is never.

    Attributes:
        status: answer everything with this code; 0 is normal.
        asked: number of requests of each path.
        dropped, cut: faults so far.
    """

    daemon_threads = True

    def __init__(self, folder: Path, drop_every: int, cut_every: int) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.drop_every, self.cut_every, self.status = drop_every, cut_every, 0
        self.asked: Counter[str] = Counter()
        self.dropped = self.cut = 0
        self.lock = threading.Lock()

    def count(self, path: str) -> int:
        with self.lock:
            self.asked[path] += 1
            return self.asked.total()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve(folder: Path, drop_every: int = 0, cut_every: int = 0) -> Iterator[FaultyServer]:
    """Serve a folder for the time of a block."""
    server = FaultyServer(folder, drop_every, cut_every)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
