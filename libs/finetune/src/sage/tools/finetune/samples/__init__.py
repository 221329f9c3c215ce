"""Original sample rows about this product, for `qa`, `chat` and `instruction` when no data is given.

One `<task>.jsonl` each, in the three published formats; read them with `importlib.resources`.
"""
