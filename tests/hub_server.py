"""A model hub on loopback: the endpoints that the hub library's client uses, in memory, with faults on demand.

It checks what the real one checks (tokens, hashes of uploads, the parent of a commit) and logs every request, so that
a test can say what was sent, what was not, and that no half of a commit was ever visible.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

PART = 64 * 1024  # files larger than this are uploaded in parts
LARGE = 10_000  # files of this size or larger are stored by sha256, as the hub does with what is not text
WRITER, READER = "hf_writerwriterwriterwriter", "hf_readerreaderreaderreader"


@dataclass(frozen=True)
class Entry:
    """A file in a commit. large: stored by sha256."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """commits: id -> files. branches: name -> commit id."""

    private: bool
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, Entry]) -> str:
        text = json.dumps([len(self.commits), *sorted((name, entry.git) for name, entry in files.items())])
        identity = hashlib.sha1(text.encode()).hexdigest()
        self.commits[identity] = files
        self.branches[branch] = identity
        return identity


@dataclass(frozen=True)
class Request:
    """One line of the log. received: bytes of body."""

    method: str
    path: str
    token: str | None
    range: str | None
    received: int


@dataclass
class Fault:
    """Something that goes wrong `times` times with requests whose `METHOD path` matches.

    status: answered instead of doing it; 0 cuts the connection. after: it is done all the same (the answer is lost).
    cut: bytes of the body that are read, or sent, before the connection is cut.
    """

    pattern: str
    status: int = 0
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    after: bool = False
    cut: int | None = None
    corrupt: bool = False


class Hub:
    """State and log. Tokens: WRITER may write to namespace `me`, READER may read."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.lock = threading.RLock()
        self.url = self.storage = ""  # two names of one server: the storage is another host to the client

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> str:
        """A repository that is there already; returns its commit."""
        repo = self.repos.setdefault(name, Repo(private))
        return repo.commit("main", {path: Entry(data, len(data) >= LARGE) for path, data in files.items()})

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a reader of the revision sees."""
        repo = self.repos[name]
        return {path: e.content for path, e in repo.commits[repo.branches.get(revision, revision)].items()}

    def sent(self, pattern: str) -> list[Request]:
        """Logged requests whose `METHOD path` matches."""
        return [request for request in self.log if re.search(pattern, f"{request.method} {request.path}")]

    def fault(self, line: str) -> Fault | None:
        """The next fault that applies, used up."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, line):
                    fault.times -= 1
                    return fault
        return None


class Refused(Exception):
    """An HTTP error with the headers that the client library reads."""

    def __init__(self, status: int, message: str, code: str = "", url: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.url = status, message, code, url


class Handler(BaseHTTPRequestHandler):
    """Routes; every method of `Routes` answers one of them."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes: the second would wait 40 ms for the client's ACK
    hub: Hub

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """The log is the hub's."""

    def _answer(self) -> None:
        line = f"{self.command} {self.path}"
        fault = self.hub.fault(line)
        length = int(self.headers.get("Content-Length") or 0)
        length_sent = length if fault is None or fault.cut is None or self.command == "GET" else min(length, fault.cut)
        body = self._chunked() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length_sent)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        with self.hub.lock:
            self.hub.log.append(Request(self.command, self.path, token, self.headers.get("Range"), len(body)))
        if fault and fault.corrupt:
            body = body[:-1] + bytes([body[-1] ^ 1])
        if fault and not fault.after and not fault.corrupt and not (self.command == "GET" and fault.cut):
            return self._fail(fault)
        try:
            with self.hub.lock:
                status, headers, content = Routes(self.hub, self, token, body).answer()
        except Refused as refused:
            status, content = refused.status, json.dumps({"error": refused.message, "url": refused.url}).encode()
            headers = {"X-Error-Message": refused.message, "X-Error-Code": refused.code}
        if fault and fault.after:
            return self._fail(fault)
        self._send(status, headers, content, fault.cut if fault and self.command == "GET" else None)

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _fail(self, fault: Fault) -> None:
        if fault.status:
            return self._send(fault.status, {"X-Error-Message": f"fault {fault.status}", **fault.headers}, b"{}", None)
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, headers: dict[str, str], content: bytes, cut: int | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", headers.get("X-Length", str(len(content))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content if cut is None else content[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)  # what was sent arrives
            self.close_connection = True
            self.connection.close()


Answer = tuple[int, dict[str, str], bytes]


class Routes:
    """One request, answered."""

    def __init__(self, hub: Hub, handler: Handler, token: str | None, body: bytes) -> None:
        url = urlsplit(handler.path)
        self.hub, self.handler, self.token, self.body = hub, handler, token, body
        self.path, self.query = url.path, {key: values[0] for key, values in parse_qs(url.query).items()}

    def answer(self) -> Answer:
        name = r"([\w.-]+/[\w.-]+)"
        routes: list[tuple[str, Callable[..., Answer]]] = [
            (r"POST /api/repos/create", self.create),
            (r"POST /api/validate-yaml", self.validate),
            (rf"GET /api/models/{name}(?:/revision/([^/]+))?", self.info),
            (rf"GET /api/models/{name}/tree/([^/]+)", self.tree),
            (rf"POST /api/models/{name}/preupload/([^/]+)", self.preupload),
            (rf"POST /api/models/{name}/branch/([^/]+)", self.branch),
            (rf"POST /api/models/{name}/commit/([^/]+)", self.commit),
            (rf"POST /{name}\.git/info/lfs/objects/batch", self.batch),
            (r"PUT /upload/(\w+)", self.upload),
            (r"POST /complete/(\w+)", self.complete),
            (rf"POST /verify/{name}/(\w+)", self.verify),
            (rf"(?:GET|HEAD) /{name}/resolve/([^/]+)/(.+)", self.resolve),
            (r"(?:GET|HEAD) /large/(\w+)", self.large),
        ]
        line = f"{self.handler.command} {self.path}"
        for pattern, route in routes:
            if match := re.fullmatch(pattern, line):
                return route(*(part and unquote(part) for part in match.groups()))
        raise Refused(404, f"no endpoint {line}")

    def json(self) -> Any:
        return json.loads(self.body)

    def seen(self, name: str) -> Repo:
        if self.token not in (None, WRITER, READER):
            raise Refused(401, "Invalid credentials in Authorization header")
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token is None):
            raise Refused(404 if self.token else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, name: str) -> Repo:
        repo = self.seen(name)
        self.may_write(name)
        return repo

    def may_write(self, name: str) -> None:
        if self.token not in (WRITER, READER):
            raise Refused(401, "Invalid credentials in Authorization header")
        if self.token != WRITER or not name.startswith("me/"):
            raise Refused(403, f"You have read access but not write access to {name.partition('/')[0]}")

    def revision(self, repo: Repo, revision: str) -> tuple[str, dict[str, Entry]]:
        identity = repo.branches.get(revision, revision)
        if identity not in repo.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return identity, repo.commits[identity]

    def create(self) -> Answer:
        request = self.json()
        name = f"{request['organization']}/{request['name']}"
        self.may_write(name)
        if name in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=f"{self.hub.url}/{name}")
        repo = self.hub.repos[name] = Repo(request.get("visibility") == "private" or bool(request.get("private")))
        repo.commit("main", {".gitattributes": Entry(b"*.safetensors filter=lfs\n", False)})
        return ok({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> Answer:
        """A few of the hub's own rules for model cards."""
        text = self.json()["content"]
        errors = []
        data = yaml.safe_load(text.split("---\n")[1]) if text.startswith("---\n") else {}
        if data.get("base_model_relation", "quantized") not in ("adapter", "merge", "quantized", "finetune"):
            errors.append('"base_model_relation" must be one of adapter, merge, quantized, finetune')
        if data.get("license", "mit") not in ("mit", "apache-2.0", "other"):
            errors.append('"license" must be one of the known identifiers')
        for model in data.get("model-index", []):
            errors += (
                ['"model-index" entries need results'] if not model.get("name") or not model.get("results") else []
            )
        status = 400 if errors else 200
        return status, {}, json.dumps({"errors": [{"message": e} for e in errors], "warnings": []}).encode()

    def info(self, name: str, revision: str | None) -> Answer:
        repo = self.seen(name)
        identity, files = self.revision(repo, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        return ok({"id": name, "modelId": name, "sha": identity, "private": repo.private, "siblings": siblings})

    def tree(self, name: str, revision: str) -> Answer:
        _, files = self.revision(self.seen(name), revision)
        listed = []
        for path, entry in files.items():
            line: dict[str, Any] = {"type": "file", "path": path, "size": len(entry.content), "oid": entry.git}
            if entry.large:
                line["lfs"] = {"oid": entry.sha256, "size": len(entry.content), "pointerSize": 134}
            listed.append(line)
        return ok(listed)

    def preupload(self, name: str, revision: str) -> Answer:
        repo = self.writable(name)
        _, files = self.revision(repo, revision)

        def known(path: str) -> str | None:
            entry = files.get(path)
            return None if entry is None else entry.sha256 if entry.large else entry.git

        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["size"] >= LARGE else "regular",
                "shouldIgnore": False,
                "oid": known(f["path"]),
            }
            for f in self.json()["files"]
        ]
        return ok({"files": modes})

    def branch(self, name: str, branch: str) -> Answer:
        repo = self.writable(name)
        if branch in repo.branches:
            raise Refused(409, "Reference already exists")
        repo.branches[branch], _ = self.revision(repo, self.json().get("startingPoint") or "main")
        return ok({})

    def batch(self, name: str) -> Answer:
        self.writable(name)
        objects = []
        for entry in self.json()["objects"]:
            oid, size = entry["oid"], entry["size"]
            line: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.blobs:
                upload: dict[str, Any] = {"href": f"{self.hub.storage}/upload/{oid}?part=1"}
                if size > PART:
                    count = -(-size // PART)
                    urls = {f"{i:05d}": f"{self.hub.storage}/upload/{oid}?part={i}" for i in range(1, count + 1)}
                    upload = {"href": f"{self.hub.storage}/complete/{oid}", "header": {"chunk_size": str(PART), **urls}}
                line["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{name}/{oid}"}}
            objects.append(line)
        return ok({"transfer": "multipart", "objects": objects})

    def upload(self, oid: str) -> Answer:
        """One part; the address itself is the permission, as with the real storage."""
        part = int(self.query["part"])
        self.hub.parts.setdefault(oid, {})[part] = self.body
        return 200, {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}, b""

    def complete(self, oid: str) -> Answer:
        parts = self.hub.parts[oid]
        for part in self.json()["parts"]:
            if part["etag"] != f'"{hashlib.md5(parts[part["partNumber"]]).hexdigest()}"':
                raise Refused(400, "a part has another etag")
        return ok({})

    def verify(self, name: str, oid: str) -> Answer:
        """The content must have the hash that was promised; only then is the file stored."""
        self.writable(name)
        parts = self.hub.parts.pop(oid)
        content = b"".join(parts[i] for i in sorted(parts))
        if hashlib.sha256(content).hexdigest() != oid or len(content) != self.json()["size"]:
            raise Refused(422, "the uploaded file does not have the announced sha256")
        self.hub.blobs[oid] = content
        return ok({})

    def commit(self, name: str, revision: str) -> Answer:
        """All or nothing: files are gathered first and made visible by one assignment."""
        repo = self.writable(name)
        head, files = self.revision(repo, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head) != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        new = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = Entry(base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, f"{value['path']}: its content was never uploaded")
                new[value["path"]] = Entry(self.hub.blobs[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del new[value["path"]]
        branch = f"refs/pr/{len(repo.commits)}" if self.query.get("create_pr") else revision
        identity = repo.commit(branch, new)
        response = {"commitUrl": f"{self.hub.url}/{name}/commit/{identity}", "commitOid": identity}
        if branch != revision:
            response["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        return ok(response)

    def resolve(self, name: str, revision: str, path: str) -> Answer:
        identity, files = self.revision(self.seen(name), revision)
        if path not in files:
            raise Refused(404, "Entry not found", "EntryNotFound")
        entry = files[path]
        headers = {"X-Repo-Commit": identity, "ETag": f'"{entry.git}"'}
        if not entry.large:
            return self.ranged(entry.content, headers)
        self.hub.blobs[entry.sha256] = entry.content
        linked = {"X-Linked-ETag": f'"{entry.sha256}"', "X-Linked-Size": str(len(entry.content))}
        return 302, headers | linked | {"Location": f"{self.hub.storage}/large/{entry.sha256}"}, b""

    def large(self, oid: str) -> Answer:
        return self.ranged(self.hub.blobs[oid], {"ETag": f'"{oid}"'})

    def ranged(self, content: bytes, headers: dict[str, str]) -> Answer:
        range_match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.handler.headers.get("Range") or "")
        if not range_match:
            return 200, {**headers, "X-Length": str(len(content))}, content
        first, last = int(range_match[1]), min(int(range_match[2] or len(content)), len(content) - 1)
        part = content[first : last + 1]
        shown = {"Content-Range": f"bytes {first}-{last}/{len(content)}", "X-Length": str(len(part))}
        return 206, headers | shown, part


def ok(data: Any) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(data).encode()


@contextmanager
def running() -> Iterator[Hub]:
    """A hub on a free port of loopback."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url, hub.storage = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
