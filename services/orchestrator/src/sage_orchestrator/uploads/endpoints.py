"""/v1/uploads: OpenAI's uploads API, for files in parts."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from sage_contracts.uploads import CompleteUploadRequest, CreateUploadRequest, UploadObject, UploadPart
from sage_orchestrator.files.upload import UploadReader, check_announced
from sage_orchestrator.uploads.service import UploadService


def make_router(service: UploadService) -> APIRouter:
    router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

    @router.post("")
    def create(request: CreateUploadRequest) -> UploadObject:
        return service.create(request)

    @router.post("/{upload_id}/parts")
    async def add_part(upload_id: str, request: Request) -> UploadPart:
        expected = await run_in_threadpool(service.expected_part, upload_id)
        check_announced(service.folder, request.headers.get("content-length"), expected)
        reader = UploadReader(request.headers.get("content-type"), service.folder, expected)
        received = await reader.read(request.stream())
        try:
            return await run_in_threadpool(service.keep_part, upload_id, received)
        except BaseException:
            reader.discard()
            raise

    @router.post("/{upload_id}/complete")
    def complete(upload_id: str, request: CompleteUploadRequest) -> UploadObject:
        return service.complete(upload_id, request)

    @router.post("/{upload_id}/cancel")
    def cancel(upload_id: str) -> UploadObject:
        return service.cancel(upload_id)

    return router
