"""As much of the Hub's HTTP API as pushing and loading a model takes, on 127.0.0.1, for the real client."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants


OWNER, TOKEN = "someone", "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz" + "01234567"
REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = {
    ("POST", r"/api/repos/create"): "create",
    ("POST", r"/api/validate-yaml"): "validate",
    ("GET", rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?"): "info",
    ("GET", rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)"): "tree",
    ("POST", rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)"): "preupload",
    ("POST", rf"/api/models/{REPOSITORY}/branch/(?P<revision>[^/]+)"): "branch",
    ("POST", rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)"): "commit",
    ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch"): "batch",
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})"): "store",
    ("GET", rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)"): "resolve",
}


class Answer(Exception):
    def __init__(self, status: int, error: str, code: str | None = None):
        self.status, self.error, self.code = status, error, code


@dataclass
class Repository:
    """Commits by their id; `branches` point to them."""

    private: bool
    commits: dict[str, dict] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, summary: str, description: str, files: dict[str, bytes]) -> str:
        commit = hashlib.sha1(f"{branch} {len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = {"summary": summary, "description": description, "files": files}
        self.branches[branch] = commit
        return commit

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = self.branches.get(revision, revision)
        if commit not in self.commits:
            raise Answer(404, f"no revision {revision}", "RevisionNotFound")
        return commit, self.commits[commit]["files"]


@dataclass
class Hub:
    """Its state, and every request as (method, target, headers, body).

    Args:
        failing: part of a target -> status with which requests to it fail; the error repeats the Authorization header.
        warnings: what it says of any README.md.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str, dict, bytes]] = field(default_factory=list)
    failing: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, method: str, target: str, headers: dict, body: bytes):
        """What a route returns: (status, headers, bytes), or JSON."""
        with self.lock:
            self.requests.append((method, target, headers, body))
            for part, status in self.failing.items():
                if part in target:
                    raise Answer(status, f"as arranged, for {headers.get('authorization')}")
            path = unquote(urlsplit(target).path)
            for (allowed, pattern), route in ROUTES.items():
                found = re.fullmatch(pattern, unquote(path) if route == "resolve" else urlsplit(target).path)
                if found and method.replace("HEAD", "GET") == allowed:
                    values = {key: unquote(value) for key, value in found.groupdict().items() if value}
                    allowed_in = headers.get("authorization") == f"Bearer {TOKEN}"
                    return getattr(self, f"_{route}")(body=body, allowed_in=allowed_in, **values)
            raise Answer(404, f"no such route: {method} {target}")

    def _repository(self, repo: str, allowed_in: bool, write: bool = False) -> Repository:
        found = self.repositories.get(repo)
        if found is None or (found.private and not allowed_in):
            raise Answer(404 if allowed_in else 401, "Repository not found", "RepoNotFound")
        if write and not allowed_in:
            raise Answer(403, "You are not allowed to write here")
        return found

    def _create(self, body, allowed_in):
        asked = json.loads(body)
        if not allowed_in:
            raise Answer(401, "Invalid credentials in Authorization header")
        owner = asked.get("organization") or OWNER
        if owner != OWNER:
            raise Answer(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo = f"{owner}/{asked['name']}"
        if repo in self.repositories:
            return 409, {}, json.dumps({"error": "You already created it", "url": f"{self.endpoint}/{repo}"}).encode()
        private = asked.get("private", False) or asked.get("visibility") == "private"
        self.repositories[repo] = Repository(private=private)
        self.repositories[repo].add("main", "initial commit", "", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return {"url": f"{self.endpoint}/{repo}", "name": repo, "id": repo}

    def _validate(self, body, allowed_in):
        return {"errors": [], "warnings": []}

    def _info(self, repo, body, allowed_in, revision="main"):
        found = self._repository(repo, allowed_in)
        commit, files = found.at(revision)
        siblings = [{"rfilename": name} for name in sorted(files)]
        return {"id": repo, "modelId": repo, "sha": commit, "private": found.private, "siblings": siblings, "tags": []}

    def _tree(self, repo, revision, body, allowed_in):
        _, files = self._repository(repo, allowed_in).at(revision)
        return [
            {"type": "file", "path": name, "size": len(data), "oid": git_hash(data)}
            | ({"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 130}} if is_large(name) else {})
            for name, data in sorted(files.items())
        ]

    def _preupload(self, repo, revision, body, allowed_in):
        self._repository(repo, allowed_in, write=True).at(revision)
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if is_large(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
        }

    def _branch(self, repo, revision, body, allowed_in):
        found = self._repository(repo, allowed_in, write=True)
        if revision in found.branches:
            raise Answer(409, "the branch exists")
        found.branches[revision] = found.branches["main"]
        return {}

    def _batch(self, repo, body, allowed_in):
        self._repository(repo, allowed_in, write=True)
        objects = [
            {"oid": each["oid"], "size": each["size"]}
            | ({} if each["oid"] in self.stored else {"actions": {"upload": {"href": self._storage(each["oid"])}}})
            for each in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def _storage(self, oid: str) -> str:
        return f"{self.endpoint}/storage/{oid}"

    def _store(self, oid, body, allowed_in):
        if sha256(body) != oid:
            raise Answer(400, "other bytes than announced")
        self.stored[oid] = body
        return {}

    def _commit(self, repo, revision, body, allowed_in):
        found = self._repository(repo, allowed_in, write=True)
        files, header = dict(found.at(revision)[1]), {}
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                header = value
                if value.get("parentCommit", found.branches[revision]) != found.branches[revision]:
                    raise Answer(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise Answer(400, f"unknown operation {key}")
        commit = found.add(revision, header["summary"], header["description"], files)
        return {"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{repo}/commit/{commit}"}

    def _resolve(self, repo, revision, file, body, allowed_in):
        commit, files = self._repository(repo, allowed_in).at(revision)
        if file not in files:
            raise Answer(404, "Entry not found", "EntryNotFound")
        tag = sha256(files[file]) if is_large(file) else git_hash(files[file])
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": commit}, files[file]


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            answer = self.server.hub.answer(self.command, self.path, headers, self._body())
            status, more, body = answer if isinstance(answer, tuple) else (200, {}, json.dumps(answer).encode())
        except Answer as problem:
            status, body = problem.status, json.dumps({"error": problem.error}).encode()
            more = {"X-Error-Message": problem.error} | ({"X-Error-Code": problem.code} if problem.code else {})
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **more}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *arguments):
        pass


@contextmanager
def hub_stand_in() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub = Hub(endpoint=f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def logged_in_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """A Hub that this process is logged in to.

    Args:
        folder: where no token is.
    """
    with hub_stand_in() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
