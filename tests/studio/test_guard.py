"""What a request must bring: a known host, the studio's own page, a token, a small body."""

import pytest
from starlette.testclient import TestClient

from digit.studio.app import make_app
from digit.studio.guard import COOKIE, host_of, is_local

TOKEN = "0123456789abcdefghij"


@pytest.fixture(scope="module")
def guarded(studio) -> TestClient:
    app = make_app(studio, hosts={"studio.example"}, token=TOKEN)
    return TestClient(app, base_url="http://studio.example", follow_redirects=False)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "LOCALHOST", "127.0.0.1"])
def test_this_machine_is_a_known_host(client, host):
    assert client.get("/api/about", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "[", "a@127.0.0.1:1:1", "0.0.0.0"]
)
def test_other_names_are_refused(client, host):
    """A page of another site that points its own name at 127.0.0.1 reads nothing (DNS rebinding)."""
    assert client.get("/api/about", headers={"host": host}).status_code == 421


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "null",
        "http://127.0.0.1:9999",
        "file://",
        "http://127.0.0.1:8000.evil.example",
        "x",
        "http://[",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_other_sites_are_refused(client, origin, method):
    answer = client.request(method, "/api/draw", headers={"origin": origin}, json={"num": 1})
    assert answer.status_code == 403


def test_the_own_page_is_welcome(client):
    answer = client.post("/api/draw", headers={"origin": "http://127.0.0.1:8000"}, json={"num": 1})
    assert answer.status_code == 200
    headers = {"sec-fetch-site": "cross-site"}
    assert client.post("/api/draw", headers=headers, json={"num": 1}).status_code == 403
    assert client.get("/api/examples", headers=headers).status_code == 403  # an <img> of another site sends no Origin
    assert client.get("/", headers=headers).status_code == 200  # a link to the page


def test_a_token_opens_the_page_once_and_stays_a_cookie(guarded):
    guarded.cookies.clear()
    assert guarded.get("/api/about").status_code == 401 and guarded.get("/").status_code == 401
    assert guarded.get(f"/?token={TOKEN}x").status_code == 401
    answer = guarded.get(f"/?token={TOKEN}")
    assert answer.status_code == 303 and answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and TOKEN in cookie
    assert guarded.get("/api/about").status_code == 200  # the client keeps the cookie
    guarded.cookies.clear()


@pytest.mark.parametrize("value", ["", "x", TOKEN[:-1], TOKEN + "x", "\xe4" * 20])
def test_other_tokens_are_refused(guarded, value):
    guarded.cookies.clear()
    for headers in (
        {"authorization": f"Bearer {value}".encode("latin-1")},
        {"cookie": f"{COOKIE}={value}".encode("latin-1")},
    ):
        assert guarded.get("/api/about", headers=headers).status_code == 401


def test_a_bearer_token_is_for_programs(guarded):
    guarded.cookies.clear()
    assert guarded.get("/api/about", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert guarded.post("/api/draw", json={"num": 1}).status_code == 401


def test_a_token_leads_nowhere_else(guarded):
    """The path of the redirect is that of the request, without a host of another site."""
    guarded.cookies.clear()
    answer = guarded.get(f"//evil.example/x?token={TOKEN}")
    assert not answer.headers.get("location", "").startswith("//")


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_is_local(address, local):
    assert is_local(address) is local


def test_host_of():
    assert host_of("Example.ORG:80") == "example.org" and host_of("[::1]:5") == "::1" and host_of("[") == ""


def test_lengths_that_are_no_numbers_are_refused(client):
    for length in ("-1", "1e3", "x", "9" * 30):
        assert client.post("/api/draw", content=b"", headers={"content-length": length}).status_code == 400
