"""The kinds of engine: what each needs and how it is started. Both speak vLLM's HTTP surface."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from sage_contracts.errors import DeviceBusyError
from sage_contracts.home import Home
from sage_inference import hardware
from sage_inference.engine_process import Address, EngineProcess, Launch
from sage_inference.fit import VLLM_RANKS, Kind
from sage_inference.models import BaseModel
from sage_inference.settings import InferenceSettings
from sage_servicekit.machine import Device

_MIB = 2**20
_GIB = 2**30
# What a process needs besides weights and cache, as measured: libraries, activations, two processes for vLLM.
_OVERHEAD_BYTES: dict[Kind, int] = {"vllm": 1400 * _MIB, "transformers": 700 * _MIB}
_DEFAULT_RANK = 16
_UNLIMITED_RANK = 2**31
_CONTEXTS_IN_CACHE = 4
_CUDA_CONTEXT_BYTES = 512 * _MIB
_LEAST_CACHE_BYTES = 512 * _MIB
_BUSY_RETRY_S = 30.0


@dataclass(frozen=True)
class Plan:
    """One engine before it is started."""

    launch: Launch
    needed_bytes: int
    """What it leases."""
    least_bytes: int
    """Of a GPU, below which a start cannot succeed."""
    max_rank: int


def choose_kind(settings: InferenceSettings) -> Kind:
    """The engine to use: vLLM where it can be found without importing it."""
    if settings.engine != "auto":
        return settings.engine
    found = settings.vllm_command or importlib.util.find_spec("vllm") is not None
    return "vllm" if found else "transformers"


class EngineFactory:
    """Plans and starts engines of one kind on one device."""

    def __init__(
        self, settings: InferenceSettings, kind: Kind, device: Device, *, has_bf16: bool | None = None
    ) -> None:
        """`has_bf16`: whether the device computes in it as fast; None: as it is found to."""
        self.kind = kind
        self.device = device
        self._settings = settings
        self._home: Home = settings.home
        self._bf16 = (device.is_cuda or hardware.has_bf16_units()) if has_bf16 is None else has_bf16

    def plan(self, base: BaseModel, rank: int) -> Plan:
        """Decide everything but the port. `rank` is the largest that a waiting adapter needs."""
        settings = self._settings
        max_rank = smallest_rank(max(rank, _DEFAULT_RANK)) if self.kind == "vllm" else _UNLIMITED_RANK
        slug = re.sub(r"[^\w.-]+", "-", base.served_name.removeprefix("base:"))
        deadline_s = (
            settings.engine_start_deadline_s if base.is_local else settings.engine_download_deadline_s
        )
        launch = Launch(
            name=slug,
            command=lambda address: self._command(base, max_rank, address),
            env=self._env(base),
            start_deadline_s=deadline_s,
            start_stall_s=settings.engine_start_stall_s if base.is_local else deadline_s,
            stop_grace_s=settings.engine_stop_grace_s,
            silence_s=settings.upstream_silence_s,
            log_path=self._home.logs / f"engine-{slug}.log",
            records=self.records,
        )
        weights_bytes = base.weights_bytes // 2 if base.is_fp32 else base.weights_bytes
        return Plan(launch, self._needed_bytes(base), weights_bytes + _LEAST_CACHE_BYTES, max_rank)

    @property
    def records(self) -> Path:
        return self._home.run / "engines"

    async def start(self, plan: Plan, used_bytes: int | None) -> EngineProcess:
        """`used_bytes` of the GPU are others'. Raises: DeviceBusyError when too little is left; OSError."""
        launch = plan.launch
        if self.device.is_cuda and self.kind == "vllm":
            wanted = self._settings.gpu_memory_utilization
            share = memory_share(self.device, used_bytes, wanted, plan.least_bytes)
            options = ["--gpu-memory-utilization", str(share)]
            launch = replace(launch, command=lambda address: [*plan.launch.command(address), *options])
        return await EngineProcess.start(launch)

    def _command(self, base: BaseModel, max_rank: int, address: Address) -> list[str]:
        common = ["--host", "127.0.0.1", "--port", str(address.port)]
        common += ["--served-model-name", base.served_name, address.nonce]
        common += ["--max-model-len", str(self.context_length(base))]
        if self.kind == "transformers":
            # Its environment shows it one GPU, which it counts from 0.
            torch_device = "cuda:0" if self.device.is_cuda else "cpu"
            program = [sys.executable, "-m", "sage_inference.transformers_engine"]
            return [*program, "--model", base.location, "--device", torch_device, *common]
        command = shlex.split(self._settings.vllm_command) or [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
        ]
        return [*command, "serve", base.location, *common, *self._vllm_options(base, max_rank)]

    def _vllm_options(self, base: BaseModel, max_rank: int) -> list[str]:
        settings = self._settings
        options = ["--enable-lora", "--max-lora-rank", str(max_rank)]
        if settings.tool_call_parser:
            options += ["--enable-auto-tool-choice", "--tool-call-parser", settings.tool_call_parser]
        options += ["--max-loras", str(settings.max_loras)]
        options += ["--max-cpu-loras", str(max(settings.max_loras, settings.max_cpu_loras))]
        if self.device.is_cuda:
            return [*options, "--max-num-seqs", str(settings.max_num_seqs or 128)]
        options += ["--max-num-seqs", str(settings.max_num_seqs or 32)]
        # Compiling costs a minute of every cold start, and a CPU engine is started on demand.
        options += ["--enforce-eager", "--kv-cache-memory-bytes", str(self._cache_bytes(base))]
        return options if self._bf16 else [*options, "--dtype", "float32"]

    def context_length(self, base: BaseModel) -> int:
        """Tokens per request: the setting, but never more than the model was made for."""
        wanted = self._settings.max_model_len or (8192 if self.device.is_cuda else 2048)
        return min(wanted, base.max_positions or wanted)

    def _cache_bytes(self, base: BaseModel) -> int:
        if self._settings.kv_cache_bytes:
            return self._settings.kv_cache_bytes
        if base.kv_values_per_token is None:
            return _GIB
        value_bytes = 2 if self._bf16 and self.kind == "vllm" else 4
        context_bytes = base.kv_values_per_token * value_bytes * self.context_length(base)
        return max(64 * _MIB, _CONTEXTS_IN_CACHE * context_bytes)

    def _needed_bytes(self, base: BaseModel) -> int:
        if self.device.is_cuda and self.kind == "vllm":
            return int(self.device.total_bytes * self._settings.gpu_memory_utilization)
        # Files hold two bytes a weight as a rule; our own CPU engine computes with four.
        factor = 2 if self.kind == "transformers" and not self.device.is_cuda else 1
        return base.weights_bytes * factor + self._cache_bytes(base) + _OVERHEAD_BYTES[self.kind]

    def _env(self, base: BaseModel) -> dict[str, str]:
        threads = str(self._settings.engine_threads or _threads(self.kind))
        env = {
            # Threads that spin while they wait cost 4 to 15 times on a shared machine.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        }
        if base.is_local:
            env["HF_HUB_OFFLINE"] = "1"
        env |= self.device.env
        if self.device.is_cuda:
            return env
        return env | {"OMP_NUM_THREADS": threads, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def memory_share(device: Device, used_bytes: int | None, wanted: float, least_bytes: int) -> float:
    """The part of a GPU for vLLM, which refuses to start where less is free: at most `wanted`.

    Raises: DeviceBusyError when what others leave is less than `least_bytes`.
    """
    if used_bytes is None:
        return wanted
    free_bytes = device.total_bytes - used_bytes - _CUDA_CONTEXT_BYTES
    share = min(wanted, round(free_bytes / device.total_bytes, 3))
    if share < wanted and free_bytes < least_bytes:
        used, total, least = (size / _GIB for size in (used_bytes, device.total_bytes, least_bytes))
        raise DeviceBusyError(
            f"{used:.1f} of the {total:.1f} GiB of {device.name} are in use, and this model needs about "
            f"{least:.1f} GiB. End what holds them (nvidia-smi lists it), or choose a smaller model; "
            f"SAGE_GPU_MEMORY_UTILIZATION ({wanted}) is only the most that is taken.",
            retry_after_s=_BUSY_RETRY_S,
        )
    return share


def _threads(kind: Kind) -> int:
    cores = hardware.cpu_cores()
    if kind == "transformers":
        return min(cores, 8)
    return 1 if cores <= 4 else cores // 2


def smallest_rank(rank: int) -> int:
    """The smallest maximum that vLLM accepts and that holds `rank`."""
    return next((choice for choice in VLLM_RANKS if choice >= rank), VLLM_RANKS[-1])
