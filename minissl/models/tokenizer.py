"""Byte-pair encoding of sentences.

Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2015 (arXiv:1508.07909), on bytes, in the
form of Radford et al., CLIP, 2021 (arXiv:2103.00020): a word is a sequence of its UTF-8 bytes, the last of which is
marked as the end of the word. Frequent pairs of symbols are merged into new symbols.

Shapes: B sentences, L tokens each.
"""

from __future__ import annotations

import gzip
import html
import re
import unicodedata
import zlib
from collections import Counter
from itertools import groupby, islice, pairwise
from pathlib import Path

import torch
from torch import Tensor

from minissl.errors import InputError

Pair = tuple[int, int]

# The 256 bytes in CLIP's order: first those that are printable characters of Latin-1, then the others.
PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = (*PRINTABLE, *sorted(set(range(256)) - set(PRINTABLE)))
BYTE_CHARS = (
    *map(chr, PRINTABLE),
    *map(chr, range(256, 512 - len(PRINTABLE))),
)  # in files of merges
NUM_BYTE_SYMBOLS = 512  # symbols before the first merge: the bytes, and the bytes that end a word

CP1252_CHARS = {code: bytes([code]).decode("cp1252") for code in {*range(128, 160)} - {129, 141, 143, 144, 157}}
LIGATURES = (0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07))
REPLACEMENTS: dict[int, str | None] = {  # as ftfy does: None removes the character
    **dict.fromkeys([*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]),
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in (*LIGATURES, 0x3000, *range(0xFF01, 0xFFF0))},
    **dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    0x149: "'n",
    0xFB05: "\u017ft",  # a long s
}


def clean_text(text: str) -> str:
    """Normalize characters as CLIP's code does with ftfy, except that mis-decoded UTF-8 is not repaired.

    HTML entities are unescaped if the text contains no "<". Control characters are removed. Ligatures, full-width
    characters and curly quotes become plain ones. The result is in normalization form C.
    """
    if "<" not in text:
        text = re.sub(r"&#?[0-9A-Za-z]{1,24};", lambda entity: html.unescape(entity[0]), text)
    text = text.translate(CP1252_CHARS).translate(REPLACEMENTS)
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # joins surrogate pairs
    return unicodedata.normalize("NFC", text)


def split_words(text: str) -> list[str]:
    """Split a sentence into lower-case words: runs of letters, single digits, runs of other characters, contractions.

    The text is cleaned first, and HTML is unescaped twice, as in CLIP's code.
    """
    text = html.unescape(html.unescape(clean_text(text))).lower()
    words: list[str] = []
    after_apostrophe = False
    for category, characters in groupby(text, _category):
        run = "".join(characters)
        if category == "L" and after_apostrophe and (ending := re.match("s|t|re|ve|m|ll|d", run, re.IGNORECASE)):
            words[-1] += ending[0]
            run = run[ending.end() :]
        after_apostrophe = run == "'"
        words += [] if category == "space" or not run else list(run) if category == "N" else [run]
    return words


def _category(character: str) -> str:
    if character.isspace():
        return "space"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "other"


def byte_symbols(word: str) -> list[int]:
    """Return the symbols of a word's UTF-8 bytes: 0 to 255, and 256 to 511 for the last byte."""
    symbols = [BYTES.index(byte) for byte in word.encode()]
    return [*symbols[:-1], symbols[-1] + 256]


def merge_pair(word: list[int], pair: Pair, symbol: int) -> list[int]:
    """Replace every occurrence of a pair in a word, from the left, by a symbol."""
    merged, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            merged.append(symbol)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


class Tokenizer:
    """Map sentences to token ids. The two largest ids are the start and the end token.

    Args:
        pairs: the merges in their order; the i-th makes symbol 512 + i of two earlier ones.
        context_length: L.
    """

    def __init__(self, pairs: list[Pair], context_length: int):
        self.pairs, self.context_length = pairs, context_length
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.start, self.end = NUM_BYTE_SYMBOLS + len(pairs), NUM_BYTE_SYMBOLS + len(pairs) + 1
        self.cache: dict[str, list[int]] = {}

    @classmethod
    def learn(cls, texts: list[str], num_merges: int, context_length: int) -> Tokenizer:
        """Learn merges from sentences: repeatedly merge the most frequent pair; of ties, that with smaller symbols.

        Args:
            texts: sentences to learn from.
            num_merges: number of merges; fewer are learned if every word becomes one symbol before.
            context_length: L.
        """
        word_counts = Counter(word for text in texts for word in split_words(text))
        words, counts = [byte_symbols(word) for word in word_counts], list(word_counts.values())
        pair_counts: Counter[Pair] = Counter()
        words_with: dict[Pair, set[int]] = {}  # indices of the words that contain a pair
        for i, word in enumerate(words):
            for pair in pairwise(word):
                pair_counts[pair] += counts[i]
                words_with.setdefault(pair, set()).add(i)
        pairs: list[Pair] = []
        while pair_counts and len(pairs) < num_merges:
            best = max(pair_counts, key=lambda pair: (pair_counts[pair], -pair[0], -pair[1]))
            for i in words_with.pop(best):
                for pair in pairwise(words[i]):
                    pair_counts[pair] -= counts[i]
                words[i] = merge_pair(words[i], best, NUM_BYTE_SYMBOLS + len(pairs))
                for pair in pairwise(words[i]):
                    pair_counts[pair] += counts[i]
                    words_with.setdefault(pair, set()).add(i)
            pair_counts = +pair_counts  # drops pairs with count 0
            pairs.append(best)
        return cls(pairs, context_length)

    @classmethod
    def read(cls, path: Path, num_merges: int, context_length: int) -> Tokenizer:
        """Read merges from a file in the format of CLIP's authors and Hugging Face: a title, then two symbols a line.

        Args:
            path: text file, gzipped if its name ends in .gz.
            num_merges: number of merges to take, the first ones; the authors' file has more than CLIP uses.
            context_length: L.

        Raises:
            InputError: if the file is missing or damaged, has another format, or holds fewer merges.
        """
        ids = {char + end: i + shift for end, shift in (("", 0), ("</w>", 256)) for i, char in enumerate(BYTE_CHARS)}
        pairs: list[Pair] = []
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                for line in islice(file, 1, num_merges + 1):
                    left, right = line.split()
                    pairs.append((ids[left], ids[right]))
                    ids[left + right] = NUM_BYTE_SYMBOLS + len(pairs) - 1
        except (OSError, EOFError, zlib.error, ValueError, KeyError):
            raise InputError(f"{path} is not a complete file of merges, two symbols per line; get it again.") from None
        if len(pairs) < num_merges:
            raise InputError(f"{path} holds {len(pairs)} merges, and {num_merges} are needed; get CLIP's own file.")
        return cls(pairs, context_length)

    def encode_word(self, word: str) -> list[int]:
        """Return the symbols of one word: apply the earliest merge that is possible, until none is."""
        if word not in self.cache:
            symbols = byte_symbols(word)
            while pairs := [pair for pair in pairwise(symbols) if pair in self.ranks]:
                best = min(pairs, key=self.ranks.__getitem__)
                symbols = merge_pair(symbols, best, NUM_BYTE_SYMBOLS + self.ranks[best])
            self.cache[word] = symbols
        return self.cache[word]

    def __call__(self, texts: list[str], truncate: bool = False, trim: bool = False) -> Tensor:
        """Return token ids (B, L) int64: start, the words, end, zeros.

        Args:
            texts: B sentences.
            truncate: shorten sentences of more than L tokens; the end token is kept.
            trim: remove the zeros at which all rows end. The output of a causal transformer at the end token is the
                same.

        Raises:
            InputError: for a sentence of more than L tokens, unless `truncate` is set.
        """
        rows = []
        for text in texts:
            row = [self.start, *(symbol for word in split_words(text) for symbol in self.encode_word(word)), self.end]
            if len(row) > self.context_length:
                if not truncate:
                    raise InputError(f"{text!r} has {len(row)} tokens, more than {self.context_length}; shorten it.")
                row = [*row[: self.context_length - 1], self.end]
            rows.append(row)
        length = max(map(len, rows), default=2) if trim else self.context_length
        padded = [row + [0] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).view(len(texts), length)
