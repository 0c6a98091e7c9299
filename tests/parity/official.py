"""OpenAI's CLIP, loaded from a file that a library wrote, compared with that library: tokens, embeddings and logits."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from minissl.data.transforms.functional import normalize
from minissl.hub import official, openai_clip
from minissl.models.tokenizer import NUM_BYTE_SYMBOLS, Tokenizer, clean_text, split_words
from tests.parity.ledger import RandomInputs, Sides, comparison
from tests.parity.towers import open_clip_model

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MERGES = Path(find_spec("open_clip").submodule_search_locations[0]) / openai_clip.MERGES_FILES[0]
WORDS = r"""a photo of the DOG, it's I'LL naïve café Straße ΣΙΣΥΦΟΣ &amp; &lt; &#39; 2nd 1980's 3.14 !!! #tag
pneumonoultramicroscopic""".split()
WORDS += ["they\u2019ve", "\u201ctwo\u201d", "e\u0301", "\ufb01sh", "\uff26\uff35", "素早い", "x²", "😀", "—"]


def random_texts(rng: RandomInputs) -> list[str]:
    """Sample sentences; some may be longer than the context."""
    return [" ".join(rng.choice(*WORDS) for _ in range(rng.integer(0, 40))) for _ in range(rng.integer(2, 5))]


@comparison("CLIP tokenizer", "open_clip", Tokenizer, split_words, clean_text, slow=True)
def _(rng: RandomInputs) -> Sides:
    from open_clip.tokenizer import tokenize

    texts = random_texts(rng)
    return Sides(lambda: openai_clip.read_merges(MERGES, 49_408, 77)(texts, truncate=True), lambda: tokenize(texts))


def clip_from_file(
    rng: RandomInputs, model: nn.Module, vocab_size: int, images: Tensor
) -> tuple[Callable[[], list[Tensor]], Tensor, Tensor]:
    """Prepare minissl's side for CLIP of a library.

    Args:
        model: of the library.
        vocab_size: of its tokenizer.
        images: (B, 3, H, W) in [0, 1].

    Returns:
        A function that writes the model's weights to a file, loads them and returns the embeddings of images and texts
        and their logits; the tokens of the texts; the images as CLIP's own code normalizes them.
    """
    texts, default_dtype = random_texts(rng), torch.get_default_dtype()

    def actual() -> list[Tensor]:
        torch.set_default_dtype(rng.dtype)
        try:
            with tempfile.TemporaryDirectory() as folder:
                save_file(model.state_dict(), Path(folder) / "model.safetensors")
                clip = openai_clip.load_openai_clip(Path(folder) / "model.safetensors", MERGES)
        finally:
            torch.set_default_dtype(default_dtype)
        image, text = (F.normalize(x, dim=-1) for x in (clip.embed_images(normalize(images)), clip.embed_text(texts)))
        return [image, text, clip.logit_scale.exp() * image @ text.mT]

    mean, std = (torch.tensor(x, dtype=rng.dtype).view(3, 1, 1) for x in (MEAN, STD))
    tokens = Tokenizer.read(MERGES, vocab_size - NUM_BYTE_SYMBOLS - 2, 77)(texts, truncate=True)
    return actual, tokens, (images - mean) / std


LOADERS = openai_clip.load_openai_clip, official.fold_normalization


@comparison("CLIP from a weights file: embeddings and logits", "transformers", *LOADERS, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    from transformers import CLIPConfig, CLIPModel

    vocab_size, patch_size, heads = rng.integer(514, 900), rng.choice(4, 8), rng.integer(1, 2)
    sizes = {"hidden_size": 64 * heads, "num_attention_heads": heads, "intermediate_size": 256 * heads}
    vision = sizes | {"image_size": patch_size * rng.integer(2, 4), "patch_size": patch_size, "num_hidden_layers": 2}
    text = sizes | {"vocab_size": vocab_size, "num_hidden_layers": rng.integer(1, 3)}
    text |= {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=rng.integer(8, 64))
    model = rng.randomize(CLIPModel(config)).eval().requires_grad_(False)
    images = rng.uniform(2, 3, vision["image_size"], vision["image_size"]).requires_grad_()
    actual, tokens, normalized = clip_from_file(rng, model, vocab_size, images)

    def expected() -> list[Tensor]:
        outputs = model(input_ids=tokens, pixel_values=normalized)
        return [outputs.image_embeds, outputs.text_embeds, outputs.logits_per_image]

    return Sides(actual, expected, [images])


@comparison("CLIP from a weights file: embeddings and logits", "open_clip", *LOADERS, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    vocab_size, patch_size, width = rng.integer(514, 900), rng.choice(4, 8), 64 * rng.integer(1, 2)
    vision = {"image_size": patch_size * rng.integer(2, 4), "patch_size": patch_size, "width": width, "layers": 2}
    text = {"context_length": 77, "vocab_size": vocab_size, "width": 64, "heads": 1, "layers": rng.integer(1, 3)}
    model = rng.randomize(open_clip_model(rng, rng.choice(40, 64), vision, text)).requires_grad_(False)
    images = rng.uniform(2, 3, vision["image_size"], vision["image_size"]).requires_grad_()
    actual, tokens, normalized = clip_from_file(rng, model, vocab_size, images)

    def expected() -> list[Tensor]:
        image, text_embeddings, scale = model(image=normalized, text=tokens)
        return [image, text_embeddings, scale * image @ text_embeddings.mT]

    return Sides(actual, expected, [images])
