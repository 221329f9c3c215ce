"""A program that answers like nvidia-smi, for cards that the test chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# A shell script: a service asks several times, and every start of Python costs a tenth of a second.
_PROGRAM = """#!/bin/sh
[ -s "$0.cards" ] || { echo 'NVIDIA-SMI has failed: it could not communicate with the driver.'; exit 9; }
case $1 in
-L) while IFS= read -r line; do echo "$line"; done <"$0.list"; exit;;
--query-gpu=*) fields=${1#--query-gpu=};;
*) echo "what is $1?" >&2; exit 2;;
esac
while read -r index uuid total used free mig; do
    row=
    for field in $(IFS=,; echo $fields); do
        case $field in
        index) row="$row, $index";;
        uuid) row="$row, $uuid";;
        memory.total) row="$row, $total";;
        memory.used) row="$row, $used";;
        memory.free) row="$row, $free";;
        mig.mode.current) row="$row, $mig";;
        *) echo "Field \\"$field\\" is not a valid field to query."; exit 2;;
        esac
    done
    echo "${row#, }"
done <"$0.cards"
"""


@dataclass(frozen=True)
class Card:
    uuid: str
    total_mib: int
    used_mib: int = 0
    slices: tuple[tuple[str, str], ...] = ()
    """Profile (`1g.5gb`) and UUID of its MIG instances."""


def install(folder: Path, *cards: Card) -> Path:
    """The folder, for PATH, with an `nvidia-smi` in it that knows these cards, numbered in this order."""
    rows, listing = [], []
    for number, card in enumerate(cards):
        free_mib = card.total_mib - card.used_mib
        mig = "Enabled" if card.slices else "[N/A]"
        rows.append(f"{number} {card.uuid} {card.total_mib} {card.used_mib} {free_mib} {mig}\n")
        listing.append(f"GPU {number}: NVIDIA Imagined (UUID: {card.uuid})\n")
        for place, (profile, uuid) in enumerate(card.slices):
            listing.append(f"  MIG {profile:<15} Device {place:>2}: (UUID: {uuid})\n")
    (folder / "nvidia-smi.cards").write_text("".join(rows))
    (folder / "nvidia-smi.list").write_text("".join(listing))
    program = folder / "nvidia-smi"
    program.write_text(_PROGRAM)
    program.chmod(0o755)
    return folder
