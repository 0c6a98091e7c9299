"""Load OpenAI's CLIP, image and text encoder, with its tokenizer.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv:2103.00020). One file
holds the weights, in the format of the authors, open_clip or Hugging Face; another the tokenizer's merges. The image
encoder is read by `hub.official`; with the text encoder it becomes a `methods.clip.CLIP`.

A file does not say which activation the MLPs have: here it is OpenAI's QuickGELU. The weights that open_clip trained on
LAION have the same shapes and an exact GELU, and would give other outputs.

Shapes: L tokens, width D, E dimensions of the shared embedding space.
"""

import math
import re
from pathlib import Path

from torch import Tensor

from minissl.errors import InputError
from minissl.hub import official
from minissl.methods.clip import CLIP
from minissl.models.tokenizer import NUM_BYTE_SYMBOLS, Tokenizer, split_words
from minissl.models.vit import ViT

MERGES_FILES = ("bpe_simple_vocab_16e6.txt.gz", "merges.txt")  # of the authors, of Hugging Face; with the same merges
VOCAB_SIZE = 49_408
TOKENIZER_CHECK = "a photo of a dog.", [320, 1125, 539, 320, 1929, 269]  # a sentence, and its ids in OpenAI's code
PROJECTIONS = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}  # transposed


def load_openai_clip(path: str | Path, merges: str | Path | None = None, name: str = "") -> CLIP:
    """Load a CLIP in evaluation mode, without gradients; its `crop_size` is the image size it was trained on.

    Args:
        path: a safetensors or torch file with both encoders.
        merges: one of `MERGES_FILES`, or a folder with one; None: the folder of the weights.
        name: one of `official.OFFICIAL_ENCODERS` that the file has to hold; "" accepts any.

    Raises:
        InputError: if a file is missing or damaged, holds more than tensors, or holds another network.
    """
    if name and official.OFFICIAL_ENCODERS[name].family != "clip":
        raise InputError(f"{name} was trained without text; load it with load_encoder.")
    tensors = official.read_weights(Path(path))
    encoder = official.build_encoder(tensors, path, name)
    if not any("token_embedding" in key for key in tensors):
        raise InputError(
            f"{path} holds an image encoder only, which load_encoder loads; CLIP with its text encoder is in "
            f"{official.SOURCES['clip']}."
        )
    merges_file = find_merges_file(Path(path), merges)
    try:
        state = to_minissl_names(tensors)
        method = infer_clip_config(state, encoder)
        method.load_state_dict(state | {"_extra_state": method.get_extra_state()})
    except (RuntimeError, KeyError, ValueError):
        raise InputError(
            f"{path} holds a text encoder that is not CLIP's; get all of CLIP from {official.SOURCES['clip']}."
        ) from None
    vocab_size = method.text.token_embedding.num_embeddings
    method.tokenizer = read_merges(merges_file, vocab_size, method.tokenizer.context_length)
    return method.eval().requires_grad_(False)


def find_merges_file(path: Path, merges: str | Path | None) -> Path:
    """Return the file of merges that was given, or that lies beside the weights. Raises InputError if there is none."""
    place = Path(merges) if merges else path.parent
    for file in [place / name for name in MERGES_FILES] if place.is_dir() else [place]:
        if file.is_file():
            return file
    raise InputError(
        f"CLIP's tokenizer needs {MERGES_FILES[0]} of github.com/openai/CLIP (its folder clip) or {MERGES_FILES[1]} of "
        f"Hugging Face's openai/clip-vit-..., and {place} {'has neither' if place.is_dir() else 'does not exist'}; "
        f"put one beside {path}, or give merges=FILE."
    )


def read_merges(path: Path, vocab_size: int, context_length: int) -> Tokenizer:
    """Read CLIP's tokenizer. Raises InputError for a file of other merges; GPT-2's have the same format."""
    tokenizer = Tokenizer.read(path, vocab_size - NUM_BYTE_SYMBOLS - 2, context_length)
    sentence, expected_ids = TOKENIZER_CHECK
    ids = [symbol for word in split_words(sentence) for symbol in tokenizer.encode_word(word)]
    if vocab_size == VOCAB_SIZE and ids != expected_ids:
        raise InputError(f"{path} holds other merges than CLIP's; get {MERGES_FILES[0]} of github.com/openai/CLIP.")
    return tokenizer


def to_minissl_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a file's tensors to those of `methods.clip.CLIP`, without the image encoder.

    Raises:
        KeyError: if a tensor is missing.
    """
    state = {re.sub(r"^(module\.)?(text_model\.|text\.)?", "", name): tensor for name, tensor in tensors.items()}
    for name, new_name in PROJECTIONS.items():
        if name in state:
            state[new_name] = state.pop(name).mT  # (E, D)
    text = {name: t for name, t in state.items() if not name.startswith(("visual.", "vision_model."))}
    state = official.to_minissl_names(text)
    state["positional_embedding"] = state.pop("pos_embed")  # (L, D)
    shared = {name: state.pop(name) for name in ("visual_projection.weight", "logit_scale")}
    shared["logit_scale"] = shared["logit_scale"].view(())
    return shared | {f"text.{name}": tensor for name, tensor in state.items()}


def infer_clip_config(state: dict[str, Tensor], encoder: ViT) -> CLIP:
    """Build a CLIP around a trained encoder, into which the other tensors fit; the encoder's are added to `state`.

    Raises:
        KeyError, ValueError: if there is none.
    """
    vocab_size, width = state["text.token_embedding.weight"].shape
    if vocab_size < NUM_BYTE_SYMBOLS + 2 or width % 64 or encoder.pos_embed is None:
        raise ValueError("bytes, start and end are 514 symbols, a head is 64 wide, and positions are learned")
    method = CLIP(
        encoder,
        crop_size=math.isqrt(encoder.pos_embed.shape[1] - 1) * encoder.patch_size,
        embed_dim=len(state["text.text_projection.weight"]),
        text_width=width,
        text_layers=1 + max(int(name.split(".")[2]) for name in state if name.startswith("text.blocks.")),
        text_heads=width // 64,
        context_length=len(state["text.positional_embedding"]),
        vocab_size=vocab_size,
    )
    state |= {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    return method
