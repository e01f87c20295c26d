"""Whether the head that runs is the one that is stored."""

from __future__ import annotations

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.model.spec import HEAD, ModelSpec

__all__ = ["HEAD", "HEAD_FIX", "head_problem"]

HEAD_FIX = f"say tie_word_embeddings: false in config.json to run the stored head, or take '{HEAD}' out to run the embedding"


def head_problem(reader: CheckpointReader, spec: ModelSpec) -> str | None:
    """What is wrong where the config ties the head to the embedding and another head is stored; None where nothing is.

    Engines disagree there, for every architecture: transformers 5 compares the two and does not tie them when they differ;
    transformers 4 and vLLM run the embedding (vLLM's Qwen3-MoE whichever was loaded last). Equal ones are no problem.
    Shapes that differ are found elsewhere.
    """
    if spec.head is not None or HEAD not in reader.entries or spec.embedding not in reader.entries:
        return None
    if reader.entries[HEAD].shape != reader.entries[spec.embedding].shape:
        return None
    head, embedding = reader.tensor(HEAD), reader.tensor(spec.embedding)
    same = head.equal(embedding) if head.dtype is embedding.dtype else head.float().equal(embedding.float())
    if same:
        return None
    return (
        f"tie_word_embeddings is true, but '{HEAD}' differs from '{spec.embedding}': transformers 5 would run the stored "
        "head, transformers 4 and vLLM the embedding"
    )
