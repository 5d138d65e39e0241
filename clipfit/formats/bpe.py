"""open_clip's byte-pair tokenizer as the files that Hugging Face's libraries read: the same ids for the same text.

What they lack is open_clip's repair of a text before it is split (subject.plain): HTML entities, curly quotes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipfit.model.sources import Source
from clipfit.model.tokenizing import tokenizer_of
from clipfit.runs import files

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
PAD = "<pad>"  # another name of the id 0, which is a piece's, too; no text is split by it
START, END = "<|startoftext|>", "<|endoftext|>"  # as those libraries call what open_clip calls <start_of_text>
ANY_CLASS = "PreTrainedTokenizerFast"  # that reads any tokenizer.json
SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}

Vocabulary = tuple[dict[str, int], list[tuple[str, str]], int]  # token → id, merges in their order, context length


def is_plain(text_cfg: Mapping[str, Any]) -> bool:
    """Whether a text tower reads open_clip's own tokens, cleaned in the usual way."""
    return not text_cfg.get("hf_tokenizer_name") and not text_cfg.get("tokenizer_kwargs")


def write(folder: Path, source: Source, pad: str = PAD) -> Vocabulary:
    """tokenizer.json, and what is in it. Raises OutputError.

    Args:
        pad: what texts are filled with: PAD, the id 0, as open_clip does, or END, where no id behind the first end
            counts.
    """
    vocabulary, merges, length = found = _vocabulary(source)
    files.write_text(folder / TOKENIZER, _compact(_tokenizer(vocabulary, merges, length, pad)))
    return found


def write_for_clip(folder: Path, source: Source) -> None:
    """The same and what CLIPTokenizer wants beside it. Raises OutputError."""
    vocabulary, merges, length = write(folder, source, END)
    named = _special(END)
    files.write_text(folder / "vocab.json", _compact(vocabulary))
    files.write_text(folder / "merges.txt", "\n".join(["#version: 0.2", *map(" ".join, merges), ""]))
    files.write_json(folder / "special_tokens_map.json", named)
    files.write_json(
        folder / CONFIG,
        {**named, "tokenizer_class": "CLIPTokenizer", "processor_class": "CLIPProcessor", "model_max_length": length},
    )


def write_for_siglip(folder: Path, source: Source) -> None:
    """The same for a text tower that reads what a text is filled with. Raises OutputError."""
    *_, length = write(folder, source)
    files.write_json(
        folder / CONFIG,
        {**_special(PAD), "tokenizer_class": ANY_CLASS, "model_max_length": length,
         "model_input_names": ["input_ids"]},
    )  # fmt: skip


def _special(pad: str) -> dict[str, str]:
    return {"unk_token": END, "bos_token": START, "eos_token": END, "pad_token": pad}


def _vocabulary(source: Source) -> Vocabulary:
    tokenizer = tokenizer_of(source)
    names = {tokenizer.sot_token_id: START, tokenizer.eot_token_id: END}
    vocabulary = {names.get(number, token): number for token, number in tokenizer.encoder.items()}
    merges = sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.__getitem__)
    return vocabulary, merges, int(tokenizer.context_length)


def _tokenizer(vocabulary: Mapping[str, int], merges: list[tuple[str, str]], length: int, pad: str) -> dict[str, Any]:
    """What tokenizer.json holds: ids of a text between start and end, cut and filled to the context's length."""
    vocabulary = vocabulary if pad in vocabulary else {pad: 0, **vocabulary}
    special = [
        {"id": vocabulary[name], "content": name, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for name in sorted({pad, START, END}, key=vocabulary.__getitem__)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": length}, "direction": "Right", "pad_to_multiple_of": None,
                    "pad_id": vocabulary[pad], "pad_type_id": 0, "pad_token": pad},
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Lowercase"},
        ]},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Removed", "invert": True},
            BYTES,
        ]},
        "post_processor": {"type": "RobertaProcessing", "sep": [END, vocabulary[END]],
                           "cls": [START, vocabulary[START]], "trim_offsets": False, "add_prefix_space": False},
        "decoder": BYTES,
        "model": {"type": "BPE", "dropout": None, "unk_token": END, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "</w>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocabulary, "merges": [list(pair) for pair in merges]},
    }  # fmt: skip


def _compact(record: Any) -> str:
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))
