"""How a run is spread over devices, and why. A pure function; who asks brings the facts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sage.tools.finetune.distributed.shards import require_shardable
from sage.tools.finetune.hardware import ResolvedPrecision
from sage_contracts.auto import GIB, WEIGHTS_SHARE
from sage_contracts.config import TrainingConfig
from sage_contracts.errors import InvalidRequestError


@dataclass(frozen=True)
class Machine:
    """What a run has: its visible devices, of which a CPU is none."""

    devices: int
    bytes_each: int
    precision: ResolvedPrecision
    """What the config's comes to here."""


@dataclass(frozen=True)
class Spread:
    kind: Literal["off", "ddp", "fsdp"]
    ranks: int
    """Processes."""
    why: str
    """One sentence for people."""
    fits: bool | None = None
    """Whether the weights on a device leave room to train; None: nothing says how many there are."""


def choose_spread(config: TrainingConfig, machine: Machine, parameters: int | None) -> Spread:
    """How this config is spread, with a base model of so many parameters (None: unknown).

    `auto` gives each device a copy of a model that leaves room to train on one of them, and cuts up a larger
    one where that is possible. Raises: InvalidRequestError for more devices than there are, and for shards of
    what cannot be cut up.
    """
    if config.distributed == "off":
        return Spread("off", 1, "distributed=off")
    if config.method != "sft":
        return Spread("off", 1, f"a run of {config.method} uses one device")
    if config.distributed == "fsdp":
        require_shardable(config)
    if machine.devices == 0:
        return _on_cpu(config)
    ranks = _ranks(config, machine.devices)
    if ranks == 1:
        return Spread("off", 1, "num_devices=1" if config.num_devices else "one device is visible")
    if config.distributed != "auto":
        return _as_asked(config, machine, ranks, parameters)
    return _automatic(config, machine, ranks, parameters)


def held_bytes(config: TrainingConfig, precision: ResolvedPrecision, parameters: int) -> int:
    """What a model's weights take in memory, and with `tuning="full"` their gradients and Adam's moments."""
    if config.tuning == "full":
        return parameters * 4 * 4
    if config.load_in_4bit:
        return round(parameters * 0.6)  # the embeddings stay as they are
    if config.load_in_8bit:
        return round(parameters * 1.1)
    return parameters * (4 if precision == "fp32" else 2)


def _on_cpu(config: TrainingConfig) -> Spread:
    if config.distributed == "auto" or config.num_devices < 2:
        return Spread("off", 1, "a CPU is one device")
    asked = f"distributed={config.distributed}, num_devices={config.num_devices}"
    return Spread(config.distributed, config.num_devices, f"{asked}: as many processes on the CPU")


def _ranks(config: TrainingConfig, visible: int) -> int:
    if config.num_devices > visible:
        raise InvalidRequestError(
            f"num_devices is {config.num_devices}, but the trainer sees {visible}. Lower it, or name more in "
            "CUDA_VISIBLE_DEVICES.",
            param="num_devices",
        )
    return config.num_devices or visible


def _as_asked(config: TrainingConfig, machine: Machine, ranks: int, parameters: int | None) -> Spread:
    why, fits = f"distributed={config.distributed}", None
    if parameters is not None:
        held, hands = held_bytes(config, machine.precision, parameters), 1
        if config.distributed == "fsdp":
            hands, why = ranks, f"{why}; in {ranks} shards the weights take {_gib(held / ranks)} each"
        fits = held // hands <= machine.bytes_each * WEIGHTS_SHARE
    return Spread("fsdp" if config.distributed == "fsdp" else "ddp", ranks, why, fits)


def _automatic(config: TrainingConfig, machine: Machine, ranks: int, parameters: int | None) -> Spread:
    if parameters is None:
        return Spread("ddp", ranks, "the size of the model is not known before it is fetched")
    held, room = held_bytes(config, machine.precision, parameters), machine.bytes_each * WEIGHTS_SHARE
    share = f"{_gib(room)} of a device's {_gib(machine.bytes_each)}"
    what = "weights, gradients and optimiser" if config.tuning == "full" else "weights"
    if held <= room:
        return Spread("ddp", ranks, f"the model's {what} ({_gib(held)}) fit into {share}", fits=True)
    large = f"the model's {what} ({_gib(held)}) would take more than {share}"
    obstacle = _obstacle(config, machine.precision)
    if obstacle:
        return Spread("ddp", ranks, f"{large}, but cannot be cut up: {obstacle}", fits=False)
    part = held // ranks
    if part > room:
        return Spread("fsdp", ranks, f"{large}, and {ranks} shards too: take a smaller model", fits=False)
    return Spread("fsdp", ranks, f"{large}; in {ranks} shards they take {_gib(part)} each", fits=True)


def _obstacle(config: TrainingConfig, precision: ResolvedPrecision) -> str | None:
    try:
        require_shardable(config.model_copy(update={"precision": precision}))
    except InvalidRequestError as error:
        return error.message
    return None


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
