"""Addresses, and that nothing which lets somebody in is ever shown."""

from __future__ import annotations

import pytest
from quantload.addresses import parse_address, scheme_of, shown_address, without_credentials


@pytest.mark.parametrize(
    ("given", "url", "shown", "user", "password"),
    [
        ("s3://bucket/a/b/", "s3://bucket/a/b", "s3://bucket/a/b", None, None),
        ("HTTPS://me:s%40crt@host:81/m?sig=x#f", "https://host:81/m?sig=x", "https://host:81/m", "me", "s@crt"),
        ("https://token@host/m", "https://host/m", "https://host/m", "token", None),
        ("abfss://container@account.dfs.core.windows.net/m",) * 3 + (None, None),
    ],
)
def test_an_address_is_taken_apart(given: str, url: str, shown: str, user: str | None, password: str | None) -> None:
    address = parse_address(given)
    assert address[1:] == (url, shown, user, password)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *((f"{scheme}://{rest}", f"{scheme}:// names no bucket; give an address of the form {scheme}://BUCKET/PREFIX")
          for scheme in ("s3", "s3a", "gs") for rest in ("", "/", "//", "?x=hunter2", "#a")),
        ("s3:///m", "s3:///m names no bucket; give an address of the form s3://BUCKET/PREFIX"),
        ("az://", "az:// names no container; give an address of the form az://CONTAINER/PREFIX"),
        ("abfss://c@/m", "abfss://c@/m names no account; give an address of the form "
                         "abfss://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX"),
        ("http://me:hunter2@:80/m", "http://:80/m names no host; give an address of the form http://HOST/PATH"),
        ("HTTPS:///m", "https:///m names no host; give an address of the form https://HOST/PATH"),
        ("s3://bucket", None), ("http://[::1]:80", None), ("abfss://container/m", None), ("memory://", None),
    ],
)  # fmt: skip
def test_an_address_without_a_place_says_which_form_it_should_have(given: str, said: str | None) -> None:
    assert parse_address(given).fault == said


@pytest.mark.parametrize("given", ["org/model", "/folder", "C:\\folder", "model", "", "://x"])
def test_what_is_no_url_has_no_scheme(given: str) -> None:
    assert scheme_of(given) is None
    assert shown_address(given) == given


@pytest.mark.parametrize(
    "given", ["https://me:hunter2@host/m?sig=hunter2", "https://me:hunter2@[host/m", "s3://a:hunter2@b"]
)
def test_a_url_is_shown_without_what_lets_somebody_in(given: str) -> None:
    assert "hunter2" not in shown_address(given)


@pytest.mark.parametrize(
    "text",
    [
        "GET http://me:hunter2@host/a failed",
        "see https://host/a?X-Amz-Signature=hunter2&X-Amz-Credential=hunter2, or not",
        "uri: Some(\n  http://host/x?sig=hunter2,\n)",
        "authorization: Bearer hunter2",
        "Authorization: Basic hunter2",
        "aws_secret_access_key=hunter2",
        "x-amz-security-token: hunter2",
        '"SharedAccessSignature": "sig=hunter2"',
        "password = hunter2",
    ],
)
def test_credentials_are_left_out_of_texts(text: str) -> None:
    assert "hunter2" not in without_credentials(text)


def test_the_rest_of_a_text_stays() -> None:
    said = without_credentials("HTTP 503 from https://host/model/a.safetensors: try later")
    assert said == "HTTP 503 from https://host/model/a.safetensors: try later"
