"""A model's chat template and special tokens, from wherever transformers takes them, and conversations written by it.

A template is a program that came with the model: it runs in transformers' sandbox, in one other process for all
conversations, with limits on processor time, memory and output.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tokenizers import Tokenizer

from quantkit.calib.documents import Conversation
from quantkit.checkpoint.reader import load_json
from quantkit.errors import CalibrationError
from quantkit.extras import need

__all__ = ["Chat", "Settings", "settings_of"]

SECONDS, MEMORY = 10.0, 1 << 30  # of the processor, for one conversation; of memory, beyond what the program itself takes
_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
_JSON, _FOLDER = "chat_template.json", "additional_chat_templates"
_INPUTS = ("tools", "documents")  # what is said beside the messages; without a template that reads it, it would be lost
# What a template calls, and what transformers sets: a column of that name must not take its place.
_TAKEN = {"range", "dict", "lipsum", "cycler", "joiner", "namespace", "raise_exception", "strftime_now", "messages", "loop"}


@dataclass(frozen=True)
class Settings:
    """tokenizer: tokenizer.json's with the tokens that other files add. special: named special tokens, by the names that
    templates use. extra: further special tokens. template: Jinja, or by name; None where the model has none."""

    tokenizer: Tokenizer
    special: dict[str, str]
    extra: list[str]
    template: str | dict[str, str] | None


def settings_of(folder: Path, tokenizer: Tokenizer, assumed: dict[str, str]) -> Settings | None:
    """As transformers reads them; None where no file says anything. Raises whatever transformers does.

    assumed: named special tokens that the model's own tokenizer class takes where tokenizer_config.json names none.
    """
    stated = any((folder / name).exists() for name in (*_FILES, _JSON, _FOLDER))
    if not stated and not assumed:
        return None
    from transformers import PreTrainedTokenizerFast  # seconds to import

    if stated:
        read = PreTrainedTokenizerFast.from_pretrained(
            str(folder), tokenizer_object=tokenizer, local_files_only=True, **assumed
        )
    else:
        read = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **assumed)
    template = read.chat_template
    if template is None and (folder / _JSON).is_file():  # processors wrote it; a tokenizer's own template comes first
        template = load_json(folder / _JSON).get("chat_template")
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}
    texts = template.values() if isinstance(template, dict) else [template or ""]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("chat_template is neither a string nor a list of named ones")
    return Settings(read.backend_tokenizer, dict(read.special_tokens_map), list(read.extra_special_tokens), template)


class Chat:
    """Renders conversations. folder: the model's, for messages. Its process starts with the first conversation."""

    def __init__(self, folder: str, settings: Settings | None = None, seconds: float = SECONDS) -> None:
        self.folder, self.settings, self.seconds = folder, settings, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None

    def template(self, where: str, tools: bool = False) -> str:
        """The template for a conversation with or without tools. Raises CalibrationError when the model has none."""
        template = self.settings.template if self.settings else None
        if isinstance(template, dict):
            named = template.get("tool_use") if tools else None
            if named is None and "default" not in template:
                problem = f"{self.folder} has chat templates named {', '.join(sorted(template))}, and none of them 'default'"
                raise CalibrationError(f"{where} is a conversation, but {problem}", "name one of them 'default'")
            template = named or template["default"]
        if not template:
            fix = "give plain 'text' instead, or add the chat_template.jinja of the model's chat version to the folder"
            raise CalibrationError(f"{where} has messages, but {self.folder} has no chat template", fix)
        return template

    def render(self, conversation: Conversation, **how: bool) -> str:
        """The conversation as text. how: add_generation_prompt, continue_final_message. Raises CalibrationError where there
        is no template, where it refuses, exceeds a limit, or does not read what the conversation's row holds for it."""
        template = self.template(conversation.where, "tools" in conversation.variables)
        need("chat", f"{conversation.where} has messages, and the chat template that writes them")
        read = {name for name in conversation.variables if re.search(rf"\b{re.escape(name)}\b", template)}
        if lost := [name for name in _INPUTS if conversation.variables.get(name) and name not in read]:
            problem = f"{conversation.where} has '{lost[0]}', which the chat template of {self.folder} does not read"
            raise CalibrationError(problem, f"take '{lost[0]}' out of the rows, or use a template that reads it")
        assert self.settings is not None
        passed = {name: conversation.variables[name] for name in read - _TAKEN - self.settings.special.keys()}
        special: dict[str, Any] = dict(self.settings.special)
        if "additional_special_tokens" in template:  # transformers 4 passed it, 5 leaves it undefined
            special["additional_special_tokens"] = self.settings.extra
        request = {"messages": conversation.messages, "template": template, "special": special, "passed": passed, "how": how}
        answer = self._ask(request, conversation.where)
        if "text" not in answer:
            problem = f"{conversation.where}: the chat template of {self.folder} {answer['error']}"
            raise CalibrationError(problem, answer["fix"])
        text = str(answer["text"])
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CalibrationError(f"{conversation.where} is not Unicode text: {error}", "repair or drop it") from error
        return text

    def _ask(self, request: dict[str, Any], where: str) -> dict[str, Any]:
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            line = json.dumps({**request, "seconds": self.seconds}).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise CalibrationError(f"{where} holds what is not JSON: {error}", "leave that column out") from error
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = b""
        return dict(json.loads(answer)) if answer.endswith(b"\n") else self._ended(process)

    def _start(self) -> subprocess.Popen[bytes]:
        """A process with the same import path as this one, which ends when its input does."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        path = os.pathsep.join(part for part in sys.path if part)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "quantkit.calib.render", str(MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, "PYTHONPATH": path},
        )
        weakref.finalize(self, _end, self._process)
        return self._process

    def _ended(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Why the process is no more."""
        _end(process)
        self._process, code = None, process.returncode
        if code == -signal.SIGPROF:
            return {"error": f"ran for more than {self.seconds:g} s", "fix": "repair the template"}
        assert self._said is not None
        self._said.seek(0)
        message = self._said.read().decode(errors="replace").strip().splitlines()[-1:]
        why = f"ended the process that ran it ({'signal' if code < 0 else 'code'} {abs(code)}) {' '.join(message)}"
        return {"error": why.strip(), "fix": "repair the template"}


def _end(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        if stream:
            try:
                stream.close()
            except OSError:  # what could not be written to a process that is gone
                continue
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
