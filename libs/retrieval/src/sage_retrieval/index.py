"""One BM25 index on disk, of which a search reads what it needs: an index that is not asked holds no memory.

bm25s and NumPy are loaded when an index is first used.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
from array import array
from collections.abc import Iterable
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
_STARTS = "starts.npy"
"""Where in that file each passage begins, and where the last one ends."""
# Another name whenever passage_terms gives other terms: what was built of the old ones is then built again.
_SCORES = "bm25-2"
_HASHES = "hashes.npy"
"""Of the terms, sorted; as text, many times as large, they would have to be in memory for every question."""
_IDS = "ids.npy"
"""The place of each of those terms in the scores."""


def write_index(pieces: Iterable[Piece], folder: Path) -> int:
    """Index passages in a folder that nobody reads yet; onto the disk, before anything vouches for it.

    File names and headings count as text. Returns how many passages there were; of none there is no index.
    """
    import numpy as np

    starts = array("q", [0])
    vocabulary: dict[str, int] = {}
    # Of a few dozen megabytes of text millions of terms: as objects of Python's they would take gigabytes.
    found: list[array[int]] = []
    with (folder / _PIECES).open("wb") as lines:
        for piece in pieces:
            line = json.dumps(asdict(piece), ensure_ascii=False).encode() + b"\n"
            starts.append(starts[-1] + lines.write(line))
            terms = passage_terms(f"{piece.title}\n{piece.source}\n{piece.text}") or [""]
            found.append(array("i", [vocabulary.setdefault(term, len(vocabulary)) for term in terms]))
    if not found:
        return 0
    hashes = np.fromiter(map(_hash, vocabulary), np.uint64, len(vocabulary))
    vocabulary.clear()
    order = np.argsort(hashes).astype(np.int32)
    for name, values in ((_STARTS, np.asarray(starts)), (_HASHES, hashes[order]), (_IDS, order)):
        np.save(folder / name, values)
    scores = _bm25s().BM25(method="lucene", backend="numpy")
    scores.scores = scores.build_index_from_ids(range(len(hashes)), found, show_progress=False)
    scores.vocab_dict = {}
    scores.save(folder / _SCORES, show_progress=False)
    for path in [folder, *folder.rglob("*")]:
        sync_path(path)
    return len(found)


@dataclass(slots=True)
class Index:
    """Passages and their term scores, all mapped from disk."""

    _lines: mmap.mmap
    _starts: Any
    _hashes: Any
    _ids: Any
    _scores: Any

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Raises: OSError, ValueError, TypeError, EOFError where `write_index` did not write the folder."""
        import numpy as np

        if not (folder / _SCORES).is_dir():
            raise ValueError("its terms are those of another version")
        with (folder / _PIECES).open("rb") as file:
            lines = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        starts, hashes, ids = (np.load(folder / name, mmap_mode="r") for name in (_STARTS, _HASHES, _IDS))
        scores = _bm25s().BM25.load(
            folder / _SCORES, show_progress=False, load_corpus=False, load_vocab=False, mmap=True
        )
        ends = scores.scores["indptr"]
        sizes = {"passages": (len(starts) - 1, scores.scores["num_docs"]), "text": (starts[-1], len(lines))}
        sizes |= {"terms": (len(hashes), len(ends) - 1), "ids": (len(ids), len(hashes))}
        sizes |= {name: (len(scores.scores[name]), ends[-1]) for name in ("data", "indices")}
        if wrong := {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}:
            raise ValueError(f"its files do not belong together: {wrong}")
        return cls(lines, starts, hashes, ids, scores)

    def search(self, question: str, limit: int = 4) -> list[Passage]:
        """The best passages, best first, numbered from 1; [] when no term of the question occurs.

        Of those with the same text only the best.
        """
        known = [self._hashes.searchsorted(_hash(term)) for term in question_terms(question, self)]
        if not known:
            return []
        scored = self._scores.get_scores_from_ids(self._ids[known])
        cutoff = max(float(scored.max()) * _RELATIVE_CUTOFF, 0.0)
        best: dict[str, Passage] = {}
        for number in (-scored).argsort(kind="stable"):
            if len(best) == limit or scored[number] <= cutoff:
                break
            piece = self._piece(int(number))
            # Copies, as of a licence in every folder, would leave no place for what else there is.
            if piece.text not in best:
                score = float(scored[number])
                best[piece.text] = Passage(
                    id=len(best) + 1, source=piece.source, text=piece.text, score=score
                )
        return list(best.values())

    def __contains__(self, term: object) -> bool:
        """Whether some passage has this term."""
        hashed = _hash(str(term))
        place = self._hashes.searchsorted(hashed)
        return bool(place < len(self._hashes) and self._hashes[place] == hashed)

    def _piece(self, number: int) -> Piece:
        return Piece(**json.loads(self._lines[self._starts[number] : self._starts[number + 1]]))


def _hash(term: str) -> Any:
    import numpy as np

    return np.uint64(int.from_bytes(hashlib.blake2b(term.encode(), digest_size=8).digest()))


def _bm25s() -> Any:
    import bm25s

    # It sets its logger to DEBUG on import, which would fill the service's log.
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s
