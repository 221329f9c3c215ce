"""Training data as people have it, turned into chat messages. No torch, no transformers."""

from sage.tools.finetune.data.formats import (
    FORMATS,
    Conversation,
    Message,
    RowError,
    detect_format,
    to_messages,
)
from sage.tools.finetune.data.reading import Row, load_rows
from sage.tools.finetune.data.report import BadRow, DataReport, load_conversations, validate_file

__all__ = [
    "FORMATS",
    "BadRow",
    "Conversation",
    "DataReport",
    "Message",
    "Row",
    "RowError",
    "detect_format",
    "load_conversations",
    "load_rows",
    "to_messages",
    "validate_file",
]
