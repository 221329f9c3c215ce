"""Training data as people have it, turned into chat messages. No torch, no transformers."""

from sage.tools.finetune.data.conversation import Conversation, Message, RowError
from sage.tools.finetune.data.formats import FORMATS, RowFormat, detect_format, to_messages
from sage.tools.finetune.data.preferences import (
    PreferencePair,
    RatedAnswer,
    load_preferences,
    load_rated_answers,
)
from sage.tools.finetune.data.reading import Row, load_rows
from sage.tools.finetune.data.report import BadRow, DataReport, load_conversations, validate_file

__all__ = [
    "FORMATS",
    "BadRow",
    "Conversation",
    "DataReport",
    "Message",
    "PreferencePair",
    "RatedAnswer",
    "Row",
    "RowError",
    "RowFormat",
    "detect_format",
    "load_conversations",
    "load_preferences",
    "load_rated_answers",
    "load_rows",
    "to_messages",
    "validate_file",
]
