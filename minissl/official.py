"""Encoders that others trained: DINO, DINOv2, DINOv3 and CLIP's for images, from a file on the disk.

The authors' files, timm's and Hugging Face's name the same tensors differently. Ours have the names of the official
DINO family, so most of what is here are synonyms; what kind of ViT it is, is read off the shapes. Nothing is
downloaded, and nothing in a file is run.

Shapes: width D, N = hw patches, R registers.
"""

import math
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from minissl.augment import MEAN, STD
from minissl.errors import InputError
from minissl.vit import SIZES, ViT


class Known(NamedTuple):
    """What a name stands for."""

    family: str
    size: str
    patch: int
    registers: int


NAMES = {
    **{f"dino_vit{s[0]}{p}": Known("dino", s, p, 0) for s in ("small", "base") for p in (16, 8)},
    **{f"dinov2_vit{s[0]}14": Known("dinov2", s, 14, 0) for s in ("small", "base", "large")},
    **{f"dinov2_vit{s[0]}14_reg": Known("dinov2", s, 14, 4) for s in ("small", "base", "large")},
    **{f"dinov3_vit{s[0]}16": Known("dinov3", s, 16, 4) for s in ("small", "base", "large")},
    "clip_vitb32": Known("clip", "base", 32, 0),
    "clip_vitb16": Known("clip", "base", 16, 0),
    "clip_vitl14": Known("clip", "large", 14, 0),
}
WHERE = {  # and under which licence
    "dino": "github.com/facebookresearch/dino (backbone only) or Hugging Face's facebook/dino-..., Apache 2.0",
    "dinov2": "github.com/facebookresearch/dinov2 (backbone only) or Hugging Face's facebook/dinov2-..., Apache 2.0",
    "dinov3": "github.com/facebookresearch/dinov3, on request and under Meta's own DINOv3 licence",
    "clip": "Hugging Face's openai/clip-vit-..., model.safetensors, MIT",
}
OF_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # its pixels' mean and deviation
WRAPPERS = ("teacher", "model", "state_dict")  # what a training's file keeps its weights under
TOWERS = ("module.", "backbone.", "visual.", "vision_model.", "vit.", "dinov2.")  # what is before an encoder's names
SYNONYMS = [  # a regular expression of other formats' names, and ours
    (r"^(model\.)?(encoder\.)?(layers?|transformer\.resblocks)\.", "blocks."),
    (r"^(embeddings\.)?(cls_token|class_embedding)$", "cls_token"),
    (r"^(embeddings\.position_embeddings|embeddings\.position_embedding\.weight|positional_embedding)$", "pos_embed"),
    (r"^(embeddings\.register_tokens|storage_tokens|reg_token)$", "register_tokens"),
    (r"^(embeddings\.patch_embeddings\.projection|embeddings\.patch_embeddings?|conv1)\.", "patch_embed.proj."),
    (r"^(pre_layrnorm|ln_pre)\.", "norm_pre."),
    (r"^(layernorm|post_layernorm|ln_post)\.", "norm."),
    (r"^embeddings\.token_embedding\.", "token_embedding."),
    (r"^final_layer_norm\.", "ln_final."),
    (r"\.(attention\.attention|attention|self_attn)\.(q|k|v)(_proj|uery|ey|alue)\.", r".attn.\2."),
    (r"\.attn\.(q|v)_bias$", r".attn.\1.bias"),
    (r"\.attn\.in_proj_", ".attn.qkv."),
    (r"\.(attention\.output\.dense|attention\.o_proj|self_attn\.out_proj|attn\.out_proj)\.", ".attn.proj."),
    (r"\.(layernorm_before|layer_norm1|ln_1)\.", ".norm1."),
    (r"\.(layernorm_after|layer_norm2|ln_2)\.", ".norm2."),
    (r"\.(intermediate\.dense|mlp\.up_proj|mlp\.c_fc)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.down_proj|mlp\.c_proj)\.", ".mlp.fc2."),
    (r"\.(layer_scale(\d)\.lambda1|gamma_(\d))$", lambda found: f".ls{found[2] or found[3]}.gamma"),
]
LEFT = re.compile(
    r"^(mask_token|embeddings\.mask_token|embeddings\.position_ids|head|fc\.|proj$|pooler|rope|local_cls"
    r"|input_resolution$|context_length$|vocab_size$)"
)


def load(path: str | Path, name: str = "") -> ViT:
    """An encoder in evaluation mode, without gradients; it eats what `augment.normalize` makes, as all do here.

    Args:
        path: a safetensors or torch file of a ViT in its authors' format, timm's or Hugging Face's.
        name: which one it has to be, of `NAMES`; "" takes what is there.

    Raises:
        InputError: if the file is missing or broken, is more than plain numbers, or holds something else.
    """
    return make(read(Path(path)), path, name)


def make(found: dict[str, Tensor], path: str | Path, name: str = "") -> ViT:
    """The encoder of a file's tensors, by its names; for the rest see `load`."""
    try:
        state = translate(found)
        encoder, family = like(state)
        if family == "clip":
            fold(state)
        encoder.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError):
        raise InputError(
            f"{path} holds no encoder of DINO, DINOv2, DINOv3 or CLIP (ViT-S to ViT-L); its first names are "
            f"{', '.join(list(found)[:3])}."
        ) from None
    if name:
        size = next(size for size, numbers in SIZES.items() if numbers[0] == encoder.dim)
        known = Known(family, size, encoder.patch_size, encoder.registers)
        if known != NAMES[name] or len(encoder.blocks) != SIZES[size][1]:
            said = f"{family}'s ViT-{size[0].upper()}/{encoder.patch_size} with {len(encoder.blocks)} blocks"
            raise InputError(f"{path} holds {said} and {encoder.registers} registers, which is not {name}.")
    return encoder.eval().requires_grad_(False)


def ask_for(name: str, call: str = "load") -> InputError:
    """What to say when there is a name and no file; `call` is that of `pretrained` that was made."""
    place = WHERE[NAMES[name].family]
    return InputError(
        f"{name} does not come with minissl, and nothing is downloaded without being asked for; "
        f"get it from {place}, then: pretrained.{call}({name!r}, path=FILE)"
    )


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by its own names; a torch file is read as numbers only."""
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            if file.read(1) not in (b"P", b"\x80"):  # a zip archive's or a pickle's; a page of the web, for instance
                raise ValueError
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as problem:
        raise InputError(f"{path} cannot be read ({problem}).") from None
    except Exception as problem:  # a damaged file can be anything
        if type(problem).__name__ == "UnpicklingError" or "TorchScript" in str(problem):
            raise InputError(
                f"{path} holds more than numbers, and to open it would run what it says; it was left closed. "
                "Get the encoder alone, or a safetensors file."
            ) from None
        raise InputError(f"{path} is no whole safetensors or torch file; get it again.") from None
    while isinstance(found, dict) and (key := next((k for k in WRAPPERS if isinstance(found.get(k), dict)), None)):
        found = found[key]
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise InputError(f"{path} holds no weights by their names; get the encoder alone.")
    return found


def translate(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Any format's tensors under our names, in torch's default precision; of several towers, the images'."""
    for tower in TOWERS:
        if any(name.startswith(tower) for name in state):
            state = {name.removeprefix(tower): t for name, t in state.items() if name.startswith(tower)}
    ours = {}
    for name, tensor in state.items():
        if not LEFT.match(name):
            for theirs, our in SYNONYMS:
                name = re.sub(theirs, our, name)
            ours[name] = tensor.to(torch.get_default_dtype())
    for i in sorted({name.split(".")[1] for name in ours if name.startswith("blocks.")}):
        _join(ours, f"blocks.{i}.attn.")
    if "cls_token" in ours:  # CLIP's are a vector and a matrix, and without a bias
        dim = ours["cls_token"].shape[-1]
        ours["cls_token"] = ours["cls_token"].view(1, 1, dim)
        ours.setdefault("patch_embed.proj.bias", torch.zeros(dim))
        if "pos_embed" in ours:
            positions = ours["pos_embed"].view(1, -1, dim)
            if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:  # timm adds the class token's to the token
                positions = torch.cat([torch.zeros(1, 1, dim), positions], dim=1)
            ours["pos_embed"] = positions
    return ours


def fold(state: dict[str, Tensor]) -> None:
    """Let CLIP eat what the others do: the way from ImageNet's mean and deviation to its own, in its first layer."""
    (mean, deviation), weight = OF_CLIP, state["patch_embed.proj.weight"]  # (D, 3, p, p)
    shift = weight.new_tensor([(a - b) / d for a, b, d in zip(MEAN, mean, deviation)])
    scale = weight.new_tensor([a / d for a, d in zip(STD, deviation)])
    state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"] + weight.sum(dim=(2, 3)) @ shift
    state["patch_embed.proj.weight"] = weight * scale[:, None, None]


def _join(state: dict[str, Tensor], attn: str) -> None:
    """Queries, keys and values in one layer; a bias that a format leaves out, of the keys or of all, is 0."""
    if f"{attn}q.weight" in state:
        state[f"{attn}qkv.weight"] = torch.cat([state.pop(f"{attn}{part}.weight") for part in "qkv"])
    three = state[f"{attn}qkv.weight"].shape[0]
    if f"{attn}qkv.bias" not in state:
        zero = torch.zeros(three // 3)
        state[f"{attn}qkv.bias"] = torch.cat([state.pop(f"{attn}{part}.bias", zero) for part in "qkv"])
    mask = state.pop(f"{attn}qkv.bias_mask", None)
    if mask is not None:  # DINOv3's, 0 for the keys
        state[f"{attn}qkv.bias"] = state[f"{attn}qkv.bias"].where(mask.nan_to_num() != 0, 0.0)


def like(state: dict[str, Tensor]) -> tuple[ViT, str]:
    """A ViT that tensors under our names fit into, and the family it is of. Raises KeyError if there is none."""
    dim, patch = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    clip, rotary, scaled = "norm_pre.weight" in state, "pos_embed" not in state, "blocks.0.ls1.gamma" in state
    side = 14 if rotary else math.isqrt(state["pos_embed"].shape[1] - 1)
    choices = {"registers": registers, "layer_scale": 1e-5 * scaled, "clip": clip}
    choices |= {"positions": "rotary" if rotary else "learned"}
    family = "clip" if clip else "dinov3" if rotary else "dinov2" if scaled else "dino"
    return ViT(dim, depth, dim // 64, patch, side * patch, **choices), family
