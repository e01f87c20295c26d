"""quantkit's model type for lm-evaluation-harness: any checkpoint that quantkit runs, on quantkit's own runtime.

A harness after 0.4.13 finds it by the entry point `lm_eval.models`. Version 0.4.13 has no such discovery, so there

    python -m quantkit.tasks.harness run --model quantkit --model_args pretrained=OUT --tasks gsm8k

registers it and hands over to the harness's own command line.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from quantkit.calib.documents import Conversation
from quantkit.calib.tokenizer import end_tokens, load_text_tokenizer
from quantkit.checkpoint.folder import find_model
from quantkit.errors import ConfigError, NotFiniteError
from quantkit.measure.divergence import chunks
from quantkit.model.cache import KVFormat
from quantkit.run.model import Model, load
from quantkit.run.sampling import Sampling

__all__ = ["QuantkitLM", "main", "register"]

_BATCH_TOKENS = 4096
_MAX_LENGTH = 2048  # where neither an argument nor config.json says
_NEW_TOKENS = 256  # the harness's default


class QuantkitLM(TemplateLM):  # type: ignore[misc]
    """`--model quantkit --model_args pretrained=FOLDER,kernels=auto,kv_cache=bf16,max_length=4096,...`.

    batch_size: rows at once; without it as many as 4096 tokens hold. max_new_tokens: an upper bound on what tasks ask for.
    add_bos: whether a text begins with the beginning-of-text id; otherwise as the model was trained. Text that the chat
    template wrote is taken as it is. truncated counts texts of which only the end fitted into max_length.
    """

    def __init__(
        self,
        pretrained: str | Path,
        device: str = "cpu",
        kernels: str = "auto",
        kv_cache: str = "bf16",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        add_bos: bool | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        if device.startswith("cuda") and not torch.cuda.is_available():  # the harness asks for cuda:0 when nobody says
            logging.getLogger(__name__).warning("no CUDA device here: running on the CPU")
            device = "cpu"
        folder = find_model(str(pretrained))
        self.model: Model = load(folder, device, kernels)  # type: ignore[arg-type]
        self.encoder, self.kv_format = load_text_tokenizer(folder, add_bos), KVFormat(kv_cache)
        fixed = batch_size not in (None, "auto") and not str(batch_size).startswith("auto")
        self.rows = int(batch_size) if fixed else max_batch_size  # type: ignore[arg-type]
        config = self.model.config
        self.max_length = int(max_length or config.get("max_position_embeddings") or _MAX_LENGTH)
        self.max_new_tokens, self.progress = max_new_tokens, progress
        self.truncated = 0
        self.ends = end_tokens(folder, config)
        self._templated = False  # whether the harness asks through the chat template
        self._device = self.model.device

    @property
    def eot_token_id(self) -> int:
        return min(self.ends) if self.ends else 0

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.eot_token_id if self.encoder.bos.id is None else self.encoder.bos.id

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.folder.resolve()).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        self._templated = bool(chat_template)
        return self.encoder.chat.template("a task") if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages through the model's own template; without a prompt for an answer, the last message is to be continued."""
        self._templated = True
        return self.encoder.render(
            Conversation([dict(message) for message in chat_history], where="a task"),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text. Special tokens are not added to what the chat template wrote."""
        written = self._templated if add_special_tokens is None else not add_special_tokens
        return self.encoder.encode_written(string) if written else self.encoder.encode(string)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would give it) of each continuation after its context.

        Requests with the same input, such as the options A, B, C, D of one question, are one row of one forward pass.
        """
        inputs: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if not continuation:
                raise ConfigError("a task asks for the likelihood of no token", "check its choices")
            whole = context + continuation
            self.truncated += len(whole) > self.max_length + 1
            inputs.setdefault(tuple(whole[-(self.max_length + 1) :][:-1]), []).append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        done = 0
        for batch in self._batches(list(inputs)):
            members = [(row, ids, index) for row, ids in enumerate(batch) for index in inputs[ids]]
            targets = [requests[index][2][-len(ids) :] for _, ids, index in members]
            hidden = self._hidden(batch)
            spans = [hidden[row, len(ids) - len(t) : len(ids)] for (row, ids, _), t in zip(members, targets, strict=True)]
            for (_, _, index), answer in zip(members, self._score(torch.cat(spans), targets), strict=True):
                answers[index] = answer
            self._check([index for *_, index in members], answers, requests)
            done += len(members)
            if self.progress:
                self.progress(done, len(requests))
        return answers

    def _check(
        self, indices: list[int], answers: list[tuple[float, bool]], requests: Sequence[tuple[Any, Any, Any]]
    ) -> None:
        """A likelihood that is not a number is no answer: among options, the first would win."""
        broken = [index for index in sorted(indices) if not math.isfinite(answers[index][0])]
        if broken:
            text = requests[broken[0]][0]
            excerpt = f" (...{text[0][-60:]!r}, then {text[1]!r})" if text else ""
            item = f"request {broken[0] + 1} of {len(requests)}{excerpt}"
            raise NotFiniteError(self.model.folder, f"the log-likelihood of {item} is not finite")

    def _batches(self, inputs: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Longest first, so that memory runs out at once or never; no row is padded to more than twice its length."""
        ordered = sorted(inputs, key=len, reverse=True)
        while ordered:
            longest = len(ordered[0])
            rows = self.rows or max(1, _BATCH_TOKENS // longest)
            batch = [ids for ids in ordered[:rows] if 2 * len(ids) >= longest]
            yield batch
            ordered = ordered[len(batch) :]

    @torch.inference_mode()
    def _hidden(self, batch: list[tuple[int, ...]]) -> torch.Tensor:
        """float32 [rows, time, hidden] after the last layer. Padding stands behind, where no real position looks."""
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
        for row, values in enumerate(batch):
            ids[row, : len(values)] = torch.tensor(values)
        hidden = torch.empty(0)
        for trace in self.model.layers(ids):
            hidden = trace.hidden
        return hidden

    @torch.inference_mode()
    def _score(self, hidden: torch.Tensor, targets: list[list[int]]) -> list[tuple[float, bool]]:
        """Of each target, whose positions lie one after another in float32 [n, hidden]: log-likelihood, and if greedy."""
        tokens = torch.tensor([token for target in targets for token in target], device=hidden.device)
        likely, greedy = [], []
        for part in chunks(len(tokens), self.model.spec.vocab):
            logits, chosen = self.model.head(hidden[part]), tokens[part, None]
            likely.append(logits.double().log_softmax(-1).gather(-1, chosen)[:, 0].cpu())
            greedy.append((logits.argmax(-1, keepdim=True) == chosen)[:, 0].cpu())
        lengths = [len(target) for target in targets]
        pairs = zip(torch.cat(likely).split(lengths), torch.cat(greedy).split(lengths), strict=True)
        return [(float(value.sum()), bool(same.all())) for value, same in pairs]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of max_length that score each token once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, cut):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[index] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first stop string, an end token, or the token limit."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=str)), []).append(index)
        answers, done = [""] * len(requests), 0
        for group in groups.values():
            stops, new, sampling = self._wish(requests[group[0]].args[1])
            encoded = {index: self._prompt(requests[index].args[0], new) for index in group}
            order = sorted(group, key=lambda index: len(encoded[index]), reverse=True)
            while order:
                rows = self.rows or max(1, _BATCH_TOKENS // (len(encoded[order[0]]) + new))
                batch, order = order[:rows], order[rows:]
                texts = self._generate([encoded[index] for index in batch], stops, new, sampling)
                for index, text in zip(batch, texts, strict=True):
                    answers[index] = text
                done += len(batch)
                if self.progress:
                    self.progress(done, len(requests))
        return answers

    def _wish(self, arguments: dict[str, Any]) -> tuple[list[str], int, Sampling]:
        """Stop strings, token limit and sampling of a request. Raises ConfigError for what the runtime cannot do."""
        kwargs = normalize_gen_kwargs(dict(arguments), _NEW_TOKENS)
        new, stops = int(kwargs.pop("max_gen_toks")), [text for text in kwargs.pop("until", []) if text]
        draw, heat = bool(kwargs.pop("do_sample", False)), float(kwargs.pop("temperature", 0.0))
        sampling = Sampling(heat if draw else 0.0, float(kwargs.pop("top_p", 1.0)))
        if kwargs:
            raise ConfigError(f"a task asks to generate with {kwargs}", "leave that out of its generation_kwargs")
        new = min(new, self.max_new_tokens or new)
        if new >= self.max_length:
            raise ConfigError(
                f"a task wants {new} new tokens, and the model's length is {self.max_length}", "lower --max-new-tokens"
            )
        return stops, new, sampling

    def _prompt(self, text: str, new: int) -> list[int]:
        """The end of a context that leaves room for `new` tokens."""
        ids = self.tok_encode(text) or [self.prefix_token_id]
        self.truncated += len(ids) > self.max_length - new
        return ids[-(self.max_length - new) :]

    def _generate(self, prompts: list[list[int]], stops: list[str], new: int, sampling: Sampling) -> list[str]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts])
        padding = torch.tensor([width - len(row) for row in prompts])
        # A stop string ends somewhere in the last tokens: each is a byte of it or more, and the newest may reach beyond.
        tail = max((len(text.encode()) for text in stops), default=0) + 8
        drawn: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        for tokens in islice(self.model.stream(ids, sampling, self.kv_format, padding), new):
            for row, token in enumerate(tokens.flatten().tolist()):
                if done[row]:
                    continue
                if token in self.ends:
                    done[row] = True
                    continue
                drawn[row].append(token)
                end = self.encoder.decode(drawn[row][-tail:]) if stops else ""
                done[row] = any(text in end for text in stops)
            if all(done):
                break
        return [_until(self.encoder.decode(row), stops) for row in drawn]


def _until(text: str, stops: list[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def register() -> None:
    """Make the harness know `quantkit`, once."""
    import lm_eval.models  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import model_registry

    if "quantkit" not in model_registry:
        model_registry.register("quantkit", target="quantkit.tasks.harness:QuantkitLM")


def main() -> None:
    """The harness's command line, with this model type."""
    from lm_eval.__main__ import cli_evaluate

    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
