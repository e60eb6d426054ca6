"""A small Hub on loopback: the endpoints that `huggingface_hub` uses, and faults that can be asked for."""

import hashlib
import json
import re
import threading
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_aTokenThatMustNeverBeSeen"


class Hub:
    """
    Repositories in memory, served at `endpoint`.

    `faults` is a list of `(method, pattern, fault)`; the first that fits a request is used up by it. A fault is a status
    code, `(status, headers)`, `"cut"` (the connection ends in the middle of the body) or `"damage"` (a wrong byte).
    """

    def __init__(self) -> None:
        self.repositories: dict[str, list[dict]] = {}  # id -> commits, each {"oid", "files"}
        self.names: dict[str, dict[str, str]] = {}  # id -> branch or tag -> commit
        self.objects: dict[str, bytes] = {}
        self.faults: list[tuple] = []
        self.requests: list[tuple[str, str, int]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def commit(self, repo: str, revision: str, files: dict[str, bytes]) -> str:
        oid = hashlib.sha1(json.dumps([repo, revision, len(self.repositories[repo])]).encode()).hexdigest()
        self.repositories[repo].append({"oid": oid, "files": files})
        self.names[repo][revision] = oid
        return oid

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        oid = self.names[repo].get(revision, revision)
        return next((commit["files"] for commit in self.repositories[repo] if commit["oid"] == oid), None)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _answer(self, status: int, body=b"", headers=None, cut: bool = False) -> None:
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"} | (headers or {})
        self.hub.requests.append((self.command, self.path, status))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            self.wfile.flush()
        if cut:
            self.close_connection = True
            self.connection.close()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = unquote(urlsplit(self.path).path)
        fault = next((f for f in self.hub.faults if f[0] == self.command and re.search(f[1], path)), None)
        if fault is not None:
            self.hub.faults.remove(fault)
            if fault[2] not in ("cut", "damage"):
                status, headers = fault[2] if isinstance(fault[2], tuple) else (fault[2], {})
                return self._answer(status, {"error": f"asked to fail with {status}"}, headers)
        for method, pattern, function in _ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return function(self, body, *match.groups(), **({"fault": fault[2]} if fault else {}))
        self._answer(404, {"error": "no such thing"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _whoami(self, body: bytes) -> None:
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        self._answer(
            200 if known else 401, {"name": "someone", "type": "user", "orgs": []} if known else {"error": "who?"}
        )

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        known = repo in self.hub.repositories
        if not known:
            self.hub.repositories[repo], self.hub.names[repo] = [], {}
            self.hub.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._answer(409 if known else 200, {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": repo})

    def _name(self, body: bytes, repo: str, kind: str, name: str) -> None:
        start = json.loads(body or b"{}")
        name, revision = (start["tag"], name) if kind == "tag" else (name, start.get("startingPoint") or "main")
        known = name in self.hub.names[repo]
        self.hub.names[repo].setdefault(name, self.hub.names[repo].get(revision, revision))
        self._answer(409 if known else 200, {})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        objects = []
        for item in json.loads(body)["objects"]:
            entry = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}", "header": {}}}
            objects.append(entry)
        self._answer(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def _put(self, body: bytes, oid: str) -> None:
        good = hashlib.sha256(body).hexdigest() == oid
        if good:
            self.hub.objects[oid] = body
        self._answer(200 if good else 400, b"")

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        files = dict(self.hub.files(repo, revision) or {})
        request = "create_pr=1" in urlsplit(self.path).query
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                files.pop(value["path"], None)
        oid = self.hub.commit(repo, "refs/pr/1" if request else revision, files)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{oid}"}
        self._answer(200, answer | ({"pullRequestUrl": f"{self.hub.endpoint}/{repo}/discussions/1"} if request else {}))

    def _info(self, body: bytes, repo: str, revision: str = "main") -> None:
        if repo not in self.hub.repositories or (files := self.hub.files(repo, revision)) is None:
            code = "RepoNotFound" if repo not in self.hub.repositories else "RevisionNotFound"
            return self._answer(404, {"error": code}, {"X-Error-Code": code})
        oid = self.hub.names[repo].get(revision, revision)
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        self._answer(200, {"id": repo, "sha": oid, "siblings": siblings, "private": False, "tags": [], "downloads": 0})

    def _tree(self, body: bytes, repo: str, revision: str, folder: str = "") -> None:
        files = self.hub.files(repo, revision) or {}
        if folder:
            files = {name: content for name, content in files.items() if name.startswith(f"{folder}/")}
            if not files:
                return self._answer(404, {"error": "no such folder"}, {"X-Error-Code": "EntryNotFound"})
        entries = []
        for name, content in files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git names it
            entries.append({"type": "file", "path": name, "size": len(content), "oid": blob})
            if name.endswith(".safetensors"):
                lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
                entries[-1]["lfs"] = lfs
        self._answer(200, entries)

    def _resolve(self, body: bytes, repo: str, revision: str, name: str, fault: str | None = None) -> None:
        files = self.hub.files(repo, revision) if repo in self.hub.repositories else None
        if files is None or name not in files:
            code = "RepoNotFound" if repo not in self.hub.repositories else "EntryNotFound"
            return self._answer(404, b"", {"X-Error-Code": code})
        content = files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Repo-Commit": self.hub.names[repo].get(revision, revision),
            "X-Linked-Size": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        status = 200
        if (wanted := self.headers.get("Range")) and self.command == "GET":
            start = int(re.match(r"bytes=(\d+)-", wanted)[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
        if fault == "damage" and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._answer(status, content, headers, cut=fault == "cut")


_REPO = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", _Handler._whoami),
    ("POST", r"/api/repos/create", _Handler._create),
    ("POST", r"/api/validate-yaml", lambda self, body: self._answer(200, {"errors": [], "warnings": []})),
    ("POST", rf"/api/models/{_REPO}/(branch|tag)/(.+)", _Handler._name),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", _Handler._preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler._batch),
    ("PUT", r"/lfs/(\w+)", _Handler._put),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", _Handler._commit),
    ("GET", rf"/api/models/{_REPO}", _Handler._info),
    ("GET", rf"/api/models/{_REPO}/revision/(.+)", _Handler._info),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)/?(.*)", _Handler._tree),
    ("GET", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler._resolve),
    ("HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler._resolve),
]
