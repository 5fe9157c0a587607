"""A model hub of local folders, at a loopback port: what the hub's clients ask for when they download and upload."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "c" * 40


@dataclass
class Uploads:
    """What a hub lets clients change.

    Attributes:
        folder: of repositories of models, OWNER/NAME below it.
        token: that may write; others are refused.
        large: endings of files that go through LFS.
        private: repositories that are.
        messages: of the commits.
        paths: of the requests that changed something.
    """

    folder: Path
    token: str
    large: tuple[str, ...] = (".safetensors", ".onnx")
    private: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Path]:
        return {str(path.relative_to(self.folder)): path for path in self.folder.glob("*/*")}


@contextmanager
def stub_hub(models: Mapping[str, Path], datasets: Mapping[str, Path], uploads: Uploads | None = None) -> Iterator[str]:
    """Serves folders under ids such as org/name; yields the address for $HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path).strip("/")
            for kind, repositories in (
                ("models", {**models, **(uploads.models if uploads else {})}),
                ("datasets", datasets),
            ):
                for name, folder in repositories.items():
                    prefix = name if kind == "models" else f"datasets/{name}"
                    if path.startswith(f"{prefix}/resolve/"):
                        return self.send_file(folder / path.removeprefix(f"{prefix}/resolve/").partition("/")[2])
                    if path.startswith(f"api/{kind}/{name}"):
                        return self.send_api(name, folder, path.removeprefix(f"api/{kind}/{name}").strip("/"))
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            path = urlparse(self.path).path.strip("/")
            writes = re.search(r"(^api/repos/create|/preupload/main|/commit/main|/lfs/objects/batch|^lfs/\w+)$", path)
            if path == "api/validate-yaml":
                self.read_body()
                return self.send_json({"errors": [], "warnings": []})
            if uploads is None or not writes:
                return self.do_GET()
            body = self.read_body()
            uploads.paths.append(path)
            if self.headers.get("Authorization") != f"Bearer {uploads.token}" and not path.startswith("lfs/"):
                return self.send(403, b"{}", {"X-Error-Message": "you may not write here"})
            if path == "api/repos/create":
                self.create(json.loads(body))
            elif path.endswith("/preupload/main"):
                files = [{"path": one["path"], "shouldIgnore": False} for one in json.loads(body)["files"]]
                modes = [{"uploadMode": "lfs" if one["path"].endswith(uploads.large) else "regular"} for one in files]
                self.send_json({"files": [one | mode for one, mode in zip(files, modes, strict=True)]})
            elif path.endswith("/lfs/objects/batch"):
                objects = json.loads(body)["objects"]
                for one in objects:
                    one["actions"] = {"upload": {"href": f"{self.address}/lfs/{one['oid']}", "header": {}}}
                self.send_json({"transfer": "basic", "objects": objects})
            elif path.startswith("lfs/"):
                assert hashlib.sha256(body).hexdigest() == path.removeprefix("lfs/")
                uploads.objects[path.removeprefix("lfs/")] = body
                self.send(200, b"", {})
            else:
                self.commit(path.removeprefix("api/models/").removesuffix("/commit/main"), body)

        do_PUT = do_POST

        @property
        def address(self) -> str:
            return f"http://127.0.0.1:{self.server.server_address[1]}"

        def create(self, wanted: Mapping[str, str]) -> None:
            assert uploads is not None
            name = f"{wanted['organization']}/{wanted['name']}"
            if name in uploads.models:
                return self.send(409, json.dumps({"url": f"{self.address}/{name}"}).encode(), {})
            (uploads.folder / name).mkdir(parents=True)
            if wanted.get("visibility") == "private" or wanted.get("private"):
                uploads.private.add(name)
            self.send_json({"url": f"{self.address}/{name}"})

        def commit(self, name: str, body: bytes) -> None:
            assert uploads is not None
            for line in map(json.loads, body.splitlines()):
                value, target = line["value"], uploads.folder / name / line["value"].get("path", "")
                if line["key"] == "header":
                    uploads.messages.append(value["summary"])
                elif line["key"] == "deletedFile":
                    target.unlink()
                else:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    is_large = line["key"] == "lfsFile"
                    target.write_bytes(
                        uploads.objects[value["oid"]] if is_large else base64.b64decode(value["content"])
                    )
            self.send_json({"commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT})

        def read_body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def send_api(self, name: str, folder: Path, rest: str) -> None:
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            if rest.startswith(("paths-info", "tree")):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
                _, _, inside = rest.partition("/")[2].partition("/")
                if body:
                    wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
                    files = [path for path in files if str(path.relative_to(folder)) in wanted]
                elif inside and not (folder / inside).exists():
                    return self.send(404, b"", {"X-Error-Code": "EntryNotFound"})
                self.send_json([entry(path, folder) for path in files])
            else:
                siblings = [{"rfilename": str(path.relative_to(folder))} for path in files]
                is_private = uploads is not None and name in uploads.private
                self.send_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": is_private, "tags": []})

        def send_file(self, path: Path) -> None:
            if not path.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            data = path.read_bytes()
            about = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
                about["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                return self.send(206, data[first : last + 1], about)
            self.send(200, data, about)

        def send_json(self, value: object) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(path: Path, folder: Path) -> dict[str, object]:
    data = path.read_bytes()
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": str(path.relative_to(folder)), "size": len(data), "oid": oid}
