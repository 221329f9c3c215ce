"""OpenAI's `after` + `limit` paging over any table with a `seq` and a public id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel
from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from sage_contracts.errors import InvalidRequestError
from sage_contracts.paging import ListPage

Item = TypeVar("Item", bound=BaseModel)
PageOrder = Literal["asc", "desc"]


def page_rows(
    session: Session,
    query: Select[Any],
    row: Any,
    *,
    after: str | None,
    limit: int,
    order: PageOrder = "desc",
) -> tuple[Sequence[Any], bool]:
    """At most `limit` rows beyond `after`, and whether there are more. Raises: InvalidRequestError."""
    if after is not None:
        edge = session.scalar(select(row.seq).where(row.id == after))
        if edge is None:
            raise InvalidRequestError(f"after: there is no {after!r} in this list.", param="after")
        query = query.where(row.seq > edge if order == "asc" else row.seq < edge)
    query = query.order_by(row.seq.asc() if order == "asc" else row.seq.desc()).limit(limit + 1)
    rows = session.scalars(query).all()
    return rows[:limit], len(rows) > limit


def list_page(items: list[Item], has_more: bool) -> ListPage[Item]:
    """The list object over items that have an `id`."""
    ids = [str(item.id) for item in items]  # type: ignore[attr-defined]
    return ListPage(
        data=items, has_more=has_more, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None
    )
