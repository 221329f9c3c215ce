"""Training rows from source code: functions to complete, gaps to fill, questions to answer. No torch.

Without a folder the source is the standard library of the running interpreter: real, documented code that
every machine has.
"""

from sage.tools.finetune.code_data.pairs import CodePair, build_code_pairs, split_by_module
from sage.tools.finetune.code_data.source_files import SOURCE_SUFFIXES

__all__ = ["SOURCE_SUFFIXES", "CodePair", "build_code_pairs", "split_by_module"]
