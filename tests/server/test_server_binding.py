from __future__ import annotations

import socket

import pytest
from quantload.errors import PolicyError
from quantload.server.binding import BindError, bind_socket, is_loopback, url_of


def test_a_free_port_is_found_and_named() -> None:
    with bind_socket("127.0.0.1", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert is_loopback(bound)


def test_a_taken_port_is_an_error_that_names_it() -> None:
    with bind_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(BindError, match=f"127.0.0.1:{port}: .*in use"):
            bind_socket("127.0.0.1", port)


@pytest.mark.parametrize("host", ["no such host", "h" * 300, "a\0b", "\ud800", "a..b"])
def test_what_is_no_host_is_a_usage_error(host: str) -> None:
    with pytest.raises(PolicyError, match="give an address of this machine"):
        bind_socket(host, 1)


@pytest.mark.parametrize(("host", "port"), [("203.0.113.1", 0), ("127.0.0.1", 70000)])
def test_an_impossible_address_is_an_error(host: str, port: int) -> None:
    with pytest.raises(BindError, match="choose another"):
        bind_socket(host, port)


def test_every_interface_is_not_loopback() -> None:
    with bind_socket("0.0.0.0", 0) as bound:
        assert not is_loopback(bound)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_ipv6_is_written_in_brackets() -> None:
    try:
        bound = bind_socket("::1", 0)
    except BindError:
        pytest.skip("no IPv6 loopback here")
    with bound:
        assert url_of(bound).startswith("http://[::1]:")
        assert is_loopback(bound)
