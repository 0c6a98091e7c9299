"""OpenAI's CLIP, whole, from a file: its words, vectors and answers are those of open_clip and of transformers."""

import gzip
import json
import random
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minissl import official, official_clip, pretrained, scores
from minissl.augment import normalize
from minissl.data import Images
from minissl.errors import InputError
from minissl.text import Tokenizer
from tests.test_text import SENTENCES

pytestmark = pytest.mark.slow  # open_clip takes seconds to import
MERGES = Path(find_spec("open_clip").submodule_search_locations[0]) / official_clip.MERGES[0]
README = Path(__file__).parent.parent / "README.md"
TEXTS = ["a photo of a dog.", "It\u2019s 3 o'clock &amp; all is well", "", "ein süßer Kater 😀", "many words " * 60]


def shake(model):
    """Random weights everywhere: what starts at 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(noise * 0.1 + (1.0 if "norm" in name or "ln_" in name else 0.0))
    return model.eval()


def open_clips(whole=True):
    """A small one, its text tower beside the other, or in a room of its own; its projections are square."""
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49_408, "width": 64, "heads": 1, "layers": 3}
    kind = open_clip.CLIP if whole else open_clip.CustomTextCLIP
    return shake(kind(embed_dim=64, quick_gelu=True, vision_cfg=vision, text_cfg=text))


def transformers_clip():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"num_hidden_layers": 2, "intermediate_size": 512, "hidden_size": 128, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    text = sizes | {"num_hidden_layers": 3, "bos_token_id": 49_406, "eos_token_id": 49_407}
    return shake(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)))


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def precision(request):
    """How near is near; whatever is made meanwhile is made in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield {"rtol": 1e-10, "atol": 1e-10} if request.param == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.set_default_dtype(before)


def pixels():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        torch.get_default_dtype()
    )


def as_clip(images):
    """Pixels in [0, 1] as OpenAI's code hands them to CLIP."""
    mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in official.OF_CLIP)
    return (images - mean) / deviation


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with open_clip's file and the merges."""
    folder = tmp_path_factory.mktemp("clip")
    save_file(open_clips().state_dict(), folder / "model.safetensors")
    shutil.copy(MERGES, folder)
    return folder


@pytest.fixture(scope="module")
def theirs():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def ours():
    return official_clip.read_merges(MERGES, 49_408, 77)


@pytest.mark.parametrize(("whole", "end"), [(True, "safetensors"), (True, "pt"), (False, "pt"), (True, "training's")])
def test_open_clips_file_gives_the_same_vectors_and_answers(tmp_path, theirs, whole, end, precision):
    """From the same pixels and sentences to both, and by the pixels' gradient."""
    model, path, images = open_clips(whole), tmp_path / "clip.pt", pixels().requires_grad_()
    if end == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(model.state_dict(), path)
    elif end == "pt":
        torch.save(model.state_dict(), path)
    else:
        state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, path)
    clip = pretrained.load_method(path, merges=MERGES)
    image, text = clip.embed_images(normalize(images)), clip.embed_text(TEXTS)
    tokens = theirs(TEXTS)
    right = model.encode_image(as_clip(images)), model.encode_text(tokens)
    torch.testing.assert_close((image, text), right, **precision)
    torch.testing.assert_close(clip.logit_scale.exp(), model.logit_scale.exp(), **precision)
    answers = clip.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).mT
    expected = model.get_logits(as_clip(images), tokens)[0]
    torch.testing.assert_close(answers, expected, **precision)
    gradients = (torch.autograd.grad(x.square().sum(), images)[0] for x in (answers, expected))
    torch.testing.assert_close(*gradients, **precision)
    assert not any(p.requires_grad for p in clip.parameters())


def test_the_authors_own_leftovers_are_left(tmp_path):
    """A state taken out of OpenAI's program has three numbers besides, and half precision."""
    state = {name: tensor.half() for name, tensor in open_clips().state_dict().items()}
    sizes = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state | sizes, tmp_path / "clip.pt")
    clip = pretrained.load_method(tmp_path / "clip.pt", merges=MERGES)
    assert {p.dtype for p in clip.parameters()} == {torch.float32}
    assert (clip.size, clip.encoder.patch_size, clip.tokenizer.length) == (32, 8, 77)


@pytest.mark.slow
def test_hugging_faces_file_gives_the_same_vectors_and_answers(tmp_path, ours, precision):
    model, images = transformers_clip(), pixels().requires_grad_()
    model.save_pretrained(tmp_path)
    shutil.copy(MERGES, tmp_path)
    clip = pretrained.load_method(tmp_path / "model.safetensors")
    image, text = clip.embed_images(normalize(images)), clip.embed_text(TEXTS)
    right = model(input_ids=ours(TEXTS, cut=True), pixel_values=as_clip(images))
    found = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    torch.testing.assert_close(found, (right.image_embeds, right.text_embeds), **precision)
    answers = clip.logit_scale.exp() * found[0] @ found[1].mT
    torch.testing.assert_close(answers, right.logits_per_image, **precision)
    gradients = (torch.autograd.grad(x.square().sum(), images)[0] for x in (answers, right.logits_per_image))
    torch.testing.assert_close(*gradients, **precision)


def test_the_images_tower_alone_eats_the_same(files):
    """CLIP's mean and deviation are folded in there too: it is the same encoder."""
    images = normalize(pixels())
    alone, whole = pretrained.load(files / "model.safetensors"), pretrained.load_method(files / "model.safetensors")
    torch.testing.assert_close(alone(images).cls, whole.encoder(images).cls, rtol=0, atol=0)
    state = open_clips().state_dict()
    expected = F.conv2d(as_clip(pixels()), state["visual.conv1.weight"], stride=8)
    torch.testing.assert_close(alone.patch_embed(images).permute(0, 3, 1, 2), expected, rtol=1e-5, atol=1e-5)


def test_pictures_are_classified_and_found_by_words(files):
    """By the functions that ask our own CLIP: their answers are those of open_clip's vectors."""
    model, clip = open_clips(), pretrained.load_method(files / "model.safetensors")
    images = torch.randint(256, (120, 3, 32, 32), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    texts, names = ["a red fish", "a dog on a beach", "nothing"], ("cat", "dog", "ship")
    with torch.no_grad():
        vectors = F.normalize(model.encode_image(as_clip(images / 255)), dim=-1)
        right = vectors @ F.normalize(model.encode_text(clip.tokenizer(texts)), dim=-1).mT
    torch.testing.assert_close(scores.agreement(clip, images, texts, clip.size), right, rtol=1e-4, atol=1e-5)
    labels = torch.arange(120) % 3
    captions = tuple((f"picture {i // 2}", "another") for i in range(120))
    found = scores.score_text(clip, Images(images, labels, names, captions=captions), clip.size)
    assert {"zero_shot_classes", "zero_shot_sum_classes", "image_to_text", "text_to_image"} == found.keys()
    assert all(0 <= share <= 1 for share in found.values())


def varied(n, seed=0):
    """Sentences of words of many scripts, signs, entities, numbers and endings, glued in several ways."""
    dice = random.Random(seed)
    parts = """dog Photo HELLO it's they've I'M don\u2019t O\u2019Brien \u201cquoted\u201d 'tis naïve café Ångström
    señor ﬁne ﬂag ﬀ ǆ İstanbul ΣΊΣΥΦΟΣ Съешь булок 素早い 茶色の狐 안녕하세요 مرحبا
    नमस्ते สวัสดี \uff26\uff35\uff2c\uff2c \uff57\uff01 Straße
    &amp; &amp;amp; &lt;b&gt; &eacute;t&eacute; &rsquo; &#65; &#x1F600; &nbsp; &notanentity; &quot;q&quot;
    2nd 90s 1980's 3.14 ½ x² Ⅷ ٣ 12345 😀 😀😀 👨\u200d👩\u200d👧 🇩🇪 👍🏽 ❤️ ☃ e\u0301 n\u0303 o\u0308
    … — \u2013 - -- !!! ?! ; : , . / \\ | _ # @me $100 €50 100% (a) [b] {c} ~ ^ * + = it\x92s
    soft\u00adhyphen zero\u200bwidth bell\x07 \ufeffmark pneumonoultramicroscopic a b c""".split()
    for _ in range(n):
        words = dice.sample(parts, dice.randint(1, 12))
        yield "".join(word + dice.choice(["", " ", " ", " ", "  ", "\t", "\n", "\u00a0", "\u3000"]) for word in words)


def test_words_are_open_clips(ours, theirs):
    """600 sentences and more, an empty one and one that is far too long among them."""
    texts = [*SENTENCES, *TEXTS, *varied(600), "", " ", "x" * 5000, "!" * 400, "word " * 400, "😀" * 100]
    assert len(texts) > 600
    for text in texts:
        assert torch.equal(ours([text], cut=True), theirs([text])), text


LETTERS = st.characters(exclude_categories=["Cn", "Co"])
PIECES = st.sampled_from(
    ["'s", "'LL", "\u2019", "&amp;", "&#39;", "&", ";", " ", "é", "e\u0301", "ﬁ", "9", "\ufeff", "\x93"]
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text(LETTERS, max_size=6) | st.text("aest'. 1", max_size=6) | PIECES, max_size=8))
def test_words_of_anything_are_open_clips(ours, theirs, pieces):
    """But for UTF-8 that was read as something else, which we leave as it is, and for what stands before a tag."""
    from ftfy import fix_text

    text = "".join(pieces)
    assume(fix_text(text) == fix_text(text, fix_encoding=False) and "<" not in text)
    assert torch.equal(ours([text], cut=True), theirs([text]))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory, theirs):
    """A folder with vocab.json and merges.txt, as they come with Hugging Face's CLIP."""
    folder = tmp_path_factory.mktemp("words")
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 48_894 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(name, name): i for name, i in theirs.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return folder


def test_both_files_hold_the_same_merges(hugging_face, ours):
    assert official_clip.read_merges(hugging_face / "merges.txt", 49_408, 77).pairs == ours.pairs


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_words_are_transformers(hugging_face):
    """It mends nothing and unescapes nothing, so it is asked about sentences that need neither."""
    from transformers import CLIPTokenizer

    ours = Tokenizer.read(hugging_face / "merges.txt", 48_894, 77)
    theirs = CLIPTokenizer.from_pretrained(hugging_face)
    texts = [
        text
        for text in (*SENTENCES, *varied(2000))
        if not re.search("[&ﬁﬂﬀǆ\u2019\u201c\u201dİΣ\uff00-\uffef\x00-\x1f\x92\u00ad\ufeff]", text)
    ]
    assert len(texts) > 100
    for text in texts:
        ids = theirs(text, truncation=True, max_length=77)["input_ids"]
        assert ours([text], cut=True)[0, : len(ids)].tolist() == ids, text


def saved(folder, state):
    torch.save(state, folder / "clip.pt")
    return folder / "clip.pt"


def test_a_file_without_words_is_told_from_one_with_both(tmp_path):
    state = open_clips().state_dict()
    path = saved(tmp_path, {name: t for name, t in state.items() if name.startswith("visual.")})
    assert pretrained.load(path).dim == 128
    with pytest.raises(InputError, match=r"of images alone, .*; CLIP with its words is in .*openai/clip-vit-"):
        pretrained.load_method(path)
    path = saved(tmp_path, {name: t for name, t in state.items() if not name.startswith("visual.")})
    with pytest.raises(InputError, match=r"holds no encoder of DINO.*first names are positional_embedding"):
        pretrained.load_method(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("ln_final.bias"),
        lambda state: state.pop("logit_scale"),
        lambda state: state.pop("text_projection"),
        lambda state: state.pop("visual.proj"),
        lambda state: state.pop("positional_embedding"),
        lambda state: state.pop("transformer.resblocks.1.attn.in_proj_weight"),
        lambda state: state.update({"logit_bias": torch.zeros(())}),
        lambda state: state.update({"text_projection": torch.zeros(64)}),
        lambda state: state.update({"text_projection": torch.zeros(64, 65)}),
        lambda state: state.update({"token_embedding.weight": torch.zeros(49_408, 32)}),
        lambda state: state.update({"token_embedding.weight": torch.zeros(100, 64)}),
        lambda state: state.update({"logit_scale": torch.zeros(2)}),
        lambda state: [
            state.pop(name) for name in list(state) if "transformer.resblocks" in name and "visual" not in name
        ],
    ],
)
def test_a_text_tower_that_does_not_fit_is_said(tmp_path, change):
    state = open_clips().state_dict()
    change(state)
    shutil.copy(MERGES, tmp_path)
    with pytest.raises(InputError, match="holds a text tower that is not CLIP's; get all of CLIP"):
        pretrained.load_method(saved(tmp_path, state))


def test_without_merges_it_is_said_which_file_where_to_get_it_and_where_to_put_it(tmp_path):
    path = saved(tmp_path, open_clips().state_dict())
    says = (
        "bpe_simple_vocab_16e6.txt.gz of github.com/openai/CLIP.*merges.txt of Hugging Face's.*put one beside.*clip.pt"
    )
    with pytest.raises(InputError, match=f"{says}.*merges=FILE"):
        pretrained.load_method(path)
    with pytest.raises(InputError, match=r"nowhere\.txt is not there"):
        pretrained.load_method(path, merges=tmp_path / "nowhere.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty has neither"):
        pretrained.load_method(path, merges=tmp_path / "empty")
    assert pretrained.load_method(path, merges=MERGES.parent).tokenizer.end == 49_407


def like_gpt2(lines):
    """As many pairs, of the same signs, in another order."""
    return [lines[0], *lines[1:200], "z z", *lines[200:]]


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("merges.txt", lambda lines: "\n".join(lines[:1000]), "holds 999 merges, and 48894 are needed"),
        ("merges.txt", lambda lines: "\n".join(like_gpt2(lines)), "holds other merges than CLIP's"),
        ("merges.txt", lambda lines: "", "holds 0 merges"),
        ("merges.txt", lambda lines: "a,b,c\n1,2,3\n", "no whole file of merges"),
        ("merges.txt", lambda lines: json.dumps({"a": 1}, indent=1), "no whole file of merges"),
        ("merges.txt", lambda lines: b"\xff\xfe\x00" * 99, "no whole file of merges"),
        ("merges.txt", lambda lines: "title\n\nin the\n", "no whole file of merges"),
        ("merges.txt.gz", lambda lines: b"no gzip", "no whole file of merges"),
        ("merges.txt.gz", lambda lines: gzip.compress("\n".join(lines).encode())[:-100_000], "no whole file of merges"),
    ],
)
def test_a_wrong_file_of_merges_is_said(tmp_path, files, name, make, says):
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        made = make(file.read().split("\n")[:48_895])
    (tmp_path / name).write_bytes(made if isinstance(made, bytes) else made.encode())
    with pytest.raises(InputError, match=says):
        pretrained.load_method(files / "model.safetensors", merges=tmp_path / name)


def test_names_are_held_to(files):
    with pytest.raises(
        InputError, match=r"nothing is downloaded.*MIT.*pretrained.load_method\('clip_vitb32', path=FILE\)"
    ):
        pretrained.load_method("clip_vitb32")
    with pytest.raises(InputError, match="dino_vits16 was trained without words"):
        pretrained.load_method("dino_vits16", path=files / "model.safetensors")
    with pytest.raises(InputError, match="There is no file"):
        pretrained.load_method("clip_vitb32", path="nowhere.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width", "patch", "side"), [("clip_vitb32", 512, 32, 7), ("clip_vitl14", 768, 14, 16)]
)
def test_the_published_sizes_load_by_their_names(tmp_path, name, width, patch, side):
    """ViT-B/32 and ViT-L/14 as they are, their blocks all alike; and they are told to be something else."""
    from open_clip import CLIP

    dim, depth = (768, 12) if width == 512 else (1024, 24)
    vision = {"image_size": side * patch, "layers": 1, "width": dim, "patch_size": patch}
    text = {"context_length": 77, "vocab_size": 49_408, "width": width, "heads": width // 64, "layers": 1}
    state = CLIP(embed_dim=width, quick_gelu=True, vision_cfg=vision, text_cfg=text).half().state_dict()
    for tower, blocks in (("visual.transformer", depth), ("transformer", 12)):
        first = {n: t for n, t in state.items() if n.startswith(f"{tower}.resblocks.0.")}
        for i in range(1, blocks):
            state |= {n.replace("resblocks.0.", f"resblocks.{i}."): t for n, t in first.items()}
    torch.save(state, tmp_path / "clip.pt")
    clip = pretrained.load_method(name, path=tmp_path / "clip.pt", merges=MERGES)
    assert (clip.size, len(clip.text.blocks), clip.text.blocks[0].attn.heads) == (224, 12, width // 64)
    assert clip.embed_text(["a photo of a dog."]).shape == (1, width)
    with pytest.raises(InputError, match="which is not clip_vitb16"):
        pretrained.load_method("clip_vitb16", path=tmp_path / "clip.pt", merges=MERGES)


def test_the_readmes_example_runs(files, monkeypatch, tmp_path, capsys):
    (example,) = [
        code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "merges" in code
    ]
    (path,) = re.findall(r'path="([^"]+)"', example)
    (tmp_path / path).parent.mkdir()
    for file in files.iterdir():
        shutil.copy(file, (tmp_path / path).parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(official, "NAMES", {})  # a small one does for it
    exec(example.replace('"clip_vitb32", path=', ""), {})
    assert "a red fish" in capsys.readouterr().out
