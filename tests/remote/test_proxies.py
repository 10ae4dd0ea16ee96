"""Which proxy a request takes."""

from __future__ import annotations

import pytest

from asyncmodels.errors import ConfigurationError
from asyncmodels.remote.proxies import Proxies, Proxy, parse_proxy


def test_each_scheme_has_its_own_and_all_fills_in() -> None:
    """http and https are looked up by scheme; all serves whichever is missing."""
    proxies = Proxies(http="http://h:1", all="http://a:2")
    assert proxies.find("http", "example.org", 80) == Proxy("http", "h", 1)
    assert proxies.find("https", "example.org", 443) == Proxy("http", "a", 2)
    assert Proxies(http="http://h:1").find("https", "example.org", 443) is None


@pytest.mark.parametrize(
    ("no", "host", "port", "direct"),
    [
        ("example.org", "example.org", 443, True),
        ("example.org", "api.example.org", 443, True),
        (".example.org", "api.example.org", 443, True),
        ("example.org", "notexample.org", 443, False),
        ("example.org:8000", "example.org", 8000, True),
        ("example.org:8000", "example.org", 443, False),
        ("localhost", "localhost", 8000, True),
        ("10.0.0.0/8", "10.1.2.3", 8000, True),
        ("10.0.0.0/8", "11.1.2.3", 8000, False),
        ("127.0.0.1", "127.0.0.1", 8000, True),
        ("::1", "::1", 8000, True),
        ("fd00::/8", "fd00::1", 8000, True),
        (" a.test , b.test ", "b.test", 443, True),
        ("*", "anything.test", 443, True),
        ("", "example.org", 443, False),
        ("not/a/network", "10.1.2.3", 443, False),
    ],
)
def test_no_proxy(no: str, host: str, port: int, direct: bool) -> None:
    """NO_PROXY takes names with everything below them, ports, addresses, networks and a star."""
    assert (Proxies(all="http://p:1", no=no).find("https", host, port) is None) is direct


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables are read at once, so that equal settings are equal values."""
    assert Proxies.from_environment() == Proxies()
    monkeypatch.setenv("HTTPS_PROXY", "http://p:1")
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert Proxies.from_environment() == Proxies(https="http://p:1", no="example.org")


@pytest.mark.parametrize(
    ("text", "proxy"),
    [
        ("http://p:8080", Proxy("http", "p", 8080)),
        ("p:8080", Proxy("http", "p", 8080)),
        ("http://p", Proxy("http", "p", 80)),
        ("https://p", Proxy("https", "p", 443)),
        ("http://u:w@p:1", Proxy("http", "p", 1, b"Basic dTp3")),
        ("http://[::1]:8080", Proxy("http", "::1", 8080)),
    ],
)
def test_a_proxy_s_url(text: str, proxy: Proxy) -> None:
    """A scheme may be missing, a port has its default, a user becomes a Basic authorization."""
    assert parse_proxy(text) == proxy


@pytest.mark.parametrize("text", ["ftp://u:hush@p", "http://", "http://u:hush@p:port"])
def test_what_is_not_a_proxy_s_url(text: str) -> None:
    """It is ConfigurationError, which repeats no password."""
    with pytest.raises(ConfigurationError) as caught:
        parse_proxy(text)
    assert "hush" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_socks_is_recognised() -> None:
    """A pool must know, because its own transport does not speak it."""
    assert Proxies(all="socks5://p:1080").uses_socks
    assert not Proxies(all="http://p:1080").uses_socks


def test_no_password_is_shown() -> None:
    """Neither settings nor a parsed proxy show what may hold one."""
    assert "hush" not in repr(Proxies(http="http://u:hush@p", https="http://u:hush@p", all="http://u:hush@p"))
    assert "dTp" not in repr(parse_proxy("http://u:hush@p"))
