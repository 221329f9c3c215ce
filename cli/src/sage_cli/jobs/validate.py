"""sage finetune validate: what a file holds, what is wrong with it, how long its rows are. No server."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import IO

import typer
from rich.console import Console
from rich.text import Text

from sage.tools.finetune.base_models import is_builtin, local_base
from sage.tools.finetune.data import BadRow, DataReport, validate_file
from sage.tools.finetune.data.hub import is_hub_id
from sage.tools.finetune.data.lengths import Bar, TokenReport
from sage.tools.finetune.data.tokenizer_files import checks
from sage.tools.finetune.positions import beyond_positions
from sage.tools.finetune.storage import temporary_folder_errors
from sage_cli import engine, render
from sage_cli.failures import YOUR_INPUT
from sage_contracts.home import Home

PREPARATION = "sage.tools.finetune.base_preparation"
_SPOOL_BYTES = 1 << 20
_BAR_CELLS = 40


def validate_command(
    path: Path, *, max_length: int, model: str | None, method: str | None, as_json: bool
) -> None:
    home, progress = Home.from_env().root, render.error_console()
    if model is not None and (path.expanduser().exists() or is_hub_id(path)):
        _prepare_builtin(model, home, progress)
    lengths, marks = checks(model, home, max_length)
    with SpooledTemporaryFile(_SPOOL_BYTES, "w+") as bad_rows, ExitStack() as stack:

        def keep(bad: BadRow) -> None:
            with temporary_folder_errors():
                bad_rows.write(bad.model_dump_json(exclude_none=True) + "\n")

        status = stack.enter_context(progress.status("Reading")) if progress.is_terminal else None
        report = validate_file(
            path.expanduser(),
            str(path) if path.is_dir() else None,
            method=method,
            lengths=lengths,
            marks=marks,
            on_bad=keep if as_json else lambda bad: None,
            on_rows=lambda rows: status.update(f"Reading: {rows:,} rows") if status else None,
        )
        stack.close()
        if as_json:
            bad_rows.seek(0)
            _write_json(report, bad_rows)
        else:
            show(render.output(), report)
    if report.good < report.rows or _fault(report):
        raise typer.Exit(YOUR_INPUT)


def _prepare_builtin(model: str, home: Path, console: Console) -> None:
    """A built-in model needs no hub, but is converted at first use. Raises: what `engine.ask` raises."""
    if is_builtin(model) and local_base(model, home) is None:
        engine.ask(PREPARATION, [model, str(home)], console, doing=f"Preparing {model}")


def _write_json(report: DataReport, bad_rows: Iterable[str] | IO[str]) -> None:
    """Bad rows go out one by one: there may be more than fit into memory."""
    write = sys.stdout.write
    first = json.dumps(report.model_dump(include={"format", "rows", "good"}), ensure_ascii=False)
    write(f'{first[:-1]}, "bad": [')
    for number, line in enumerate(bad_rows):
        write(f"{',' if number else ''}\n  {line.rstrip()}")
    rest = report.model_dump(exclude={"format", "rows", "good", "bad", "tokens"})
    tokens = report.tokens.model_dump() if report.tokens else {}
    more = {"duplicates": rest.pop("duplicates"), "tokens": tokens, **rest}
    write(f"], {json.dumps(more, ensure_ascii=False)[1:]}\n")


def show(console: Console, report: DataReport) -> None:
    """The report as people read it: the verdict last."""
    title = f"{report.name}: {report.rows:,} {_rows(report.rows)}"
    console.print(Text(f"{title}, {report.container}", style="bold"), soft_wrap=True)
    for name, count in report.formats.items():
        console.print(Text(f"  {name.ljust(20)} {count:>12,}"))
    for note in report.notes:
        render.line(console, "wait", note)
    if report.tokens is not None:
        _show_tokens(console, report.tokens)
    console.print()
    if report.bad:
        _show_bad(console, report)
    if report.duplicates:
        text = f"{report.duplicates:,} exact {'duplicate' if report.duplicates == 1 else 'duplicates'}"
        render.line(console, "warn", f"{text}: each conversation is trained on once")
    if report.tokens is not None:
        _show_cut(console, report.tokens)
    bad_count = report.rows - report.good
    if bad_count:
        empty = f", {report.empty_answers:,} for want of an answer" if report.empty_answers else ""
        verdict = f"{bad_count:,} of {report.rows:,} rows cannot be used{empty}. Correct or remove them."
        render.line(console, "bad", verdict)
    elif fault := _fault(report):
        render.line(console, "bad", fault)
    elif report.refused:
        verdict = "Every row can be used, with a model whose chat template takes it: see --model."
        render.line(console, "ok", verdict)
    elif report.tokens is not None and report.tokens.answers_cut_off:
        tokens = report.tokens
        lost = f"{'about ' if tokens.is_estimate else ''}{tokens.answers_cut_off:,}"
        verdict = f"Every row can be used, but {lost} of them not with {tokens.max_length:,} tokens a row."
        render.line(console, "warn", verdict)
    else:
        render.line(console, "ok", "Every row can be used.")


def _fault(report: DataReport) -> str | None:
    """Why no run can learn from the good rows; None when one can."""
    tokens = report.tokens
    if tokens is None or tokens.is_estimate or tokens.answers_cut_off < report.good:
        return report.fault()
    return (
        f"No row can be used with {tokens.max_length:,} tokens a row: every answer lies behind them. Raise "
        "max_length, or make the rows shorter."
    )


def _show_bad(console: Console, report: DataReport) -> None:
    places = [str(bad.row) if bad.file is None else f"{bad.file}:{bad.row}" for bad in report.bad]
    cells = [(place, bad.field, bad.reason) for place, bad in zip(places, report.bad, strict=True)]
    width = max(len(place) for place in [*places, "row"])
    field_width = max(len(field) for _, field, _ in [*cells, ("", "field", "")])
    console.print(Text(f"{'row'.ljust(width)}  {'field'.ljust(field_width)}  reason", style="bold"))
    for place, field, reason in cells:
        # Long reasons continue on the next line: cutting them would hide what to do.
        line = Text(f"{place.ljust(width)}  {field.ljust(field_width)}  {reason}")
        console.print(line, soft_wrap=not console.is_terminal)
    more = report.rows - report.good - len(report.bad)
    if more:
        console.print(Text(f"and {more:,} more; --json prints all", style="dim"))
    console.print()


def _show_tokens(console: Console, tokens: TokenReport) -> None:
    how = "estimated from the text's length" if tokens.is_estimate else f"counted with {tokens.tokenizer}"
    console.print()
    console.print(Text(f"Tokens, {how}", style="bold"))
    console.print(
        Text(
            f"  {tokens.total:,} in all; a row has {tokens.mean:,.0f} on average, {tokens.median:,} at the "
            f"median, {tokens.longest:,} at most; 95 % have up to {tokens.p95:,}"
        ),
        soft_wrap=not console.is_terminal,
    )
    bars = tokens.histogram
    if all(bar.least == bar.most for bar in bars):
        bars = [bar for bar in bars if bar.rows]  # a few exact lengths, of which the gaps say nothing
    most = max(bar.rows for bar in bars)
    labels = [_label(bar) for bar in bars]
    width = max(map(len, labels))
    cell = "█" if render.can_show("█", console) else "#"
    for label, bar in zip(labels, bars, strict=True):
        style = "yellow" if bar.least > tokens.max_length else "cyan"
        bar_text = cell * _cells(bar, most)
        console.print(Text.assemble(f"  {label.rjust(width)}  ", (bar_text, style), f" {bar.rows:,}"))


def _label(bar: Bar) -> str:
    return f"{bar.least:,}" if bar.least == bar.most else f"{bar.least:,}–{bar.most:,}"


def _cells(bar: Bar, most: int) -> int:
    return max(1, round(bar.rows / most * _BAR_CELLS)) if bar.rows else 0


def _show_cut(console: Console, tokens: TokenReport) -> None:
    longest = min(tokens.longest, tokens.max_length)
    if warning := beyond_positions(longest, tokens.positions):
        render.line(console, "warn", warning)
    if not tokens.too_long:
        return
    about = "about " if tokens.is_estimate else ""
    text = (
        f"{tokens.too_long:,} {_rows(tokens.too_long)} longer than {tokens.max_length:,} tokens: cut there,"
        f" they would lose {about}{tokens.answer_tokens_cut:,} tokens of their answers"
    )
    if tokens.answers_cut_off:
        text += f", {tokens.answers_cut_off:,} of them the whole answer"
    render.line(console, "warn", text)


def _rows(count: int) -> str:
    return "row" if count == 1 else "rows"
