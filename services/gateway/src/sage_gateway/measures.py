"""What the gateway counts about chats."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram


class ChatMeasures:
    """Prometheus series; created once per app."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.answers = Counter(
            "sage_chat_answers",
            "Chat answers by backend and status",
            ["backend", "status"],
            registry=registry,
        )
        self.overhead_s = Histogram(
            "sage_chat_overhead_seconds",
            "Time in the gateway before the backend is asked",
            registry=registry,
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5),
        )
