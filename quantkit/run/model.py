"""Run a checkpoint, quantized or not: on the reference, in float32, or on the kernels that this machine has."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from quantkit.checkpoint.opened import misfits
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import CheckpointError, ConfigError, NotFiniteError, counted
from quantkit.host import pick_device, plain_arithmetic, plainly
from quantkit.kernels import dispatch
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.forward import LayerTrace, forward, head
from quantkit.model.registry import build_spec
from quantkit.run.sampling import GREEDY, Sampling, sample
from quantkit.run.weights import CheckpointWeights, Kernels, KernelWeights

__all__ = ["Model", "load"]


class Model:
    """A loaded checkpoint. `spec` says what it is, `weights` where its numbers come from.

    hold: keep weights once read. kernels: see `load`.
    """

    def __init__(self, folder: Path, device: torch.device, hold: bool = True, kernels: Kernels = "reference") -> None:
        reader = CheckpointReader(folder)
        self.folder, self.device, self.config = folder, device, reader.config
        self.spec = build_spec(reader.config, str(folder / "config.json"))
        self.weights = (
            CheckpointWeights(reader, device, hold)
            if kernels == "reference"
            else KernelWeights(reader, device, dispatch.OPTIONS[kernels])
        )
        if problems := misfits(reader, self.spec, self.weights.schemes):
            raise CheckpointError(
                f"{folder}: {counted(len(problems), 'tensor')} not as config.json says: {problems[0]}",
                "check config.json, or fetch both again",
            )

    def layers(self, input_ids: Tensor, cache: Cache | None = None) -> Iterator[LayerTrace]:
        """Layer after layer over int64 [batch, time]; hidden states float32 [batch, time, hidden], and routing."""
        self._check(input_ids)
        return plainly(forward(self.spec, self.weights, input_ids.to(self.device), cache))

    def head(self, hidden: Tensor) -> Tensor:
        """float32 [..., hidden] after the last layer -> float32 logits [..., vocab]."""
        with plain_arithmetic():
            return head(self.spec, self.weights, hidden)

    @torch.inference_mode()
    @plain_arithmetic()
    def logits(self, input_ids: Tensor, cache: Cache | None = None, last: int | None = None) -> Tensor:
        """int64 [batch, time] -> float32 [batch, time, vocab]. With a cache, the ids continue what it holds.

        last: of that many positions at the end only; those of a long prompt are gigabytes. Raises ConfigError for ids of
        another dtype or shape, or outside the vocabulary.
        """
        self._check(input_ids)
        return self._logits(input_ids, cache, last)

    def _logits(self, input_ids: Tensor, cache: Cache | None, last: int | None) -> Tensor:
        """`logits` of ids that are checked, in arithmetic that is set."""
        hidden = torch.empty(0)
        for trace in forward(self.spec, self.weights, input_ids.to(self.device), cache):
            hidden = trace.hidden
        return self.head(hidden if last is None else hidden[:, -last:])

    def stream(
        self,
        input_ids: Tensor,
        sampling: Sampling = GREEDY,
        kv_format: KVFormat = KVFormat.BF16,
        padding: Tensor | None = None,
        new_tokens: int | None = None,
    ) -> Iterator[Tensor]:
        """Continue int64 [batch, time] without end, yielding int64 [batch, 1]: prefill once, then a token at a time.

        The cache holds one K and one V per CLA group, in kv_format. padding: int64 [batch], how many ids at the start of
        each row only fill it up, where prompts are of different lengths. new_tokens: how many will be asked for, so that
        the cache is made for them at once. Ids are checked once, here. Raises NotFiniteError: of logits that are not
        finite no token is the likeliest.
        """
        if padding is not None and (padding.shape != input_ids.shape[:1] or bool((padding >= input_ids.shape[1]).any())):
            problem = f"padding {padding.tolist()} of input_ids {tuple(input_ids.shape)}"
            raise ConfigError(problem, "give a number for each row that leaves it at least one token")
        self._check(input_ids)
        at = None if padding is None else padding.to(self.device)
        room = 0 if new_tokens is None else input_ids.shape[1] + new_tokens
        cache, generator = Cache(kv_format, at, room), torch.Generator().manual_seed(sampling.seed)
        following = input_ids
        for drawn in count(1):
            with torch.inference_mode(), plain_arithmetic():
                logits = self._logits(following, cache, last=1)[:, -1]
                if not _finite(logits):
                    raise NotFiniteError(self.folder, f"the logits of new token {drawn} are not finite")
                following = sample(logits, sampling, generator)
            yield following

    def generate(
        self,
        input_ids: Tensor,
        new_tokens: int,
        sampling: Sampling = GREEDY,
        kv_format: KVFormat = KVFormat.BF16,
    ) -> Tensor:
        """int64 [batch, time] -> int64 [batch, time + new_tokens], as `stream` gives them."""
        self._check(input_ids)
        self.check_room(input_ids.shape[1], new_tokens)
        new = islice(self.stream(input_ids, sampling, kv_format, None, new_tokens), new_tokens)
        return torch.cat([input_ids.to(self.device), *new], dim=1)

    def explain(self) -> list[dict[str, str | int]]:
        """Which kernel serves which role, why, and what would on other hardware (`kernels.dispatch.explain`)."""
        linears = (
            (ref.role.value, self.weights.schemes[ref.key], (ref.out_features, ref.in_features))
            for ref in self.spec.linears()
        )
        backends = self.weights.backends if isinstance(self.weights, KernelWeights) else ()
        return dispatch.explain(linears, self.device, backends)

    def explain_decoding(self) -> list[dict[str, str | int]]:
        """Which halves of how many layers go in one call when tokens are few, or why they do not. Packs nothing."""
        if not isinstance(self.weights, KernelWeights):
            return []
        halves = Counter(self.weights.halves.explain(self.spec))
        return [{"half": half, "layers": n, "kernel": kernel, "why": why} for (half, kernel, why), n in halves.items()]

    def check_room(self, prompt: int, new_tokens: int) -> None:
        """Raises ConfigError where a prompt of that many tokens and the new ones are more than the config's positions."""
        limit = self.spec.positions
        if limit and prompt + new_tokens > limit:
            problem = f"{prompt} tokens of prompt and {new_tokens} new ones are more than {self.folder} reads"
            left = limit - prompt
            fix = f"ask for {left} new tokens or fewer" if left > 0 else f"give a prompt of fewer than {limit} tokens"
            raise ConfigError(f"{problem}: its max_position_embeddings is {limit}", fix)

    def _check(self, input_ids: Tensor) -> None:
        if not isinstance(input_ids, Tensor):
            raise ConfigError(f"input_ids are a {type(input_ids).__name__}", "give a tensor, int64 [batch, time]")
        if input_ids.dtype is not torch.int64 or input_ids.ndim != 2 or 0 in input_ids.shape:
            actual = f"{input_ids.dtype} {tuple(input_ids.shape)}"
            raise ConfigError(f"input_ids are {actual}", "give int64 [batch, time] with at least one token")
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.spec.vocab:
            raise ConfigError(f"input_ids span {low}..{high}", f"the vocabulary is 0..{self.spec.vocab - 1}")


def _finite(logits: Tensor) -> bool:
    """A sum that is finite has finite parts; one that is not may have overflowed."""
    return math.isfinite(float(logits.sum())) or bool(torch.isfinite(logits).all())


@plain_arithmetic()
def load(
    path: str | Path,
    device: str = "cpu",
    kernels: Kernels = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """A quantized or unquantized checkpoint folder, ready for `logits`, `stream` and `generate`.

    device: auto, cpu, cuda or cuda:N. kernels: "auto" packs quantized linears for this machine's kernels (`Model.explain`
    says which; the first use may build them); "w4a8" does so too and rounds the inputs of INT4 weights to INT8, faster on a
    CPU; "reference" dequantizes and multiplies in float32. progress is called with (layers packed, layers in all). Raises
    QuantkitError when the checkpoint is not sound.
    """
    if kernels not in ("reference", *dispatch.OPTIONS):
        raise ConfigError(f"kernels is {kernels!r}", f"choose reference, {', '.join(dispatch.OPTIONS)}")
    model = Model(Path(path), pick_device(device), kernels=kernels)
    if isinstance(model.weights, KernelWeights):
        model.weights.pack(model.spec, progress)
    return model
