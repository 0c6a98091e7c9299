"""The text transformer equals CLIP's in transformers, and has the authors' initial weights."""

import pytest
import torch

from minissl.models.text_encoder import TextTransformer

TRANSFORMERS = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "blocks": "encoder.layers",
    "norm": "layer_norm",
    "attn.proj": "self_attn.out_proj",
    "ln_final": "final_layer_norm",
}


def copy_weights(reference, network):
    """Copy the weights of a CLIPTextModelWithProjection, whose queries, keys and values are separate layers."""
    state = {name.removeprefix("text_model."): value for name, value in reference.state_dict().items()}
    for name, value in network.state_dict().items():
        for own, other in TRANSFORMERS.items():
            name = name.replace(own, other)
        parts = [name.replace("attn.qkv", f"self_attn.{part}_proj") for part in "qkv"] if "qkv" in name else [name]
        value.copy_(torch.cat([state.pop(part) for part in parts]))
    assert not state


@pytest.mark.slow
@pytest.mark.parametrize("eos", [99, 2])  # 2 is in the published configurations and means the largest id
def test_outputs_equal_transformers(eos):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 128, "projection_dim": 24}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 11}
    config = CLIPTextConfig(**sizes, hidden_act="quick_gelu", bos_token_id=98, eos_token_id=eos)
    reference = CLIPTextModelWithProjection(config).eval().double()
    with torch.no_grad():
        for parameter in reference.parameters():  # biases and norms too
            parameter.add_(0.1 * torch.randn_like(parameter))
    network = TextTransformer(100, 11, 32, 3, 4, 24).eval().double()
    copy_weights(reference, network)
    tokens = torch.zeros(6, 11, dtype=torch.long)
    for row, n in zip(tokens, (2, 3, 5, 8, 10, 11)):
        row[: n - 1] = torch.tensor([98, *torch.randint(1, 98, (n - 2,))])
        row[n - 1] = 99
    with torch.no_grad():
        embeddings, expected = network(tokens), reference(input_ids=tokens).text_embeds
    assert expected.std() > 0.1
    torch.testing.assert_close(embeddings, expected, rtol=1e-10, atol=1e-10)


def test_tokens_after_the_end_have_no_effect():
    torch.manual_seed(0)
    network = TextTransformer(20, 8, 16, 2, 2, 4).eval()
    tokens = torch.tensor([[18, 3, 4, 19, 0, 0, 0, 0]])
    changed_after, changed_before = tokens.clone(), tokens.clone()
    changed_after[0, 5], changed_before[0, 1] = 7, 7
    torch.testing.assert_close(network(changed_after), network(tokens), rtol=0, atol=1e-6)
    assert (network(changed_before) - network(tokens)).abs().max() > 1e-3


def test_initial_weights_are_those_of_the_authors():
    torch.manual_seed(0)
    network = TextTransformer(1000, 64, 128, 4, 2, 96)
    expected = {
        "token_embedding.weight": 0.02,
        "positional_embedding": 0.01,
        "text_projection.weight": 128**-0.5,
        "blocks.3.attn.qkv.weight": 128**-0.5,
        "blocks.3.attn.proj.weight": (128 * 8) ** -0.5,
        "blocks.3.mlp.fc1.weight": 256**-0.5,
        "blocks.3.mlp.fc2.weight": (128 * 8) ** -0.5,
        "blocks.0.attn.qkv.bias": 0,
        "blocks.0.attn.proj.bias": 0,
    }
    state = network.state_dict()
    assert {name: state[name].std().item() for name in expected} == pytest.approx(expected, rel=0.03)
