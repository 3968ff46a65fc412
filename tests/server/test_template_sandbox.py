"""Chat templates of strangers reach nothing outside of their sandbox, and what clients say is no template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from server_harness import Client

HELLO = [{"role": "user", "content": "hello"}]
ATTACKS = {
    "subclasses": "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "globals of a global": "{{{{ cycler.__init__.__globals__.os.system('touch {mark}') }}}}",
    "globals of a function": "{{{{ lipsum.__globals__['os'].system('touch {mark}') }}}}",
    "globals of transformers' functions": "{{{{ raise_exception.__globals__ }}}}",
    "globals of the clock": "{{{{ strftime_now.__globals__['datetime'] }}}}",
    "builtins": "{{{{ joiner.__init__.__globals__.__builtins__.open('{mark}', 'w') }}}}",
    "import": "{{{{ ''.__class__.__base__.__subclasses__()[0].__init__.__globals__['__import__']('os') }}}}",
    "attr": "{{{{ ('' | attr('__class__')) | attr('__mro__') }}}}",
    "map": "{{{{ [''] | map(attribute='__class__') | map(attribute='__mro__') | list }}}}",
    "sort": "{{{{ [messages, messages] | sort(attribute='__class__.__mro__') | list }}}}",
    "format": "{{{{ '{{0.__class__.__mro__}}'.format(messages) }}}}",
    "format_map": "{{{{ '{{x.__class__.__mro__}}'.format_map(dict(x=messages)) }}}}",
    "concatenated names": "{{{{ messages['__cl' + 'ass__'].__name__ + messages['__cl' ~ 'ass__']['__mro__'] }}}}",
    "escaped names": "{{{{ ''['\\x5f\\x5fclass\\x5f\\x5f']['\\x5f\\x5fmro\\x5f\\x5f'] }}}}",
    "the template itself": "{{{{ self._TemplateReference__context.environment.loader }}}}",
    "a macro": "{{% macro m() %}}{{% endmacro %}}{{{{ m._environment.from_string('x') }}}}",
    "code of a macro": "{{% macro m() %}}{{% endmacro %}}{{{{ m._func.__code__ }}}}",
    "the loop": "{{% for m in messages %}}{{{{ loop._iterator.gi_frame }}}}{{% endfor %}}",
    "include": "{{% include '/etc/passwd' %}}",
    "extends": "{{% extends '/etc/passwd' %}}",
    "import of a file": "{{% import '/etc/passwd' as x %}}{{{{ x }}}}",
    "changing the messages": "{{% set x = messages.append(1) %}}",
    "changing a message": "{{% set x = messages[0].update(role='system') %}}",
    "a namespace": "{{% set n = namespace() %}}{{{{ n.__init__.__globals__ }}}}",
    "a large range": "{{{{ range(10 ** 12) | list | length }}}}",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_template_does_not_get_out(
    name: str, client: Client, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "ran"
    monkeypatch.setattr(tokenizer, "chat_template", ATTACKS[name].format(mark=mark))
    reply = client.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1})
    assert not mark.exists()
    assert reply.status == 400
    assert reply.json["error"]["param"] == "messages"
    assert "root:" not in reply.text


SAID = "{{ 7 * 7 }}{% for x in range(3) %}{{ ''.__class__ }}{% endfor %}{# no #}"


def test_what_clients_say_is_no_template(client: Client, tokenizer: Any) -> None:
    """Nor as a role, a name, a tool or a variable of the template."""
    messages = [{"role": "user", "content": SAID}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert SAID in rendered
    body = {"messages": messages, "max_tokens": 1, "chat_template_kwargs": {"x": SAID, "messages_": SAID}}
    reply = client.post("/v1/chat/completions", body)
    assert reply.status == 200
    assert reply.json["usage"]["prompt_tokens"] == len(tokenizer(rendered)["input_ids"])


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template": "{{ 7 * 7 }}"},
        {"chat_template_kwargs": {"chat_template": "{{ 7 * 7 }}"}},
        {"custom_generate": "evil/repo"},
        {"generation_config": {"custom_generate": "evil/repo"}},
        {"trust_remote_code": True},
        {"revision": "main"},
        {"model": "/etc/passwd"},
        {"model": "../../x"},
        {"model": "evil/repo"},
    ],
)
def test_a_request_names_no_template_model_or_code(client: Client, fields: dict[str, Any]) -> None:
    reply = client.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 1, **fields})
    assert 400 <= reply.status < 500
    assert reply.json["error"]["param"]
