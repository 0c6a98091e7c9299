"""Vision and text transformers, compared with timm, transformers and open_clip: the same weights, values and gradients.

No weights are copied. The reference network is called with minissl's tensors in place of its own, so that both sides
are differentiated by the same weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minissl.models.layers import Attention, LayerScale, Mlp, SwiGLU
from minissl.models.vit import PatchEmbed, ViT
from tests.parity.ledger import RandomInputs, Sides, comparison

Names = dict[
    str, str | tuple[str, ...]
]  # a part of minissl's name -> the reference's, or several that share the tensor

SPLIT_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
TRANSFORMERS: Names = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.proj": "attention.o_proj",
    "attn.qkv": SPLIT_QKV,
}
VIT: Names = TRANSFORMERS | {
    "norm.": "layernorm.",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "blocks": "layers",
}
LAYER_SCALE: Names = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
DINOV2: Names = TRANSFORMERS | LAYER_SCALE
DINOV2 |= {"norm.": "layernorm.", "blocks": "encoder.layer", "mlp.w3": "mlp.down_proj"}
DINOV2 |= {"mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}
DINOV3: Names = TRANSFORMERS | LAYER_SCALE
DINOV3 |= {"patch_embeddings.projection": "patch_embeddings", "blocks": "model.layer", "mlp.fc1": "mlp.up_proj"}
DINOV3 |= {"mlp.fc2": "mlp.down_proj"}
TRANSFORMERS_CLIP: Names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "blocks": "encoder.layers",
                            "attn.proj": "self_attn.out_proj",
                            "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}  # fmt: skip
OPEN_CLIP: Names = {"norm1": "ln_1", "norm2": "ln_2", "blocks": "transformer.resblocks", "attn.proj": "attn.out_proj",
                    "attn.qkv.": "attn.in_proj_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                    "norm.": "ln_post."}  # fmt: skip
EVA: Names = {"register_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}


def bind_weights(
    module: nn.Module, state: dict[str, Tensor], names: Names, unused: tuple[str, ...] = ("mask_token",)
) -> Callable[..., Any]:
    """Return a function that calls a module with other tensors in place of its parameters.

    Args:
        module: the reference network; it is not changed.
        state: minissl's tensors by name.
        names: how the parts of minissl's names translate, applied in order.
        unused: parts of the names of parameters that keep their own values.

    Raises:
        ValueError: if a parameter has no tensor.
    """
    parameters = dict(module.named_parameters())
    own, bound = parameters | dict(module.named_buffers()), {}
    for name, tensor in state.items():
        targets = [name]
        for old, new in names.items():
            new = new if isinstance(new, tuple) else (new,)
            targets = [target.replace(old, part) for target in targets for part in (new if old in target else [""])]
        for target, part in zip(targets, tensor.chunk(len(targets))):
            bound[target] = part.view_as(own[target])
    if missing := [name for name in parameters if name not in bound and not any(part in name for part in unused)]:
        raise ValueError(f"no tensor is bound to {missing}")
    return lambda *arguments, **options: functional_call(module, bound, arguments, options)


def random_vit(rng: RandomInputs, head_width: int = 8, **choices: Any) -> ViT:
    """Build a small ViT of random size and weights; each head has `head_width` channels."""
    heads, patch_size = rng.choice(2, 3, 4), rng.choice(2, 4)
    depth = rng.integer(1, 3)
    encoder = ViT(heads * head_width, depth, heads, patch_size, patch_size * rng.integer(2, 4), **choices)
    return rng.randomize(encoder).eval()


def timm_config(encoder: ViT) -> dict[str, int]:
    """Return the sizes of a ViT under timm's names."""
    side = round((encoder.pos_embed.shape[1] - 1) ** 0.5) if encoder.pos_embed is not None else 4
    sizes = {"img_size": side * encoder.patch_size, "patch_size": encoder.patch_size, "embed_dim": encoder.embed_dim}
    return sizes | {"depth": len(encoder.blocks), "num_heads": encoder.num_heads, "num_classes": 0}


def transformers_config(encoder: ViT) -> dict[str, Any]:
    """Return the sizes of a ViT under the names of transformers."""
    sizes, dim = timm_config(encoder), encoder.embed_dim
    config = {"hidden_size": dim, "num_hidden_layers": sizes["depth"], "num_attention_heads": sizes["num_heads"]}
    config |= {"image_size": sizes["img_size"], "patch_size": sizes["patch_size"], "attn_implementation": "eager"}
    return config | {"intermediate_size": 4 * dim, "hidden_act": "gelu"}


def vit_sides(
    rng: RandomInputs, encoder: ViT, reference: Callable[[Tensor], Tensor], max_extra: int = 0, num_skipped: int = 1
) -> Sides:
    """Compare class token and patches of a ViT and a reference that returns all tokens.

    Args:
        encoder: of minissl; outputs are differentiated by the images and by all weights.
        reference: maps images to tokens (B, T, D).
        max_extra: images have up to so many more patches per side than in training.
        num_skipped: number of tokens before the patches.
    """
    sizes = timm_config(encoder)
    height, width = (sizes["img_size"] + sizes["patch_size"] * rng.integer(0, max_extra) for _ in range(2))
    images = rng.leaf(rng.integer(1, 3), 3, height, width)

    def actual() -> list[Tensor]:
        cls, patches = encoder(images)
        return [cls, patches.flatten(1, 2)]

    def expected() -> list[Tensor]:
        x = reference(images)
        return [x[:, 0], x[:, num_skipped:]]

    return Sides(actual, expected, [images, *(p for p in encoder.parameters() if p.requires_grad)])


def max_extra_patches(rng: RandomInputs) -> int:
    """Return 3 in float32, 0 in float64: the libraries resample position embeddings in float32 in any precision."""
    return 3 if rng.dtype == torch.float32 else 0


def last_hidden_state(model: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    return lambda images: model(pixel_values=images).last_hidden_state


def timm_vit(rng: RandomInputs, encoder: ViT, state: dict[str, Tensor], **options: Any) -> Callable[[Tensor], Tensor]:
    """Return timm's ViT, bound to the tensors in `state`."""
    from timm.models.vision_transformer import VisionTransformer

    class Features(VisionTransformer):
        forward = VisionTransformer.forward_features

    module = Features(**timm_config(encoder), dynamic_img_size=True, **options).to(rng.dtype).eval()
    return bind_weights(module, state, {"register_tokens": "reg_token"})


@comparison("ViT (DINO)", "timm", ViT, PatchEmbed, Attention, Mlp, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    encoder = random_vit(rng)
    return vit_sides(rng, encoder, timm_vit(rng, encoder, dict(encoder.named_parameters())))


@comparison("ViT (DINO)", "transformers", ViT, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    from transformers import ViTConfig, ViTModel

    encoder = random_vit(rng)
    options = transformers_config(encoder) | {"attn_implementation": "sdpa"}  # "eager" takes the softmax in float32
    module = ViTModel(ViTConfig(**options, layer_norm_eps=1e-6), add_pooling_layer=False).to(rng.dtype).eval()
    return vit_sides(rng, encoder, last_hidden_state(bind_weights(module, dict(encoder.named_parameters()), VIT)))


@comparison("ViT with LayerScale (DINOv2)", "timm", ViT, LayerScale, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    encoder = random_vit(rng, layer_scale_init=1.0)
    return vit_sides(rng, encoder, timm_vit(rng, encoder, dict(encoder.named_parameters()), init_values=1.0))


@comparison("ViT with registers, in fp32 also at other image sizes", "timm", ViT, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    """timm adds no position to the class token; it is bound to the sum of minissl's class token and its position."""
    n = rng.integer(1, 4)
    encoder = random_vit(rng, layer_scale_init=1.0, num_registers=n)
    state = dict(encoder.named_parameters())
    state |= {"cls_token": encoder.cls_token + encoder.pos_embed[:, :1], "pos_embed": encoder.pos_embed[:, 1:]}
    reference = timm_vit(rng, encoder, state, init_values=1.0, reg_tokens=n, no_embed_class=True)
    return vit_sides(rng, encoder, reference, max_extra_patches(rng), num_skipped=1 + n)


def bind_dinov2(rng: RandomInputs, encoder: ViT, **extra: Tensor) -> Callable[..., Any]:
    """Return DINOv2 of transformers, bound to the weights of a ViT and to `extra` tensors."""
    import transformers

    swiglu, n = isinstance(encoder.blocks[0].mlp, SwiGLU), encoder.num_registers
    options = transformers_config(encoder) | {"use_swiglu_ffn": swiglu} | ({"num_register_tokens": n} if n else {})
    options.pop("intermediate_size")
    prefix = "Dinov2WithRegisters" if n else "Dinov2"
    module = getattr(transformers, f"{prefix}Model")(getattr(transformers, f"{prefix}Config")(**options))
    names = DINOV2 | {"mask_token": "embeddings.mask_token"}
    return bind_weights(module.to(rng.dtype).eval(), dict(encoder.named_parameters()) | extra, names)


def dinov2_sides(rng: RandomInputs, swiglu: bool = False, num_registers: int = 0) -> Sides:
    encoder = random_vit(rng, layer_scale_init=1.0, num_registers=num_registers, swiglu=swiglu)
    reference = last_hidden_state(bind_dinov2(rng, encoder))
    return vit_sides(rng, encoder, reference, max_extra_patches(rng) if num_registers else 0, 1 + num_registers)


@comparison("ViT with LayerScale (DINOv2)", "transformers", ViT, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    return dinov2_sides(rng)


@comparison("ViT with SwiGLU", "transformers", ViT, SwiGLU, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    return dinov2_sides(rng, swiglu=True)


@comparison("ViT with registers, in fp32 also at other image sizes", "transformers", ViT, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    return dinov2_sides(rng, swiglu=rng.choice(True, False), num_registers=rng.integer(1, 4))


@comparison("ViT with masked patches", "transformers", ViT, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    encoder = random_vit(rng, layer_scale_init=1.0)
    mask_token, size = rng.leaf(1, encoder.embed_dim), timm_config(encoder)["img_size"]
    reference, side = bind_dinov2(rng, encoder, mask_token=mask_token), size // encoder.patch_size
    images, masks = rng.leaf(2, 3, size, size), rng.mask(2, side, side)
    masks[0, 0, 0], masks[1, 0, 0] = True, False

    def actual() -> list[Tensor]:
        cls, patches = encoder(images, masks, mask_token)
        return [cls, patches.flatten(1, 2)]

    def expected() -> list[Tensor]:
        x = reference(pixel_values=images, bool_masked_pos=masks.flatten(1)).last_hidden_state
        return [x[:, 0], x[:, 1:]]

    return Sides(actual, expected, [images, mask_token, *encoder.parameters()])


@comparison("class-token attention of each block", "transformers", ViT.attention, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    n = rng.integer(1, 4)
    encoder = random_vit(rng, layer_scale_init=1.0, num_registers=n).requires_grad_(False)
    reference, images = bind_dinov2(rng, encoder), rng.normal(2, 3, *[timm_config(encoder)["img_size"]] * 2)
    layers = range(len(encoder.blocks))

    def expected() -> list[Tensor]:
        attentions = reference(pixel_values=images, output_attentions=True).attentions
        return [weights[:, :, 0, 1 + n :] for weights in attentions]

    return Sides(lambda: [encoder.attention(images, layer).flatten(2) for layer in layers], expected)
