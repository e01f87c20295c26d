"""Tokenizers in the layouts of released models, made by hand: small vocabularies, the same files beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

__all__ = ["LAYOUTS", "MESSAGES", "added", "byte_level", "write_tokenizer"]

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "hi  there, 人"},
    {"role": "assistant", "content": "ho\n"},
    {"role": "user", "content": " again"},
]
_TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
_LLAMA_2 = (
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def added(text: str) -> dict[str, Any]:
    """A special token as tokenizer_config.json holds objects."""
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": text, "normalized": True, **flags}


def byte_level(*special: str, bos: str | None = None) -> Tokenizer:
    """Bytes as GPT-2 writes them and these special tokens; with `bos` the post-processor puts it before a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    byte = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = byte
    if bos:
        tokenizer.post_processor = processors.Sequence([byte, _begins_with(tokenizer, bos)])
    return tokenizer


def _begins_with(tokenizer: Tokenizer, bos: str) -> Any:
    named = [(bos, tokenizer.token_to_id(bos))]
    return processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=named)


def sentence_piece() -> Tokenizer:
    """Llama-2's: a normaliser that writes spaces as marks, and bytes for what the vocabulary lacks."""
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))])}
    vocab |= {c: len(vocab) + i for i, c in enumerate(dict.fromkeys("▁abcdefghijklmnopqrstuvwxyz[]/INST.,B"))}
    merges = [("▁", "["), ("▁", "h"), ("▁h", "i"), ("I", "N"), ("S", "T"), ("IN", "ST"), ("▁", "▁")]
    for pair in merges:
        vocab["".join(pair)] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = _begins_with(tokenizer, "<s>")
    return tokenizer


def _llama_3() -> tuple[Tokenizer, dict[str, Any]]:
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ bos_token }}" + _TURNS}
    return byte_level(*names.values(), bos=names["bos_token"]), {**names, **config}


def _deepseek() -> tuple[Tokenizer, dict[str, Any]]:
    """Special tokens are objects, the post-processor writes no BOS, and add_bos_token is true."""
    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    names = {"bos_token": added(bos), "eos_token": added(eos), "pad_token": added(eos), "unk_token": None}
    config = {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "add_eos_token": False}
    return byte_level(bos, eos), {**names, **config, "chat_template": "{{ bos_token }}" + _TURNS}


def _mistral(**more: Any) -> tuple[Tokenizer, dict[str, Any]]:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": "{{ bos_token }}" + _TURNS}
    return sentence_piece(), {**names, **config, **more}


def _llama_2() -> tuple[Tokenizer, dict[str, Any]]:
    names = {"bos_token": added("<s>"), "eos_token": added("</s>"), "unk_token": added("<unk>"), "pad_token": None}
    return _mistral(**names, legacy=False, chat_template=_LLAMA_2)


LAYOUTS = {"llama-3": _llama_3, "mixtral": _mistral, "deepseek": _deepseek, "llama-2": _llama_2}


def write_tokenizer(folder: Path, layout: str) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer, config = LAYOUTS[layout]()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
