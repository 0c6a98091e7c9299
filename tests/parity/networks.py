"""Vision and text transformers beside timm's, transformers' and open_clip's: the same weights, values and gradients.

Nothing is copied: the other network is called with our tensors in the place of its own, so both sides are
differentiated by the very same weights.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from minissl.patches import PatchEmbed
from minissl.transformer import Attention, LayerScale, Mlp, SwiGLU
from minissl.vit import ViT
from tests.parity.ledger import Draw, Sides, compared

Names = dict[str, str | tuple[str, ...]]  # ours, or a part of it, and theirs; several share one of ours

SPLIT = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
TRANSFORMERS: Names = {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "attn.proj": "attention.o_proj",
    "attn.qkv": SPLIT,
}
VIT: Names = TRANSFORMERS | {
    "norm.": "layernorm.",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "blocks": "layers",
}
SCALED: Names = {"ls1.gamma": "layer_scale1.lambda1", "ls2.gamma": "layer_scale2.lambda1"}
DINOV2: Names = TRANSFORMERS | SCALED | {"norm.": "layernorm.", "blocks": "encoder.layer", "mlp.w3": "mlp.down_proj",
                                         "mlp.w12": ("mlp.gate_proj", "mlp.up_proj")}  # fmt: skip
DINOV3: Names = TRANSFORMERS | SCALED | {"patch_embeddings.projection": "patch_embeddings", "blocks": "model.layer",
                                         "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}  # fmt: skip
OF_CLIP: Names = {"norm1": "layer_norm1", "norm2": "layer_norm2", "blocks": "encoder.layers",
                  "attn.proj": "self_attn.out_proj",
                  "attn.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}  # fmt: skip
OPEN_CLIP: Names = {"norm1": "ln_1", "norm2": "ln_2", "blocks": "transformer.resblocks", "attn.proj": "attn.out_proj",
                    "attn.qkv.": "attn.in_proj_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
                    "norm.": "ln_post."}  # fmt: skip
EVA: Names = {"register_tokens": "reg_token", "ls1.gamma": "gamma_1", "ls2.gamma": "gamma_2"}


def lend(
    model: nn.Module, ours: dict[str, Tensor], names: Names, unused: tuple[str, ...] = ("mask_token",)
) -> Callable[..., Any]:
    """`model`, called with our tensors in the place of all of its own but `unused`."""
    own = dict(model.named_parameters())
    wanted, lent = own | dict(model.named_buffers()), {}
    for name, tensor in ours.items():
        found = [name]
        for our, their in names.items():
            their = their if isinstance(their, tuple) else (their,)
            found = [one.replace(our, new) for one in found for new in (their if our in one else [""])]
        for one, part in zip(found, tensor.chunk(len(found))):
            lent[one] = part.view_as(wanted[one])
    if left := [name for name in own if name not in lent and not any(part in name for part in unused)]:
        raise ValueError(f"nothing was lent for {left}")
    return lambda *arguments, **options: functional_call(model, lent, arguments, options)


def our_vit(draw: Draw, width: int = 8, **choices: Any) -> ViT:
    """A small ViT of random size and weights; `width` of a head divides its width."""
    heads, patch = draw.one_of(2, 3, 4), draw.one_of(2, 4)
    encoder = ViT(heads * width, draw.whole(1, 3), heads, patch, patch * draw.whole(2, 4), **choices)
    return draw.shake(encoder).eval()


def sizes(ours: ViT) -> dict[str, int]:
    """What timm calls them."""
    side, depth = round((ours.pos_embed.shape[1] - 1) ** 0.5) if ours.pos_embed is not None else 4, len(ours.blocks)
    size, heads = {"img_size": side * ours.patch_size, "patch_size": ours.patch_size}, ours.blocks[0].attn.heads
    return size | {"embed_dim": ours.dim, "depth": depth, "num_heads": heads, "num_classes": 0}


def config(ours: ViT) -> dict[str, Any]:
    """What transformers call them."""
    of = sizes(ours)
    found = {"hidden_size": ours.dim, "num_hidden_layers": of["depth"], "num_attention_heads": of["num_heads"]}
    found |= {"image_size": of["img_size"], "patch_size": of["patch_size"], "attn_implementation": "eager"}
    return found | {"intermediate_size": 4 * ours.dim, "hidden_act": "gelu"}


def beside(draw: Draw, ours: ViT, theirs: Callable[[Tensor], Tensor], stretch: int = 0, skip: int = 1) -> Sides:
    """Class token and patches of both, by images, of up to `stretch` patches more a side, and by every weight."""
    of = sizes(ours)
    high, wide = (of["img_size"] + of["patch_size"] * draw.whole(0, stretch) for _ in range(2))
    images = draw.free(draw.whole(1, 3), 3, high, wide)

    def right() -> list[Tensor]:
        x = theirs(images)
        return [x[:, 0], x[:, skip:]]

    def found() -> list[Tensor]:
        cls, patches = ours(images)
        return [cls, patches.flatten(1, 2)]

    return Sides(found, right, [images, *(p for p in ours.parameters() if p.requires_grad)])


def other_sizes(draw: Draw) -> int:
    """Learned positions are stretched in float32 by the libraries, whatever the precision of the rest."""
    return 3 if draw.dtype == torch.float32 else 0


def last_state(model: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    return lambda images: model(pixel_values=images).last_hidden_state


def timm_vit(draw: Draw, ours: ViT, state: dict[str, Tensor], **options: Any) -> Callable[[Tensor], Tensor]:
    from timm.models.vision_transformer import VisionTransformer

    class Features(VisionTransformer):
        forward = VisionTransformer.forward_features

    theirs = Features(**sizes(ours), dynamic_img_size=True, **options).to(draw.dtype).eval()
    return lend(theirs, state, {"register_tokens": "reg_token"})


@compared("ViT, as DINO has it", "timm", ViT, PatchEmbed, Attention, Mlp, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    ours = our_vit(draw)
    return beside(draw, ours, timm_vit(draw, ours, dict(ours.named_parameters())))


@compared("ViT, as DINO has it", "transformers", ViT, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    from transformers import ViTConfig, ViTModel

    ours = our_vit(draw)
    options = config(ours) | {"attn_implementation": "sdpa"}  # "eager" takes the softmax in float32
    theirs = ViTModel(ViTConfig(**options, layer_norm_eps=1e-6), add_pooling_layer=False).to(draw.dtype).eval()
    return beside(draw, ours, last_state(lend(theirs, dict(ours.named_parameters()), VIT)))


@compared("ViT with LayerScale, as DINOv2 has it", "timm", ViT, LayerScale, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    ours = our_vit(draw, layer_scale=1.0)
    return beside(draw, ours, timm_vit(draw, ours, dict(ours.named_parameters()), init_values=1.0))


@compared("ViT with registers, in fp32 at other sizes too", "timm", ViT, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    """timm's class token has no position there: it is lent the sum of ours."""
    n = draw.whole(1, 4)
    ours = our_vit(draw, layer_scale=1.0, registers=n)
    state = dict(ours.named_parameters())
    state |= {"cls_token": ours.cls_token + ours.pos_embed[:, :1], "pos_embed": ours.pos_embed[:, 1:]}
    theirs = timm_vit(draw, ours, state, init_values=1.0, reg_tokens=n, no_embed_class=True)
    return beside(draw, ours, theirs, stretch=other_sizes(draw), skip=1 + n)


def lend_dinov2(draw: Draw, ours: ViT, **besides: Tensor) -> Callable[..., Any]:
    import transformers

    gated, n = hasattr(ours.blocks[0].mlp, "w12"), ours.registers
    options = config(ours) | {"use_swiglu_ffn": gated} | ({"num_register_tokens": n} if n else {})
    options.pop("intermediate_size")
    kind = "Dinov2WithRegisters" if n else "Dinov2"
    theirs = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
    names = DINOV2 | {"mask_token": "embeddings.mask_token"}
    return lend(theirs.to(draw.dtype).eval(), dict(ours.named_parameters()) | besides, names)


def dinov2(draw: Draw, gated: bool = False, registers: int = 0) -> Sides:
    ours = our_vit(draw, layer_scale=1.0, registers=registers, gated=gated)
    theirs, stretch = last_state(lend_dinov2(draw, ours)), other_sizes(draw) if registers else 0
    return beside(draw, ours, theirs, stretch, skip=1 + registers)


@compared("ViT with LayerScale, as DINOv2 has it", "transformers", ViT, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    return dinov2(draw)


@compared("ViT with SwiGLU", "transformers", ViT, SwiGLU, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    return dinov2(draw, gated=True)


@compared("ViT with registers, in fp32 at other sizes too", "transformers", ViT, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    return dinov2(draw, gated=draw.one_of(True, False), registers=draw.whole(1, 4))


@compared("ViT with hidden patches", "transformers", ViT, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    ours = our_vit(draw, layer_scale=1.0)
    token, size = draw.free(1, ours.dim), sizes(ours)["img_size"]
    ask, side = lend_dinov2(draw, ours, mask_token=token), size // ours.patch_size
    images, masks = draw.free(2, 3, size, size), draw.mask(2, side, side)
    masks[0, 0, 0], masks[1, 0, 0] = True, False

    def found() -> list[Tensor]:
        cls, patches = ours(images, masks, token)
        return [cls, patches.flatten(1, 2)]

    def right() -> list[Tensor]:
        x = ask(pixel_values=images, bool_masked_pos=masks.flatten(1)).last_hidden_state
        return [x[:, 0], x[:, 1:]]

    return Sides(found, right, [images, token, *ours.parameters()])


@compared("the class token's attention in each block", "transformers", ViT.attention, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    n = draw.whole(1, 4)
    ours = our_vit(draw, layer_scale=1.0, registers=n).requires_grad_(False)
    ask, images = lend_dinov2(draw, ours), draw.normal(2, 3, *[sizes(ours)["img_size"]] * 2)
    layers = range(len(ours.blocks))

    def theirs() -> list[Tensor]:
        return [weights[:, :, 0, 1 + n :] for weights in ask(pixel_values=images, output_attentions=True).attentions]

    return Sides(lambda: [ours.attention(images, layer).flatten(2) for layer in layers], theirs)
