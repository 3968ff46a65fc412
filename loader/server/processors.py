"""Tokenizers, processors and chat templates: tried before any weight is read.

What is wrong with one would otherwise end the server, or stop it for good, when all weights are loaded: a template may
loop for ever, a file of a tokenizer may take all memory or end the process that reads it.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from tokenizers.decoders import DecodeStream

from ..checkpoint.folder import Checkpoint
from ..errors import CheckpointError
from ..tokenizer import chat_templates, is_of_library, load_processor, processor_files, said, vocabulary_files
from .transformers_serving import try_response_template

TRIAL_SECONDS = 60.0
TRIAL_BYTES = 2 << 30
"""What trying may take beside what the process has, and beside `BYTES_OF_A_FILE` for each byte of the files."""
BYTES_OF_A_FILE = 32
TEXTS = ("Hi", " a\n\n  b\t", "äöü € 漢字 🦊", "0123456789" * 20, "def f(x):\n    return x\n" * 40)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json")


def check_processor(
    checkpoint: Checkpoint, trust_remote_code: bool, seconds: float = TRIAL_SECONDS, method: str | None = None
) -> None:
    """Try what `load_processor` gives (`try_processor`) in another process; raises `CheckpointError`.

    That process has `seconds` and so much memory (`TRIAL_BYTES`). `method` is how `multiprocessing` starts it: by
    default it is forked where this process has no other threads, on Linux, as importing anew takes seconds.
    """
    alone = sys.platform == "linux" and threading.active_count() == 1
    context: Any = multiprocessing.get_context(method or ("fork" if alone else "spawn"))
    receiver, sender = context.Pipe(duplex=False)  # of texts, what begins, and at the end a tuple, what is wrong
    arguments = (checkpoint.root, checkpoint.model_id, trust_remote_code, seconds, sender)
    child = context.Process(target=_in_child, args=arguments, name="quantload-processor", daemon=True)
    with receiver:
        with warnings.catch_warnings():  # Python counts the idle threads of libraries, too
            warnings.simplefilter("ignore", DeprecationWarning)
            child.start()
        sender.close()
        try:
            problem = _problem_of(checkpoint, receiver, child, seconds)
        finally:
            child.kill()
            child.join()
    if problem is not None:
        raise CheckpointError(problem)


def _problem_of(checkpoint: Checkpoint, receiver: Connection, child: Any, seconds: float) -> str | None:
    """What is wrong, or None: told by the child, or by what it was doing when its time was up or it ended."""
    end, step = time.monotonic() + seconds, f"{checkpoint.root}: loading its tokenizer or processor"
    while receiver.poll(max(0.0, end - time.monotonic())):
        try:
            said: str | tuple[str | None] = receiver.recv()
        except EOFError:
            child.join()
            code = child.exitcode
            return f"{step} ended the process {f'by {signal.Signals(-code).name}' if code < 0 else f'with code {code}'}"
        if isinstance(said, tuple):
            return said[0]
        step = said
    return f"{step} took too long: all that is tried before a model is loaded may take {seconds:g} s"


def _in_child(root: Path, model_id: str, trust_remote_code: bool, seconds: float, sender: Connection) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # whatever is worth a warning is said again when it is loaded for good
        os.dup2(null, stream)
    _limit(root, seconds)
    try:
        try_processor(Checkpoint(root, model_id), trust_remote_code, sender.send)
    except CheckpointError as error:
        sender.send((str(error),))
    except MemoryError:
        sender.send((f"{root}: its tokenizer or processor takes more memory than any that is tried may have",))
    else:
        sender.send((None,))


def _limit(root: Path, seconds: float) -> None:
    """Let this process have no more than a trial may take, where the system can say what it has."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except OSError:
        return
    import resource

    allowed = pages * mmap.PAGESIZE + TRIAL_BYTES
    allowed += BYTES_OF_A_FILE * sum((root / name).stat().st_size for name in processor_files(root))
    for kind, limit in (
        (resource.RLIMIT_DATA, allowed),
        (resource.RLIMIT_CPU, int(seconds) * (os.cpu_count() or 1) + 1),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def try_processor(
    checkpoint: Checkpoint, trust_remote_code: bool, begins: Callable[[str], None] = lambda step: None
) -> None:
    """Load, encode and decode some text, and render a greeting with each chat template.

    Raises `CheckpointError`, which names the file, for whatever does not work; a template may refuse the greeting.
    `begins` is told what is tried next.
    """
    root = checkpoint.root
    processor = load_processor(checkpoint, trust_remote_code)
    tokenizer = getattr(processor, "tokenizer", processor)
    vocabularies = vocabulary_files(root)
    with _step(f"{root}: encoding and decoding text with {', '.join(vocabularies)}", begins):
        _try_tokenizer(tokenizer)
    name = next((name for name in TEMPLATE_FILES if (root / name).exists()), TEMPLATE_FILES[0])
    with _step(f"{root / name}: rendering the chat template for one message of a user", begins):
        _try_templates(processor)
    with _step(f"{root / 'tokenizer_config.json'}: parsing an answer by its response_template", begins):
        try_response_template(processor)


@contextmanager
def _step(what: str, begins: Callable[[str], None]) -> Iterator[None]:
    begins(what)
    try:
        yield
    except BaseException as error:
        if not is_of_library(error):
            raise
        raise CheckpointError(f"{what} failed: {said(error)}") from error


def _try_tokenizer(tokenizer: Any) -> None:
    tokens = 0
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        tokens += len(ids)
        if not isinstance(tokenizer.decode(ids, skip_special_tokens=True), str):
            raise TypeError(f"the tokens of {text!r} are decoded to something else than text")
        core = getattr(tokenizer, "_tokenizer", None)
        if core is not None:  # what streams text
            stream = DecodeStream([], skip_special_tokens=True)
            for token in ids:
                stream.step(core, token)
    if not tokens:
        raise ValueError(f"none of {len(TEXTS)} texts has a token")


def _try_templates(processor: Any) -> None:
    for template in chat_templates(processor):
        if not isinstance(template, str):
            raise TypeError(f"it is a {type(template).__name__}, not a text")
        try:
            _render(processor, template, "Hi")
        except TemplateError as error:
            if type(error) is TemplateError:  # what `raise_exception` in a template raises: it wants other messages
                continue
            _render(processor, template, [{"type": "text", "text": "Hi"}])
        except (TypeError, ValueError):
            _render(processor, template, [{"type": "text", "text": "Hi"}])


def _render(processor: Any, template: str, content: Any) -> None:
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    getattr(processor, "tokenizer", processor)(prompt, add_special_tokens=False)
