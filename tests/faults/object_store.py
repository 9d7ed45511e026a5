"""A real S3 server on loopback (moto), and a proxy before it that answers some requests with 500 or late."""

import contextlib
import http.client
import random
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BUCKET = "runs"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[int]:
    """Run moto's server; yield its port."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    _request(port, "PUT", f"/{BUCKET}")
    yield port
    server.stop()


@pytest.fixture
def bucket(s3_server, monkeypatch) -> str:
    """Point this process's credentials at the server; return a URL that no other test uses."""
    _point_at(monkeypatch, s3_server)
    return f"s3://{BUCKET}/{random.randrange(1 << 40):010x}"


@pytest.fixture
def faulty_bucket(s3_server, monkeypatch) -> Iterator[tuple[str, "Faults"]]:
    """As `bucket`, by way of a proxy; yield its URL and the faults that it is to make."""
    faults = Faults()
    with _proxy(s3_server, faults) as port:
        _point_at(monkeypatch, port)
        yield f"s3://{BUCKET}/{random.randrange(1 << 40):010x}", faults


class Faults:
    """What share of requests is answered with 500, before or after the server has done them, and how late."""

    def __init__(self) -> None:
        self.share_500 = 0.0
        self.delay_s = 0.0
        self.n_500 = 0
        self._random = random.Random(0)

    def fails(self) -> bool:
        return self._random.random() < self.share_500


def _point_at(monkeypatch, port: int) -> None:
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
    }.items():
        monkeypatch.setenv(name, value)


def _request(port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.getheaders(), answer.read()


@contextlib.contextmanager
def _proxy(upstream: int, faults: Faults) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            time.sleep(faults.delay_s)
            lost_before, lost_after = faults.fails(), faults.fails()
            if not lost_before:
                answer = _request(upstream, self.command, self.path, body, dict(self.headers))
                if not lost_after:
                    return self._answer(*answer)
            faults.n_500 += 1
            return self._answer(500, [], b"injected")

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on

        def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            length = next((value for name, value in headers if name.lower() == "content-length"), str(len(body)))
            skipped = {"content-length", "transfer-encoding", "connection", "server", "date"}
            for name, value in headers:
                if name.lower() not in skipped:
                    self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
