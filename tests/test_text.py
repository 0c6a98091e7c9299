"""The tokenizer is byte-pair encoding, with CLIP's merges it is CLIP's, and the text transformer is CLIP's."""

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
from minissl.text import BYTES, TextTransformer, Tokenizer, mend, split_words, symbols

TEXTS = [
    "a red cat sleeps in a snowy field",
    "a picture of a red dog that is sleeping on the moon",
    "It's the dog's ball, isn't it? They've 2 of 10.",
    "Ein süßer Kater schläft — schläft! Ça va, garçon?",
    "banana bandana ananas aaaa aaaaa",
    "a red cat 😀 and a red hat 😀😀",
]
# Letters of several scripts, marks, numbers, spaces, signs, and what HTML and contractions are made of.
SIGNS = "aestLDé漢яİ\u0301٣²½Ⅷ01 \t\n\u00a0\u3000.,!?'\"-_&;#<>()😀\u200d"


def spelled(tokenizer, symbol):
    """The bytes a symbol stands for, and whether it ends a word."""
    if symbol < 512:
        return bytes([BYTES[symbol % 256]]), symbol >= 256
    (left, ends), (right, end) = (spelled(tokenizer, part) for part in tokenizer.pairs[symbol - 512])
    assert not ends
    return left + right, end


def by_recounting(texts, most):
    """The merges, by counting all pairs anew for each."""
    words = Counter(word for text in texts for word in split_words(text))
    spelling = {word: [BYTES.index(byte) for byte in word.encode()] for word in words}
    for found in spelling.values():
        found[-1] += 256
    pairs = []
    for new in range(512, 512 + most):
        seen = Counter(pair for word, n in words.items() for pair in [*pairwise(spelling[word])] * n)
        if not seen:
            break
        pairs.append(min(seen, key=lambda pair: (-seen[pair], *pair)))
        for word, found in spelling.items():
            left = []
            for symbol in found:
                if left and (left[-1], symbol) == pairs[-1]:
                    left[-1] = new
                else:
                    left.append(symbol)
            spelling[word] = left
    return pairs, spelling


def test_merges_of_a_small_example_by_hand():
    """(b, c) is seen 4 times, then (a, b) at the end of a word 2, then (a, bc) 1; nothing is left to merge."""
    a, b, end_b, end_c = BYTES.index(97), BYTES.index(98), BYTES.index(98) + 256, BYTES.index(99) + 256
    assert Tokenizer.learn(["bc Bc bc", "ab ab abc"], 10, 8).pairs == [(b, end_c), (a, end_b), (a, 512)]
    assert Tokenizer.learn(["bc Bc bc", "ab ab abc"], 2, 8).pairs == [(b, end_c), (a, end_b)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(TEXTS) | st.text("aab ", max_size=12), max_size=6), st.integers(0, 8) | st.just(1000))
def test_merges_equal_those_by_recounting(texts, most):
    pairs, spelling = by_recounting(texts, most)
    tokenizer = Tokenizer.learn(texts, most, 40)
    assert tokenizer.pairs == pairs
    assert {word: tokenizer.word(word) for word in spelling} == spelling


def test_merges_do_not_depend_on_the_order_of_sentences():
    expected = Tokenizer.learn(TEXTS, 50, 40).pairs
    assert Tokenizer.learn(TEXTS, 50, 40).pairs == expected
    for seed in range(5):
        assert Tokenizer.learn(random.Random(seed).sample(TEXTS, len(TEXTS)), 50, 40).pairs == expected


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(SIGNS) | st.text())
def test_symbols_spell_the_sentence(text):
    """Nothing is lost but spaces, and a word's last symbol, and no other, ends it."""
    tokenizer = Tokenizer.learn(TEXTS, 80, 40)
    words = split_words(text)
    assert "".join(words) == "".join(html.unescape(html.unescape(mend(text))).lower().split())
    for word in words:
        parts = [spelled(tokenizer, symbol) for symbol in tokenizer.word(word)]
        assert b"".join(part for part, _ in parts) == word.encode()
        assert [ends for _, ends in parts] == [False] * (len(parts) - 1) + [True]


def test_every_byte_has_its_symbol():
    assert sorted(BYTES) == list(range(256))
    assert symbols("a!") == [BYTES.index(97), BYTES.index(33) + 256]
    assert len(symbols("é")) == 2
    assert len(symbols("😀")) == 4


def test_tokens_are_start_words_end_zeros():
    tokenizer = Tokenizer.learn(TEXTS, 30, 12)
    start, end = 542, 543
    assert tokenizer(["", "  \n "]).tolist() == [[start, end, *[0] * 10]] * 2
    row = tokenizer(["red 😀"])[0].tolist()
    inside = [*tokenizer.word("red"), *tokenizer.word("😀")]
    assert row == [start, *inside, end, *[0] * (10 - len(inside))]
    assert tokenizer([]).shape == (0, 12)
    assert tokenizer(TEXTS, cut=True).max() == end


def test_zeros_that_end_all_rows_can_be_left_out_and_the_vectors_stay():
    tokenizer = Tokenizer.learn(TEXTS, 30, 40)
    whole, trimmed = tokenizer(TEXTS), tokenizer(TEXTS, trim=True)
    assert trimmed.shape[1] == int((whole > 0).sum(1).max()) < 40
    torch.manual_seed(0)
    reader = TextTransformer(544, 40, 16, 2, 2, 8)
    torch.testing.assert_close(reader(trimmed), reader(whole))


def test_a_sentence_that_just_fits_is_kept_and_a_longer_one_refused_or_cut():
    tokenizer = Tokenizer([], 6)
    end = tokenizer.end
    fits, long = tokenizer(["abcd"]), tokenizer(["abcde"], cut=True)
    assert fits[0, -1] == long[0, -1] == end
    assert torch.equal(fits, tokenizer(["abcd"], cut=True))
    assert long[0, 1:5].tolist() == symbols("abcde")[:4]
    with pytest.raises(InputError, match="'abcde' has 7 tokens, more than 6"):
        tokenizer(["abcd", "abcde"])


@pytest.fixture(scope="module")
def theirs():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def official(theirs):
    """Our tokenizer with the merges of CLIP's; each symbol stands for what it does in theirs."""
    from open_clip.tokenizer import default_bpe

    ours = Tokenizer.read(Path(default_bpe()), 49_408 - 512 - 2, 77)
    for symbol in range(49_406):
        found, ends = spelled(ours, symbol)
        their = theirs.decoder[symbol]
        assert found == bytes(theirs.byte_decoder[sign] for sign in their.removesuffix("</w>"))
        assert ends == their.endswith("</w>")
    return ours


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("a photo of a dog.", [320, 1125, 539, 320, 1929, 269]),
        ("Hello, world! 123", [3306, 267, 1002, 256, 272, 273, 274]),
        ("it's", [585, 568]),
        ("café &amp;amp; naïve 😀", [15304, 261, 1097, 35689, 563, 7334]),
    ],
)
def test_official_ids(official, text, ids):
    assert official([text])[0].tolist() == [49406, *ids, 49407, *[0] * (75 - len(ids))]


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
def test_ids_equal_open_clips(official, theirs, text):
    assert torch.equal(official([text], cut=True), theirs([text]))


def test_a_cut_sentence_equals_open_clips(official, theirs):
    long = " ".join(SENTENCES)
    assert torch.equal(official([long], cut=True), theirs([long]))


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([*SIGNS, "'s", "'t", "'re", "'ve", "'m", "'ll", "'d"])))
def test_words_are_those_of_the_official_expression(theirs, pieces):
    from ftfy import fix_text

    text = "".join(pieces)
    clean = html.unescape(html.unescape(fix_text(text, fix_encoding=False)))
    assert split_words(text) == theirs.pat.findall(clean.lower())


THEIRS = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "blocks": "encoder.layers",
    "norm": "layer_norm",
    "attn.proj": "self_attn.out_proj",
    "ln_final": "final_layer_norm",
}


def copy_weights(theirs, ours):
    """From a CLIPTextModelWithProjection; our queries, keys and values are one layer."""
    state = {name.removeprefix("text_model."): value for name, value in theirs.state_dict().items()}
    for name, value in ours.state_dict().items():
        for our, their in THEIRS.items():
            name = name.replace(our, their)
        parts = [name.replace("attn.qkv", f"self_attn.{part}_proj") for part in "qkv"] if "qkv" in name else [name]
        value.copy_(torch.cat([state.pop(part) for part in parts]))
    assert not state


@pytest.mark.slow
@pytest.mark.parametrize("eos", [99, 2])  # 2 is what the published configurations say, and it means the largest id
def test_transformer_equals_transformers(eos):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 128, "projection_dim": 24}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 11}
    config = CLIPTextConfig(**sizes, hidden_act="quick_gelu", bos_token_id=98, eos_token_id=eos)
    theirs = CLIPTextModelWithProjection(config).eval().double()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = TextTransformer(100, 11, 32, 3, 4, 24).eval().double()
    copy_weights(theirs, ours)
    tokens = torch.zeros(6, 11, dtype=torch.long)
    for row, n in zip(tokens, (2, 3, 5, 8, 10, 11)):
        row[: n - 1] = torch.tensor([98, *torch.randint(1, 98, (n - 2,))])
        row[n - 1] = 99
    with torch.no_grad():
        found, expected = ours(tokens), theirs(input_ids=tokens).text_embeds
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_only_words_before_the_end_are_read():
    torch.manual_seed(0)
    network = TextTransformer(20, 8, 16, 2, 2, 4).eval()
    tokens = torch.tensor([[18, 3, 4, 19, 0, 0, 0, 0]])
    after, before = tokens.clone(), tokens.clone()
    after[0, 5], before[0, 1] = 7, 7
    torch.testing.assert_close(network(after), network(tokens), rtol=0, atol=1e-6)
    assert (network(before) - network(tokens)).abs().max() > 1e-3


def test_first_weights_are_the_papers():
    torch.manual_seed(0)
    network = TextTransformer(1000, 64, 128, 4, 2, 96)
    expected = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection.weight": 128**-0.5,
        "blocks.3.attn.qkv.weight": 128**-0.5,
        "blocks.3.attn.proj.weight": (128 * 8) ** -0.5,
        "blocks.3.mlp.fc1.weight": 256**-0.5,
        "blocks.3.mlp.fc2.weight": (128 * 8) ** -0.5,
        "blocks.0.attn.qkv.bias": 0,
        "blocks.0.attn.proj.bias": 0,
    }
    state = network.state_dict()
    assert {name: state[name].std().item() for name in expected} == pytest.approx(expected, rel=0.03)
