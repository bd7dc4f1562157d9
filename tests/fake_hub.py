"""A Hub on loopback: as much of its protocol as a push and a pull need, and its refusals.

Written from what the protocol is (repositories, preupload, Git LFS, commits, resolve), so that
huggingface_hub talks to it as to the real one. Like there, small texts are kept in commits and
safetensors by Git LFS; a missing repository and a private one look alike to strangers; the card's
metadata is checked.
"""

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
import yaml

TOKENS = {"hf_me": ("me", True), "hf_reader": ("me", False)}
"""Token: (owner, may write)."""
LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "other"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}


@dataclass
class Repo:
    """A repository: its commits, the last one at the end, each the files as they then were."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def add(self, files: dict[str, bytes]) -> str:
        """One more commit on top of the last; gives its id."""
        whole = {**(list(self.commits.values()) or [{}])[-1], **files}
        oid = hashlib.sha1(repr((sorted(whole.items()), len(self.commits))).encode()).hexdigest()
        self.commits[oid] = whole
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """(commit, files) of main or of a commit; KeyError where there is none."""
        oid = list(self.commits)[-1] if revision == "main" else revision
        return oid, self.commits[oid]


class FakeHub:
    """Its address, its repositories, what was stored by LFS, and what was asked of it."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.broken: int | None = None
        """The status that every request is answered with, None where it works."""
        self.endpoint = ""

    def make(self, name: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """A repository with one commit."""
        self.repos[name] = Repo(private)
        return self.repos[name].add(files)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    hub = FakeHub()

    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub that huggingface_hub, in this process, takes for the real one; `me` is logged in.

    What HF_ENDPOINT and the like say is read when huggingface_hub is imported, which other tests
    have done before. Xet, which does not speak HTTP, is left out: LFS carries the files.
    """
    from huggingface_hub import constants

    with fake_hub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        address = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", "hf_me")
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    # -- which request is which -----------------------------------------------------------------

    def _answer(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{method} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        owner, writes = TOKENS.get(token, ("", False))
        name = r"/(\w+/[\w.-]+)"
        if self.hub.broken is not None:
            self._json({"error": "out of order"}, self.hub.broken)
        elif token and not owner:
            self._json({"error": "Invalid credentials in Authorization header"}, 401)
        elif path == "/api/validate-yaml":
            self._validate(json.loads(body))
        elif found := re.fullmatch(r"/lfs/(\w{64})", path):
            whole = hashlib.sha256(body).hexdigest() == found[1]
            if token or not (whole or method == "GET"):  # a store must not be told who asks
                self._json({"error": "not for this store"}, 400)
                return
            if method == "PUT":
                self.hub.stored[found[1]] = body
            self._send(self.hub.stored[found[1]] if method == "GET" else b"", 200)
        elif method == "POST" and not owner:
            self._json({"error": "Invalid username or password."}, 401)
        elif method == "POST" and not writes:
            self._json({"error": "this token may only read"}, 403)
        elif path == "/api/repos/create":
            self._create(json.loads(body), owner)
        elif re.fullmatch(f"/api/models{name}/preupload/main", path):
            self._preupload(json.loads(body))
        elif re.fullmatch(rf"{name}\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(body))
        elif found := re.fullmatch(f"/api/models{name}/commit/main", path):
            self._commit(body, found[1])
        elif found := re.fullmatch(rf"/api/models{name}(?:/revision/([\w.-]+))?", path):
            self._info(owner, found[1], found[2] or "main")
        elif found := re.fullmatch(rf"{name}/resolve/([\w.-]+)/(.+)", path):
            self._resolve(owner, *found.groups())
        else:
            self._json({"error": f"no such page: {path}"}, 404)

    # -- writing -----------------------------------------------------------------------------------

    def _create(self, asked: dict, owner: str) -> None:
        name = f"{asked.get('organization') or owner}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        if not name.startswith(f"{owner}/"):
            message = "You don't have the rights to create a model under this namespace"
            self._json({"error": message}, 403)
        elif name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": url}, 409)
        else:
            private = asked.get("visibility") == "private"
            self.hub.make(name, {".gitattributes": b""}, private=private)
            self._json({"url": url, "name": name}, 200)

    def _validate(self, asked: dict) -> None:
        found = re.match(r"---\n(.*?)\n---\n", asked["content"], re.DOTALL)
        data = yaml.safe_load(found[1]) if found else {}
        base, relation = data.get("base_model"), data.get("base_model_relation")
        errors = []
        if data.get("license") not in (None, *LICENSES):
            errors.append({"message": '"license" must be one of those that the Hub knows'})
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            errors.append({"message": '"base_model" must be the name of a model'})
        if relation is not None and (relation not in RELATIONS or base is None):
            errors.append({"message": '"base_model_relation" must be one of a base_model'})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _preupload(self, asked: dict) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._json({"files": modes}, 200)

    def _batch(self, asked: dict) -> None:
        objects = []
        for one in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}
            there = one["oid"] in self.hub.stored
            objects.append({**one, **({} if there else {"actions": upload})})
        self._json({"transfer": "basic", "objects": objects}, 200)

    def _commit(self, body: bytes, name: str) -> None:
        files = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        oid = self.hub.repos[name].add(files)
        url = f"{self.hub.endpoint}/{name}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url}, 200)

    # -- reading -----------------------------------------------------------------------------------

    def _find(self, owner: str, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files), or None once it was said what is missing."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not name.startswith(f"{owner}/")):
            # A stranger is not told whether it exists.
            missing = {"X-Error-Code": "RepoNotFound"} if owner else {}
            self._json({"error": "Repository not found"}, 404 if owner else 401, missing)
            return None
        try:
            return repo.at(revision)
        except KeyError:
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return None

    def _info(self, owner: str, name: str, revision: str) -> None:
        if (found := self._find(owner, name, revision)) is None:
            return
        files = [{"rfilename": path} for path in sorted(found[1])]
        private = self.hub.repos[name].private
        self._json({"id": name, "sha": found[0], "private": private, "siblings": files}, 200)

    def _resolve(self, owner: str, name: str, revision: str, path: str) -> None:
        if (found := self._find(owner, name, revision)) is None:
            return
        commit, files = found
        if path not in files:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        digest = hashlib.sha256(files[path]).hexdigest()
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}
        if not path.endswith(".safetensors"):
            self._send(files[path], 200, headers)
            return
        self.hub.stored[digest] = files[path]  # by Git LFS: what it is, and where it lies
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(files[path]))}
        store = self.hub.endpoint.replace("127.0.0.1", "localhost")  # another host, as there
        where = {"Location": f"{store}/lfs/{digest}"}
        self._send(b"", 302, headers | linked | where)

    # -- answers -----------------------------------------------------------------------------------

    def _json(self, value: dict, status: int, headers: dict[str, str] | None = None) -> None:
        told = {"X-Error-Message": value["error"]} if "error" in value else {}
        self._send(json.dumps(value).encode(), status, told | (headers or {}))

    def _send(self, body: bytes, status: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
