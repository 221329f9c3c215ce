"""Seconds from a chat request to its first token: engine cold, warm, and warm with an adapter not loaded yet.

Needs a running stack with at least one tuned model:
    python tests/bench/first_token.py --model code --new code@1
Cold is measured only when no engine runs yet (`sage down && sage up` first); the script says when it was not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import httpx


def first_token_s(base_url: str, model: str, timeout_s: float) -> float:
    """Wall seconds until the first chunk with content. Comments of a starting engine do not count."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": "Write one word."}],
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
    }
    started = time.perf_counter()
    with httpx.stream("POST", f"{base_url}/v1/chat/completions", json=body, timeout=timeout_s) as response:
        if response.is_error:
            raise SystemExit(f"HTTP {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise SystemExit(f"error in the stream: {event['error']['message']}")
            if any(choice["delta"].get("content") for choice in event["choices"]):
                return time.perf_counter() - started
    raise SystemExit("the stream ended without a token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8080")
    parser.add_argument("--model", default="code", help="the model for the cold and the warm figure")
    parser.add_argument("--new", help="another version on the same base, not loaded yet")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--timeout-s", type=float, default=300)
    arguments = parser.parse_args()

    engines = httpx.get(f"{arguments.base_url}/v1/sage/engines", timeout=10).json()["engines"]
    running = [engine["engine_id"] for engine in engines if engine["state"] == "ready"]
    cold_s = first_token_s(arguments.base_url, arguments.model, arguments.timeout_s)
    print(f"{'not cold: ' + running[0] + ' was running' if running else 'cold'}: {cold_s:.2f} s")
    if arguments.new:
        new_s = first_token_s(arguments.base_url, arguments.new, arguments.timeout_s)
        print(f"warm engine, {arguments.new} for the first time: {new_s:.3f} s")
    warm = [
        first_token_s(arguments.base_url, arguments.model, arguments.timeout_s)
        for _ in range(arguments.repeat)
    ]
    spread = f"min {min(warm):.3f}, max {max(warm):.3f}"
    print(f"warm: median {statistics.median(warm):.3f} s of {len(warm)} ({spread})")


if __name__ == "__main__":
    main()
