"""`python -m sage_inference.transformers_engine --model FOLDER --port N --served-model-name NAME …`."""

from __future__ import annotations

import argparse

from sage_inference.transformers_engine.server import serve


def main() -> None:
    parser = argparse.ArgumentParser(prog="transformers_engine", description=__doc__)
    parser.add_argument("--model", required=True, help="a folder or a Hub id")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", nargs="+", required=True)
    parser.add_argument("--max-model-len", type=int, default=2048, help="tokens, prompt and answer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    serve(parser.parse_args())


if __name__ == "__main__":
    main()
