"""What grew out of the ViT: rotary positions, CLIP's two towers and the masked autoencoder, beside the libraries'."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.methods.pretext import MaskedAutoencoder
from minissl.text import TextTransformer
from minissl.transformer import quick_gelu
from minissl.vit import ViT
from tests.parity.ledger import Draw, Sides, compared
from tests.parity.networks import (
    DINOV3,
    EVA,
    OF_CLIP,
    OPEN_CLIP,
    VIT,
    Names,
    beside,
    config,
    last_state,
    lend,
    our_vit,
    sizes,
)

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@compared("ViT with rotary positions, as DINOv3 has it", "timm", ViT, fp64=None, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    from timm.models.eva import Eva

    class Features(Eva):
        forward = Eva.forward_features

    n = draw.whole(1, 4)
    ours = our_vit(draw, layer_scale=1.0, registers=n, positions="rotary")
    theirs = Features(**sizes(ours), init_values=1.0, num_reg_tokens=n, use_abs_pos_emb=False, qkv_bias=True,
                      use_rot_pos_emb=True, rope_type="dinov3", rope_temperature=100.0, rope_rotate_half=True,
                      no_embed_class=True, use_fc_norm=False, norm_layer=partial(nn.LayerNorm, eps=1e-5),
                      dynamic_img_size=True)  # fmt: skip
    bias: Names = {"attn.qkv.bias": ("attn.q_bias", "attn.k_bias", "attn.v_bias")}
    return beside(draw, ours, lend(theirs.eval(), dict(ours.named_parameters()), EVA | bias), stretch=3, skip=1 + n)


@compared("ViT with rotary positions, as DINOv3 has it", "transformers", ViT, fp64=None, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    n = draw.whole(1, 4)
    ours = our_vit(draw, layer_scale=1.0, registers=n, positions="rotary")
    theirs = DINOv3ViTModel(DINOv3ViTConfig(**config(ours), num_register_tokens=n, key_bias=True)).eval()
    return beside(draw, ours, last_state(lend(theirs, dict(ours.named_parameters()), DINOV3)), stretch=3, skip=1 + n)


def clip_tower(draw: Draw) -> tuple[ViT, dict[str, Tensor], Tensor, Tensor]:
    """Ours, its tensors, a projection and images; CLIP has no bias of patches."""
    ours = our_vit(draw, clip=True)
    ours.patch_embed.proj.bias.requires_grad_(False).zero_()
    state = {name: tensor for name, tensor in ours.named_parameters() if tensor.requires_grad}
    size = sizes(ours)["img_size"]
    return ours, state, draw.free(ours.dim, draw.whole(3, 9)), draw.free(2, 3, size, size)


@compared("CLIP's image tower", "transformers", ViT, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    ours, state, projection, images = clip_tower(draw)
    options = config(ours) | {"hidden_act": "quick_gelu", "projection_dim": projection.shape[1]}
    theirs = CLIPVisionModelWithProjection(CLIPVisionConfig(**options | {"attn_implementation": "sdpa"}))
    names = OF_CLIP | {"cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding.weight",
                       "patch_embed.proj": "embeddings.patch_embedding", "norm_pre": "pre_layrnorm",
                       ".norm.": ".post_layernorm."}  # fmt: skip
    state_of = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    ask = lend(theirs.to(draw.dtype).eval(), state_of | {"visual_projection.weight": projection.T}, names)
    inputs = [images, projection, *state.values()]
    return Sides(lambda: ours(images).cls @ projection, lambda: ask(pixel_values=images).image_embeds, inputs)


def open_clips(draw: Draw, dim: int, vision: dict[str, Any], text: dict[str, Any]) -> nn.Module:
    from open_clip import CLIP

    return CLIP(embed_dim=dim, quick_gelu=True, vision_cfg=vision, text_cfg=text).to(draw.dtype).eval()


SMALL_TEXT = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
SMALL_VISION = {"image_size": 4, "patch_size": 4, "width": 8, "head_width": 8, "layers": 1}


@compared("CLIP's image tower", "open_clip", ViT, quick_gelu, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    ours, state, projection, images = clip_tower(draw)
    vision = {"image_size": images.shape[-1], "patch_size": ours.patch_size, "width": ours.dim, "head_width": 8}
    theirs = open_clips(draw, projection.shape[1], vision | {"layers": len(ours.blocks)}, SMALL_TEXT).visual
    names = OPEN_CLIP | {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "norm_pre": "ln_pre",
                         "patch_embed.proj": "conv1"}  # fmt: skip
    ask = lend(theirs, state | {"proj": projection}, names)
    return Sides(lambda: ours(images).cls @ projection, lambda: ask(images), [images, projection, *state.values()])


def sentences(draw: Draw) -> tuple[TextTransformer, Tensor, int]:
    """Ours, and tokens: a start, words, an end, zeros."""
    length, vocabulary, heads = draw.whole(4, 9), draw.whole(20, 40), draw.one_of(2, 3, 4)
    ours = TextTransformer(vocabulary, length, 8 * heads, draw.whole(1, 3), heads, draw.whole(3, 9))
    tokens = torch.zeros(draw.whole(2, 5), length, dtype=torch.long)
    for row in tokens:
        end = draw.whole(1, length - 1)
        row[:end] = draw.numbers(end, below=vocabulary - 2)
        row[0], row[end] = vocabulary - 2, vocabulary - 1
    return draw.shake(ours).eval(), tokens, vocabulary


@compared("CLIP's text tower", "transformers", TextTransformer, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    ours, tokens, vocabulary = sentences(draw)
    width, out = ours.text_projection.in_features, ours.text_projection.out_features
    options = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 4 * width, "projection_dim": out}
    options |= {"num_hidden_layers": len(ours.blocks), "num_attention_heads": width // 8, "hidden_act": "quick_gelu"}
    options |= {
        "max_position_embeddings": tokens.shape[1],
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    theirs = CLIPTextModelWithProjection(CLIPTextConfig(**options, pad_token_id=0)).to(draw.dtype).eval()
    state = {f"text_model.{name}": tensor for name, tensor in ours.named_parameters()}
    names = OF_CLIP | {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm",
                       "positional_embedding": "embeddings.position_embedding.weight",
                       "text_model.text_projection": "text_projection"}  # fmt: skip
    ask = lend(theirs, state, names)
    return Sides(lambda: ours(tokens), lambda: ask(input_ids=tokens).text_embeds, list(ours.parameters()))


@compared("CLIP's text tower", "open_clip", TextTransformer, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    """Its vectors have length 1."""
    ours, tokens, vocabulary = sentences(draw)
    width, out = ours.text_projection.in_features, ours.text_projection.out_features
    text = {"context_length": tokens.shape[1], "vocab_size": vocabulary, "width": width, "heads": width // 8}
    theirs = open_clips(draw, out, SMALL_VISION, text | {"layers": len(ours.blocks)})
    state = dict(ours.named_parameters())
    state["text_projection"] = state.pop("text_projection.weight").T
    ask = lend(theirs, state, OPEN_CLIP, unused=("visual", "logit_scale"))
    return Sides(lambda: F.normalize(ours(tokens), dim=-1), lambda: ask(text=tokens)[1], list(ours.parameters()))


@compared("the masked autoencoder, all of it", "transformers", MaskedAutoencoder, fp64=None, fp32=1e-5, slow=True)
def _(draw: Draw) -> Sides:
    """The same noise says what is hidden."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    encoder, width, ratio, normed = our_vit(draw), 32 * draw.whole(1, 2), draw.real(0.3, 0.7), draw.one_of(True, False)
    size, b = sizes(encoder)["img_size"], draw.whole(2, 4)
    n, images = (size // encoder.patch_size) ** 2, draw.uniform(b, 3, size, size)
    task = draw.shake(MaskedAutoencoder(encoder, n, ratio, normed, width, draw.whole(1, 2)))
    options = config(encoder) | {"decoder_hidden_size": width, "decoder_intermediate_size": 4 * width}
    options |= {"decoder_num_attention_heads": width // 32, "decoder_num_hidden_layers": len(task.blocks)}
    options |= {"mask_ratio": ratio, "norm_pix_loss": normed, "layer_norm_eps": 1e-6}
    state = {f"task.{name}": tensor for name, tensor in task.named_parameters()}
    state |= {f"vit.{name}": tensor for name, tensor in encoder.named_parameters()}
    names = VIT | {"task.layernorm.": "decoder.decoder_norm.", "task.layers": "decoder.decoder_layers",
                   "task.embed.": "decoder.decoder_embed.", "task.positions": "decoder.decoder_pos_embed",
                   "task.head": "decoder.decoder_pred", "task.": "decoder."}  # fmt: skip
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**options)).to(draw.dtype).eval()
    theirs.decoder.decoder_norm.eps = task.norm.eps  # 1e-5, torch's own; the other norms have the paper's 1e-6
    ask = lend(theirs, state, names)

    def found() -> Tensor:
        torch.manual_seed(draw.seed)
        return task(encoder, images)["loss"]

    def right() -> Tensor:
        torch.manual_seed(draw.seed)
        mean, deviation = (torch.tensor(x, dtype=draw.dtype).view(3, 1, 1) for x in (MEAN, DEVIATION))
        return ask(pixel_values=(images - mean) / deviation, noise=torch.rand(b, n)).loss

    return Sides(found, right, [*encoder.parameters(), *task.parameters()])
