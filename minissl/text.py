"""Sentences for a network: bytes merged into words, and a transformer that reads them.

Byte-pair encoding: Sennrich et al., 2015 (arXiv:1508.07909), on bytes, in the form of Radford et al., CLIP, 2021
(arXiv:2103.00020): a word is its UTF-8 bytes, the last one marked as the end of the word, and pairs that are often seen
together become one symbol. The transformer is CLIP's: causal, read out where the sentence ends.

Shapes: B sentences, L tokens each, width D, E dimensions of the space that text and images share.
"""

import html
import re
import unicodedata
from collections import Counter
from itertools import groupby, pairwise

import torch
from torch import Tensor, nn

from minissl.errors import InputError
from minissl.transformer import Block, quick_gelu

# The 256 bytes in CLIP's order: first those that print as themselves in Latin-1, then the others.
PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = (*PRINTED, *sorted(set(range(256)) - set(PRINTED)))
PLAIN = 512  # symbols before the first merge: the bytes, and the bytes that end a word
Pair = tuple[int, int]


def split_words(text: str) -> list[str]:
    """A sentence as lower-case words: runs of letters, single digits, runs of other signs, and endings as in "it's".

    HTML is unescaped twice, as in CLIP's code; what its code mends besides, by ftfy (curly apostrophes, accents apart
    from their letters), stays as it is.
    """
    text = html.unescape(html.unescape(text)).lower()
    words, apostrophe = [], False
    for kind, run in groupby(text, _kind):
        run = "".join(run)
        if kind == "L" and apostrophe and (ending := re.match("s|t|re|ve|m|ll|d", run)):
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
