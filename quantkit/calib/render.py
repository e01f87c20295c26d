"""A program that `chat` starts: it writes conversations through chat templates, one JSON request a line, under limits.

A template that computes without end is ended with its process, by the system (SIGPROF); one that wants too much memory is
told so, or ends its process.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import sys
from typing import Any

__all__ = ["answer", "main"]

_ALLOWED = ("tools", "documents", "add_generation_prompt")  # of transformers' own parameters, those that are of the template
_LEAST, _TIMES = 1 << 20, 16  # characters: what a template may write at least, and how many times what it was given


def answer(tokenizer: Any, request: dict[str, Any], size: int) -> dict[str, str]:
    """{"text"}, or {"error", "fix"}. size: characters of the request."""
    passed = request["passed"]
    own = inspect.signature(tokenizer.apply_chat_template).parameters
    if fixed := [name for name in passed if name in own and name not in _ALLOWED]:
        return {"error": f"reads '{fixed[0]}', which cannot be passed to it", "fix": f"take '{fixed[0]}' out of the rows"}
    how = {**request["special"], **passed, **request["how"]}
    try:
        text = tokenizer.apply_chat_template(request["messages"], chat_template=request["template"], tokenize=False, **how)
    except MemoryError:
        return {"error": "wants more memory than a conversation may take", "fix": "repair the template"}
    except Exception as error:  # a template may raise anything; it is data of the model
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return {
            "error": f"refuses these messages: {reason[:300]}",
            "fix": "check roles and contents",
        }
    if len(text) > max(_LEAST, _TIMES * size):
        return {"error": f"writes {len(text):,} characters from {size:,}", "fix": "repair the template"}
    return {"text": text}


def limit_memory(more: int) -> None:
    """Bytes beyond those that are mapped now."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, mapped + more))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    limit_memory(int(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        reply = json.dumps(answer(tokenizer, request, len(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, file=out, flush=True)


if __name__ == "__main__":
    main()
