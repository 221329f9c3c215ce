"""A model hub on loopback: repositories are folders under `models/` and `datasets/` of one root.

It speaks what `huggingface_hub` asks for when it looks a repository up, downloads a snapshot, and uploads a
folder, large files by LFS with a hash that is checked. A repository has one revision. What is private or
gated answers only to TOKEN.
"""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sage.tools.finetune.data.layout import data_card

TOKEN = "hf_test"
REVISION = "5" * 40
LARGE_SUFFIXES = (".safetensors", ".gguf")


class FakeHub:
    """`app` serves it.

    `gated` names repositories ("models/owner/name") whose files want the token; what they hold is told to
    everybody. `private` are those that were made so. Of `broken_files` the first half comes through, and then
    the hub is out of order. `sizes` (bytes) are told instead of the true ones.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.broken_files: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.commits: list[str] = []
        self.served: list[tuple[str, str]] = []
        """(file, range) of every request for a file that was answered whole."""
        repository = "/{kind:str}/{owner}/{name}"
        self.app = Starlette(
            routes=[
                Route("/api/repos/create", self._create, methods=["POST"]),
                Route("/api/validate-yaml", self._validate_card, methods=["POST"]),
                Route(f"/api{repository}/preupload/{{revision}}", self._preupload, methods=["POST"]),
                Route(f"/api{repository}/commit/{{revision}}", self._commit, methods=["POST"]),
                Route(f"/api{repository}/revision/{{revision}}", self._info),
                Route(f"/api{repository}/tree/{{revision}}", self._tree),
                Route(f"/api{repository}", self._info),
                Route("/datasets/{owner}/{name}/resolve/{revision}/{file:path}", self._file),
                Route("/{owner}/{name}.git/info/lfs/objects/batch", self._batch, methods=["POST"]),
                Route("/{owner}/{name}/resolve/{revision}/{file:path}", self._file),
                Route("/lfs/{hash}", self._take_object, methods=["PUT"]),
            ]
        )

    def _refusal(self, request: Request, key: str) -> Response | None:
        is_known = request.headers.get("authorization") == f"Bearer {TOKEN}"
        if key in self.gated and not is_known:
            return Response(status_code=401, headers={"X-Error-Code": "GatedRepo"})
        return None if (self.root / key).is_dir() else self._unknown()

    def _unknown(self) -> Response:
        return Response(status_code=404, headers={"X-Error-Code": "RepoNotFound"})

    def _of(self, request: Request) -> str:
        kind = request.path_params.get("kind") or (
            "datasets" if request.url.path.startswith("/datasets/") else "models"
        )
        return f"{kind}/{request.path_params['owner']}/{request.path_params['name']}"

    async def _info(self, request: Request) -> Response:
        key = self._of(request)
        if not (self.root / key).is_dir():
            return self._unknown()
        found: dict[str, Any] = {"id": key.partition("/")[2], "sha": REVISION}
        found["private"] = key in self.private
        found["cardData"] = {"license": "apache-2.0"} | data_card(self.root / key)
        found["siblings"] = [
            {"rfilename": name, "size": self.sizes.get(name) or (self.root / key / name).stat().st_size}
            for name in self._names(key)
        ]
        return JSONResponse(found)

    async def _tree(self, request: Request) -> Response:
        key = self._of(request)
        if refusal := self._refusal(request, key):
            return refusal
        listed = [
            {"type": "file", "path": name, "size": (self.root / key / name).stat().st_size, "oid": REVISION}
            for name in self._names(key)
        ]
        return JSONResponse(listed)

    async def _file(self, request: Request) -> Response:
        key = self._of(request)
        if refusal := self._refusal(request, key):
            return refusal
        file = self.root / key / request.path_params["file"]
        if not file.is_file():
            return Response(status_code=404, headers={"X-Error-Code": "EntryNotFound"})
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": REVISION}
        if file.name in self.broken_files and request.method == "GET":
            if "range" in request.headers:
                return Response(status_code=503)
            content = file.read_bytes()
            half = content[: len(content) // 2]
            return StreamingResponse(iter([half]), headers={**headers, "Content-Length": str(len(content))})
        self.served.append((file.name, request.headers.get("range", "")))
        return FileResponse(file, headers=headers)

    async def _create(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return Response(status_code=401)
        asked = await request.json()
        name = "/".join(filter(None, [asked.get("organization") or "me", asked["name"]]))
        url = f"{request.base_url}{name}"
        if (self.root / "models" / name).is_dir():
            return JSONResponse({"error": "You already created this model repo", "url": url}, 409)
        (self.root / "models" / name).mkdir(parents=True)
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(f"models/{name}")
            self.gated.add(f"models/{name}")
        return JSONResponse({"url": url, "name": name})

    async def _validate_card(self, request: Request) -> Response:
        return JSONResponse({"errors": [], "warnings": []})

    async def _preupload(self, request: Request) -> Response:
        if refusal := self._refusal(request, self._of(request)):
            return refusal
        asked = (await request.json())["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in asked
        ]
        return JSONResponse({"files": modes, "commitOid": REVISION})

    async def _batch(self, request: Request) -> Response:
        asked = await request.json()
        objects = []
        for wanted in asked["objects"]:
            upload = {"href": f"{request.base_url}lfs/{wanted['oid']}", "header": {}}
            objects.append({**wanted, "actions": {"upload": upload}})
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _take_object(self, request: Request) -> Response:
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != request.path_params["hash"]:
            return Response(status_code=422)
        (self.root / "lfs").mkdir(exist_ok=True)
        (self.root / "lfs" / request.path_params["hash"]).write_bytes(content)
        return Response()

    async def _commit(self, request: Request) -> Response:
        key = self._of(request)
        if refusal := self._refusal(request, key):
            return refusal
        for line in (await request.body()).splitlines():
            said: dict[str, Any] = json.loads(line)
            value = said["value"]
            if said["key"] == "header":
                self.commits.append(value["summary"])
                continue
            target = self.root / key / value["path"]
            if said["key"] == "deletedFile":
                target.unlink()
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if said["key"] == "file":
                target.write_bytes(base64.b64decode(value["content"]))
            else:
                (self.root / "lfs" / value["oid"]).rename(target)
        url = f"{request.base_url}{key.partition('/')[2]}/commit/{REVISION}"
        return JSONResponse({"commitUrl": url, "commitOid": REVISION, "success": True})

    def _names(self, key: str) -> list[str]:
        folder = self.root / key
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
