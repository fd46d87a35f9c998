"""A hub on this machine: the routes by which Hugging Face's library finds, fetches and uploads a model's files."""

import hashlib
import json
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_of-a-user-who-may"
COMMIT = "c0ffee" + 34 * "0"


class Hub(ThreadingHTTPServer):
    """Serves folders as models, and notes which files were fetched.

    Attributes:
        models: folders by OWNER/NAME.
        closed: names that need `TOKEN`: of private models (404 without) and of gated ones (403).
        fetched: the paths of files that were sent.
        pushed: the files of each model that was uploaded, by path.
    """

    daemon_threads = True

    def __init__(self, models: dict[str, Path], private: tuple[str, ...] = (), gated: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", 0), Routes)
        self.models, self.private, self.gated = models, private, gated
        self.fetched: list[str] = []
        self.pushed: dict[str, dict[str, bytes]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Routes(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        """Take an upload: the making of a model, how its files will come, and the commit that holds them."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {})
        match unquote(urlsplit(self.path).path).strip("/").split("/"):
            case ["api", "repos", "create"]:
                made = json.loads(body)
                name = f"{made['organization']}/{made['name']}"
                self.server.pushed[name] = {}
                return self.send_json({"url": f"{self.server.url}/{name}", "id": name})
            case ["api", "models", _, _, "preupload", _]:
                files = [
                    {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for each in json.loads(body)["files"]
                ]
                return self.send_json({"files": files})
            case ["api", "models", owner, model, "commit", _]:
                lines = [json.loads(line) for line in body.splitlines()]
                files = {each["value"]["path"]: each["value"]["content"] for each in lines if each["key"] == "file"}
                self.server.pushed[f"{owner}/{model}"] |= {path: b64decode(text) for path, text in files.items()}
                url = f"{self.server.url}/{owner}/{model}/commit/{COMMIT}"
                return self.send_json({"commitUrl": url, "commitOid": COMMIT, "success": True})
            case ["api", "datasets", owner, name, "paths-info", _]:
                folder = self.server.models[f"{owner}/{name}"]
                paths = [path for path in parse_qs(body.decode()).get("paths", []) if (folder / path).is_file()]
                return self.send_json([entry(folder, folder / path) for path in paths])
        return self.send_json({"errors": [], "warnings": []})  # of a card

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        is_api = parts[0] == "api" and parts[1] in ("models", "datasets")
        named = parts[2:] if is_api else parts[1:] if parts[0] == "datasets" else parts
        owner, model, kind, *rest = [*named, "", "", ""][: len(parts) + 3]
        name, may = f"{owner}/{model}", self.headers.get("Authorization") == f"Bearer {TOKEN}"
        folder = self.server.models.get(name)
        if folder is None or (name in self.server.private and not may):
            return self.send(401 if not may else 404, {"X-Error-Code": "RepoNotFound"})
        if name in self.server.gated and not may and not is_api:
            return self.send(403, {"X-Error-Code": "GatedRepo"})
        commit = hashlib.sha1(name.encode()).hexdigest()
        revision = rest[0] if rest and rest[0] else "main"
        if revision not in ("main", "v1", commit):
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        if kind in ("", "revision"):
            siblings = [{"rfilename": each} for each in files]
            return self.send_json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})
        if kind == "tree":
            return self.send_json([entry(folder, path) for path in files.values()])
        path = files.get("/".join(each for each in rest[1:] if each))
        if kind != "resolve" or path is None:
            return self.send(404, {"X-Error-Code": "EntryNotFound"})
        content = path.read_bytes()
        if self.command == "GET":
            self.server.fetched.append(f"{name}/{path.relative_to(folder)}")
        return self.send(200, {"ETag": f'"{oid(path)}"', "X-Repo-Commit": commit}, content)

    def send_json(self, value: object) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entry(folder: Path, path: Path) -> dict[str, object]:
    """Return what the hub says of a file."""
    return {"type": "file", "path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "oid": oid(path)}


def oid(path: Path) -> str:
    """Return what git calls the file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub(models: dict[str, Path], **closed: tuple[str, ...]) -> Iterator[Hub]:
    """Run a hub while the block runs."""
    hub = Hub(models, **closed)
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
