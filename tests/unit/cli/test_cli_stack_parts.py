"""Where the parts of the embedded stack listen."""

from __future__ import annotations

from pathlib import Path

import pytest

from sage_cli.stack.parts import Part, embedded_parts

PORTS = {"orchestrator": 1, "inference": 2, "gateway": 3, "tensorboard": 4}


def part(name: str, gateway_host: str) -> Part:
    return next(one for one in embedded_parts(PORTS, gateway_host, Path("output")) if one.name == name)


@pytest.mark.parametrize("gateway_host", ["0.0.0.0", "192.0.2.7"])
def test_tensorboard_which_asks_for_no_key_never_leaves_this_machine(gateway_host: str) -> None:
    pytest.importorskip("tensorboard")
    tensorboard = part("tensorboard", gateway_host)
    given = dict(zip(tensorboard.command[3::2], tensorboard.command[4::2], strict=True))
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "4")
    assert tensorboard.host == "127.0.0.1"


@pytest.mark.parametrize(("gateway_host", "called"), [("::", "127.0.0.1"), ("192.0.2.7", "192.0.2.7")])
def test_the_gateway_is_called_where_it_listens(gateway_host: str, called: str) -> None:
    assert part("gateway", gateway_host).host == called
    assert part("orchestrator", gateway_host).host == "127.0.0.1"
