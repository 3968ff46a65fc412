"""Bodies that no request may have, whatever their fields."""

from __future__ import annotations

import pytest
from quantload.server.api_errors import ApiError
from quantload.server.json_values import MAX_DEPTH, parse_json


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"prompt": "a\\ud800b"}', "prompt"),
        ('{"stop": ["x", "\\udfff"]}', "stop[1]"),
        ('{"a\\ud83d": 1}', None),
        ('{"messages": [{}, {"content": [{"text": "\\udc00"}]}]}', "messages[1].content[0].text"),
        ('{"metadata": {"a\\ud800": 1}}', "metadata"),
        ('{"top_p": 1e999}', "top_p"),
        ('{"seed": -' + "1" * 30 + "}", "seed"),
        ('{"tools": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", "tools[0][0][0][0]"),
        ('{"tools": ' + '{"a":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH + "}", "tools.a.a.a.a"),
        ("[" * 100_000, None),
        ("1" * 5000, None),
        ('{"a": NaN}', None),
        (b'{"a": "\xff"}', None),
        ("", None),
    ],
)
def test_what_is_out_of_bounds_is_a_400_that_names_the_place(body: str | bytes, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_text_inside_a_field_is_named_by_the_field() -> None:
    for text in ("{", '{"a": "\\ud800"}', '{"a": 1e999}', '{"a":' * 900 + "1" + "}" * 900):
        with pytest.raises(ApiError, match=r"messages\[0\].tool_calls") as caught:
            parse_json(text, "messages[0].tool_calls")
        assert caught.value.param == "messages[0].tool_calls"


def test_what_is_in_bounds_is_read_as_it_is() -> None:
    text = '{"a": ["\\ud83e\\udd8a ä", 1.5, -18446744073709551616, null, true], "a": {"\\u0000": "\\uffff"}}'
    assert parse_json(text) == {"a": {"\x00": "\uffff"}}
    assert parse_json('["\\ud83e\\udd8a"]') == ["🦊"]
    deep = "[" * (MAX_DEPTH) + "]" * (MAX_DEPTH)
    assert parse_json(deep) is not None


def test_an_answer_quotes_no_more_than_a_screen() -> None:
    body = ApiError(400, "x" * 10**6, param="y\ud800" * 10**5).body()["error"]
    assert len(body["message"]) < 2100
    assert len(body["param"]) < 2100
    body["param"].encode()
