"""Settings of the inference host. Times in seconds, sizes in bytes; 0 in a size or count means "choose"."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sage_servicekit.settings import ServiceSettings


class InferenceSettings(ServiceSettings):
    """Read from the environment (prefix SAGE_)."""

    chat_finetune_port: int = 8000
    """Where the host listens; the published name of the variable is SAGE_CHAT_FINETUNE_PORT."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    vllm_command: str = ""
    """A command that stands in for `vllm`, split like a shell does; empty takes this interpreter's module."""
    tool_call_parser: str = ""
    """vLLM's name for the way in which the models write calls of tools (`hermes`); empty: no request may have
    tools, since an engine that does not know it refuses them."""
    device: str = "auto"
    """`auto`, `cpu`, or a GPU: its number as nvidia-smi counts (`cuda:1`), or its UUID."""

    keep_alive_s: float = 300
    """An engine without requests for this long is stopped; 0 stops it when its last request ends."""
    max_engines: int = Field(2, ge=1)
    """Base models held at once. One more stops the idle engine that was used least recently."""
    engine_start_deadline_s: float = 1800
    engine_start_stall_s: float = 180
    """A start in which an engine neither logs nor computes for this long is over before its deadline."""
    engine_download_deadline_s: float = 3600
    """In place of both where the base model may have to be fetched from a hub first: it may look stalled."""
    engine_stop_grace_s: float = 10
    """From SIGTERM to SIGKILL."""
    request_start_timeout_s: float = 150
    """How long a request that does not stream waits for its engine."""
    stream_start_timeout_s: float = 600
    """The same for a stream, which sees comments meanwhile."""
    comment_interval_s: float = 2
    upstream_silence_s: float = 600
    """An engine that sends nothing for this long in the middle of an answer, or when it is to load an adapter
    (which may have to wait for an answer to end), has failed."""
    beat_interval_s: float = 2
    """Between renewals of device leases, and so the longest that a yield order waits to be read."""

    max_model_len: int = Field(0, ge=0)
    """Tokens of context per request; 0: 2048 on a CPU, 8192 on a GPU. Never more than the model has."""
    max_num_seqs: int = Field(0, ge=0)
    """Requests per batch in vLLM; 0: 32 on a CPU, 128 on a GPU."""
    kv_cache_bytes: int = Field(0, ge=0)
    """CPU only; 0: room for four full contexts, at least 64 MiB."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    """Of a GPU's memory, for vLLM; less where others leave less."""
    engine_threads: int = Field(0, ge=0)
    """0: vLLM gets one on up to four cores, else half of them; our engine gets all of up to eight."""
    max_loras: int = Field(4, ge=1)
    """Adapters in one batch."""
    max_cpu_loras: int = Field(16, ge=1)
    """Adapters kept loaded; one more unloads the idle one that was used least recently."""
