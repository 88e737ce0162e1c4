"""A model hub on this machine: as much of huggingface.co's interface as downloading a repository needs."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class HubServer:
    """Serves repositories, each a list of commits; `with HubServer() as hub: hub.commit("me/model", folder)`.

    Attributes:
        url: What HF_ENDPOINT must be.
        asked: Path of every request.
        tokens: What the last request of a path said of who asks, `Bearer TOKEN`; None where it did not.
    """

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository -> commit -> file -> content
        self.asked: list[str] = []
        self.tokens: dict[str, str | None] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repository: str, folder: Path) -> str:
        """Put a folder's files there as a new commit; returns its hash."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        history = self.commits.setdefault(repository, {})
        sha = hashlib.sha1(f"{repository}{len(history)}{sorted(files)}".encode()).hexdigest()
        history[sha] = files
        return sha

    def _find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        history = self.commits.get(repository, {})
        sha = list(history)[-1] if revision == "main" and history else revision
        return (sha, history[sha]) if sha in history else None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None: ...

            def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(content)

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path).strip("/")
                hub.asked.append(path)
                hub.tokens[path] = self.headers.get("Authorization")
                parts = path.split("/")
                if parts[:2] == ["api", "models"]:
                    kind, revision = (parts[4:6] + ["revision", "main"])[:2] if len(parts) > 5 else ("revision", "main")
                    found = hub._find("/".join(parts[2:4]), revision)
                    if found is None:
                        return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
                    sha, files = found
                    if kind == "tree":
                        tree = [
                            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                            for name, data in files.items()
                        ]
                        return self.answer(json.dumps(tree).encode(), Content_Type="application/json")
                    about = {"id": "/".join(parts[2:4]), "sha": sha, "siblings": [{"rfilename": n} for n in files]}
                    return self.answer(json.dumps(about).encode(), Content_Type="application/json")
                found = hub._find("/".join(parts[:2]), parts[3]) if len(parts) > 4 and parts[2] == "resolve" else None
                name = "/".join(parts[4:])
                if found is None or name not in found[1]:
                    return self.answer(b"", 404, X_Error_Code="EntryNotFound")
                data = found[1][name]
                tag = f'"{hashlib.sha1(data).hexdigest()}"'
                return self.answer(data, X_Repo_Commit=found[0], ETag=tag, X_Linked_Etag=tag)

            do_HEAD = do_GET

        return Handler
