"""OpenAI's CLIP from a file has the token ids, embeddings and logits of open_clip and transformers."""

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

from minissl.data import Images
from minissl.data.transforms.functional import normalize
from minissl.errors import InputError
from minissl.evaluation import benchmark
from minissl.hub import official, openai_clip, pretrained
from minissl.models.tokenizer import Tokenizer
from tests.test_tokenizer import SENTENCES

pytestmark = pytest.mark.slow  # open_clip takes seconds to import
MERGES = Path(find_spec("open_clip").submodule_search_locations[0]) / openai_clip.MERGES_FILES[0]
README = Path(__file__).parent.parent / "README.md"
TEXTS = ["a photo of a dog.", "It\u2019s 3 o'clock &amp; all is well", "", "ein süßer Kater 😀", "many words " * 60]


def randomize_weights(model):
    """Randomize all weights: initial values of 0 or 1 would hide errors."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(noise * 0.1 + (1.0 if "norm" in name or "ln_" in name else 0.0))
    return model.eval()


def open_clip_model(custom_text=False):
    """Build a small CLIP of open_clip with square projections; `custom_text` puts the text encoder under "text."."""
    import open_clip

    vision = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49_408, "width": 64, "heads": 1, "layers": 3}
    model_class = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    return randomize_weights(model_class(embed_dim=64, quick_gelu=True, vision_cfg=vision, text_cfg=text))


def transformers_model():
    from transformers import CLIPConfig, CLIPModel

    sizes = {"num_hidden_layers": 2, "intermediate_size": 512, "hidden_size": 128, "num_attention_heads": 2}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    text = sizes | {"num_hidden_layers": 3, "bos_token_id": 49_406, "eos_token_id": 49_407}
    return randomize_weights(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128)))


@pytest.fixture(params=[torch.float32, torch.float64], ids=["fp32", "fp64"])
def tolerance(request):
    """Set the default precision, and return the tolerance of a comparison in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield {"rtol": 1e-10, "atol": 1e-10} if request.param == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.set_default_dtype(before)


def random_images():
    """Return images (3, 3, 32, 32) in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 32, 32, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())


def to_clip_input(images):
    """Normalize images in [0, 1] as OpenAI's code."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in official.CLIP_MEAN_STD)
    return (images - mean) / std


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a file of open_clip and the merges."""
    folder = tmp_path_factory.mktemp("clip")
    save_file(open_clip_model().state_dict(), folder / "model.safetensors")
    shutil.copy(MERGES, folder)
    return folder


@pytest.fixture(scope="module")
def open_clip_tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@pytest.fixture(scope="module")
def tokenizer():
    return openai_clip.read_merges(MERGES, 49_408, 77)


@pytest.mark.parametrize(
    ("custom_text", "form"), [(False, "safetensors"), (False, "pt"), (True, "pt"), (False, "checkpoint")]
)
def test_a_file_of_open_clip_gives_its_embeddings_and_logits(
    tmp_path, open_clip_tokenizer, custom_text, form, tolerance
):
    """And its logits, from the same images and sentences; the gradient of the images is equal too."""
    model, path, images = open_clip_model(custom_text), tmp_path / "clip.pt", random_images().requires_grad_()
    if form == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(model.state_dict(), path)
    elif form == "pt":
        torch.save(model.state_dict(), path)
    else:
        state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, path)
    clip = pretrained.load_method(path, merges=MERGES)
    image, text = clip.embed_images(normalize(images)), clip.embed_text(TEXTS)
    tokens = open_clip_tokenizer(TEXTS)
    expected = model.encode_image(to_clip_input(images)), model.encode_text(tokens)
    torch.testing.assert_close((image, text), expected, **tolerance)
    torch.testing.assert_close(clip.logit_scale.exp(), model.logit_scale.exp(), **tolerance)
    logits = clip.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).mT
    expected_logits = model.get_logits(to_clip_input(images), tokens)[0]
    torch.testing.assert_close(logits, expected_logits, **tolerance)
    gradients = (torch.autograd.grad(x.square().sum(), images)[0] for x in (logits, expected_logits))
    torch.testing.assert_close(*gradients, **tolerance)
    assert not any(p.requires_grad for p in clip.parameters())


def test_additional_numbers_of_the_authors_are_ignored(tmp_path):
    """The state dict of OpenAI's TorchScript files has three more numbers, and half precision."""
    state = {name: tensor.half() for name, tensor in open_clip_model().state_dict().items()}
    sizes = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    torch.save(state | sizes, tmp_path / "clip.pt")
    clip = pretrained.load_method(tmp_path / "clip.pt", merges=MERGES)
    assert {p.dtype for p in clip.parameters()} == {torch.float32}
    assert (clip.crop_size, clip.encoder.patch_size, clip.tokenizer.context_length) == (32, 8, 77)


def test_a_file_of_hugging_face_gives_its_embeddings_and_logits(tmp_path, tokenizer, tolerance):
    model, images = transformers_model(), random_images().requires_grad_()
    model.save_pretrained(tmp_path)
    shutil.copy(MERGES, tmp_path)
    clip = pretrained.load_method(tmp_path / "model.safetensors")
    image, text = (F.normalize(x, dim=-1) for x in (clip.embed_images(normalize(images)), clip.embed_text(TEXTS)))
    expected = model(input_ids=tokenizer(TEXTS, truncate=True), pixel_values=to_clip_input(images))
    torch.testing.assert_close((image, text), (expected.image_embeds, expected.text_embeds), **tolerance)
    logits = clip.logit_scale.exp() * image @ text.mT
    torch.testing.assert_close(logits, expected.logits_per_image, **tolerance)
    gradients = (torch.autograd.grad(x.square().sum(), images)[0] for x in (logits, expected.logits_per_image))
    torch.testing.assert_close(*gradients, **tolerance)


def test_the_image_encoder_alone_has_the_same_input(files):
    """CLIP's normalization is folded into its patch embedding as well."""
    images, file = normalize(random_images()), files / "model.safetensors"
    encoder, clip = pretrained.load_encoder(file), pretrained.load_method(file)
    torch.testing.assert_close(encoder(images).cls, clip.encoder(images).cls, rtol=0, atol=0)
    state = open_clip_model().state_dict()
    expected = F.conv2d(to_clip_input(random_images()), state["visual.conv1.weight"], stride=8)
    torch.testing.assert_close(encoder.patch_embed(images).permute(0, 3, 1, 2), expected, rtol=1e-5, atol=1e-5)


def test_images_are_classified_and_retrieved_by_text(files):
    """The functions for minissl's CLIP apply; the similarities are those of open_clip's embeddings."""
    model, clip = open_clip_model(), pretrained.load_method(files / "model.safetensors")
    images = torch.randint(256, (120, 3, 32, 32), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    texts, names = ["a red fish", "a dog on a beach", "nothing"], ("cat", "dog", "ship")
    with torch.no_grad():
        embeddings = F.normalize(model.encode_image(to_clip_input(images / 255)), dim=-1)
        expected = embeddings @ F.normalize(model.encode_text(clip.tokenizer(texts)), dim=-1).mT
    similarity = benchmark.image_text_similarity(clip, images, texts, clip.crop_size)
    torch.testing.assert_close(similarity, expected, rtol=1e-4, atol=1e-5)
    labels = torch.arange(120) % 3
    captions = tuple((f"image {i // 2}", "another") for i in range(120))
    metrics = benchmark.evaluate_zero_shot(clip, Images(images, labels, names, captions=captions), clip.crop_size)
    assert {"zero_shot_classes", "zero_shot_sum_classes", "image_to_text", "text_to_image"} == metrics.keys()
    assert all(0 <= value <= 1 for value in metrics.values())


def random_sentences(n, seed=0):
    """Yield sentences of words of many scripts, signs, entities, numbers and contractions, with various spaces."""
    rng = random.Random(seed)
    parts = """dog Photo HELLO it's they've I'M don\u2019t O\u2019Brien \u201cquoted\u201d 'tis naïve café Ångström
    señor ﬁne ﬂag ﬀ ǆ İstanbul ΣΊΣΥΦΟΣ Съешь булок 素早い 茶色の狐 안녕하세요 مرحبا
    नमस्ते สวัสดี \uff26\uff35\uff2c\uff2c \uff57\uff01 Straße
    &amp; &amp;amp; &lt;b&gt; &eacute;t&eacute; &rsquo; &#65; &#x1F600; &nbsp; &notanentity; &quot;q&quot;
    2nd 90s 1980's 3.14 ½ x² Ⅷ ٣ 12345 😀 😀😀 👨\u200d👩\u200d👧 🇩🇪 👍🏽 ❤️ ☃ e\u0301 n\u0303 o\u0308
    … — \u2013 - -- !!! ?! ; : , . / \\ | _ # @me $100 €50 100% (a) [b] {c} ~ ^ * + = it\x92s
    soft\u00adhyphen zero\u200bwidth bell\x07 \ufeffmark pneumonoultramicroscopic a b c""".split()
    for _ in range(n):
        words = rng.sample(parts, rng.randint(1, 12))
        yield "".join(word + rng.choice(["", " ", " ", " ", "  ", "\t", "\n", "\u00a0", "\u3000"]) for word in words)


def test_token_ids_equal_open_clip(tokenizer, open_clip_tokenizer):
    """For more than 600 sentences, among them an empty one and one that is far too long."""
    texts = [*SENTENCES, *TEXTS, *random_sentences(600), "", " ", "x" * 5000, "!" * 400, "word " * 400, "😀" * 100]
    assert len(texts) > 600
    for text in texts:
        assert torch.equal(tokenizer([text], truncate=True), open_clip_tokenizer([text])), text


LETTERS = st.characters(exclude_categories=["Cn", "Co"])
PIECES = st.sampled_from(
    ["'s", "'LL", "\u2019", "&amp;", "&#39;", "&", ";", " ", "é", "e\u0301", "ﬁ", "9", "\ufeff", "\x93"]
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(st.lists(st.text(LETTERS, max_size=6) | st.text("aest'. 1", max_size=6) | PIECES, max_size=8))
def test_token_ids_of_any_text_equal_open_clip(tokenizer, open_clip_tokenizer, pieces):
    """Except for mis-decoded UTF-8, which minissl does not repair, and for text before an HTML tag."""
    from ftfy import fix_text

    text = "".join(pieces)
    assume(fix_text(text) == fix_text(text, fix_encoding=False) and "<" not in text)
    assert torch.equal(tokenizer([text], truncate=True), open_clip_tokenizer([text]))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory, open_clip_tokenizer):
    """Return a folder with vocab.json and merges.txt, as Hugging Face's CLIP has them."""
    folder = tmp_path_factory.mktemp("words")
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1 : 48_894 + 1]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(name, name): i for name, i in open_clip_tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    return folder


def test_both_files_hold_the_same_merges(hugging_face, tokenizer):
    assert openai_clip.read_merges(hugging_face / "merges.txt", 49_408, 77).pairs == tokenizer.pairs


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_token_ids_equal_transformers(hugging_face):
    """transformers neither cleans nor unescapes text, so the sentences are those that need neither."""
    from transformers import CLIPTokenizer

    tokenizer = Tokenizer.read(hugging_face / "merges.txt", 48_894, 77)
    reference = CLIPTokenizer.from_pretrained(hugging_face)
    changed = re.compile("[&ﬁﬂﬀǆ\u2019\u201c\u201dİΣ\uff00-\uffef\x00-\x1f\x92\u00ad\ufeff]")
    texts = [text for text in (*SENTENCES, *random_sentences(2000)) if not changed.search(text)]
    assert len(texts) > 100
    for text in texts:
        ids = reference(text, truncation=True, max_length=77)["input_ids"]
        assert tokenizer([text], truncate=True)[0, : len(ids)].tolist() == ids, text


def save(folder, state):
    torch.save(state, folder / "clip.pt")
    return folder / "clip.pt"


def test_a_file_with_one_encoder_is_recognized(tmp_path):
    state = open_clip_model().state_dict()
    path = save(tmp_path, {name: t for name, t in state.items() if name.startswith("visual.")})
    assert pretrained.load_encoder(path).embed_dim == 128
    with pytest.raises(InputError, match=r"load_encoder.*openai/clip-vit-"):
        pretrained.load_method(path)
    path = save(tmp_path, {name: t for name, t in state.items() if not name.startswith("visual.")})
    with pytest.raises(InputError, match=r"holds no encoder"):
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
def test_a_text_encoder_that_does_not_fit_raises(tmp_path, change):
    state = open_clip_model().state_dict()
    change(state)
    shutil.copy(MERGES, tmp_path)
    with pytest.raises(InputError, match="text encoder"):
        pretrained.load_method(save(tmp_path, state))


def test_missing_merges_raise_with_their_source(tmp_path):
    path = save(tmp_path, open_clip_model().state_dict())
    with pytest.raises(InputError, match=r"bpe_simple_vocab_16e6\.txt\.gz.*merges\.txt.*clip\.pt.*merges=FILE"):
        pretrained.load_method(path)
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        pretrained.load_method(path, merges=tmp_path / "nowhere.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty"):
        pretrained.load_method(path, merges=tmp_path / "empty")
    assert pretrained.load_method(path, merges=MERGES.parent).tokenizer.end == 49_407


def other_merges(lines):
    """Return as many pairs of the same symbols in another order, as those of GPT-2 are."""
    return [lines[0], *lines[1:200], "z z", *lines[200:]]


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("merges.txt", lambda lines: "\n".join(lines[:1000]), "holds 999 merges, and 48894 are needed"),
        ("merges.txt", lambda lines: "\n".join(other_merges(lines)), "other merges"),
        ("merges.txt", lambda lines: "", "holds 0 merges"),
        ("merges.txt", lambda lines: "a,b,c\n1,2,3\n", "not a complete file"),
        ("merges.txt", lambda lines: json.dumps({"a": 1}, indent=1), "not a complete file"),
        ("merges.txt", lambda lines: b"\xff\xfe\x00" * 99, "not a complete file"),
        ("merges.txt", lambda lines: "title\n\nin the\n", "not a complete file"),
        ("merges.txt.gz", lambda lines: b"no gzip", "not a complete file"),
        ("merges.txt.gz", lambda lines: gzip.compress("\n".join(lines).encode())[:-100_000], "not a complete file"),
    ],
)
def test_a_wrong_file_of_merges_raises(tmp_path, files, name, make, message):
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        content = make(file.read().split("\n")[:48_895])
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message):
        pretrained.load_method(files / "model.safetensors", merges=tmp_path / name)


def test_names_are_checked(files):
    with pytest.raises(InputError, match=r"MIT.*load_method\('clip_vitb32', path=FILE\)"):
        pretrained.load_method("clip_vitb32")
    with pytest.raises(InputError, match="without text"):
        pretrained.load_method("dino_vits16", path=files / "model.safetensors")
    with pytest.raises(InputError, match="There is no file"):
        pretrained.load_method("clip_vitb32", path="nowhere.safetensors")
    with pytest.raises(InputError, match="leave it out"):
        pretrained.load_method("scenes/clip", path=files / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "width", "patch_size", "side"), [("clip_vitb32", 512, 32, 7), ("clip_vitl14", 768, 14, 16)]
)
def test_the_published_sizes_load_by_name(tmp_path, name, width, patch_size, side):
    """ViT-B/32 and ViT-L/14 in full size, with copies of one block; another name raises."""
    from open_clip import CLIP

    dim, depth = (768, 12) if width == 512 else (1024, 24)
    vision = {"image_size": side * patch_size, "layers": 1, "width": dim, "patch_size": patch_size}
    text = {"context_length": 77, "vocab_size": 49_408, "width": width, "heads": width // 64, "layers": 1}
    state = CLIP(embed_dim=width, quick_gelu=True, vision_cfg=vision, text_cfg=text).half().state_dict()
    for tower, blocks in (("visual.transformer", depth), ("transformer", 12)):
        first = {n: t for n, t in state.items() if n.startswith(f"{tower}.resblocks.0.")}
        for i in range(1, blocks):
            state |= {n.replace("resblocks.0.", f"resblocks.{i}."): t for n, t in first.items()}
    torch.save(state, tmp_path / "clip.pt")
    clip = pretrained.load_method(name, path=tmp_path / "clip.pt", merges=MERGES)
    assert (clip.crop_size, len(clip.text.blocks), clip.text.blocks[0].attn.num_heads) == (224, 12, width // 64)
    assert clip.embed_text(["a photo of a dog."]).shape == (1, width)
    with pytest.raises(InputError, match="not clip_vitb16"):
        pretrained.load_method("clip_vitb16", path=tmp_path / "clip.pt", merges=MERGES)


def documented_examples():
    """Return the Python examples of the README and the documentation that load CLIP."""
    pages = [README, *(README.parent / "docs").glob("*.md")]
    blocks = [code for page in pages for code in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)]
    return [code for code in blocks if '"clip_vitb32", path=' in code]


def test_documented_examples_run(files, monkeypatch, tmp_path):
    """With a small file in place of OpenAI's, and without the name, which would be compared with the file."""
    examples = documented_examples()
    assert examples
    monkeypatch.chdir(tmp_path)
    for example in examples:
        (path,) = re.findall(r'path="([^"]+)"', example)
        (tmp_path / path).parent.mkdir(exist_ok=True)
        for file in files.iterdir():
            shutil.copy(file, (tmp_path / path).parent)
        exec(example.replace('"clip_vitb32", path=', ""), {})
