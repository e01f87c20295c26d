"""Train the bundled tiny-hunyuan: Hunyuan-Large's architecture, small enough for a repository and two CPU cores.

    python examples/tiny-hunyuan/train.py --english novels.txt.xz --chinese modern.txt.xz --out examples/tiny-hunyuan

Three sources: English, Chinese (any UTF-8 text, .xz or not) and the Python standard library without the modules that
`quantkit.calib.corpus` holds out. Trains a byte-level BPE, then the model with Muon for matrices and AdamW for the rest,
under a clock (`--minutes`), in bfloat16 matmuls over float32 weights. Writes BF16 safetensors, config, tokenizer and the
figures of the model card (training.json).

`--config FILE` trains another architecture that quantkit knows; `--init MODEL` begins with a model's tokenizer and those of
its tensors that have the same name and shape.
"""

from __future__ import annotations

import json
import lzma
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from quantkit.calib.corpus import held_out_files
from quantkit.model.forward import LayerTrace, forward, head
from quantkit.model.registry import build_spec
from quantkit.model.spec import Linear, ModelSpec
from quantkit.model.weights import Weights

CONFIG: dict[str, object] = {
    "architectures": ["HunYuanForCausalLM"],
    "model_type": "hunyuan",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "moe_topk": 1,
    "use_mixed_mlp_moe": True,
    "num_shared_expert": 1,
    "use_cla": True,
    "cla_share_factor": 2,
    "use_qk_norm": True,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "torch_dtype": "bfloat16",
}
MIXTURE = {"english": 0.35, "chinese": 0.25, "python": 0.4}
WINDOW = 512


class TrainWeights(Weights):
    """Float32 parameters, multiplied in bfloat16."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        self.parameters = parameters

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.parameters[ref.weight].bfloat16())

    def tensor(self, key: str) -> Tensor:
        return self.parameters[key]


def read_text(path: Path) -> str:
    data = path.read_bytes()
    return (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8")


def read_python() -> tuple[str, str]:
    """(training text, held-out text) of the standard library."""
    held = held_out_files()
    texts: tuple[list[str], list[str]] = ([], [])
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts and path.stat().st_size < 400_000:
            texts[path in held].append(path.read_text("utf-8", errors="ignore"))
    return "\n".join(texts[0]), "\n".join(texts[1])


def train_tokenizer(texts: dict[str, str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    pieces = [text[i : i + 4000] for text in texts.values() for i in range(0, 4_000_000, 4000)]
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    pieces = [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
    return np.concatenate([np.array(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(pieces)])


def batches(sources: dict[str, np.ndarray], batch: int, generator: np.random.Generator) -> Iterator[Tensor]:
    """int64 [batch, WINDOW + 1] of random windows, drawn from the sources by MIXTURE."""
    names, shares = list(MIXTURE), list(MIXTURE.values())
    while True:
        rows = []
        for name in generator.choice(names, size=batch, p=shares):
            start = int(generator.integers(len(sources[name]) - WINDOW - 1))
            rows.append(sources[name][start : start + WINDOW + 1].astype(np.int64))
        yield torch.from_numpy(np.stack(rows))


def run(spec: ModelSpec, weights: TrainWeights, ids: Tensor) -> tuple[Tensor, list[LayerTrace]]:
    """Next-token loss in nats and the trace of every layer."""
    traces = list(forward(spec, weights, ids[:, :-1]))
    hidden = traces[-1].hidden.bfloat16()
    return F.cross_entropy(head(spec, weights, hidden).flatten(0, 1), ids[:, 1:].flatten()), traces


def balance_loss(traces: list[LayerTrace]) -> Tensor:
    """Switch Transformer eq. 4 (arXiv 2101.03961), mean over layers; 1.0 when perfectly balanced."""
    losses = []
    for routing in (trace.routing for trace in traces if trace.routing is not None):
        experts = routing.logits.shape[1]
        share = torch.bincount(routing.experts.flatten(), minlength=experts) / routing.experts.numel()
        losses.append(experts * (share * routing.logits.softmax(-1).mean(0)).sum())
    return torch.stack(losses).mean()


def initialise(spec: ModelSpec, seed: int, known: dict[str, Tensor]) -> dict[str, Tensor]:
    """known: tensors that are taken as they are where name and shape agree."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for key, shape in spec.tensors().items():
        if len(shape) == 1:
            value = torch.ones(shape)
        else:
            std = 0.02 if key == spec.embedding else shape[1] ** -0.5
            if key.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * len(spec.layers))
            value = torch.randn(shape, generator=generator) * std
        if key in known and known[key].shape == shape:
            value = known[key].float()
        parameters[key] = value.requires_grad_()
    return parameters


def optimisers(spec: ModelSpec, parameters: dict[str, Tensor], lr: float) -> list[torch.optim.Optimizer]:
    matrices = [parameters[ref.weight] for ref in spec.linears()]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters.values() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@torch.no_grad()
def evaluate(spec: ModelSpec, weights: TrainWeights, held: dict[str, np.ndarray]) -> dict[str, object]:
    """Perplexity per source on its held-out tokens, and per layer the share of tokens of each expert."""
    perplexity, counts = {}, [torch.zeros(0, dtype=torch.int64)] * len(spec.layers)
    for name, tokens in held.items():
        usable = tokens[: min(len(tokens), 64 * (WINDOW + 1)) // (WINDOW + 1) * (WINDOW + 1)]
        losses = []
        for rows in torch.from_numpy(usable.astype(np.int64)).view(-1, WINDOW + 1).split(16):
            loss, traces = run(spec, weights, rows)
            losses.append(loss.item() * len(rows))
            for trace in traces:
                if trace.routing is not None:
                    seen = torch.bincount(trace.routing.experts.flatten(), minlength=trace.routing.logits.shape[1])
                    counts[trace.index] = counts[trace.index] + seen if len(counts[trace.index]) else seen
        perplexity[name] = round(math.exp(sum(losses) / (len(usable) // (WINDOW + 1))), 3)
    shares = [count / count.sum() for count in counts if len(count)]
    return {
        "held_out_perplexity": perplexity,
        "router_share_min": [round(float(share.min()), 4) for share in shares],
        "router_share_max": [round(float(share.max()), 4) for share in shares],
    }


def save(out: Path, config: dict[str, object], parameters: dict[str, Tensor], record: dict[str, object]) -> None:
    weights = {key: value.detach().bfloat16() for key, value in parameters.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


@click.command()
@click.option("--english", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--chinese", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--config", "config_file", type=click.Path(path_type=Path, exists=True), help="config.json of another model.")
@click.option("--init", type=click.Path(path_type=Path, exists=True), help="A model to begin with.")
@click.option("--minutes", default=80.0, help="Training time by the clock; the learning rate falls with it.")
@click.option("--batch", default=8, help="Windows of 512 tokens in one step.")
@click.option("--lr", default=4e-3)
@click.option("--seed", default=0)
def main(
    english: Path,
    chinese: Path,
    out: Path,
    config_file: Path | None,
    init: Path | None,
    minutes: float,
    batch: int,
    lr: float,
    seed: int,
) -> None:
    config = json.loads(config_file.read_text()) if config_file else CONFIG
    out.mkdir(parents=True, exist_ok=True)
    python, python_held = read_python()
    texts = {"english": read_text(english), "chinese": read_text(chinese), "python": python}
    held_texts = {name: text[-len(text) // 100 :] for name, text in texts.items()}
    train_texts = {name: text[: -len(text) // 100] for name, text in texts.items()}
    held_texts["python"] = python_held
    if init:
        tokenizer = Tokenizer.from_file(str(init / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(train_texts, int(str(config["vocab_size"])))
    tokenizer.save(str(out / "tokenizer.json"))
    sources = {name: encode(tokenizer, text) for name, text in train_texts.items()}
    held = {name: encode(tokenizer, text) for name, text in held_texts.items()}
    click.echo({name: len(ids) for name, ids in sources.items()})

    spec = build_spec(config, str(config_file or "config"))
    parameters = initialise(spec, seed, load_file(init / "model.safetensors") if init else {})
    weights = TrainWeights(parameters)
    optims = optimisers(spec, parameters, lr)
    data = batches(sources, batch, np.random.default_rng(seed))
    start, step, last = time.monotonic(), 0, 0.0
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        factor = min(1.0, (step + 1) / 100) * min(1.0, 1.5 * (1 - done) + 0.01)
        for optim in optims:
            optim.param_groups[0]["lr"] = lr * factor
        loss, traces = run(spec, weights, next(data))
        (loss + 0.02 * balance_loss(traces)).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()
        step += 1
        if time.monotonic() - last > 20:
            last = time.monotonic()
            click.echo(f"{done:6.1%} step {step} tokens {step * batch * WINDOW:,} loss {loss.item():.3f}")
        if step % 500 == 0 or time.monotonic() - start >= 60 * minutes:
            rounded = TrainWeights({key: value.detach().bfloat16().float() for key, value in parameters.items()})
            seen = {"parameters": sum(p.numel() for p in parameters.values()), "tokens_seen": step * batch * WINDOW}
            run_of = {"steps": step, "minutes": minutes, "batch": batch, "lr": lr, "seed": seed}
            record = {**seen, **run_of, **evaluate(spec, rounded, held)}
            save(out, config, parameters, record)
            click.echo(json.dumps(record))


if __name__ == "__main__":
    main()
