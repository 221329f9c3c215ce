"""One BM25 index in memory and on disk. bm25s and NumPy are loaded when an index is first used."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sage_contracts.chat import Passage
from sage_contracts.home import sync_path
from sage_retrieval.splitting import Piece
from sage_retrieval.tokens import passage_terms, question_terms

# Below this share of the best score a passage shares a common word with the question and no more.
_RELATIVE_CUTOFF = 0.3
_PIECES = "passages.jsonl"
# Another name whenever passage_terms gives other terms: what was built of the old ones is then built again.
_SCORES = "bm25-2"


@dataclass(slots=True)
class Index:
    """Passages and their term scores."""

    pieces: list[Piece]
    _scores: Any

    @classmethod
    def build(cls, pieces: Sequence[Piece]) -> Index:
        """Index passages; file names and headings count as text. Needs at least one."""
        scores = _bm25s().BM25(method="lucene", backend="numpy")
        corpus = [passage_terms(f"{piece.title}\n{piece.source}\n{piece.text}") or [""] for piece in pieces]
        scores.index(corpus, show_progress=False, create_empty_token=False)
        return cls(list(pieces), scores)

    def search(self, question: str, limit: int = 4) -> list[Passage]:
        """The best passages, best first, numbered from 1; [] when no term of the question occurs."""
        known = question_terms(question, self._scores.vocab_dict)
        if not known:
            return []
        scored = self._scores.get_scores(known)
        best = sorted(range(len(self.pieces)), key=lambda number: -float(scored[number]))[:limit]
        cutoff = float(scored[best[0]]) * _RELATIVE_CUTOFF
        return [
            Passage(
                id=rank,
                source=self.pieces[number].source,
                text=self.pieces[number].text,
                score=float(scored[number]),
            )
            for rank, number in enumerate(best, start=1)
            if float(scored[number]) > max(cutoff, 0.0)
        ]

    def save(self, folder: Path) -> None:
        """Write into a folder that nobody reads yet, and onto the disk before anything vouches for it."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(asdict(piece), ensure_ascii=False) + "\n" for piece in self.pieces)
        (folder / _PIECES).write_text(lines, encoding="utf-8")
        self._scores.save(folder / _SCORES, show_progress=False)
        for path in [folder, *folder.rglob("*")]:
            sync_path(path)

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Raises: OSError, ValueError, TypeError, EOFError when the folder is not what `save` wrote."""
        if not (folder / _SCORES).is_dir():
            raise ValueError("its terms are those of another version")
        # Not splitlines(): passages may hold U+2028 and its like, which end no line of JSON.
        lines = (folder / _PIECES).read_text(encoding="utf-8").split("\n")
        pieces = [Piece(**json.loads(line)) for line in lines if line]
        scores = _bm25s().BM25.load(folder / _SCORES, show_progress=False, load_corpus=False)
        if not pieces or len(pieces) != scores.scores["num_docs"]:
            raise ValueError(f"{len(pieces)} passages, and scores of {scores.scores['num_docs']}")
        return cls(pieces, scores)


def _bm25s() -> Any:
    import bm25s

    # It sets its logger to DEBUG on import, which would fill the service's log.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s
