"""The project's own checkpoints load and look, each by itself."""

import pytest
import torch

from minissl import pretrained
from minissl.checkpoint import load_tensors

FILES = sorted(pretrained.OWN.glob("*.safetensors"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_checkpoint_loads_by_its_name(path):
    encoder = pretrained.load(f"scenes/{path.stem}")
    _, info = load_tensors(path)
    size = info["encoder"]["img_size"]
    with torch.no_grad():
        maps = encoder.attention(torch.zeros(1, 3, size, size))
    assert maps.sum((-2, -1)).max() <= 1 + 1e-4
    assert encoder(torch.zeros(1, 3, size, size)).cls.isfinite().all()
