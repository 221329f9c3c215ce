"""What `auto` chooses for a device and a model, and why. A pure function; who asks brings the facts."""

from __future__ import annotations

from dataclasses import dataclass

from sage_contracts.config import PresetName, preset_fields

GIB = 2**30
WEIGHTS_SHARE = 0.6
"""Of the memory, for the frozen weights; the rest is for activations, adapters and what the driver takes."""
_LARGEST_FIRST = (PresetName.A100, PresetName.RTX_4090, PresetName.RTX_3060, PresetName.MINIMAL)
_AT_LEAST_BYTES = {PresetName.A100: 40 * GIB, PresetName.RTX_4090: 20 * GIB, PresetName.RTX_3060: 8 * GIB}
"""Cards sell a little less than they say: an RTX 4090 has 23.99 GiB."""


@dataclass(frozen=True)
class PresetChoice:
    preset: PresetName
    why: str
    """One sentence for people."""


def choose_preset(device: str, memory_bytes: int, parameters: int | None) -> PresetChoice:
    """The preset for a device (`cpu`, `cuda:0`, …) and a base model of so many parameters (None: unknown)."""
    if device == "cpu":
        return PresetChoice(PresetName.CPU, _cpu_reason(memory_bytes, parameters))
    for_card = next(name for name in _LARGEST_FIRST if memory_bytes >= _AT_LEAST_BYTES.get(name, 0))
    card = f"{device} has {_gib(memory_bytes)}"
    if parameters is None:
        return PresetChoice(for_card, f"{card}; the size of the model is not known before it is fetched")
    smaller = _LARGEST_FIRST[_LARGEST_FIRST.index(for_card) :]
    room = memory_bytes * WEIGHTS_SHARE
    chosen = next((name for name in smaller if weight_bytes(name, parameters) <= room), PresetName.MINIMAL)
    weights = f"the model's weights take {_gib(weight_bytes(chosen, parameters))} {_kind(chosen)}"
    if weight_bytes(chosen, parameters) > room:
        return PresetChoice(
            chosen,
            f"{card} and {weights}: more than the {_gib(room)} that leave room to train; "
            "take a smaller model if memory does not suffice",
        )
    if chosen is for_card:
        return PresetChoice(chosen, f"{card}, and {weights}")
    too_large = f"{_gib(weight_bytes(for_card, parameters))} {_kind(for_card)} would leave too little room"
    return PresetChoice(chosen, f"{card}, and {weights} ({too_large})")


def weight_bytes(preset: PresetName, parameters: int) -> int:
    """What the frozen weights take in memory under a preset; on a CPU at least, which may need fp32."""
    fields = preset_fields(preset)
    if fields.get("load_in_4bit"):
        # nf4 with double quantisation: 4.13 bits, and the embeddings stay as they are.
        return round(parameters * 0.6)
    if fields.get("load_in_8bit"):
        return round(parameters * 1.1)
    return parameters * 2


def _cpu_reason(memory_bytes: int, parameters: int | None) -> str:
    reason = f"no NVIDIA GPU is in reach of the trainer, which has {_gib(memory_bytes)} of memory"
    if parameters is None:
        return reason
    weights = weight_bytes(PresetName.CPU, parameters)
    # Which of both it is depends on the chip, the file and the run: `plan` measures it.
    reason += f"; the model's weights take {_gib(weights)} of it in bf16 and {_gib(2 * weights)} in fp32"
    return reason if weights <= memory_bytes * WEIGHTS_SHARE else f"{reason}: take a smaller model"


def _kind(preset: PresetName) -> str:
    fields = preset_fields(preset)
    if fields.get("load_in_4bit"):
        return "in 4-bit"
    return "in 8-bit" if fields.get("load_in_8bit") else "in 16-bit"


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / GIB:.1f} GiB"
