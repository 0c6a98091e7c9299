"""Networks built on the ViT: RoPE, the two towers of CLIP and the masked autoencoder, compared with the libraries."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.methods.mae import MaskedAutoencoder
from minissl.models.layers import quick_gelu
from minissl.models.text_encoder import TextTransformer
from minissl.models.vit import ViT
from tests.parity.ledger import RandomInputs, Sides, comparison
from tests.parity.networks import (
    DINOV3,
    EVA,
    OPEN_CLIP,
    TRANSFORMERS_CLIP,
    VIT,
    bind_weights,
    last_hidden_state,
    random_vit,
    timm_config,
    transformers_config,
    vit_sides,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


@comparison("ViT with RoPE (DINOv3)", "timm", ViT, fp64=None, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    from timm.models.eva import Eva

    class Features(Eva):
        forward = Eva.forward_features

    n = rng.integer(1, 4)
    encoder = random_vit(rng, layer_scale_init=1.0, num_registers=n, pos_embed="rope")
    module = Features(**timm_config(encoder), init_values=1.0, num_reg_tokens=n, use_abs_pos_emb=False, qkv_bias=True,
                      use_rot_pos_emb=True, rope_type="dinov3", rope_temperature=100.0, rope_rotate_half=True,
                      no_embed_class=True, use_fc_norm=False, norm_layer=partial(nn.LayerNorm, eps=1e-5),
                      dynamic_img_size=True)  # fmt: skip
    names = EVA | {"attn.qkv.bias": ("attn.q_bias", "attn.k_bias", "attn.v_bias")}
    reference = bind_weights(module.eval(), dict(encoder.named_parameters()), names)
    return vit_sides(rng, encoder, reference, max_extra=3, num_skipped=1 + n)


@comparison("ViT with RoPE (DINOv3)", "transformers", ViT, fp64=None, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    n = rng.integer(1, 4)
    encoder = random_vit(rng, layer_scale_init=1.0, num_registers=n, pos_embed="rope")
    config = DINOv3ViTConfig(**transformers_config(encoder), num_register_tokens=n, key_bias=True)
    reference = bind_weights(DINOv3ViTModel(config).eval(), dict(encoder.named_parameters()), DINOV3)
    return vit_sides(rng, encoder, last_hidden_state(reference), max_extra=3, num_skipped=1 + n)


def clip_image_tower(rng: RandomInputs) -> tuple[ViT, dict[str, Tensor], Tensor, Tensor]:
    """Build a ViT in CLIP's form, without a patch bias. Returns it, its tensors, a projection and images."""
    encoder = random_vit(rng, clip=True)
    encoder.patch_embed.proj.bias.requires_grad_(False).zero_()
    state = {name: tensor for name, tensor in encoder.named_parameters() if tensor.requires_grad}
    size = timm_config(encoder)["img_size"]
    return encoder, state, rng.leaf(encoder.embed_dim, rng.integer(3, 9)), rng.leaf(2, 3, size, size)


@comparison("CLIP image tower", "transformers", ViT, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    encoder, state, projection, images = clip_image_tower(rng)
    options = transformers_config(encoder) | {"hidden_act": "quick_gelu", "projection_dim": projection.shape[1]}
    module = CLIPVisionModelWithProjection(CLIPVisionConfig(**options | {"attn_implementation": "sdpa"}))
    names = TRANSFORMERS_CLIP | {"cls_token": "embeddings.class_embedding", "norm_pre": "pre_layrnorm",
                                 "pos_embed": "embeddings.position_embedding.weight",
                                 "patch_embed.proj": "embeddings.patch_embedding",
                                 ".norm.": ".post_layernorm."}  # fmt: skip
    vision_state = {f"vision_model.{name}": tensor for name, tensor in state.items()}
    bound = vision_state | {"visual_projection.weight": projection.T}
    reference = bind_weights(module.to(rng.dtype).eval(), bound, names)
    inputs = [images, projection, *state.values()]
    return Sides(lambda: encoder(images).cls @ projection, lambda: reference(pixel_values=images).image_embeds, inputs)


def open_clip_model(rng: RandomInputs, embed_dim: int, vision: dict[str, Any], text: dict[str, Any]) -> nn.Module:
    from open_clip import CLIP

    return CLIP(embed_dim=embed_dim, quick_gelu=True, vision_cfg=vision, text_cfg=text).to(rng.dtype).eval()


SMALL_TEXT = {"context_length": 4, "vocab_size": 9, "width": 8, "heads": 1, "layers": 1}
SMALL_VISION = {"image_size": 4, "patch_size": 4, "width": 8, "head_width": 8, "layers": 1}


@comparison("CLIP image tower", "open_clip", ViT, quick_gelu, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    encoder, state, projection, images = clip_image_tower(rng)
    vision = {"image_size": images.shape[-1], "patch_size": encoder.patch_size, "width": encoder.embed_dim}
    vision |= {"head_width": 8, "layers": len(encoder.blocks)}
    module = open_clip_model(rng, projection.shape[1], vision, SMALL_TEXT).visual
    names = OPEN_CLIP | {"cls_token": "class_embedding", "pos_embed": "positional_embedding", "norm_pre": "ln_pre",
                         "patch_embed.proj": "conv1"}  # fmt: skip
    reference = bind_weights(module, state | {"proj": projection}, names)
    inputs = [images, projection, *state.values()]
    return Sides(lambda: encoder(images).cls @ projection, lambda: reference(images), inputs)


def text_tower(rng: RandomInputs) -> tuple[TextTransformer, Tensor, int]:
    """Build a text transformer. Returns it, tokens (start token, words, end token, zeros) and the vocabulary size."""
    length, vocab_size, heads = rng.integer(4, 9), rng.integer(20, 40), rng.choice(2, 3, 4)
    encoder = TextTransformer(vocab_size, length, 8 * heads, rng.integer(1, 3), heads, rng.integer(3, 9))
    tokens = torch.zeros(rng.integer(2, 5), length, dtype=torch.long)
    for row in tokens:
        end = rng.integer(1, length - 1)
        row[:end] = rng.integers(end, below=vocab_size - 2)
        row[0], row[end] = vocab_size - 2, vocab_size - 1
    return rng.randomize(encoder).eval(), tokens, vocab_size


@comparison("CLIP text tower", "transformers", TextTransformer, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    encoder, tokens, vocab_size = text_tower(rng)
    width, embed_dim = encoder.text_projection.in_features, encoder.text_projection.out_features
    options = {"vocab_size": vocab_size, "hidden_size": width, "intermediate_size": 4 * width}
    options |= {"projection_dim": embed_dim, "hidden_act": "quick_gelu", "max_position_embeddings": tokens.shape[1]}
    options |= {"num_hidden_layers": len(encoder.blocks), "num_attention_heads": width // 8}
    options |= {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "pad_token_id": 0}
    module = CLIPTextModelWithProjection(CLIPTextConfig(**options)).to(rng.dtype).eval()
    state = {f"text_model.{name}": tensor for name, tensor in encoder.named_parameters()}
    names = TRANSFORMERS_CLIP | {"token_embedding": "embeddings.token_embedding", "ln_final": "final_layer_norm",
                                 "positional_embedding": "embeddings.position_embedding.weight",
                                 "text_model.text_projection": "text_projection"}  # fmt: skip
    reference = bind_weights(module, state, names)
    return Sides(lambda: encoder(tokens), lambda: reference(input_ids=tokens).text_embeds, list(encoder.parameters()))


@comparison("CLIP text tower", "open_clip", TextTransformer, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    """open_clip's embeddings have length 1."""
    encoder, tokens, vocab_size = text_tower(rng)
    width, embed_dim = encoder.text_projection.in_features, encoder.text_projection.out_features
    text = {"context_length": tokens.shape[1], "vocab_size": vocab_size, "width": width, "heads": width // 8}
    module = open_clip_model(rng, embed_dim, SMALL_VISION, text | {"layers": len(encoder.blocks)})
    state = dict(encoder.named_parameters())
    state["text_projection"] = state.pop("text_projection.weight").T
    reference = bind_weights(module, state, OPEN_CLIP, unused=("visual", "logit_scale"))
    parameters = list(encoder.parameters())
    return Sides(lambda: F.normalize(encoder(tokens), dim=-1), lambda: reference(text=tokens)[1], parameters)


@comparison("MAE, encoder and decoder", "transformers", MaskedAutoencoder, fp64=None, fp32=1e-5, slow=True)
def _(rng: RandomInputs) -> Sides:
    """Both sides choose the masked patches by the same random numbers."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    encoder, decoder_dim = random_vit(rng), 32 * rng.integer(1, 2)
    options = {"mask_ratio": rng.number(0.3, 0.7), "norm_pix_loss": rng.choice(True, False)}
    size, b = timm_config(encoder)["img_size"], rng.integer(2, 4)
    num_patches, images = (size // encoder.patch_size) ** 2, rng.uniform(b, 3, size, size)
    decoder = {"decoder_dim": decoder_dim, "decoder_depth": rng.integer(1, 2)}
    method = rng.randomize(MaskedAutoencoder(encoder, crop_size=size, **options, **decoder))
    config = transformers_config(encoder) | options | {"layer_norm_eps": 1e-6}
    config |= {"decoder_hidden_size": decoder_dim, "decoder_intermediate_size": 4 * decoder_dim}
    config |= {"decoder_num_attention_heads": decoder_dim // 32, "decoder_num_hidden_layers": decoder["decoder_depth"]}
    module = ViTMAEForPreTraining(ViTMAEConfig(**config)).to(rng.dtype).eval()
    module.decoder.decoder_norm.eps = method.decoder_norm.eps  # 1e-5, torch's default; the other norms have the paper's
    state = {f"vit.{name}": tensor for name, tensor in encoder.named_parameters()}
    state |= {f"decoder.{name}": p for name, p in method.named_parameters() if not name.startswith("encoder.")}
    names = VIT | {"decoder_layernorm.": "decoder_norm.", "decoder_embeddings.position_embeddings": "decoder_pos_embed"}
    reference = bind_weights(module, state, names)

    def actual() -> Tensor:
        torch.manual_seed(rng.seed)
        return method.loss_on_crops(images)["loss"]

    def expected() -> Tensor:
        torch.manual_seed(rng.seed)
        mean, std = (torch.tensor(x, dtype=rng.dtype).view(3, 1, 1) for x in (MEAN, STD))
        return reference(pixel_values=(images - mean) / std, noise=torch.rand(b, num_patches)).loss

    return Sides(actual, expected, list(method.parameters()))
