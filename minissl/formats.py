"""Our ViTs in others' formats, so that what was trained here is used there: timm's and Hugging Face's.

The way back is `official`'s. Only what these libraries have a place for can go: linear patches, no convolutional stem.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from minissl import checkpoint
from minissl.errors import InputError
from minissl.vit import ViT

# Of a ViT's parts, our names and Hugging Face's. ViT and DINOv2 there share the first, and DINOv3 has its own.
COMMON = {
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "blocks.": "encoder.layer.",
    ".attn.proj.": ".attention.output.dense.",
    ".attn.q.": ".attention.attention.query.",
    ".attn.k.": ".attention.attention.key.",
    ".attn.v.": ".attention.attention.value.",
    ".ls1.gamma": ".layer_scale1.lambda1",
    ".ls2.gamma": ".layer_scale2.lambda1",
}
PLAIN = {
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
DINOV3 = {
    "patch_embed.proj.": "embeddings.patch_embeddings.",
    "blocks.": "layer.",
    ".attn.proj.": ".attention.o_proj.",
    ".attn.q.": ".attention.q_proj.",
    ".attn.k.": ".attention.k_proj.",
    ".attn.v.": ".attention.v_proj.",
    ".mlp.fc1.": ".mlp.up_proj.",
    ".mlp.fc2.": ".mlp.down_proj.",
}


def export(encoder: nn.Module, path: Path, form: str) -> None:
    """Write a ViT so that others load it.

    Args:
        encoder: of linear patches, without a gate.
        path: for "timm" a safetensors file, for "huggingface" a folder, of config.json and model.safetensors.
        form: one of the two.

    Raises:
        InputError: for another format, and for an encoder that it cannot hold.
    """
    if not isinstance(encoder, ViT) or not isinstance(encoder.patch_embed.stem, nn.Identity):
        raise InputError("Only a ViT with linear patches (--encoder.stem patch) has a place in others' formats.")
    if hasattr(encoder.blocks[0].mlp, "w12") or not isinstance(encoder.norm_pre, nn.Identity):
        raise InputError("CLIP's towers and ViTs with a gate are not exported.")
    if encoder.stretch is None and encoder.pos_embed is None:
        raise InputError("A ViT without positions is not exported: others' all have some.")
    if form == "timm":
        checkpoint.make_folder(path.parent)
        checkpoint.write(path, save(to_timm(encoder), metadata={"format": "pt"}))
        return
    if form != "huggingface":
        raise InputError(f"There is no format {form!r}; choose timm or huggingface.")
    tensors, config = to_huggingface(encoder)
    checkpoint.keep_off(path)
    checkpoint.make_folder(path)
    checkpoint.write(path / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    checkpoint.write_json(path / "config.json", config)


def to_timm(encoder: ViT) -> dict[str, Tensor]:
    """The tensors by timm's names: of its VisionTransformer, or, with rotary positions, of its Eva with biases."""
    state = {name.replace("register_tokens", "reg_token"): t for name, t in encoder.state_dict().items()}
    if encoder.stretch is None:
        if encoder.registers:  # there the class token has its position already
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:].contiguous()
        return state
    if any(block.attn.qkv.bias.chunk(3)[1].any() for block in encoder.blocks):
        raise InputError("timm has no place for the keys' biases beside rotary positions; choose huggingface.")
    for i in range(len(encoder.blocks)):
        bias = state.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{i}.attn.q_bias": bias[0].clone(), f"blocks.{i}.attn.v_bias": bias[2].clone()}
        for n in (1, 2):
            state[f"blocks.{i}.gamma_{n}"] = state.pop(f"blocks.{i}.ls{n}.gamma", torch.ones(encoder.dim))
    return state


def to_huggingface(encoder: ViT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by Hugging Face's names, and the config: of a ViT, or of DINOv2's, or of DINOv3's."""
    rotary, attn = encoder.stretch is not None, encoder.blocks[0].attn
    scaled = not isinstance(encoder.blocks[0].ls1, nn.Identity)
    kind = "dinov3_vit" if rotary else "dinov2_with_registers" if encoder.registers else "dinov2" if scaled else "vit"
    names = COMMON | (DINOV3 if rotary else PLAIN if kind == "vit" else {})
    if not rotary:
        names |= {"norm.": "layernorm."}
    state = {}
    for name, tensor in encoder.state_dict().items():
        if ".attn.qkv." in name:
            state |= {name.replace("qkv", part): t.clone() for part, t in zip("qkv", tensor.chunk(3))}
        else:
            state[name] = tensor
    if kind != "vit":
        state["embeddings.mask_token"] = torch.zeros(1, 1, encoder.dim) if rotary else torch.zeros(1, encoder.dim)
        for i in range(len(encoder.blocks) if not scaled else 0):
            state |= {f"blocks.{i}.ls{n}.gamma": torch.ones(encoder.dim) for n in (1, 2)}
    tensors = {_renamed(name, names): tensor for name, tensor in state.items()}
    grid = 14 if rotary else round((encoder.pos_embed.shape[1] - 1) ** 0.5)
    config = {
        "model_type": kind,
        "architectures": [{"vit": "ViTModel", "dinov2": "Dinov2Model", "dinov3_vit": "DINOv3ViTModel"}.get(
            kind, "Dinov2WithRegistersModel")],
        "hidden_size": encoder.dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": attn.heads,
        "intermediate_size": 4 * encoder.dim,
        "image_size": grid * encoder.patch_size,
        "patch_size": encoder.patch_size,
        "layer_norm_eps": encoder.norm.eps,
    }  # fmt: skip
    if encoder.registers or rotary:
        config["num_register_tokens"] = encoder.registers
    return tensors, config | ({"key_bias": True} if rotary else {})


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        name = name.replace(ours, theirs) if ours.startswith(".") else name
    return name
