"""A model hub of local folders, at a loopback port: what the hub's clients ask for when they download."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "c" * 40


@contextmanager
def stub_hub(models: Mapping[str, Path], datasets: Mapping[str, Path]) -> Iterator[str]:
    """Serves folders under ids such as org/name; yields the address for $HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlparse(self.path).path).strip("/")
            for kind, repositories in (("models", models), ("datasets", datasets)):
                for name, folder in repositories.items():
                    prefix = name if kind == "models" else f"datasets/{name}"
                    if path.startswith(f"{prefix}/resolve/"):
                        return self.send_file(folder / path.removeprefix(f"{prefix}/resolve/").partition("/")[2])
                    if path.startswith(f"api/{kind}/{name}"):
                        return self.send_api(name, folder, path.removeprefix(f"api/{kind}/{name}").strip("/"))
            self.send(404, b"", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_POST = do_GET

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
                self.send_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

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
    thread = Thread(target=server.serve_forever, daemon=True)
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
