"""Sentences for a network: bytes merged into words, and a transformer that reads them.

Byte-pair encoding: Sennrich et al., 2015 (arXiv:1508.07909), on bytes, in the form of Radford et al., CLIP, 2021
(arXiv:2103.00020): a word is its UTF-8 bytes, the last one marked as the end of the word, and pairs that are often seen
together become one symbol. The transformer is CLIP's: causal, read out where the sentence ends.

Shapes: B sentences, L tokens each, width D, E dimensions of the space that text and images share.
"""

import gzip
import html
import re
import unicodedata
import zlib
from collections import Counter
from itertools import groupby, islice, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from minissl.errors import InputError
from minissl.transformer import Block, quick_gelu

# The 256 bytes in CLIP's order: first those that print as themselves in Latin-1, then the others.
PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = (*PRINTED, *sorted(set(range(256)) - set(PRINTED)))
SIGNS = (*map(chr, PRINTED), *map(chr, range(256, 512 - len(PRINTED))))  # as what a file of merges writes each of them
PLAIN = 512  # symbols before the first merge: the bytes, and the bytes that end a word
Pair = tuple[int, int]
WINDOWS = {sign: bytes([sign]).decode("cp1252") for sign in {*range(128, 160)} - {129, 141, 143, 144, 157}}
TWO_AS_ONE = (0x132, 0x133, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07))
MENDED = {  # how CLIP's clean-up writes signs: not at all, as two letters, at their common width, as straight quotes
    **dict.fromkeys([*range(9), 11, *range(14, 32), 127, *range(0x206A, 0x2070), 0xFEFF, *range(0xFFF9, 0xFFFD)]),
    **{sign: unicodedata.normalize("NFKC", chr(sign)) for sign in (*TWO_AS_ONE, 0x3000, *range(0xFF01, 0xFFF0))},
    **dict.fromkeys([0x2BC, *range(0x2018, 0x201C)], "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    0x149: "'n",
    0xFB05: "\u017ft",  # a long s
}


def mend(text: str) -> str:
    """A sentence as people type it: what CLIP's code has ftfy do, but for UTF-8 that was read as something else.

    HTML is unescaped where there is no tag, accents join their letters, halves of a sign are one or unknown.
    """
    if "<" not in text:
        text = re.sub(r"&#?[0-9A-Za-z]{1,24};", lambda found: html.unescape(found[0]), text)
    text = text.translate(WINDOWS).translate(MENDED).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return unicodedata.normalize("NFC", text)


def split_words(text: str) -> list[str]:
    """A sentence as lower-case words: runs of letters, single digits, runs of other signs, and endings as in "it's".

    It is mended before, and HTML unescaped twice, as in CLIP's code.
    """
    text = html.unescape(html.unescape(mend(text))).lower()
    words, apostrophe = [], False
    for kind, run in groupby(text, _kind):
        run = "".join(run)
        if kind == "L" and apostrophe and (ending := re.match("s|t|re|ve|m|ll|d", run, re.IGNORECASE)):
            words[-1] += ending[0]
            run = run[ending.end() :]
        apostrophe = run == "'"
        words += [] if kind == "space" or not run else list(run) if kind == "N" else [run]
    return words


def _kind(sign: str) -> str:
    if sign.isspace():
        return "space"
    category = unicodedata.category(sign)[0]
    return category if category in "LN" else "other"


def symbols(word: str) -> list[int]:
    """A word's bytes as symbols 0..255, its last as 256..511."""
    found = [BYTES.index(byte) for byte in word.encode()]
    return [*found[:-1], found[-1] + 256]


def merge(word: list[int], pair: Pair, symbol: int) -> list[int]:
    """`word` with every `pair` in it, from the left, replaced by `symbol`."""
    out, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            out.append(symbol)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


class Tokenizer:
    """Sentences to numbers.

    Args:
        pairs: the merges in their order; the i-th makes symbol 512 + i of two earlier ones.
        length: L, numbers a sentence gets.
    """

    def __init__(self, pairs: list[Pair], length: int):
        self.pairs, self.length = pairs, length
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.start, self.end = PLAIN + len(pairs), PLAIN + len(pairs) + 1
        self.known: dict[str, list[int]] = {}

    @classmethod
    def learn(cls, texts: list[str], most: int, length: int) -> "Tokenizer":
        """Merge, again and again, the pair seen most often (of equals the one with smaller symbols).

        Args:
            texts: sentences to learn from.
            most: merges; fewer, if every word is one symbol before.
            length: L.
        """
        counts = Counter(word for text in texts for word in split_words(text))
        words, weights = [symbols(word) for word in counts], list(counts.values())
        seen, where = Counter(), {}  # how often a pair is seen, and in which words
        for i, word in enumerate(words):
            for pair in pairwise(word):
                seen[pair] += weights[i]
                where.setdefault(pair, set()).add(i)
        pairs: list[Pair] = []
        while seen and len(pairs) < most:
            best = max(seen, key=lambda pair: (seen[pair], -pair[0], -pair[1]))
            for i in where.pop(best):
                for pair in pairwise(words[i]):
                    seen[pair] -= weights[i]
                words[i] = merge(words[i], best, PLAIN + len(pairs))
                for pair in pairwise(words[i]):
                    seen[pair] += weights[i]
                    where.setdefault(pair, set()).add(i)
            seen = +seen  # without what is gone
            pairs.append(best)
        return cls(pairs, length)

    @classmethod
    def read(cls, path: Path, most: int, length: int) -> "Tokenizer":
        """The merges of a file as CLIP's authors and Hugging Face write it: a title, then two symbols a line.

        Args:
            path: of text, gzipped if its name ends so.
            most: merges to take, the first ones; the authors' file has more than CLIP knows.
            length: L.

        Raises:
            InputError: if there is no such file, it is broken, holds something else, or fewer merges.
        """
        number = {sign + end: i + shift for end, shift in (("", 0), ("</w>", 256)) for i, sign in enumerate(SIGNS)}
        pairs: list[Pair] = []
        try:
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
                for line in islice(file, 1, most + 1):
                    left, right = line.split()
                    pairs.append((number[left], number[right]))
                    number[left + right] = PLAIN + len(pairs) - 1
        except (OSError, EOFError, zlib.error, ValueError, KeyError):
            raise InputError(f"{path} is no whole file of merges, two symbols a line; get it again.") from None
        if len(pairs) < most:
            raise InputError(f"{path} holds {len(pairs)} merges, and {most} are needed; get CLIP's own.")
        return cls(pairs, length)

    def word(self, word: str) -> list[int]:
        """The symbols of one word: always the earliest merge that applies, until none does."""
        if word not in self.known:
            found = symbols(word)
            while pairs := [pair for pair in pairwise(found) if pair in self.ranks]:
                best = min(pairs, key=self.ranks.__getitem__)
                found = merge(found, best, PLAIN + self.ranks[best])
            self.known[word] = found
        return self.known[word]

    def __call__(self, texts: list[str], cut: bool = False, trim: bool = False) -> Tensor:
        """(B, L) int64: start, the words, end, zeros.

        Args:
            texts: B sentences.
            cut: leave out what is too long, but for the end.
            trim: leave out zeros that end all rows; a causal transformer, read at the end, says the same.

        Raises:
            InputError: for a sentence of more than L tokens, unless it is cut.
        """
        rows = []
        for text in texts:
            found = [self.start, *(symbol for word in split_words(text) for symbol in self.word(word)), self.end]
            if len(found) > self.length:
                if not cut:
                    raise InputError(f"{text!r} has {len(found)} tokens, more than {self.length}; shorten it.")
                found = [*found[: self.length - 1], self.end]
            rows.append(found)
        length = max(map(len, rows), default=2) if trim else self.length
        padded = [row + [0] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.long).view(len(texts), length)


class TextTransformer(nn.Module):
    """Tokens (B, L or fewer) to vectors (B, E); section 2.4 of the paper, its code's first weights.

    Args:
        vocabulary: numbers there are.
        length: L.
        width, depth, heads: of the transformer.
        out: E.
    """

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int, out: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(
            Block(width, heads, causal=True, activation=quick_gelu, eps=1e-5) for _ in range(depth)
        )
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, out, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection.weight, std=width**-0.5)
        for block in self.blocks:
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=(2 * depth * width) ** -0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=(2 * depth * width) ** -0.5)
            for layer in (block.attn.qkv, block.attn.proj):
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]  # (B, L, D)
        for block in self.blocks:
            x = block(x)
        end = tokens.argmax(dim=-1)  # the end has the largest number
        x = self.ln_final(x)[torch.arange(len(x), device=x.device), end]  # (B, D)
        return self.text_projection(x)
