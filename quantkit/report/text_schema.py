"""How text became token ids: that part of `report.json`."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["TextTokens"]


class TextTokens(BaseModel):
    """How the evaluation text became ids: documents (of them conversations, written by the chat template), rows skipped as
    empty or null, the first ids of the first document, and whether raw text gets the beginning-of-text token (bos; null:
    no file names one), with the reason."""

    model_config = ConfigDict(extra="forbid")
    documents: int
    conversations: int
    skipped_rows: dict[str, int]
    first_ids: list[int]
    first_tokens: list[str]
    bos_id: int | None
    bos_added: bool | None
    bos_why: str
