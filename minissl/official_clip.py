"""CLIP as OpenAI trained it, whole: both towers, what brings them together, and what its words are made of.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv:2103.00020). One file
holds the weights, by the authors' names, open_clip's or Hugging Face's; another the tokenizer's merges. The images'
tower is read by `official`; with the sentences' beside it, it is a `methods.clip.CLIP`, and who asks ours can ask it.

What a perceptron has between its layers is not in a file: it is OpenAI's quick_gelu here. The weights that open_clip
trained on LAION have the same shapes and an exact GELU, and would give other numbers.

Shapes: L tokens, width D, E dimensions of the space that images and sentences share.
"""

import math
import re
from pathlib import Path

from torch import Tensor, nn

from minissl import official
from minissl.errors import InputError
from minissl.method import find
from minissl.text import PLAIN, Tokenizer, split_words
from minissl.vit import ViT

MERGES = ("bpe_simple_vocab_16e6.txt.gz", "merges.txt")  # the authors', Hugging Face's; the same pairs
VOCABULARY = 49_408
DOG = "a photo of a dog.", [320, 1125, 539, 320, 1929, 269]  # a sentence, and its numbers in OpenAI's code
VECTORS_BY = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}  # x W, and x W'


def load(path: str | Path, merges: str | Path | None = None, name: str = "") -> nn.Module:
    """A `methods.clip.CLIP` in evaluation mode, without gradients; its `size` is the pixels a side it was trained on.

    Args:
        path: a safetensors or torch file of both towers.
        merges: one of `MERGES`, or a folder with one; None: where the weights are.
        name: which one it has to be, of `official.NAMES`; "" takes what is there.

    Raises:
        InputError: if a file is missing or broken, is more than plain numbers, or holds something else.
    """
    if name and official.NAMES[name].family != "clip":
        raise InputError(f"{name} was trained without words; pretrained.load gives its encoder.")
    found = official.read(Path(path))
    encoder = official.make(found, path, name)
    if not any("token_embedding" in one for one in found):
        raise InputError(
            f"{path} holds an encoder of images alone, which pretrained.load gives; CLIP with its words is in "
            f"{official.WHERE['clip']}."
        )
    pairs = where(Path(path), merges)
    try:
        state = translate(found)
        method = like(state, encoder)
        method.load_state_dict(state | {"_extra_state": method.get_extra_state()})
    except (RuntimeError, KeyError, ValueError):
        raise InputError(
            f"{path} holds a text tower that is not CLIP's; get all of CLIP: {official.WHERE['clip']}."
        ) from None
    method.tokenizer = read_merges(pairs, method.text.token_embedding.num_embeddings, method.tokenizer.length)
    return method.eval().requires_grad_(False)


def where(path: Path, merges: str | Path | None) -> Path:
    """The file of merges that was given, or that lies beside the weights. Raises InputError if there is none."""
    given = Path(merges) if merges else path.parent
    for place in [given / name for name in MERGES] if given.is_dir() else [given]:
        if place.is_file():
            return place
    raise InputError(
        f"CLIP's words need {MERGES[0]} of github.com/openai/CLIP (its folder clip) or {MERGES[1]} of Hugging Face's "
        f"openai/clip-vit-..., and {given} {'has neither' if given.is_dir() else 'is not there'}; "
        f"put one beside {path}, or say where it is: merges=FILE."
    )


def read_merges(path: Path, vocabulary: int, length: int) -> Tokenizer:
    """The tokenizer of a text tower. Raises InputError for a file of other merges, as GPT-2's, which look alike."""
    tokenizer = Tokenizer.read(path, vocabulary - PLAIN - 2, length)
    sentence, numbers = DOG
    if vocabulary == VOCABULARY and [n for word in split_words(sentence) for n in tokenizer.word(word)] != numbers:
        raise InputError(f"{path} holds other merges than CLIP's; get {MERGES[0]} of github.com/openai/CLIP.")
    return tokenizer


def translate(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the names of `methods.clip.CLIP`, but for its encoder's. Raises KeyError if any lack."""
    state = {re.sub(r"^(module\.)?(text_model\.|text\.)?", "", name): tensor for name, tensor in found.items()}
    for theirs, ours in VECTORS_BY.items():
        if theirs in state:
            state[ours] = state.pop(theirs).mT  # (E, D)
    state = official.translate({n: t for n, t in state.items() if not n.startswith(("visual.", "vision_model."))})
    state["positional_embedding"] = state.pop("pos_embed")  # (L, D)
    shared = {name: state.pop(name) for name in ("visual_projection.weight", "logit_scale")}
    shared["logit_scale"] = shared["logit_scale"].view(())
    return shared | {f"text.{name}": tensor for name, tensor in state.items()}


def like(state: dict[str, Tensor], encoder: ViT) -> nn.Module:
    """A CLIP around an encoder that has its weights, into which the others fit. Raises KeyError or ValueError."""
    vocabulary, width = state["text.token_embedding.weight"].shape
    if vocabulary < PLAIN + 2 or width % 64:
        raise ValueError("bytes, start and end are 514 symbols, and a head is 64 wide")
    method = find("clip")(
        encoder,
        size=math.isqrt(encoder.pos_embed.shape[1] - 1) * encoder.patch_size,
        embedding=len(state["text.text_projection.weight"]),
        text_width=width,
        text_depth=1 + max(int(name.split(".")[2]) for name in state if name.startswith("text.blocks.")),
        text_heads=width // 64,
        length=len(state["text.positional_embedding"]),
        vocabulary=vocabulary,
    )
    state |= {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return method
