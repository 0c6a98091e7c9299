"""Byte-pair encoding equals a slow reference; with CLIP's merges the token ids equal open_clip's."""

import html
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minissl.errors import InputError
from minissl.models.text_encoder import TextTransformer
from minissl.models.tokenizer import BYTES, Tokenizer, byte_symbols, clean_text, split_words

TEXTS = [
    "a red cat sleeps in a snowy field",
    "an image of a red dog that is sleeping on the moon",
    "It's the dog's ball, isn't it? They've 2 of 10.",
    "Ein süßer Kater schläft — schläft! Ça va, garçon?",
    "banana bandana ananas aaaa aaaaa",
    "a red cat 😀 and a red hat 😀😀",
]
# Letters of several scripts, marks, numbers, spaces, signs, and the characters of HTML entities and contractions.
CHARACTERS = "aestLDé漢яİ\u0301٣²½Ⅷ01 \t\n\u00a0\u3000.,!?'\"-_&;#<>()😀\u200d"


def spell(tokenizer, symbol):
    """Return the bytes of a symbol, and whether it ends a word."""
    if symbol < 512:
        return bytes([BYTES[symbol % 256]]), symbol >= 256
    (left, left_ends), (right, ends) = (spell(tokenizer, part) for part in tokenizer.pairs[symbol - 512])
    assert not left_ends
    return left + right, ends


def learn_by_recounting(texts, num_merges):
    """Learn merges by counting all pairs again for each; return them and the symbols of every word."""
    words = Counter(word for text in texts for word in split_words(text))
    spelling = {word: [BYTES.index(byte) for byte in word.encode()] for word in words}
    for symbols in spelling.values():
        symbols[-1] += 256
    pairs = []
    for new in range(512, 512 + num_merges):
        counts = Counter(pair for word, n in words.items() for pair in [*pairwise(spelling[word])] * n)
        if not counts:
            break
        pairs.append(min(counts, key=lambda pair: (-counts[pair], *pair)))
        for word, symbols in spelling.items():
            merged = []
            for symbol in symbols:
                if merged and (merged[-1], symbol) == pairs[-1]:
                    merged[-1] = new
                else:
                    merged.append(symbol)
            spelling[word] = merged
    return pairs, spelling


def test_merges_of_a_small_example():
    """(b, c) occurs 4 times, then (a, b) at the end of a word 2 times, then (a, bc) once; then nothing is left."""
    a, b, end_b, end_c = BYTES.index(97), BYTES.index(98), BYTES.index(98) + 256, BYTES.index(99) + 256
    assert Tokenizer.learn(["bc Bc bc", "ab ab abc"], 10, 8).pairs == [(b, end_c), (a, end_b), (a, 512)]
    assert Tokenizer.learn(["bc Bc bc", "ab ab abc"], 2, 8).pairs == [(b, end_c), (a, end_b)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(TEXTS) | st.text("aab ", max_size=12), max_size=6), st.integers(0, 8) | st.just(1000))
def test_merges_equal_those_of_recounting(texts, num_merges):
    pairs, spelling = learn_by_recounting(texts, num_merges)
    tokenizer = Tokenizer.learn(texts, num_merges, 40)
    assert tokenizer.pairs == pairs
    assert {word: tokenizer.encode_word(word) for word in spelling} == spelling


def test_merges_do_not_depend_on_the_order_of_sentences():
    expected = Tokenizer.learn(TEXTS, 50, 40).pairs
    assert Tokenizer.learn(TEXTS, 50, 40).pairs == expected
    for seed in range(5):
        assert Tokenizer.learn(random.Random(seed).sample(TEXTS, len(TEXTS)), 50, 40).pairs == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(CHARACTERS) | st.text())
def test_symbols_spell_the_sentence(text):
    """Only spaces are lost, and the last symbol of a word, and no other, ends it."""
    tokenizer = Tokenizer.learn(TEXTS, 80, 40)
    words = split_words(text)
    assert "".join(words) == "".join(html.unescape(html.unescape(clean_text(text))).lower().split())
    for word in words:
        parts = [spell(tokenizer, symbol) for symbol in tokenizer.encode_word(word)]
        assert b"".join(part for part, _ in parts) == word.encode()
        assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]


def test_every_byte_has_a_symbol():
    assert sorted(BYTES) == list(range(256))
    assert byte_symbols("a!") == [BYTES.index(97), BYTES.index(33) + 256]
    assert len(byte_symbols("é")) == 2
    assert len(byte_symbols("😀")) == 4


def test_tokens_are_start_words_end_zeros():
    tokenizer = Tokenizer.learn(TEXTS, 30, 12)
    start, end = 542, 543
    assert tokenizer(["", "  \n "]).tolist() == [[start, end, *[0] * 10]] * 2
    row = tokenizer(["red 😀"])[0].tolist()
    symbols = [*tokenizer.encode_word("red"), *tokenizer.encode_word("😀")]
    assert row == [start, *symbols, end, *[0] * (10 - len(symbols))]
    assert tokenizer([]).shape == (0, 12)
    assert tokenizer(TEXTS, truncate=True).max() == end


def test_trimmed_tokens_have_the_same_embeddings():
    tokenizer = Tokenizer.learn(TEXTS, 30, 40)
    tokens, trimmed = tokenizer(TEXTS), tokenizer(TEXTS, trim=True)
    assert trimmed.shape[1] == int((tokens > 0).sum(1).max()) < 40
    torch.manual_seed(0)
    text_encoder = TextTransformer(544, 40, 16, 2, 2, 8)
    torch.testing.assert_close(text_encoder(trimmed), text_encoder(tokens))


def test_a_sentence_that_fits_is_kept_and_a_longer_one_truncated_or_refused():
    tokenizer = Tokenizer([], 6)
    fitting, truncated = tokenizer(["abcd"]), tokenizer(["abcde"], truncate=True)
    assert fitting[0, -1] == truncated[0, -1] == tokenizer.end
    assert torch.equal(fitting, tokenizer(["abcd"], truncate=True))
    assert truncated[0, 1:5].tolist() == byte_symbols("abcde")[:4]
    with pytest.raises(InputError, match="'abcde' has 7 tokens, more than 6"):
        tokenizer(["abcd", "abcde"])


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def clip_tokenizer(open_clip_tokenizer):
    """Return a tokenizer with CLIP's merges, after checking that each symbol spells the same as open_clip's."""
    from open_clip.tokenizer import default_bpe

    tokenizer = Tokenizer.read(Path(default_bpe()), 49_408 - 512 - 2, 77)
    for symbol in range(49_406):
        spelling, ends = spell(tokenizer, symbol)
        expected = open_clip_tokenizer.decoder[symbol]
        assert spelling == bytes(open_clip_tokenizer.byte_decoder[char] for char in expected.removesuffix("</w>"))
        assert ends == expected.endswith("</w>")
    return tokenizer


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a dog.", [320, 1125, 539, 320, 1929, 269]),
        ("Hello, world! 123", [3306, 267, 1002, 256, 272, 273, 274]),
        ("it's", [585, 568]),
        ("café &amp;amp; naïve 😀", [15304, 261, 1097, 35689, 563, 7334]),
    ],
)
def test_ids_of_clip(clip_tokenizer, text, ids):
    assert clip_tokenizer([text])[0].tolist() == [49406, *ids, 49407, *[0] * (75 - len(ids))]


SENTENCES = """
A photo of a dog, a cat & 3 birds. ¦ Two   spaces, a\ttab and a trailing one ¦
It's John's; they're, we've, I'm, you'll, he'd, isn't, can't, o'clock, rock 'n' roll ¦
I'LL NEVER SHOUT: THAT'S IT!!! ¦ 'tis the season ¦ the dogs' home isn't ours' ¦ 1234567890 + 3.14159 = ? ¦
½ of x² is Ⅷ, and ٣ is three ¦ e-mail: someone@example.org, https://example.org/a_b?c=d#e ¦
Zürich, naïve café, Ångström, señor, fiancée, İstanbul, ΣΊΣΥΦΟΣ ¦ Ein süßer Kater schläft auf der Straße ¦
Съешь же ещё этих мягких французских булок ¦ 素早い茶色の狐 jumps over 犬 ¦ 안녕하세요 세계 ¦ مرحبا بالعالم ¦
नमस्ते दुनिया ¦ สวัสดีชาวโลก ¦ 😀😀 family: 👨\u200d👩\u200d👧 flag: 🇩🇪 thumbs: 👍🏽 ❤️ ¦
&lt;b&gt;bold&lt;/b&gt; &amp; &quot;quoted&quot; &eacute;t&eacute; ¦ &amp;lt;twice&amp;gt; &amp;amp; more ¦
&notanentity; &#65; &#x1F600; ¦ (brackets) [square] {curly} <angle> a/b\\c ¦
wait... what?! -- no -- yes; ok: fine ¦
$100 €50 £20 100% #hashtag @name *star* _under_ ~tilde~ ^hat | bar `tick` ¦
supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis ¦
x x x xx xxx xxxx xxxxx ¦ a1b2c3 2nd 3rd 90s 1980's mp3 h2o ¦ l'été d'aujourd'hui qu'il s't ¦
∀x: ⌈x⌉ ≥ x ∴ π ≈ 3 ¦ "double quotes" and 'single quotes' ¦ soft\u00adhyphen zero\u200bwidth nbsp\u00a0here ¦ the end
""".split("¦")


@pytest.mark.parametrize("text", ["", *SENTENCES])
def test_ids_equal_open_clip(clip_tokenizer, open_clip_tokenizer, text):
    assert torch.equal(clip_tokenizer([text], truncate=True), open_clip_tokenizer([text]))


def test_a_truncated_sentence_equals_open_clip(clip_tokenizer, open_clip_tokenizer):
    long = " ".join(SENTENCES)
    assert torch.equal(clip_tokenizer([long], truncate=True), open_clip_tokenizer([long]))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([*CHARACTERS, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"])))
def test_words_are_those_of_the_authors_regular_expression(open_clip_tokenizer, pieces):
    from ftfy import fix_text

    text = "".join(pieces)
    cleaned = html.unescape(html.unescape(fix_text(text, fix_encoding=False)))
    assert split_words(text) == open_clip_tokenizer.pat.findall(cleaned.lower())
