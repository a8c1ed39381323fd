"""A CLIP-style byte-pair tokenizer, trained on the captions until nearly every word is one token."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

MAX_LENGTH = 32  # tokens, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
WORDS = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")  # CLIP's pattern, reduced to ASCII

Pair = tuple[str, str]


def byte_symbols() -> list[str]:
    """Return GPT-2's 256 printable symbols for bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(code) for code in [*printable, *range(256, 256 + others)]]


def learn_merges(captions: Iterable[str]) -> list[Pair]:
    """Learn byte-pair merges until every word is one token; Sennrich et al. (2016), algorithm 1."""
    counts = Counter(word for text in captions for word in WORDS.findall(text.lower()))
    spelled = {(*word[:-1], word[-1] + WORD_END): count for word, count in counts.items()}
    merges: list[Pair] = []
    while pairs := _count_pairs(spelled):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        spelled = {_merge(symbols, best): count for symbols, count in spelled.items()}
        merges.append(best)
    return merges


def _count_pairs(spelled: dict[tuple[str, ...], int]) -> Counter[Pair]:
    pairs: Counter[Pair] = Counter()
    for symbols, count in spelled.items():
        for pair in pairwise(symbols):
            pairs[pair] += count
    return pairs


def _merge(symbols: tuple[str, ...], pair: Pair) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def vocabulary(merges: Iterable[Pair]) -> dict[str, int]:
    """Return token ids in CLIP's order: bytes, bytes that end a word, merges, start, end."""
    singles = byte_symbols()
    tokens = [*singles, *(single + WORD_END for single in singles), *(a + b for a, b in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def write_tokenizer(folder: Path, captions: Iterable[str]) -> None:
    """Write the files that `CLIPTokenizer.from_pretrained` reads."""
    merges = learn_merges(captions)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "vocab.json", vocabulary(merges))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    specials = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    _write_json(folder / "special_tokens_map.json", specials)
    _write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_LENGTH, "do_lower_case": True, **specials},
    )


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
