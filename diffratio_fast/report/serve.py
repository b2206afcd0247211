"""A live view: the report of a run on this machine's loopback address, regenerated for every request."""

from __future__ import annotations

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from diffratio_fast.report.page import page
from diffratio_fast.report.run_files import read
from diffratio_fast.storage.reading import DAMAGE, one_line

REFRESH = 10
"""Seconds after which the browser loads the page again."""
ADDRESS = "127.0.0.1"


def server(root: Path, port: int) -> ThreadingHTTPServer:
    """Return a server of the report of ``root`` on loopback; ``port`` 0 chooses a free one. Reads only."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # a page of another site could name this server by a host name of its own (DNS rebinding)
            if self.headers.get("Host", "").rpartition(":")[0] not in (ADDRESS, "localhost"):
                self.send_error(403)
                return
            if self.path != "/":
                self.send_error(404)
                return
            try:
                content = page(read(root), refresh=REFRESH).encode()
            except DAMAGE as error:
                self.send_error(503, f"damaged metrics: {one_line(error)[:100]}")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            """Log nothing: a page sends a request every few seconds."""

    return ThreadingHTTPServer((ADDRESS, port), Handler)
