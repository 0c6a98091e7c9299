"""Entry points for torch.hub: `torch.hub.load(PATH_OF_THIS_FOLDER, "scenes_dino", source="local")`.

`encoder` takes what `minissl.load_encoder` takes; `scenes_NAME` are the encoders in data/checkpoints, trained on the
synthetic data set Scenes. All return encoders in evaluation mode that map normalized images (B, 3, H, W) to Tokens.
"""

from functools import partial as _partial

from minissl.hub.pretrained import load_encoder as encoder

dependencies = ["torch", "torchvision", "safetensors", "filelock"]

scenes_simclr = _partial(encoder, "scenes/simclr")
scenes_dino = _partial(encoder, "scenes/dino")
scenes_dinov2 = _partial(encoder, "scenes/dinov2")
scenes_dinov3 = _partial(encoder, "scenes/dinov3")
scenes_clip = _partial(encoder, "scenes/clip")
scenes_mae = _partial(encoder, "scenes/mae")
scenes_rotation = _partial(encoder, "scenes/rotation")
scenes_colorization = _partial(encoder, "scenes/colorization")
scenes_supervised = _partial(encoder, "scenes/objects")

__all__ = [
    "encoder",
    "scenes_clip",
    "scenes_colorization",
    "scenes_dino",
    "scenes_dinov2",
    "scenes_dinov3",
    "scenes_mae",
    "scenes_rotation",
    "scenes_simclr",
    "scenes_supervised",
]
