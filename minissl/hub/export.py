"""Export ViTs in the formats of timm and Hugging Face.

`hub.official` reads these files back. Only what these libraries can represent is exported: linear patch embedding,
not a convolutional stem.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from minissl.errors import InputError
from minissl.models.layers import Block, SwiGLU
from minissl.models.outputs import Encoder
from minissl.models.vit import ViT
from minissl.training import checkpoint

# minissl's names of a ViT's modules and Hugging Face's. Its ViT and DINOv2 share the first; DINOv3 has its own.
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
ARCHITECTURES = {  # Hugging Face's model types and classes
    "vit": "ViTModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "dinov3_vit": "DINOv3ViTModel",
}


def export_encoder(encoder: Encoder, path: Path, form: str) -> None:
    """Write a ViT in the format of another library.

    Args:
        encoder: a ViT with linear patches and without SwiGLU.
        path: for "timm" a safetensors file, for "huggingface" a folder, which gets config.json and model.safetensors.
        form: "timm" or "huggingface".

    Raises:
        InputError: for another format, and for an encoder that the format cannot represent.
    """
    if form not in ("timm", "huggingface"):
        raise InputError(f"There is no format {form!r}; choose timm or huggingface.")
    if not isinstance(encoder, ViT) or not isinstance(encoder.patch_embed.stem, nn.Identity):
        raise InputError("Only a ViT with linear patches (--encoder.stem patch) can be exported to other formats.")
    if isinstance(_blocks(encoder)[0].mlp, SwiGLU) or not isinstance(encoder.norm_pre, nn.Identity):
        raise InputError("ViTs with SwiGLU and CLIP's image encoder cannot be exported; use the format minissl.")
    if encoder.rope_augmentation is None and encoder.pos_embed is None:
        raise InputError("A ViT without position encoding cannot be exported: other formats require one.")
    if form == "timm":
        tensors = to_timm(encoder)
        checkpoint.make_folder(path.parent)
        checkpoint.write_atomic(path, save(tensors, metadata={"format": "pt"}))
        return
    tensors, config = to_huggingface(encoder)
    checkpoint.refuse_run_dir(path)
    checkpoint.make_folder(path)
    checkpoint.write_atomic(path / "model.safetensors", save(tensors, metadata={"format": "pt"}))
    checkpoint.write_json(path / "config.json", config)


def to_timm(encoder: ViT) -> dict[str, Tensor]:
    """Return the tensors by timm's names: of its VisionTransformer or, with RoPE, of its Eva with biases."""
    state = {name.replace("register_tokens", "reg_token"): t for name, t in encoder.state_dict().items()}
    if encoder.rope_augmentation is None:
        if encoder.num_registers:  # timm's class token includes its position embedding then
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:].contiguous()
        return state
    if any(block.attn.qkv.bias.chunk(3)[1].any() for block in _blocks(encoder)):
        raise InputError("timm cannot represent biases of the keys together with RoPE; choose huggingface.")
    for i in range(len(encoder.blocks)):
        bias = state.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        state |= {f"blocks.{i}.attn.q_bias": bias[0].clone(), f"blocks.{i}.attn.v_bias": bias[2].clone()}
        for n in (1, 2):
            state[f"blocks.{i}.gamma_{n}"] = state.pop(f"blocks.{i}.ls{n}.gamma", torch.ones(encoder.embed_dim))
    return state


def to_huggingface(encoder: ViT) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors by Hugging Face's names and the config, of a ViT, DINOv2 or DINOv3 there."""
    rope, layer_scale = encoder.rope_augmentation is not None, _has_layer_scale(encoder)
    plain = "dinov2_with_registers" if encoder.num_registers else "dinov2" if layer_scale else "vit"
    model_type = "dinov3_vit" if rope else plain
    names = COMMON | (DINOV3 if rope else PLAIN if model_type == "vit" else {})
    if not rope:
        names |= {"norm.": "layernorm."}
    state: dict[str, Tensor] = {}
    for name, tensor in encoder.state_dict().items():
        if ".attn.qkv." in name:
            state |= {name.replace("qkv", part): t.clone() for part, t in zip("qkv", tensor.chunk(3))}
        else:
            state[name] = tensor
    if model_type != "vit":
        dim = encoder.embed_dim
        state["embeddings.mask_token"] = torch.zeros(1, 1, dim) if rope else torch.zeros(1, dim)
        for i in range(len(encoder.blocks) if not layer_scale else 0):
            state |= {f"blocks.{i}.ls{n}.gamma": torch.ones(dim) for n in (1, 2)}
    return {_rename(name, names): tensor for name, tensor in state.items()}, _huggingface_config(encoder, model_type)


def _huggingface_config(encoder: ViT, model_type: str) -> dict[str, Any]:
    side = 14 if encoder.pos_embed is None else round((encoder.pos_embed.shape[1] - 1) ** 0.5)
    config = {
        "model_type": model_type,
        "architectures": [ARCHITECTURES[model_type]],
        "hidden_size": encoder.embed_dim,
        "num_hidden_layers": len(encoder.blocks),
        "num_attention_heads": encoder.num_heads,
        "intermediate_size": 4 * encoder.embed_dim,
        "image_size": side * encoder.patch_size,
        "patch_size": encoder.patch_size,
        "layer_norm_eps": encoder.norm.eps,
    }
    if encoder.num_registers or encoder.pos_embed is None:
        config["num_register_tokens"] = encoder.num_registers
    return config | ({"key_bias": True} if encoder.pos_embed is None else {})


def _blocks(encoder: ViT) -> list[Block]:
    return [block for block in encoder.blocks if isinstance(block, Block)]


def _has_layer_scale(encoder: ViT) -> bool:
    return not isinstance(_blocks(encoder)[0].ls1, nn.Identity)


def _rename(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = new + name.removeprefix(old) if name.startswith(old) else name
        name = name.replace(old, new) if old.startswith(".") else name
    return name
