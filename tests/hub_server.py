"""
A Hub on loopback: the endpoints that `huggingface_hub`'s client asks for models, and repositories kept in memory.

`HF_ENDPOINT` is read when `huggingface_hub` is imported, and the tests' own process is offline, so the client runs in
a process of its own with `environment()`. What the client sends and gets is the real protocol: text files travel in
the commit, binary ones through Git LFS.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


TOKEN = "hf_thisIsTheTokenOfTheTestsAndOfNothingElse"
USER = "someone"
_TEXT = (".json", ".jsonl", ".md", ".txt", ".gitattributes")
_REVISION = r"(?P<revision>[^/]+)"


@dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]  # the whole tree after it


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, message: str, files: dict[str, bytes]) -> Commit:
        commits = self.branches.setdefault(branch, [])
        oid = hashlib.sha1(f"{branch} {len(commits)} {message}".encode()).hexdigest()
        commits.append(Commit(oid, message, files))
        return commits[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch's name or of a hash."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((c for commits in self.branches.values() for c in commits if c.oid == revision), None)


class HubServer:
    """
    A running Hub; a context manager.

    `repos` are the repositories by id, `requests` all (method, path) so far, and `bodies` all that was ever sent, file
    contents decoded: where one looks for what must not leave the machine. Who writes to a repository in `refused` is
    told that this is not allowed.
    """

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # by sha256
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.refused: set[str] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Files of a revision by path, without the Hub's own `.gitattributes`."""
        files = self.repos[repo_id].at(revision).files
        return {path: content for path, content in files.items() if path != ".gitattributes"}

    def messages(self, repo_id: str, branch: str = "main") -> list[str]:
        """Commit messages after the initial one, oldest first."""
        return [commit.message for commit in self.repos[repo_id].branches[branch][1:]]

    def environment(self, home: Path) -> dict[str, str]:
        """Environment of a client process whose caches are in `home`."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        tests = Path(__file__).parent
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "MPLCONFIGDIR": str(home),  # or its font cache waits for another process's lock, and gives up
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), kept.get("PYTHONPATH", "")]),
        }

    def run(self, script: str | Path, folder: Path) -> subprocess.CompletedProcess:
        """Run a client script in `folder`; what it writes there is its result."""
        home = folder / "hf_home"
        done = subprocess.run(
            [sys.executable, str(script)], cwd=folder, env=self.environment(home), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    # Regular expression of the path -> method; `(?P<repo>...)` and other groups become its arguments.
    ROUTES = {
        ("GET", r"/api/whoami-v2"): "who",
        ("POST", r"/api/repos/create"): "create",
        ("POST", r"/api/validate-yaml"): "validate",
        ("GET", rf"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/{_REVISION})?"): "info",
        ("GET", rf"/api/models/(?P<repo>[^/]+/[^/]+)/tree/{_REVISION}(/(?P<folder>.*))?"): "tree",
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<branch>[^/]+)"): "branch",
        ("POST", rf"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/{_REVISION}"): "preupload",
        ("POST", rf"/api/models/(?P<repo>[^/]+/[^/]+)/commit/{_REVISION}"): "commit",
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"): "batch",
        ("PUT", r"/large/(?P<sha>[0-9a-f]{64})"): "put",
        ("GET", rf"/(?P<repo>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<path>.+)"): "resolve",
    }

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        self.hub.bodies.append(self.body)
        for (wanted, pattern), name in self.ROUTES.items():
            if method == wanted and (match := re.fullmatch(pattern, path)):
                groups = {key: value and unquote(value) for key, value in match.groupdict().items()}
                if (repo_id := groups.get("repo")) is not None and not self._may_see(repo_id, method):
                    return self._json(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return getattr(self, name)(**groups)
        self._json(404, {"error": f"{self.command} {path}: this Hub does not know it"})

    @property
    def known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _may_see(self, repo_id: str, method: str) -> bool:
        repo = self.hub.repos.get(repo_id)
        return repo is not None and (self.known or (method == "GET" and not repo.private))

    def who(self):
        if not self.known:
            return self._json(401, {"error": "Invalid credentials"})
        self._json(200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if not self.known:
            return self._json(401, {"error": "Invalid credentials"})
        if repo_id in self.hub.repos:
            return self._json(409, {"error": "You already created this model repo", **answer})
        self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        self._json(200, answer)

    def validate(self):
        content = json.loads(self.body)["content"]
        bad = not content.startswith("---\n")
        self._json(200, {"errors": [], "warnings": [{"message": "no metadata"}] * bad})

    def info(self, repo, revision):
        if (commit := self._commit_of(repo, revision or "main")) is not None:
            files = [{"rfilename": path} for path in sorted(commit.files)]
            about = {"id": repo, "modelId": repo, "private": self.hub.repos[repo].private, "tags": []}
            self._json(200, {**about, "sha": commit.oid, "siblings": files, "downloads": 0, "likes": 0})

    def tree(self, repo, revision, folder):
        if (commit := self._commit_of(repo, revision)) is not None:
            inside = f"{folder}/" if folder else ""
            files = {path: content for path, content in commit.files.items() if path.startswith(inside)}
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
                for path, content in sorted(files.items())
            ]
            self._json(200, entries)

    def branch(self, repo, branch):
        branches = self.hub.repos[repo].branches
        if branch in branches:
            return self._json(409, {"error": "Reference already exists"})
        branches[branch] = list(branches["main"])
        self._json(200, {})

    def preupload(self, repo, revision):
        if (commit := self._commit_of(repo, revision)) is not None:
            files = []
            for file in json.loads(self.body)["files"]:
                path, large = file["path"], not file["path"].endswith(_TEXT)
                there = commit.files.get(path)
                oid = None if there is None else hashlib.sha256(there).hexdigest() if large else _git_oid(there)
                mode = "lfs" if large else "regular"
                files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            self._json(200, {"files": files})

    def batch(self, repo):
        objects = []
        for entry in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/large/{entry['oid']}", "header": {}}}
            there = entry["oid"] in self.hub.large
            objects.append({**entry, "authenticated": True, **({} if there else {"actions": upload})})
        self._json(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def put(self, sha):
        if hashlib.sha256(self.body).hexdigest() != sha:
            return self._json(400, {"error": "The content is not what was announced"})
        self.hub.large[sha] = self.body
        self._json(200, {})

    def commit(self, repo, revision):
        if (commit := self._commit_of(repo, revision)) is None:
            return
        if repo in self.hub.refused:
            return self._json(403, {"error": "You have no right to write here"})
        files, message = dict(commit.files), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.hub.bodies.append(files[value["path"]])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]  # a file that is not there is an error
            else:
                return self._json(400, {"error": f"{entry['key']}: this Hub does not know it"})
        oid = self.hub.repos[repo].commit(revision, message, files).oid
        self._json(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def resolve(self, repo, revision, path):
        if (commit := self._commit_of(repo, revision)) is None:
            return
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            return self._json(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **headers})
        content = commit.files[path]
        etag = _git_oid(content) if path.endswith(_TEXT) else hashlib.sha256(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "Content-Type": "application/octet-stream", **headers})

    def _commit_of(self, repo: str, revision: str) -> Commit | None:
        commit = self.hub.repos[repo].at(revision)
        if commit is None:
            self._json(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        return commit

    def _json(self, status: int, answer: dict | list, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format, *arguments):
        """Silence: `requests` has it."""


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
