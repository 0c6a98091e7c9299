"""Load official encoders from a file: DINO, DINOv2, DINOv3 and the image encoder of CLIP.

Files in the format of the authors, timm and Hugging Face are read; they name the same tensors differently. minissl's
names are those of the official DINO family, to which all others are renamed. The architecture is inferred from the
shapes. Nothing is downloaded, and no code in a file is executed.

Shapes: width D, N = hw patches, R registers.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from minissl.data.transforms.functional import IMAGENET_MEAN, IMAGENET_STD
from minissl.errors import InputError
from minissl.models.vit import SIZES, ViT


class OfficialSpec(NamedTuple):
    """Architecture of an official encoder."""

    family: str
    size: str
    patch_size: int
    num_registers: int


OFFICIAL_ENCODERS = {
    **{f"dino_vit{s[0]}{p}": OfficialSpec("dino", s, p, 0) for s in ("small", "base") for p in (16, 8)},
    **{f"dinov2_vit{s[0]}14": OfficialSpec("dinov2", s, 14, 0) for s in ("small", "base", "large")},
    **{f"dinov2_vit{s[0]}14_reg": OfficialSpec("dinov2", s, 14, 4) for s in ("small", "base", "large")},
    **{f"dinov3_vit{s[0]}16": OfficialSpec("dinov3", s, 16, 4) for s in ("small", "base", "large")},
    "clip_vitb32": OfficialSpec("clip", "base", 32, 0),
    "clip_vitb16": OfficialSpec("clip", "base", 16, 0),
    "clip_vitl14": OfficialSpec("clip", "large", 14, 0),
}
SOURCES = {  # where the files are, and their license
    "dino": "github.com/facebookresearch/dino (backbone only) or Hugging Face's facebook/dino-..., Apache 2.0",
    "dinov2": "github.com/facebookresearch/dinov2 (backbone only) or Hugging Face's facebook/dinov2-..., Apache 2.0",
    "dinov3": "github.com/facebookresearch/dinov3, on request and under Meta's own DINOv3 license",
    "clip": "Hugging Face's openai/clip-vit-..., model.safetensors, MIT",
}
CLIP_MEAN_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's input images
WRAPPERS = ("teacher", "model", "state_dict")  # keys under which checkpoints of a training hold the weights
PREFIXES = ("module.", "backbone.", "visual.", "vision_model.", "vit.", "dinov2.")  # before an encoder's names
SYNONYMS: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [  # regular expression, minissl's name
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
    (r"\.(layer_scale(\d)\.lambda1|gamma_(\d))$", lambda match: f".ls{match[2] or match[3]}.gamma"),
]
IGNORED_TENSORS = re.compile(
    r"^(mask_token|embeddings\.mask_token|embeddings\.position_ids|head|fc\.|proj$|pooler|rope|local_cls"
    r"|input_resolution$|context_length$|vocab_size$)"
)


def load_official(path: str | Path, name: str = "") -> ViT:
    """Load an official encoder in evaluation mode, without gradients.

    Like all encoders, it takes images that are normalized with the ImageNet mean and standard deviation.

    Args:
        path: a safetensors or torch file of a ViT in the format of its authors, timm or Hugging Face.
        name: one of `OFFICIAL_ENCODERS` that the file has to hold; "" accepts any.

    Raises:
        InputError: if the file is missing or damaged, holds more than tensors, or holds another network.
    """
    return build_encoder(read_weights(Path(path)), path, name)


def build_encoder(tensors: dict[str, Tensor], path: str | Path, name: str = "") -> ViT:
    """Build the encoder that a file's tensors belong to and load them. Arguments and errors as for `load_official`."""
    try:
        state = to_minissl_names(tensors)
        encoder, family = infer_vit_config(state)
        if family == "clip":
            fold_normalization(state)
        encoder.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError):
        raise InputError(
            f"{path} holds no encoder of DINO, DINOv2, DINOv3 or CLIP (ViT-S to ViT-L); its first tensors are "
            f"{', '.join(list(tensors)[:3])}."
        ) from None
    if name:
        _check_architecture(encoder, family, path, name)
    return encoder.eval().requires_grad_(False)


def _check_architecture(encoder: ViT, family: str, path: str | Path, name: str) -> None:
    """Raise InputError if an encoder is not the official one of a name."""
    size = next(size for size, (width, _, _) in SIZES.items() if width == encoder.embed_dim)
    spec = OfficialSpec(family, size, encoder.patch_size, encoder.num_registers)
    if spec != OFFICIAL_ENCODERS[name] or len(encoder.blocks) != SIZES[size][1]:
        raise InputError(
            f"{path} holds {family}'s ViT-{size[0].upper()}/{encoder.patch_size} with {len(encoder.blocks)} blocks and "
            f"{encoder.num_registers} registers, which is not {name}; give its own name or another file."
        )


def missing_weights_error(name: str, function: str) -> InputError:
    """Return the error for an official name without a file; `function` of `hub.pretrained` was called."""
    source = SOURCES[OFFICIAL_ENCODERS[name].family]
    return InputError(
        f"{name} is not shipped with minissl and is not downloaded automatically; "
        f"get it from {source}, then: {function}({name!r}, path=FILE)"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors or torch file, by the file's own names. Pickled code is never executed.

    Raises:
        InputError: if the file is missing or damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            if file.read(1) not in (b"P", b"\x80"):  # a zip archive or a pickle; not, for instance, a web page
                raise ValueError
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError) as error:
        raise InputError(f"{path} cannot be read ({error}).") from None
    except Exception as error:  # a damaged file can raise anything
        if type(error).__name__ == "UnpicklingError" or "TorchScript" in str(error):
            raise InputError(
                f"{path} holds more than tensors, and opening it would execute code; it was not opened. "
                "Get the encoder alone, or a safetensors file."
            ) from None
        raise InputError(f"{path} is not a complete safetensors or torch file; get it again.") from None
    return _unwrap(content, path)


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the dict of tensors in a torch file, which may lie under keys of a training checkpoint."""
    while isinstance(content, dict) and (key := next((k for k in WRAPPERS if isinstance(content.get(k), dict)), None)):
        content = content[key]
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise InputError(f"{path} holds no tensors by name; get the encoder alone.")
    return content


def to_minissl_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of any format to minissl's names, in torch's default precision.

    Of a file with an image and a text encoder, the image encoder is taken.
    """
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    state = {}
    for name, tensor in tensors.items():
        if not IGNORED_TENSORS.match(name):
            for pattern, new_name in SYNONYMS:
                name = re.sub(pattern, new_name, name)
            state[name] = tensor.to(torch.get_default_dtype())
    for i in sorted({name.split(".")[1] for name in state if name.startswith("blocks.")}):
        _merge_qkv(state, f"blocks.{i}.attn.")
    if "cls_token" in state:
        _complete_embeddings(state)
    return state


def _complete_embeddings(state: dict[str, Tensor]) -> None:
    """Reshape the class token and position embeddings, and add what a format leaves out, in place."""
    dim = state["cls_token"].shape[-1]
    state["cls_token"] = state["cls_token"].view(1, 1, dim)  # CLIP's is a vector
    state.setdefault("patch_embed.proj.bias", torch.zeros(dim))  # CLIP has none
    if "pos_embed" in state:
        positions = state["pos_embed"].view(1, -1, dim)  # CLIP's is a matrix
        if math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:  # timm adds that of the class token to the token
            positions = torch.cat([torch.zeros(1, 1, dim), positions], dim=1)
        state["pos_embed"] = positions


def fold_normalization(state: dict[str, Tensor]) -> None:
    """Fold the conversion from ImageNet's mean and standard deviation to CLIP's into the patch embedding, in place."""
    (mean, std), weight = CLIP_MEAN_STD, state["patch_embed.proj.weight"]  # (D, 3, p, p)
    shift = weight.new_tensor([(a - b) / d for a, b, d in zip(IMAGENET_MEAN, mean, std)])
    scale = weight.new_tensor([a / d for a, d in zip(IMAGENET_STD, std)])
    state["patch_embed.proj.bias"] = state["patch_embed.proj.bias"] + weight.sum(dim=(2, 3)) @ shift
    state["patch_embed.proj.weight"] = weight * scale[:, None, None]


def _merge_qkv(state: dict[str, Tensor], attn: str) -> None:
    """Concatenate queries, keys and values into one layer, in place; biases that a format leaves out are 0."""
    if f"{attn}q.weight" in state:
        state[f"{attn}qkv.weight"] = torch.cat([state.pop(f"{attn}{part}.weight") for part in "qkv"])
    width = state[f"{attn}qkv.weight"].shape[0] // 3
    if f"{attn}qkv.bias" not in state:
        zeros = torch.zeros(width)
        state[f"{attn}qkv.bias"] = torch.cat([state.pop(f"{attn}{part}.bias", zeros) for part in "qkv"])
    mask = state.pop(f"{attn}qkv.bias_mask", None)
    if mask is not None:  # DINOv3's, 0 for the keys
        state[f"{attn}qkv.bias"] = state[f"{attn}qkv.bias"].where(mask.nan_to_num() != 0, 0.0)


def infer_vit_config(state: dict[str, Tensor]) -> tuple[ViT, str]:
    """Build a ViT that tensors by minissl's names fit into, and return it with the name of its family.

    Raises:
        KeyError, ValueError: if there is none.
    """
    dim, patch_size = state["cls_token"].shape[-1], state["patch_embed.proj.weight"].shape[-1]
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    num_registers = state["register_tokens"].shape[1] if "register_tokens" in state else 0
    clip, rope, layer_scale = "norm_pre.weight" in state, "pos_embed" not in state, "blocks.0.ls1.gamma" in state
    side = 14 if rope else math.isqrt(state["pos_embed"].shape[1] - 1)
    encoder = ViT(
        dim,
        depth,
        dim // 64,
        patch_size,
        side * patch_size,
        pos_embed="rope" if rope else "learned",
        clip=clip,
        num_registers=num_registers,
        layer_scale_init=1e-5 * layer_scale,
    )
    return encoder, "clip" if clip else "dinov3" if rope else "dinov2" if layer_scale else "dino"
