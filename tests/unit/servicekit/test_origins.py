"""What a web page makes a browser send is refused; programs and people are not in its way."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from starlette.datastructures import Headers

from sage_servicekit.app import create_app
from sage_servicekit.settings import ServiceSettings

LOCAL = "http://127.0.0.1:8080"


def client_of(
    home: Path,
    host: str = "127.0.0.1",
    published_on: str = "",
    admit: Callable[[Headers], None] | None = None,
) -> TestClient:
    settings = ServiceSettings(home_dir=home, host=host, published_on=published_on)
    app = create_app("probe", settings, admit=admit)

    @app.api_route("/thing", methods=["GET", "POST", "PUT", "DELETE"])
    def thing() -> str:
        return "done"

    return TestClient(app, base_url=LOCAL)


@pytest.fixture
def client(tmp_path: Path) -> TestClient:
    return client_of(tmp_path)


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "0x7f.1",
    f"{socket.gethostname()}.evil.example", "evil.example:127.0.0.1", "evil.example@127.0.0.1",
    "[::1].evil.example", "[evil.example]", "[", "",
])  # fmt: skip
def test_a_name_that_somebody_else_could_own_is_refused(client: TestClient, host: str) -> None:
    for path in ("/thing", "/healthz", "/metrics", "/docs", "/nothing"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 403
        assert (answer.json()["error"]["code"], answer.json()["source"]) == ("forbidden", "probe")
        assert "127.0.0.1 or localhost" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", [
    "127.0.0.1", "127.0.0.1:8080", "192.168.1.5:8080", "[::1]:8080", "localhost", "LocalHost:8080",
    "localhost.", "sage.localhost:8080", "host.docker.internal:8080", "box.local", socket.gethostname(),
    f"{socket.gethostname().partition('.')[0].upper()}:8080", "orchestrator:8081", "box.",
])  # fmt: skip
def test_an_address_and_the_machines_own_names_are_answered(client: TestClient, host: str) -> None:
    assert client.post("/thing", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "::1", "localhost"])
def test_every_loopback_address_is_for_the_machine_alone(tmp_path: Path, host: str) -> None:
    assert client_of(tmp_path, host).get("/thing", headers={"host": "evil.example"}).status_code == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "sage.example"])
def test_a_service_on_a_network_answers_to_every_name(tmp_path: Path, host: str) -> None:
    assert client_of(tmp_path, host).get("/thing", headers={"host": "sage.example"}).status_code == 200


@pytest.mark.parametrize(("published_on", "status"), [
    ("127.0.0.1", 403), ("localhost", 403), ("::1", 403), ("0.0.0.0", 200), ("192.168.1.5", 200), ("", 200),
])  # fmt: skip
def test_a_container_is_for_the_machine_alone_where_it_is_published_there_alone(
    tmp_path: Path, published_on: str, status: int
) -> None:
    client = client_of(tmp_path, "0.0.0.0", published_on)
    assert client.get("/thing", headers={"host": "evil.example"}).status_code == status
    for host in ("127.0.0.1:8081", "localhost", "orchestrator:8081"):
        assert client.post("/thing", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_a_page_of_another_site_changes_nothing(tmp_path: Path, host: str, method: str) -> None:
    headers = {"sec-fetch-site": "cross-site", "origin": "https://evil.example", "content-type": "text/plain"}
    answer = client_of(tmp_path, host).request(method, "/thing", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


@pytest.mark.parametrize("site", ["same-origin", "same-site", "none"])
def test_a_page_of_this_machine_and_a_typed_address_are_answered(client: TestClient, site: str) -> None:
    assert client.post("/thing", headers={"sec-fetch-site": site}).status_code == 200


def test_a_link_from_another_site_is_followed(client: TestClient) -> None:
    assert client.get("/thing", headers={"sec-fetch-site": "cross-site"}).status_code == 200


@pytest.mark.parametrize("origin", [
    "https://evil.example", "http://evil.example:8080", "http://127.0.0.1.evil.example", "null", "", "file://",
    "http://localhost:8080", "http://192.168.1.5:8080", "chrome-extension://abc",
])  # fmt: skip
def test_an_origin_that_is_not_the_host_is_another_site(client: TestClient, origin: str) -> None:
    answer = client.post("/thing", headers={"origin": origin, "content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    assert client.get("/thing", headers={"origin": origin}).status_code == 200


@pytest.mark.parametrize(("origin", "host"), [
    ("http://127.0.0.1:8080", "127.0.0.1:8080"), ("http://localhost:3000", "LocalHost:8080"),
    ("http://[::1]", "[::1]:8080"), ("https://a.localhost", "a.localhost"), ("http://a.local", "a.local."),
])  # fmt: skip
def test_a_page_of_the_same_host_is_answered(client: TestClient, origin: str, host: str) -> None:
    assert client.post("/thing", headers={"origin": origin, "host": host}).status_code == 200


def test_what_a_browser_says_of_the_site_counts_more_than_the_origin(client: TestClient) -> None:
    # A proxy that ends TLS may send another Host than the page's.
    headers = {"sec-fetch-site": "same-origin", "origin": "https://sage.example"}
    assert client.post("/thing", headers=headers).status_code == 200


def test_a_key_makes_up_for_an_origin(tmp_path: Path) -> None:
    client = client_of(tmp_path, admit=lambda headers: None)
    headers = {"origin": "http://sage.example"}
    assert client.post("/thing", headers=headers).status_code == 200
    assert client.post("/thing", headers=headers | {"sec-fetch-site": "cross-site"}).status_code == 403
