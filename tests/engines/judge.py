"""The judge of both engines: mean KL(engine || quantkit) over the positions of a few prompts, in nats a token. And what is
asked of the bundled model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import quantkit
from quantkit.run.weights import Kernels
from tests.engines.models import RECIPES
from tests.helpers.paths import ROOT

PROMPTS = torch.randint(1, 257, (4, 96), generator=torch.Generator().manual_seed(1))
LIMIT = 0.01


def kernels_like_vllm(column: str) -> Kernels:
    """INT4 experts are multiplied by inputs rounded to INT8 there."""
    return "w4a8" if RECIPES[column].get("experts", column) == "W4A16" else "auto"


def logprobs(folder: Path, kernels: Kernels) -> Tensor:
    return quantkit.load(folder, kernels=kernels).logits(PROMPTS).log_softmax(-1)[:, :-1]


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) over positions; both log-probabilities [..., vocab]."""
    return float((p.exp() * (p - q)).sum(-1).mean())


BUNDLED = ROOT / "examples" / "tiny-hunyuan"
TEXTS = [
    "def __init__(self, name, value=None):\n        self.name = name\n        self.value = value\n        if value is",
    "It was a cold evening, and the old man sat by the fire with a book in his hand, while the children were asleep and",
    "import os\nimport sys\n\n\nclass Reader:\n    def read(self, size=-1):\n        data = self.stream.read(size)\n",
]
