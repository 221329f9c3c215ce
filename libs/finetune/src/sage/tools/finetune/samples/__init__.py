"""Original sample rows about this product, for the `qa`, `chat` and `instruction` tasks when no data is given.

One `<task>.jsonl` each, in the three published formats; read them with `importlib.resources`.
"""
