"""/v1/files: OpenAI's files API."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from sage_contracts.files import FileObject
from sage_contracts.paging import Deleted, ListPage
from sage_orchestrator.files.service import FileService
from sage_orchestrator.files.upload import UploadReader, check_announced, whole_file
from sage_orchestrator.paging import PageOrder


def make_router(service: FileService, max_file_bytes: int) -> APIRouter:
    router = APIRouter(prefix="/v1/files", tags=["files"])

    @router.post("")
    async def upload(request: Request) -> FileObject:
        expected = whole_file(max_file_bytes)
        check_announced(service.folder, request.headers.get("content-length"), expected)
        reader = UploadReader(request.headers.get("content-type"), service.folder, expected)
        received = await reader.read(request.stream())
        try:
            return await run_in_threadpool(service.keep, received)
        except BaseException:
            reader.discard()
            raise

    @router.get("")
    def list_files(
        purpose: str | None = None,  # any: of what is not taken here there are none
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: PageOrder = "desc",
    ) -> ListPage[FileObject]:
        return service.list_files(purpose=purpose, after=after, limit=limit, order=order)

    @router.get("/{file_id}")
    def retrieve(file_id: str) -> FileObject:
        return service.get(file_id)

    @router.delete("/{file_id}")
    def delete(file_id: str) -> Deleted:
        return service.delete(file_id)

    @router.get("/{file_id}/content")
    def content(file_id: str) -> FileResponse:
        path, filename = service.content(file_id)
        return FileResponse(path, filename=filename, media_type="application/octet-stream")

    return router
