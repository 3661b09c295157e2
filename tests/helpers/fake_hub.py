"""A Hugging Face hub on loopback, with the few answers that reading needs: no logging in, no Xet."""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import huggingface_hub
from huggingface_hub import constants

from safelm.io import cache, remote


class FakeHub(http.server.ThreadingHTTPServer):
    """Serves `files[(kind, repository, revision)][path]`, and remembers what was asked for.

    Attributes:
      asked: paths, in order; a HEAD is not counted.
      refused: files that are forbidden (403).
      gated: repositories whose files and descriptions need terms accepted.
      failing: answers to give first, each once: pairs of a status and a body.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[tuple[str, str, str], dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.refused: set[str] = set()
        self.gated: set[str] = set()
        self.failing: list[tuple[int, bytes]] = []
        self.tokens: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def add(self, repository, folder, *, kind="datasets", revision="main", at=""):
        """Adds a folder's files to a revision; returns its commit, by which it is served too."""
        files = {f"{at}{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.files.setdefault((kind, repository, revision), {}).update(files)
        commit = self.commit(kind, repository, revision)
        self.files[kind, repository, commit] = dict(self.files[kind, repository, revision])
        return commit

    def commit(self, kind, repository, revision):
        """Forty hexadecimal digits that the files of a revision decide."""
        parts = [repository.encode()]
        for path, data in sorted(self.files[kind, repository, revision].items()):
            parts += [path.encode(), hashlib.sha1(data).digest()]
        return hashlib.sha1(b"\0".join(parts)).hexdigest()

    def downloads(self):
        """The files asked for, without what is around their names."""
        return [found[1] for path in self.asked if (found := re.search(r"/resolve/[^/]+/(.+)", path))]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_HEAD(self):
        self._serve()

    def do_GET(self):
        self.server.asked.append(urllib.parse.unquote(urllib.parse.urlsplit(self.path).path))
        self._serve()

    def _serve(self):
        if self.server.failing:
            status, body = self.server.failing.pop(0)
            return self._answer(status, body, {"Content-Type": "text/html"})
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if token := self.headers.get("Authorization"):
            self.server.tokens.add(token)
        if found := re.fullmatch(r"/api/(datasets|models)/([\w-]+/[\w.-]+)(?:/revision/([^/]+))?", path):
            self._answer_json(*found.groups(), self._description)
        elif found := re.fullmatch(r"/api/(datasets|models)/([\w-]+/[\w.-]+)/tree/([^/]+)/?(.*)", path):
            self._answer_json(*found.groups()[:3], lambda *_: self._tree(found))
        elif found := re.fullmatch(r"/(datasets/)?([\w-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            self._answer_file("datasets" if found[1] else "models", *found.groups()[1:])
        else:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})

    def _description(self, kind, repository, revision):
        files = self.server.files[kind, repository, revision]
        sha = self.server.commit(kind, repository, revision)
        return {"id": repository, "sha": sha, "siblings": [{"rfilename": path} for path in files]}

    def _tree(self, found):
        kind, repository, revision, folder = found.groups()
        files = self.server.files[kind, repository, revision]
        prefix = f"{folder}/" if folder else ""
        recursive = "recursive=true" in self.path.lower()
        entries = {}
        for path, data in files.items():
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                parent = prefix + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": "0" * 40}
            if recursive or len(parts) == 1:
                entries[path] = {"type": "file", "path": path, "size": len(data), "oid": "0" * 40}
        return list(entries.values()) or None

    def _answer_json(self, kind, repository, revision, make):
        revision = revision or "main"
        if (code := self._refusal(kind, repository, revision)) is not None:
            self._answer(403 if code == "GatedRepo" else 404, b"", {"X-Error-Code": code})
        elif (value := make(kind, repository, revision)) is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refusal(self, kind, repository, revision):
        if repository in self.server.gated:
            return "GatedRepo"
        if (kind, repository, revision) in self.server.files:
            return None
        known = any(key[:2] == (kind, repository) for key in self.server.files)
        return "RevisionNotFound" if known else "RepoNotFound"

    def _answer_file(self, kind, repository, revision, path):
        data = self.server.files.get((kind, repository, revision), {}).get(path)
        if path in self.server.refused:
            self._answer(403, b"", {"X-Error-Message": "ask for access"})
        elif data is None:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        elif found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            self._answer(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})
        else:
            commit = self.server.commit(kind, repository, revision)
            self._answer(200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit})

    def _answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(monkeypatch, folder):
    """A hub that huggingface_hub asks and nothing else, with empty caches under `folder`."""
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(folder / "cache"))
    monkeypatch.setenv(remote.RETRY_VARIABLE, "0")
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template[1] + template[2])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    huggingface_hub.close_session()
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield server
    huggingface_hub.HfFileSystem.clear_instance_cache()
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)
    assert not server.tokens
