"""A program with vLLM's HTTP surface and none of its weight; it misbehaves on request. Standard library only.

    python tests/fakes/fake_engine.py [MISBEHAVIOUR …] serve MODEL --port N --served-model-name NAME …
The words it says depend on the model's name alone, so that base and adapters differ. They are its tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CRASH = """Traceback (most recent call last):
  File "engine.py", line 7, in load
    raise ValueError("the weights are damaged")
ValueError: the weights are damaged

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "engine.py", line 9, in start
    raise RuntimeError("Engine core initialization failed. See root cause above.")
RuntimeError: Engine core initialization failed. See root cause above."""
STUBBORN = (
    "import signal, threading; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); "
    "threading.Event().wait(120)"
)
WORDS = (
    "amber",
    "birch",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heron",
    "inlet",
    "jetty",
    "knoll",
    "larch",
)
PROMPT_LIMIT_CHARACTERS = 2000
VOCABULARY = 1000


class Model:
    """What the engine serves: names, adapters, and what each says."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.base_names: list[str] = options.served_model_name
        self.adapters: dict[str, str] = {}
        self.lock = threading.Lock()

    def knows(self, name: object) -> bool:
        return name in self.base_names or name in self.adapters

    def words(self, name: str, count: int) -> list[str]:
        chosen = random.Random(hashlib.sha256(name.encode()).hexdigest())
        return [chosen.choice(WORDS) + " " for _ in range(count)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: Model

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200, b"")
        elif self.path == "/v1/models":
            names = [*self.model.base_names, *self.model.adapters]
            self.reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]})
        else:
            self.refuse(404, "no such route")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/load_lora_adapter":
            self.load(body)
        elif self.path == "/v1/unload_lora_adapter":
            self.unload(body["lora_name"])
        elif self.path in ("/v1/chat/completions", "/v1/completions"):
            self.complete(body)
        else:
            self.refuse(404, "no such route")

    def load(self, body: dict[str, Any]) -> None:
        name, config = body["lora_name"], Path(body["lora_path"], "adapter_config.json")
        with self.model.lock:
            while self.model.options.load_while and self.model.options.load_while.exists():
                time.sleep(0.02)
            if name in self.model.adapters and not body.get("load_inplace"):
                self.refuse(400, f"The lora adapter '{name}' has already been loaded.")
            elif not config.is_file():
                self.refuse(404, f"Loading lora {name} failed: No adapter found for <path>")
            elif json.loads(config.read_text()).get("use_dora"):
                self.refuse(400, "vLLM does not yet support DoRA.")
            elif json.loads(config.read_text())["r"] > self.model.options.max_lora_rank:
                self.refuse(500, "LoRA rank is greater than max_lora_rank")
            else:
                self.model.adapters[name] = body["lora_path"]
                print(f"loaded {name}", flush=True)
                self.reply(200, f"Success: LoRA adapter '{name}' added successfully.".encode())

    def unload(self, name: str) -> None:
        with self.model.lock:
            if self.model.adapters.pop(name, None) is None:
                self.refuse(404, f"The lora adapter '{name}' cannot be found.")
            else:
                print(f"unloaded {name}", flush=True)
                self.reply(200, b"Success")

    def complete(self, body: dict[str, Any]) -> None:
        if not self.model.knows(body.get("model")):
            self.refuse(404, f"The model `{body.get('model')}` does not exist.", param="model")
            return
        limit = self.model.options.max_model_len
        prompt = json.dumps(body.get("messages") or body.get("prompt"))
        if body.get("max_tokens", 1) > limit or len(prompt) > PROMPT_LIMIT_CHARACTERS:
            self.refuse(400, f"max_tokens or prompt above the context of {limit}", param="max_tokens")
            return
        if self.path == "/v1/completions":
            self.go_on(body)
            return
        if not -(2**63) <= (body.get("seed") or 0) < 2**63:
            self.refuse(400, "seed: 64 bits at most", param="seed")
            return
        words = self.model.words(body["model"], body.get("max_tokens") or 8)
        text, reason = cut("".join(words), body)
        usage = {"prompt_tokens": 5, "completion_tokens": len(words), "total_tokens": 5 + len(words)}
        if body.get("stream"):
            self.stream(body, text, reason, usage)
        else:
            self.pause(len(words))
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
            self.reply(200, {"id": "x", "model": body["model"], "choices": [choice], "usage": usage})

    def go_on(self, body: dict[str, Any]) -> None:
        """The same words after each prompt."""
        prompts = prompts_in(body["prompt"])
        if not prompts or any(stray(prompt) for prompt in prompts):
            self.refuse(400, "no prompt, or ids of no token", param="prompt")
            return
        words = self.model.words(body["model"], body.get("max_tokens") or 8)
        text, reason = cut("".join(words), body)
        one = {"text": text, "finish_reason": reason, "logprobs": None}
        choices = [one | {"index": index} for index in range(len(prompts))]
        asked, said = sum(map(len, prompts)), len(prompts) * len(words)
        usage = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
        if not body.get("stream"):
            self.pause(said)
            self.reply(200, {"id": "x", "model": body["model"], "choices": choices, "usage": usage})
            return
        self.start_stream()
        for choice in choices:
            self.event(body, [choice])
        self.event(body, [], usage)
        self.chunk(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def start_stream(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()

    def stream(self, body: dict[str, Any], text: str, reason: str, usage: dict[str, int]) -> None:
        self.start_stream()
        deltas = [{"role": "assistant", "content": ""}] + [{"content": word} for word in text.split(" ")]
        deltas[1:] = [{"content": piece["content"] + " "} for piece in deltas[1:-1]] + (
            [deltas[-1]] if deltas[-1]["content"] else []
        )
        try:
            for number, delta in enumerate(deltas):
                if self.model.options.crash_mid_stream and number == 3:
                    print(CRASH, flush=True)
                    os._exit(1)
                self.event(body, [{"index": 0, "delta": delta, "finish_reason": None}])
                self.pause(1)
            self.event(body, [{"index": 0, "delta": {}, "finish_reason": reason}])
            if (body.get("stream_options") or {}).get("include_usage"):
                self.event(body, [], usage)
            self.chunk(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            print("request aborted", flush=True)
            self.close_connection = True

    def event(self, body: dict[str, Any], choices: list[Any], usage: dict[str, int] | None = None) -> None:
        content = {"id": "x", "object": "chat.completion.chunk", "model": body["model"], "choices": choices}
        self.chunk(f"data: {json.dumps(content | ({'usage': usage} if usage else {}))}\n\n".encode())

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def pause(self, tokens: int) -> None:
        time.sleep(self.model.options.token_s * tokens)

    def refuse(self, status: int, message: str, param: str | None = None) -> None:
        self.reply(status, {"error": {"message": message, "type": "Error", "param": param, "code": status}})

    def reply(self, status: int, body: bytes | dict[str, Any]) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        return


def prompts_in(prompt: Any) -> list[Any]:
    """One or many, as text or as ids."""
    return [prompt] if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)) else prompt


def stray(prompt: Any) -> bool:
    return not isinstance(prompt, str) and any(not 0 <= token < VOCABULARY for token in prompt)


def cut(text: str, body: dict[str, Any]) -> tuple[str, str]:
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop") or []
    stops = [*stops, *(WORDS[token] for token in body.get("stop_token_ids") or [])]
    found = [text.index(one) for one in stops if one in text]
    return (text[: min(found)], "stop") if found else (text, "length")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start-s", type=float, default=0)
    parser.add_argument("--start-while", type=Path, help="go on starting as long as this file exists")
    parser.add_argument("--load-while", type=Path, help="go on loading adapters as long as this file exists")
    parser.add_argument("--token-s", type=float, default=0, help="time per word")
    parser.add_argument("--starts", type=Path, help="a file that gets a line per start")
    parser.add_argument("--crash-while", type=Path, help="crash at start while this file exists")
    parser.add_argument("--crash-mid-stream", action="store_true")
    parser.add_argument("--linger", action="store_true", help="say that the start failed, and stay")
    parser.add_argument("--port-taken-once", type=Path, help="fail to bind until this file exists")
    parser.add_argument("--foreign", action="store_true", help="serve other names: somebody else's server")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--grandchild", action="store_true", help="start a child that ignores SIGTERM")
    parser.add_argument("serve", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--served-model-name", nargs="+", required=True)
    parser.add_argument("--max-lora-rank", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, default=2048)
    return parser.parse_known_args()[0]


def misbehave_at_start(options: argparse.Namespace) -> None:
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.starts:
        with options.starts.open("a") as file:
            file.write(f"{os.getpid()}\n")
    if options.grandchild:
        child = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    print("Starting to load model", flush=True)
    time.sleep(options.start_s)
    while options.start_while and options.start_while.exists():
        time.sleep(0.02)
    if options.crash_while and options.crash_while.exists():
        sys.exit(CRASH)
    if options.linger:
        print(CRASH, flush=True)
        signal.pause()
    if options.port_taken_once and not options.port_taken_once.exists():
        options.port_taken_once.touch()
        sys.exit("OSError: [Errno 98] Address already in use")


def main() -> None:
    options = parse()
    misbehave_at_start(options)
    if options.foreign:
        options.served_model_name = ["somebody-else"]
    Handler.model = Model(options)
    server = ThreadingHTTPServer(("127.0.0.1", options.port), Handler)
    server.daemon_threads = True
    print("Application startup complete.", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
