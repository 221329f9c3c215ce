"""sage index add, list, remove."""

from __future__ import annotations

import time
from pathlib import Path

import typer
from rich.text import Text

from sage_cli import render
from sage_cli.client import Client
from sage_cli.failures import print_json
from sage_cli.indexes.documents import Documents, read_documents, shortened
from sage_cli.stack.updown import ensure_stack
from sage_contracts.errors import PayloadTooLargeError
from sage_contracts.indexes import IndexCard, PutIndexRequest, require_index_name


def add_command(name: str, path: Path, *, as_json: bool) -> None:
    require_index_name(name)
    documents = read_documents(path)
    ensure_stack()
    with Client.from_env() as client:
        card = _put(client, name, path, documents)
    if as_json:
        told = {"left_out": documents.left_out, "notes": documents.notes}
        print_json(card.model_dump(mode="json") | told)
    else:
        _show_added(card, documents)


def _put(client: Client, name: str, path: Path, documents: Documents) -> IndexCard:
    try:
        return client.put_index(name, PutIndexRequest(documents=documents.read))
    except PayloadTooLargeError as error:
        size = sum(len(document.text.encode()) for document in documents.read)
        raise PayloadTooLargeError(
            f"{path} has {render.bytes_text(size)} of text, more than the gateway takes at once"
            f" ({error.message.rstrip('.')}). Make several indexes of it, or raise"
            " SAGE_MAX_BODY_BYTES where the stack is started."
        ) from error


def _show_added(card: IndexCard, documents: Documents) -> None:
    console = render.output()
    for text in shortened(documents.notes):
        render.line(console, "wait", text)
    for text in shortened(documents.left_out):
        render.line(console, "warn", f"left out: {text}" if ": " in text else text)
    render.line(console, "ok", f"{card.id}: files {card.files:,}, passages {card.passages:,}")
    for command in (
        f"Next: sage finetune chat MODEL --index {card.id}",
        f"No model yet? sage chat --backend mock --index {card.id}",
    ):
        console.print(Text(command), soft_wrap=True)


def list_command(*, as_json: bool) -> None:
    with Client.from_env() as client:
        cards = client.indexes()
    if as_json:
        print_json([card.model_dump(mode="json") for card in cards])
        return
    if not cards:
        typer.echo("None yet; docs-public is made at its first use. Add your own: sage index add NAME FOLDER")
        return
    now = time.time()
    render.table(
        render.output(),
        ["INDEX", "FILES", "PASSAGES", "MADE"],
        [
            [card.id, f"{card.files:,}", f"{card.passages:,}", f"{render.age_text(card.created_at, now)} ago"]
            for card in cards
        ],
    )


def remove_command(name: str) -> None:
    require_index_name(name)
    with Client.from_env() as client:
        client.delete_index(name)
    render.line(render.output(), "ok", f"{name} is removed")
