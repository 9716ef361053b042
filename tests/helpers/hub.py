"""A folder served as the Hub serves it: what `from_pretrained` and `load_dataset` ask for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 40


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of `models/ORG/NAME` and `datasets/ORG/NAME`, and what is asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            """Send a file, the list of a repository's files, or what the repository is."""
            path = unquote(urlsplit(self.path).path).strip("/")
            asked.append(f"{self.command} {path}")
            kind, *rest = path.removeprefix("api/").split("/")
            if kind not in ("models", "datasets"):
                kind, rest = "models", [kind, *rest]
            name, action = "/".join(rest[:2]), rest[2:]
            root = folder / kind / name
            files = sorted(file for file in root.rglob("*") if file.is_file())
            if not files:
                self.answer(b"", 404, X_Error_Code="RepoNotFound")
            elif action[:1] == ["resolve"]:
                file = root.joinpath(*action[2:])
                if file in files:
                    self.answer(file.read_bytes(), ETag=f'"{digest(file)}"', X_Repo_Commit=COMMIT)
                else:
                    self.answer(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            elif action[:1] == ["tree"]:
                self.answer_json(
                    [
                        {
                            "type": "file",
                            "path": file.relative_to(root).as_posix(),
                            "size": file.stat().st_size,
                            "oid": digest(file),
                        }
                        for file in files
                    ]
                )
            else:
                siblings = [{"rfilename": file.relative_to(root).as_posix()} for file in files]
                self.answer_json({"id": name, "sha": COMMIT, "siblings": siblings, "tags": []})

        do_HEAD = do_GET

        def answer_json(self, found: Any) -> None:
            self.answer(json.dumps(found).encode(), Content_Type="application/json")

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def digest(file: Path) -> str:
    """The name that the Hub has for a file's content."""
    return hashlib.sha1(file.read_bytes()).hexdigest()
