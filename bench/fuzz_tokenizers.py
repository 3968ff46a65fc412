"""Spoilt tokenizers and chat templates, tried as `serve` tries them before it reads a weight."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from fuzz_mutations import mutate_json
from fuzz_readers import CONFIG, DEMO, Wrong
from quantload.checkpoint.resolve import resolve


class TokenizerReader:
    """Tokenizer files and chat templates, as `serve` tries them; what passes makes a prompt of a greeting."""

    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def corpus(self) -> list[bytes]:
        texts = {name: (DEMO / name).read_text() for name in self.names}
        texts["tokenizer.json"] = self._small(texts["tokenizer.json"])
        texts["chat_template.jinja"] = CHAT_TEMPLATE
        inside = json.loads(texts["tokenizer_config.json"]) | {"chat_template": CHAT_TEMPLATE}
        within = {**texts, "tokenizer_config.json": json.dumps(inside)}
        del within["chat_template.jinja"]
        return [json.dumps(each).encode() for each in (texts, within)]

    def _small(self, text: str) -> str:
        value = json.loads(text)
        model = value["model"]
        model["vocab"] = dict(list(model["vocab"].items())[:300])
        model["merges"] = [merge for merge in model["merges"] if "".join(merge) in model["vocab"]][:20]
        return json.dumps(value)

    def mutate(self, rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]:
        texts = json.loads(data)
        name = rng.choice(list(texts))
        if name.endswith(".jinja") and rng.random() < 0.7:
            text, at = texts[name], rng.randrange(len(texts[name]) + 1)
            texts[name] = text[:at] + rng.choice(SNIPPETS) + text[at + rng.choice((0, 0, 1, 8)) :]
            return json.dumps(texts).encode(), f"{name}: snippet"
        if rng.random() < 0.02:
            del texts[name]
            return json.dumps(texts).encode(), f"{name}: gone"
        keys = ("type", "vocab", "merges", "content", "id", "pattern", "Regex", "auto_map", "chat_template",
                "response_template", "tokenizer_class", "processor_class", "model_max_length")  # fmt: skip
        changed, where = mutate_json(rng, texts[name].encode("utf-8", "surrogatepass"), (), keys)
        texts[name] = changed.decode("utf-8", "replace")
        return json.dumps(texts).encode(), f"{name}: {where}"

    def read(self, data: bytes) -> None:
        from quantload.server.api_errors import ApiError
        from quantload.server.processors import check_processor
        from quantload.server.prompts import CheckedProcessor
        from quantload.tokenizer import load_processor

        for name in self.names:
            (self._folder / name).unlink(missing_ok=True)
        for name, text in json.loads(data).items():
            (self._folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        shutil.copy(DEMO / CONFIG, self._folder)
        checkpoint = resolve(self._folder)
        check_processor(checkpoint, False, seconds=5, method="fork")
        processor = CheckedProcessor(load_processor(checkpoint, False))
        try:
            ids = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
            ids = ids["input_ids"]
        except ApiError:  # it has no template, or its template wants other messages
            ids = processor("Hi")["input_ids"]
        if not isinstance(processor.decode(ids), str):
            raise Wrong("no text comes out of the tokens")


CHAT_TEMPLATE = """{%- set ns = namespace(last=messages|length) %}
{%- if tools %}<|im_start|>system
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages[::-1] %}{% set ns.last = ns.last - 1 %}{% endfor %}
{%- macro text(said) %}{% if said is string %}{{ said }}{% else %}{{ said[0].text }}{% endif %}{% endmacro %}
{%- for message in messages %}
{%- if message.role not in ["system", "user", "assistant", "tool"] %}{{ raise_exception("no such role") }}{% endif %}
{{- "<|im_start|>" + message.role + "\n" + text(message.content) | trim + "<|im_end|>\n" }}
{%- for call in message.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"""
SNIPPETS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 11 }}", "{{ [[0] * 10 ** 6] * 10 ** 6 }}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{{ messages.x.y }}", "{{ nothing.at.all }}", "{{ 1 // 0 }}", "{{ 1 + 'a' }}", "{{ raise_exception('not so') }}",
    "{{ raise_exception() }}", "{{ messages.__class__.__mro__ }}", "{{ ''.__class__.__base__.__subclasses__() }}",
    "{% include 'x' %}", "{% import '/etc/passwd' as x %}", "{% extends 'x' %}", "{% generation %}x{% endgeneration %}",
    "{% set messages = 1 %}", "{{ messages | map('x') | list }}", "{{ '%d' | format('x') }}", "{{ messages[99].role }}",
    "{{ strftime_now('%Y') }}", "{{ strftime_now(1) }}", "{{ 10 ** 10 ** 8 }}", "{{ '\ud800' }}", "{%", "{{", "{#",
    "{% break %}", "{% raw %}", "{{ range(10 ** 9) | list }}", "{{ lipsum(n=10 ** 7) }}", "{{ cycler().next() }}",
    "{{ messages | tojson(indent='x') }}", "{{ self }}", "{{ loop.index }}", "{{ caller() }}", "{% set x.y = 1 %}",
)  # fmt: skip
"""What a template may hold: endless work, endless memory, errors of every kind, ways out of the sandbox."""
