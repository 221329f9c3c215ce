"""A gateway that trains nothing: jobs advance one step each time they are looked at, answers are canned.

Speaks the routes that the command line uses, with the real wire types. By hand:
    python tests/fakes/fake_gateway.py --port 8080
Names ask for outcomes: a job called `fails`, `no-hub` or `dies` fails, `endless` never ends; a question of
`break` breaks off, `error` errs inside the stream, `endless` never ends. GET /requests lists what came in;
POST /reset forgets everything.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import Response, StreamingResponse

from sage_contracts.config import Task, TrainingConfig, preset_fields
from sage_contracts.devices import DeviceLease, DeviceState
from sage_contracts.errors import (
    ConflictError,
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
)
from sage_contracts.files import FileObject, FilePurpose
from sage_contracts.inference import EngineState, EngineStatus, HostStatus
from sage_contracts.jobs import (
    CreateJobRequest,
    EventLevel,
    FineTuningJob,
    JobError,
    JobEvent,
    JobMetrics,
    JobStatus,
    SageJobInfo,
)
from sage_contracts.models import ExportFormat, MergeJob, MergeRequest, MergeStatus, ModelCard, ModelInfo
from sage_contracts.paging import Deleted, ListPage
from sage_contracts.status import PartStatus, StackStatus
from sage_contracts.sweeps import CreateSweepRequest, Sweep, SweepChild, SweepStatus, grid_points
from sage_servicekit import errors

STEPS = 2
MODEL = "smollm2-135m"
FAILURES = {
    "fails": ("training_failed", "The loss became NaN at step 4."),
    "no-hub": ("model_not_found", "No hub is reached."),
    "dies": ("internal_error", "The trainer died."),
}


@dataclass
class FakeJob:
    """A script of looks: queued, preparing, steps, done."""

    job: FineTuningJob
    looks: int = 0
    events: list[JobEvent] = field(default_factory=list)

    def say(self, message: str, *, level: EventLevel = EventLevel.INFO, **data: Any) -> None:
        self.events.append(
            JobEvent(
                id=f"ftevent-{self.job.id}-{len(self.events)}",
                created_at=int(time.time()),
                level=level,
                message=message,
                type="metrics" if data else "message",
                data=data or None,
            )
        )

    def look(self) -> None:
        job, metrics = self.job, self.job.sage.metrics
        if job.status.is_terminal or job.status is JobStatus.PAUSED:
            return
        self.looks += 1
        if self.looks == 2:
            job.status, metrics.phase = JobStatus.RUNNING, "data"
            self.say("Preparing data")
        elif 2 < self.looks <= 2 + STEPS:
            self._step(self.looks - 2)
        elif self.looks > 2 + STEPS and job.sage.name != "endless":
            self._end()

    def _step(self, step: int) -> None:
        metrics = self.job.sage.metrics
        metrics.phase, metrics.step, metrics.total_steps = "training", step, STEPS
        metrics.loss, metrics.tokens_per_second, metrics.eta_s = 2.5 - 0.1 * step, 800.0 + step, 10.0 - step
        self.say(f"Step {step}/{STEPS} loss {metrics.loss:.2f}", step=step, total_steps=STEPS)

    def _end(self) -> None:
        job = self.job
        job.finished_at = int(time.time())
        if job.sage.name in FAILURES:
            code, message = FAILURES[job.sage.name]
            job.status = JobStatus.FAILED
            job.error = JobError(code=code, message=message)
            self.say(message, level=EventLevel.ERROR)
            return
        job.status = JobStatus.SUCCEEDED
        job.fine_tuned_model = f"{job.sage.name}@{job.sage.version}"
        job.sage.metrics.base_eval_loss, job.sage.metrics.eval_loss = 2.391, 1.898
        job.sage.metrics.base_perplexity, job.sage.metrics.perplexity = 10.92, 6.673
        job.sage.metrics.base_token_accuracy, job.sage.metrics.token_accuracy = 0.524, 0.581
        self.say(f"Registered {job.fine_tuned_model}")


EXPORTED = "finetune_output/code/versions/1/exports/ollama"
PARITY = {"probes": 3, "same": 2, "top1": 0.97, "dtype": "q8_0"}


@dataclass
class State:
    jobs: dict[str, FakeJob] = field(default_factory=dict)
    files: dict[str, FileObject] = field(default_factory=dict)
    merges: dict[str, int] = field(default_factory=dict)
    formats: dict[str, ExportFormat] = field(default_factory=dict)
    """Of the merges."""
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    swept: dict[str, str] = field(default_factory=dict)
    """The best job by the name of its sweep."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    counter: Any = field(default_factory=lambda: itertools.count(1))

    def clear(self) -> None:
        for kept in (self.jobs, self.files, self.merges, self.sweeps, self.swept, self.requests):
            kept.clear()
        self.counter = itertools.count(1)

    def job(self, job_id: str) -> FakeJob:
        if job_id not in self.jobs:
            raise NotFoundError(f"There is no job {job_id}.")
        return self.jobs[job_id]

    def tuned(self) -> list[FineTuningJob]:
        return [fake.job for fake in self.jobs.values() if fake.job.status is JobStatus.SUCCEEDED]


def make_job(state: State, request: CreateJobRequest) -> FakeJob:
    options = request.sage
    task = options.task or Task.CUSTOM
    if request.model == "nowhere/nothing":
        raise ModelNotFoundError("There is no base model 'nowhere/nothing'.", param="model")
    preset = options.preset or "cpu"
    fields = preset_fields(preset) | options.config | {"model_name": MODEL, "task": task}
    name = options.name or task.value
    versions = [job for job in state.tuned() if job.sage.name == name]
    job = FineTuningJob(
        id=f"ftjob-{next(state.counter):04}",
        created_at=int(time.time()),
        model=MODEL,
        status=JobStatus.QUEUED,
        training_file=request.training_file or "",
        sage=SageJobInfo(
            name=name,
            task=task,
            preset=preset,
            config=TrainingConfig.model_validate(fields),
            version=len(versions) + 1,
            output_dir=f"finetune_output/{name}",
            metrics=JobMetrics(),
        ),
    )
    state.jobs[job.id] = FakeJob(job)
    return state.jobs[job.id]


def cards(state: State) -> list[ModelCard]:
    found = []
    for job in state.tuned():
        info = ModelInfo(
            name=job.sage.name,
            version=job.sage.version or 1,
            task=job.sage.task,
            base_model=MODEL,
            adapter_path=f"finetune_output/{job.sage.name}/versions/{job.sage.version}/lora_weights",
            base_eval_loss=2.391,
            eval_loss=1.898,
        )
        found.append(ModelCard(id=job.fine_tuned_model or "", created=job.created_at, sage=info))
        alias = info.model_copy(update={"alias_of": job.fine_tuned_model})
        found.append(ModelCard(id=job.sage.name, created=job.created_at, sage=alias))
    for name, job_id in state.swept.items():
        info = ModelInfo(name=name, version=1, job_id=job_id, base_model=MODEL, adapter_path="adapters/best")
        found.append(ModelCard(id=name, created=0, sage=info))
    return [*{card.id: card for card in found}.values(), ModelCard(id="mock", created=0)]


def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    return f"data: {json.dumps({'object': 'chat.completion.chunk', 'choices': [choice]})}\n\n"


async def answer(model: str, question: str) -> AsyncIterator[str]:
    yield ": starting the engine\n\n"
    yield chunk({"role": "assistant", "content": ""})
    if question == "error":
        detail = {"message": "The engine died: out of memory.", "code": "engine_failed"}
        yield f"data: {json.dumps({'error': detail, 'source': 'inference'})}\n\n"
        return
    yield chunk({"content": f"{model} says: "})
    if question == "break":
        return
    while question == "endless":
        yield chunk({"content": "more "})
        await asyncio.sleep(0.01)
    for word in f"you asked {question!r}".split(" "):
        yield chunk({"content": f"{word} "})
    yield chunk({}, "stop")
    yield "data: [DONE]\n\n"


def build_app() -> FastAPI:
    app = FastAPI()
    state = State()
    errors.install(app, "fake")
    _add_jobs(app, state)
    _add_models(app, state)
    _add_sweeps(app, state)

    @app.middleware("http")
    async def record(request: Request, call_next: Any) -> Response:
        if request.url.path not in ("/requests", "/reset"):
            state.requests.append(
                {
                    "method": request.method,
                    "path": request.url.path,
                    "key": request.headers.get("authorization"),
                }
            )
        response: Response = await call_next(request)
        return response

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok", "service": "gateway"}

    @app.post("/reset")
    def reset() -> None:
        state.clear()

    @app.get("/requests")
    def requests() -> list[dict[str, Any]]:
        return state.requests

    @app.get("/v1/sage/status")
    def status() -> StackStatus:
        return StackStatus(
            parts=[
                PartStatus(name="gateway", state="up"),
                PartStatus(name="trainer", state="up", detail={"jobs": 1}),
            ]
        )

    @app.get("/v1/sage/engines")
    def engines() -> HostStatus:
        engine = EngineStatus(
            engine_id="e1",
            kind="transformers",
            base_model=MODEL,
            state=EngineState.READY,
            adapters=["code@1"],
        )
        return HostStatus(device="cpu", engine_kind="transformers", keep_alive_s=300, engines=[engine])

    @app.get("/v1/sage/devices")
    def devices() -> ListPage[DeviceState]:
        lease = DeviceLease(
            holder="train:x",
            purpose="training",
            bytes=2**31,
            label="training code",
            expires_at=0,
            is_idle=False,
        )
        return ListPage(
            data=[DeviceState(device="cpu", total_bytes=2**34, leased_bytes=2**31, leases=[lease])]
        )

    @app.post("/v1/sage/release")
    async def release(request: Request) -> dict[str, Any]:
        state.requests.append({"path": "release body", "body": await request.json()})
        return {"released": True}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await request.json()
        state.requests.append({"path": "chat body", "body": body})
        model = body["model"].removeprefix("finetune/")
        names = [card.id for card in cards(state)]
        if model not in names and not model.startswith("base:"):
            raise ModelNotFoundError(
                f"There is no model {model!r}. Models: {', '.join(names)}.", param="model"
            )
        citations = (
            [{"id": 1, "source": "presets.md#cpu", "score": 1.0, "text": "…"}] if body.get("index") else []
        )
        headers = {"X-Sage-Citations": json.dumps(citations)}
        stream = answer(model, body["messages"][-1]["content"])
        return StreamingResponse(stream, media_type="text/event-stream", headers=headers)

    return app


def _add_jobs(app: FastAPI, state: State) -> None:
    @app.post("/v1/files")
    async def upload(file: UploadFile) -> FileObject:
        content = await file.read()
        kept = FileObject(
            id=f"file-{next(state.counter)}",
            bytes=len(content),
            created_at=int(time.time()),
            filename=file.filename or "",
            purpose=FilePurpose.FINE_TUNE,
        )
        state.files[kept.id] = kept
        state.requests.append({"path": "upload", "filename": kept.filename, "bytes": kept.bytes})
        return kept

    @app.delete("/v1/files/{file_id}")
    def delete(file_id: str) -> Deleted:
        del state.files[file_id]
        return Deleted(id=file_id, object="file")

    @app.post("/v1/fine_tuning/jobs")
    def create(request: CreateJobRequest) -> FineTuningJob:
        state.requests.append({"path": "job body", "body": request.model_dump(mode="json")})
        return make_job(state, request).job

    @app.get("/v1/fine_tuning/jobs")
    def jobs(limit: int = 20) -> ListPage[FineTuningJob]:
        newest = [fake.job for fake in reversed(state.jobs.values())]
        return ListPage(data=newest[:limit])

    @app.get("/v1/fine_tuning/jobs/{job_id}")
    def job(job_id: str) -> FineTuningJob:
        fake = state.job(job_id)
        fake.look()
        return fake.job

    @app.get("/v1/fine_tuning/jobs/{job_id}/events")
    def events(
        job_id: str, order: str = "desc", after: str | None = None, limit: int = 20
    ) -> ListPage[JobEvent]:
        found = state.job(job_id).events
        ordered = found if order == "asc" else found[::-1]
        start = next((i + 1 for i, event in enumerate(ordered) if event.id == after), 0)
        return ListPage(data=ordered[start : start + limit], has_more=len(ordered) > start + limit)

    @app.post("/v1/fine_tuning/jobs/{job_id}/{verb}")
    def act(job_id: str, verb: str) -> FineTuningJob:
        job = state.job(job_id).job
        target = {"cancel": JobStatus.CANCELLED, "pause": JobStatus.PAUSED, "resume": JobStatus.QUEUED}[verb]
        if not job.status.can_become(target):
            raise ConflictError(f"The job {job_id} is {job.status.value}: it cannot be told to {verb}.")
        job.status = target
        return job


def _add_models(app: FastAPI, state: State) -> None:
    @app.get("/v1/models")
    def models() -> ListPage[ModelCard]:
        return ListPage(data=cards(state))

    @app.post("/v1/sage/models/{name}/merge")
    def merge(name: str, request: MergeRequest) -> MergeJob:
        if name not in [card.id for card in cards(state)]:
            raise ModelNotFoundError(f"There is no model {name!r}.", param="name")
        if request.dtype == "fp16":
            raise InvalidRequestError("The CPU cannot merge in fp16.", param="dtype")
        merge_id = f"merge-{next(state.counter)}"
        state.merges[merge_id] = 0
        state.formats[merge_id] = request.format
        state.requests.append({"path": "merge body", "body": request.model_dump(mode="json")})
        return MergeJob(id=merge_id, model=name, status=MergeStatus.QUEUED, created_at=int(time.time()))

    @app.get("/v1/sage/merges/{merge_id}")
    def merge_job(merge_id: str) -> MergeJob:
        state.merges[merge_id] += 1
        is_done = state.merges[merge_id] >= 2
        written = "finetune_output/code/merged_model" if state.formats[merge_id] == "safetensors" else None
        return MergeJob(
            id=merge_id,
            model="code@1",
            status=MergeStatus.SUCCEEDED if is_done else MergeStatus.RUNNING,
            phase="writing weights",
            created_at=int(time.time()),
            format=state.formats[merge_id],
            merged_path=written if is_done else None,
            result_path=(written or EXPORTED) if is_done else None,
            report={"parity": PARITY, "size_bytes": 269_000_000} if is_done else {},
        )


def _add_sweeps(app: FastAPI, state: State) -> None:
    @app.post("/v1/sage/sweeps")
    def create(request: CreateSweepRequest) -> Sweep:
        state.requests.append({"path": "sweep body", "body": request.model_dump(mode="json")})
        name = request.sage.name or "code"
        children = []
        for number, point in enumerate(grid_points(request.grid, max_jobs=request.max_jobs), 1):
            options = request.sage.model_copy(update={"name": f"{name}-s{number}"})
            job = make_job(state, CreateJobRequest(model=request.model, sage=options)).job
            children.append(SweepChild(job_id=job.id, name=job.sage.name, point=point, status=job.status))
        sweep = Sweep(
            id=f"sweep-{next(state.counter)}",
            created_at=int(time.time()),
            status=SweepStatus.RUNNING,
            name=name,
            task=Task.CODE,
            model=MODEL,
            grid=request.grid,
            children=children,
        )
        state.sweeps[sweep.id] = sweep
        return sweep

    @app.get("/v1/sage/sweeps")
    def list_sweeps() -> ListPage[Sweep]:
        return ListPage(data=list(reversed(state.sweeps.values())))

    @app.get("/v1/sage/sweeps/{sweep_id}")
    def retrieve(sweep_id: str) -> Sweep:
        """Each look ends the next job: every second one fails, the rest get better and better."""
        sweep = state.sweeps[sweep_id]
        waiting = [child for child in sweep.children if not child.status.is_terminal]
        if sweep.name == "endless" or sweep.status.is_terminal:
            return sweep
        child, number = waiting[0], len(sweep.children) - len(waiting)
        if number % 2 or sweep.name in FAILURES:
            child.status = JobStatus.FAILED
            child.error = JobError(code="training_failed", message="The loss became NaN at step 4.")
        else:
            child.status, child.step, child.total_steps, child.loss = JobStatus.SUCCEEDED, 4, 4, 2.1
            child.base_eval_loss, child.eval_loss = 2.391, 1.898 - number / 10
            child.fine_tuned_model, sweep.best_job_id = f"{child.name}@1", child.job_id
        if len(waiting) == 1:
            sweep.status = SweepStatus.SUCCEEDED if sweep.best_job_id else SweepStatus.FAILED
            sweep.fine_tuned_model = f"{sweep.name}@1" if sweep.best_job_id else None
            state.swept = {sweep.name: sweep.best_job_id} if sweep.best_job_id else {}
        return sweep

    @app.post("/v1/sage/sweeps/{sweep_id}/cancel")
    def cancel(sweep_id: str) -> Sweep:
        state.sweeps[sweep_id].status = SweepStatus.CANCELLED
        return state.sweeps[sweep_id]


def main() -> None:
    import uvicorn

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8080)
    uvicorn.run(build_app(), host="127.0.0.1", port=parser.parse_args().port, log_level="warning")


if __name__ == "__main__":
    main()
