"""sage models."""

from __future__ import annotations

import time

import typer

from sage_cli import render
from sage_cli.client import Client
from sage_cli.failures import print_json
from sage_contracts.models import ModelCard


def models_command(*, as_json: bool) -> None:
    with Client.from_env() as client:
        cards = client.models()
    if as_json:
        print_json([card.model_dump(mode="json", exclude_none=True) for card in cards])
        return
    if not cards:
        typer.echo("No models yet. Make one: sage finetune quickstart code")
        return
    now = time.time()
    # Tuned models first, an alias before its versions.
    ordered = sorted(cards, key=lambda card: (card.sage is None, _order(card)))
    render.table(
        render.output(),
        ["MODEL", "BASE", "HELD-OUT LOSS", "MADE"],
        [[card.id, _base(card), _losses(card), _age(card, now)] for card in ordered],
        flexible=1,
    )


def _order(card: ModelCard) -> tuple[str, int, int]:
    info = card.sage
    return (card.id, 0, 0) if info is None else (info.name, 0 if info.alias_of else 1, -info.version)


def _base(card: ModelCard) -> str:
    if card.sage is None:
        return card.owned_by
    newest = f"{card.sage.base_model}"
    return f"→ {card.sage.alias_of}" if card.sage.alias_of else newest


def _losses(card: ModelCard) -> str:
    info = card.sage
    if info is None or info.base_eval_loss is None or info.eval_loss is None:
        return ""
    return f"{info.base_eval_loss:.3f} → {info.eval_loss:.3f}"


def _age(card: ModelCard, now: float) -> str:
    return f"{render.age_text(card.created, now)} ago" if card.created else ""
