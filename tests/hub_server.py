"""A stand-in for the Hugging Face hub on the loopback interface, which the real client talks to.

It answers the requests of huggingface_hub 1.26 to 2.4. Statuses, headers and error codes are those that the client's
`utils/_http.py` and `file_download.py` read, and the bodies those of its `_commit_api.py` and `hf_api.py`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from huggingface_hub import constants

OTHER = "0123456789abcdef0123456789abcdef01234567"
# Seconds after which a test that waits for an answer fails.
_LONGEST_SILENCE = 20


class Server(ThreadingHTTPServer):
    """Serves folders as repositories: `repositories[name][commit]`; the first commit is that of the default branch.

    `answers` maps a repository to a status and headers that each request gets instead. `once` maps a method and a file
    to a status and headers, or to a number of bytes after which the transfer breaks; it is used once. Requests for
    repositories in `silent` get no answer while the server runs.
    """

    def __init__(self, uploads):
        super().__init__(("127.0.0.1", 0), Handler)
        self.uploads = uploads
        self.repositories = {}
        self.private = {}
        self.answers = {}
        self.once = {}
        self.silent = set()
        self.ended = threading.Event()
        self.requests = []

    def downloads(self):
        """Return the names of the files that were sent."""
        return [request[4] for request in self.requests if request[0] == "GET" and request[2] == "resolve"]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, headers=(), body=b""):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, document, status=200):
        self.answer(status, {"Content-Type": "application/json"}, json.dumps(document).encode())

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")
        if len(path) == 2:
            # Information about a repository, for its default branch.
            path += ["revision", "main"]
        if len(path) < 4:
            self.answer(404)
            return
        repository, kind, revision = "/".join(path[:2]), path[2], path[3]
        self.server.requests.append((self.command, repository, kind, revision, *path[4:5]))
        if repository in self.server.silent:
            self.server.ended.wait(_LONGEST_SILENCE)
            self.close_connection = True
            return
        if repository in self.server.answers:
            status, headers = self.server.answers[repository]
            self.answer(status, headers, json.dumps({"error": headers.get("X-Error-Message", "")}).encode())
            return
        folders = self.server.repositories.get(repository)
        if folders is None:
            self.answer(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        commit = next(iter(folders), "") if revision == "main" else revision
        if commit not in folders:
            self.answer(404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"})
            return
        files = {file.name: file.read_bytes() for file in folders[commit].iterdir() if file.is_file()}
        if kind == "revision":
            siblings = [{"rfilename": name} for name in files]
            private = self.server.private.get(repository, False)
            self.answer_json({"id": repository, "sha": commit, "siblings": siblings, "private": private})
        elif kind == "tree":
            self.answer_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
            )
        else:
            self.send_file(path[4], files.get(path[4]), commit)

    def send_file(self, name, data, commit):
        fault = self.server.once.pop((self.command, name), None)
        if isinstance(fault, tuple):
            self.answer(*fault)
            return
        if data is None:
            missing = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            self.answer(404, missing)
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        status = 200
        if wanted := self.headers["Range"]:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            status, data = 206, data[start:]
            self.server.requests.append(("RANGE", name, start))
        headers["Content-Length"] = str(len(data))
        if isinstance(fault, bytes):
            data = fault
        self.answer(status, headers, data[:fault] if isinstance(fault, int) else data)
        if isinstance(fault, int):
            self.close_connection = True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.split("?")[0].strip("/").split("/")
        self.server.requests.append((self.command, *path))
        if path[:2] == ["api", "validate-yaml"]:
            self.answer_json({"errors": [], "warnings": []})
        elif not self.headers["Authorization"]:
            self.answer(401, {"X-Error-Message": "Invalid username or password."})
        elif path[:3] == ["api", "repos", "create"]:
            document = json.loads(body)
            repository = f"{document.get('organization') or 'me'}/{document['name']}"
            url = {"url": f"http://{self.headers['Host']}/{repository}"}
            if repository in self.server.repositories:
                self.answer_json(url, 409)
                return
            self.server.private[repository] = document.get("visibility") == "private" or bool(document.get("private"))
            empty = self.server.uploads / repository / "initial"
            empty.mkdir(parents=True)
            self.server.repositories[repository] = {"f" * 40: empty}
            self.answer_json(url)
        else:
            self.change("/".join(path[2:4]), *path[4:6], body)

    def change(self, repository, kind, branch, body):
        """Answer the requests that belong to a commit."""
        folders = self.server.repositories[repository]
        if kind == "preupload":
            named = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in named]
            self.answer_json({"files": modes})
        elif kind == "branch":
            folders[branch] = next(iter(folders.values()))
            self.answer_json({})
        else:
            lines = [json.loads(line) for line in body.splitlines()]
            commit = hashlib.sha1(body).hexdigest()
            before = next(iter(folders.values())) if branch == "main" else folders[branch]
            folder = Path(shutil.copytree(before, self.server.uploads / repository / commit))
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    (folder / value["path"]).write_bytes(base64.b64decode(value["content"]))
                elif line["key"] == "deletedFile":
                    (folder / value["path"]).unlink()
            new = {commit: folder, **folders} if branch == "main" else {**folders, commit: folder, branch: folder}
            self.server.repositories[repository] = new
            self.answer_json({"commitUrl": f"{constants.ENDPOINT}/{repository}/commit/{commit}", "commitOid": commit})


@contextmanager
def serve(monkeypatch, tmp_path):
    """Start a hub on the loopback interface, and use an empty cache."""
    server = Server(tmp_path / "uploads")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    use_cache(monkeypatch, tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()
    thread.join()


def use_cache(monkeypatch, tmp_path):
    """Use an empty cache, and no token."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))


def cache(repository, commit, folder, main_is=True):
    """Put a folder into the hub's cache, in its documented structure."""
    root = Path(constants.HF_HUB_CACHE, f"models--{repository.replace('/', '--')}")
    shutil.copytree(folder, root / "snapshots" / commit)
    if main_is:
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / "main").write_text(commit)
