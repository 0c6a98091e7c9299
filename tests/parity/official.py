"""OpenAI's CLIP, read from a file that a library made, beside that library: its words as numbers, and what it says."""

import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from minissl import official, official_clip
from minissl.augment import normalize
from minissl.text import PLAIN, Tokenizer, mend, split_words
from tests.parity.ledger import Draw, Sides, compared
from tests.parity.towers import open_clips

MEAN, DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
MERGES = Path(find_spec("open_clip").submodule_search_locations[0]) / official_clip.MERGES[0]
WORDS = r"""a photo of the DOG, it's I'LL naïve café Straße ΣΙΣΥΦΟΣ &amp; &lt; &#39; 2nd 1980's 3.14 !!! #tag
pneumonoultramicroscopic""".split()
WORDS += ["they\u2019ve", "\u201ctwo\u201d", "e\u0301", "\ufb01sh", "\uff26\uff35", "素早い", "x²", "😀", "—"]


def said(draw: Draw) -> list[str]:
    """Sentences, one of which may be too long."""
    return [" ".join(draw.one_of(*WORDS) for _ in range(draw.whole(0, 40))) for _ in range(draw.whole(2, 5))]


@compared("CLIP's words as numbers", "open_clip", Tokenizer, split_words, mend, slow=True)
def _(draw: Draw) -> Sides:
    from open_clip.tokenizer import tokenize

    texts = said(draw)
    return Sides(lambda: official_clip.read_merges(MERGES, 49_408, 77)(texts, cut=True), lambda: tokenize(texts))


def whole(
    draw: Draw, theirs: nn.Module, vocabulary: int, pixels: Tensor
) -> tuple[Callable[[], list[Tensor]], Tensor, Tensor]:
    """Our side: the vectors of pixels and sentences, and the answers, by the file that theirs makes. Then the tokens,
    and the pixels as CLIP's code hands them on."""
    texts, before = said(draw), torch.get_default_dtype()

    def ours() -> list[Tensor]:
        torch.set_default_dtype(draw.dtype)
        try:
            with tempfile.TemporaryDirectory() as folder:
                save_file(theirs.state_dict(), Path(folder) / "model.safetensors")
                clip = official_clip.load(Path(folder) / "model.safetensors", MERGES)
        finally:
            torch.set_default_dtype(before)
        image, text = (F.normalize(x, dim=-1) for x in (clip.embed_images(normalize(pixels)), clip.embed_text(texts)))
        return [image, text, clip.logit_scale.exp() * image @ text.mT]

    mean, deviation = (torch.tensor(x, dtype=draw.dtype).view(3, 1, 1) for x in (MEAN, DEVIATION))
    tokens = Tokenizer.read(MERGES, vocabulary - PLAIN - 2, 77)(texts, cut=True)
    return ours, tokens, (pixels - mean) / deviation


@compared("CLIP whole, from a file: vectors and answers", "transformers", official_clip.load, official.fold, fp32=1e-5,
          slow=True)  # fmt: skip
def _(draw: Draw) -> Sides:
    from transformers import CLIPConfig, CLIPModel

    vocabulary, patch, heads = draw.whole(514, 900), draw.one_of(4, 8), draw.whole(1, 2)
    sizes = {"hidden_size": 64 * heads, "num_attention_heads": heads, "intermediate_size": 256 * heads}
    vision = sizes | {"image_size": patch * draw.whole(2, 4), "patch_size": patch, "num_hidden_layers": 2}
    text = sizes | {"vocab_size": vocabulary, "num_hidden_layers": draw.whole(1, 3)}
    text |= {"bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1, "pad_token_id": 0}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=draw.whole(8, 64))
    theirs = draw.shake(CLIPModel(config)).eval().requires_grad_(False)
    pixels = draw.uniform(2, 3, vision["image_size"], vision["image_size"]).requires_grad_()
    ours, tokens, given = whole(draw, theirs, vocabulary, pixels)

    def right() -> list[Tensor]:
        found = theirs(input_ids=tokens, pixel_values=given)
        return [found.image_embeds, found.text_embeds, found.logits_per_image]

    return Sides(ours, right, [pixels])


@compared("CLIP whole, from a file: vectors and answers", "open_clip", official_clip.load, official.fold, fp32=1e-5,
          slow=True)  # fmt: skip
def _(draw: Draw) -> Sides:
    vocabulary, patch, width = draw.whole(514, 900), draw.one_of(4, 8), 64 * draw.whole(1, 2)
    vision = {"image_size": patch * draw.whole(2, 4), "patch_size": patch, "width": width, "layers": 2}
    text = {"context_length": 77, "vocab_size": vocabulary, "width": 64, "heads": 1, "layers": draw.whole(1, 3)}
    theirs = draw.shake(open_clips(draw, draw.one_of(40, 64), vision, text)).requires_grad_(False)
    pixels = draw.uniform(2, 3, vision["image_size"], vision["image_size"]).requires_grad_()
    ours, tokens, given = whole(draw, theirs, vocabulary, pixels)

    def right() -> list[Tensor]:
        image, sentence, scale = theirs(image=given, text=tokens)
        return [image, sentence, scale * image @ sentence.mT]

    return Sides(ours, right, [pixels])
