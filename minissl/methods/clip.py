"""CLIP: an image and the sentence that describes it should agree.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv:2103.00020). Of B
images and their B captions, each image has to find its caption, and each caption its image. What an image is called is
then only a question of which sentence it agrees with most: no classifier is trained for it.

Shapes: B images and captions, E dimensions of the space they share, L tokens of a caption.
"""

import math
import random
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.augment import flip, normalize, random_resized_crop
from minissl.method import Batch, class_token
from minissl.parallel import from_all, gather_rows, rank, world
from minissl.text import PLAIN, TextTransformer, Tokenizer


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor | float, also: Tensor | None = None) -> Tensor:
    """The symmetric contrastive loss; figure 3 of the paper.

    Args:
        image: (B, E), of any length.
        text: (B, E), the i-th belongs to the i-th image.
        logit_scale: multiplies the cosines; the inverse of a temperature.
        also: (B, W B) bool, where another's caption is as true as one's own. Such a pair is neither pulled
            together nor pushed apart: it is left out of the softmax. With None every other caption counts as false.

    Returns:
        The mean of both directions, over B; ln B is chance. With W processes the others' are candidates too.
    """
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    own = torch.arange(len(image), device=image.device) + rank() * len(image)  # where our own stand among all
    loss = 0.0
    for ours, theirs in ((image, text), (text, image)):
        logits = logit_scale * ours @ gather_rows(theirs).mT  # (B, W B)
        if also is not None:
            itself = torch.zeros_like(also).scatter(1, own[:, None], True)
            logits = logits.masked_fill(also & ~itself, -torch.inf)
        loss = loss + 0.5 * F.cross_entropy(logits, own)
    return loss


def equally_true(captions: list[tuple[str, ...]]) -> Tensor:
    """(B, W B) bool: whether an image and one of all processes' are described by the very same sentences."""
    everyone = from_all(captions)
    number = {caption: i for i, caption in enumerate(everyone)}
    ours, all_of_them = (torch.tensor([number[caption] for caption in some]) for some in (captions, everyone))
    return ours[:, None] == all_of_them


class CLIP(nn.Module):
    """An image encoder and a text encoder that learn to agree.

    Args:
        encoder: images -> Tokens, with its width as `dim`; its class token is projected into the shared space.
        size: pixels of the crop that the encoder sees.
        scale: share of the image's area of that crop; the paper's only augmentation.
        mirror: how likely the crop is turned left to right; only where no sentence speaks of left and right.
        embedding: E.
        text_width: width of the text transformer.
        text_depth: its blocks.
        text_heads: its heads.
        length: L; a longer caption is cut.
        vocabulary: of the tokenizer; 514 are bytes, start and end, the others merges learnt from the captions.
        temperature: of the softmax at the start; it is learnt.
        largest_scale: the inverse temperature does not grow beyond this.
        forgive: leave captions that are equally true out of the softmax.
    """

    needs: ClassVar[tuple[str, ...]] = ("captions",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # What learns in minutes on two cores; the paper had 400 million pairs and 256 GPUs.
        "cpu": {
            "encoder.name": "cnn",  # reads actions better than a ViT of the same cost
            "image_size": 64,
            "size": 32,
            "scale": (0.75, 1.0),  # 10,000 images are seen again and again
            "mirror": 0.5,  # for the same reason
            "embedding": 64,
            "text_width": 128,  # 512 in the paper
            "text_depth": 2,  # 12 in the paper
            "text_heads": 4,
            "length": 24,  # 77 in the paper; these captions are short
            "vocabulary": 768,  # 49,408 in the paper; these captions need 660
            # Of few captions one is soon told by its kind and place alone; actions need many, and a softmax that is not
            # satisfied too early. 32,768 captions in the paper, and a temperature down to 0.01.
            "batch_size": 512,
            "temperature": 0.1,
            "largest_scale": 14.0,
            "lr": 3e-3,
            "final_weight_decay": 0.04,
            "minutes": 15.0,
        },
        # ViT-S/16 on one GPU, for 100,000s of pairs.
        "gpu": {
            "encoder.name": "small",
            "image_size": 256,
            "vocabulary": 16_384,  # 49,408 in the paper
            "text_depth": 6,  # 12 in the paper
            "batch_size": 1024,  # 32,768 in the paper
            "lr": 5e-4,
            "weight_decay": 0.2,  # the paper's, constant
            "final_weight_decay": 0.2,
            "clip": 0.0,
            "compile": True,
        },
    }

    def __init__(
        self,
        encoder: nn.Module,
        *,
        size: int = 224,
        scale: tuple[float, float] = (0.9, 1.0),
        mirror: float = 0.0,
        embedding: int = 512,
        text_width: int = 512,
        text_depth: int = 12,
        text_heads: int = 8,
        length: int = 77,
        vocabulary: int = 49_408,
        temperature: float = 0.07,
        largest_scale: float = 100.0,
        forgive: bool = True,
    ):
        super().__init__()
        self.encoder = encoder
        self.visual_projection = nn.Linear(encoder.dim, embedding, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=encoder.dim**-0.5)
        self.text = TextTransformer(vocabulary, length, text_width, text_depth, text_heads, embedding)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))  # of the scale its logarithm
        self.tokenizer = Tokenizer([], length)
        self.size, self.scale, self.mirror = size, scale, mirror
        self.merges, self.most, self.forgive = vocabulary - PLAIN - 2, math.log(largest_scale), forgive

    def prepare(self, data: Any) -> None:
        """Learn the tokenizer's merges from all captions of the training data."""
        texts = [text for texts in data.captions for text in texts]
        self.tokenizer = Tokenizer.learn(texts, self.merges, self.tokenizer.length)

    def get_extra_state(self) -> Tensor:
        """The merges (M, 2), kept with the weights."""
        return torch.tensor(self.tokenizer.pairs, dtype=torch.long).view(-1, 2)

    def set_extra_state(self, state: Tensor) -> None:
        self.tokenizer = Tokenizer([(int(a), int(b)) for a, b in state], self.tokenizer.length)

    def embed_images(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) to vectors (B, E), of any length."""
        return self.visual_projection(class_token(self.encoder, images))

    def embed_text(self, texts: list[str]) -> Tensor:
        """B sentences to vectors (B, E), of any length."""
        tokens = self.tokenizer(texts, cut=True, trim=True)
        return self.text(tokens.to(self.logit_scale.device, non_blocking=True))

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        images = normalize(flip(random_resized_crop(batch.images, self.size, self.scale), self.mirror))
        image = self.embed_images(images).float()  # (B, E)
        chances = [random.random() for _ in range(world() * len(image))][rank() * len(image) :]
        chosen = [texts[int(chance * len(texts))] for texts, chance in zip(batch.captions, chances)]
        text = self.embed_text(chosen).float()  # (B, E)
        also = equally_true(batch.captions).to(image.device, non_blocking=True) if self.forgive else None
        scale = self.logit_scale.exp()
        return {"loss": clip_loss(image, text, scale, also), "scale": scale}

    def guesses(self, batch_size: int) -> dict[str, int]:
        return {"loss": batch_size}  # the sentences of the batch

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        self.logit_scale.clamp_(0, self.most)
