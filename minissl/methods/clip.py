"""CLIP: align images and their captions in one embedding space by a symmetric contrastive loss.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv:2103.00020). Among B
images and B captions, each image is matched to its caption and each caption to its image. Zero-shot classification then
compares an image with one sentence per class; no classifier is trained.

Shapes: B images and captions on each of W processes, E dimensions of the shared embedding space, L tokens of a caption.
"""

import math
import random
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minissl.data.transforms.functional import normalize, random_horizontal_flip, random_resized_crop
from minissl.distributed import gather_lists, gather_rows, rank, world_size
from minissl.methods.base import Batch, ImageTextMethod
from minissl.methods.losses import cosine_similarities
from minissl.models.outputs import Encoder
from minissl.models.text_encoder import TextTransformer
from minissl.models.tokenizer import NUM_BYTE_SYMBOLS, Tokenizer


def clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor | float, ignore_mask: Tensor | None = None) -> Tensor:
    """Compute the symmetric contrastive loss (figure 3): the mean of image-to-text and text-to-image cross-entropy.

    Args:
        image: (B, E) float; L2-normalized here.
        text: (B, E) float, likewise; row i describes image i.
        logit_scale: factor on the cosine similarities, the inverse of a temperature (not its logarithm).
        ignore_mask: bool (B, W B), True for captions that describe an image as well as its own. Such a pair is left out
            of the softmax, neither a positive nor a negative; an image's own caption is always kept. None treats all
            other captions as negatives.

    Returns:
        A scalar; ln(W B) at chance level. With several processes, the others' rows are negatives too.
    """
    own = torch.arange(len(image), device=image.device) + rank() * len(image)  # (B,) index of the positive
    losses = []
    for queries, keys in ((image, text), (text, image)):
        logits = logit_scale * cosine_similarities(queries, gather_rows(keys))  # (B, W B)
        if ignore_mask is not None:
            positives = torch.zeros_like(ignore_mask).scatter(1, own[:, None], True)
            logits = logits.masked_fill(ignore_mask & ~positives, -torch.inf)
        losses.append(F.cross_entropy(logits, own))
    return 0.5 * losses[0] + 0.5 * losses[1]


def duplicate_caption_mask(captions: list[tuple[str, ...]]) -> Tensor:
    """Find images whose captions are all identical, for the `ignore_mask` of `clip_loss`.

    Args:
        captions: all captions of each of the B images.

    Returns:
        bool (B, W B) on the CPU, the images of all processes as columns; True also for an image and itself.
    """
    all_captions = gather_lists(captions)
    index = {caption: i for i, caption in enumerate(all_captions)}
    rows, columns = (torch.tensor([index[caption] for caption in some]) for some in (captions, all_captions))
    return rows[:, None] == columns


class CLIP(ImageTextMethod):
    """Train an image encoder and a text encoder contrastively, on images and their captions.

    Args:
        encoder: maps normalized images to Tokens; its class token is projected into the shared space.
        crop_size: side of the training crops in pixels.
        crop_scale: range of a crop's area, as a fraction of the image's; the paper's only augmentation.
        flip_prob: probability of a horizontal flip; 0 where captions mention left and right.
        embed_dim: E.
        text_width: width of the text transformer.
        text_layers: number of blocks of the text transformer.
        text_heads: number of attention heads of each of these blocks.
        context_length: largest number of tokens L, start and end included; longer captions are truncated.
        vocab_size: number of token ids: 514 for bytes, start and end, the others for merges learned from the captions.
        temperature: initial temperature of the softmax; it is learned.
        max_logit_scale: upper bound of the inverse temperature, not of its logarithm.
        mask_duplicate_captions: leave identical captions of other images out of the softmax.
    """

    required_fields: ClassVar[tuple[str, ...]] = ("captions",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        # Trains in minutes on two CPU cores; the paper had 400 million pairs and 256 GPUs.
        "cpu": {
            "encoder.name": "cnn",  # recognizes actions better than a ViT of the same cost
            "image_size": 64,
            "crop_size": 32,
            "crop_scale": (0.75, 1.0),  # 0.9 in the paper; 10,000 images are seen for many epochs
            "flip_prob": 0.5,  # 0 in the paper, for the same reason
            "embed_dim": 64,  # 512 in the paper
            "text_width": 128,  # 512 in the paper
            "text_layers": 2,  # 12 in the paper
            "text_heads": 4,  # 8 in the paper
            "context_length": 24,  # 77 in the paper; these captions are short
            "vocab_size": 768,  # 49,408 in the paper; these captions need 660
            # In a small batch, class and background alone identify a caption. Actions need many negatives, and a
            # softmax that does not saturate too early. The paper has 32,768 captions and temperatures down to 0.01.
            "batch_size": 512,
            "temperature": 0.1,
            "max_logit_scale": 14.0,
            "lr": 3e-3,
            "final_weight_decay": 0.04,  # constant
            "minutes": 15.0,
        },
        # ViT-S/16 on one GPU, for hundreds of thousands of pairs.
        "gpu": {
            "encoder.name": "small",
            "image_size": 256,
            "vocab_size": 16_384,  # 49,408 in the paper
            "text_layers": 6,  # 12 in the paper
            "batch_size": 1024,  # 32,768 in the paper
            "lr": 5e-4,  # the paper's for ViT-B/32
            "beta2": 0.98,  # the paper's for ViTs
            "adam_eps": 1e-6,  # likewise
            "weight_decay": 0.2,  # the paper's, constant
            "final_weight_decay": 0.2,
            "clip_grad": 0.0,  # none in the paper
            "compile": True,
        },
    }

    def __init__(
        self,
        encoder: Encoder,
        *,
        crop_size: int = 224,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        flip_prob: float = 0.0,
        embed_dim: int = 512,
        text_width: int = 512,
        text_layers: int = 12,
        text_heads: int = 8,
        context_length: int = 77,
        vocab_size: int = 49_408,
        temperature: float = 0.07,
        max_logit_scale: float = 100.0,
        mask_duplicate_captions: bool = True,
    ):
        super().__init__()
        self.encoder: Encoder = encoder
        self.visual_projection = nn.Linear(encoder.embed_dim, embed_dim, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=encoder.embed_dim**-0.5)
        self.text = TextTransformer(vocab_size, context_length, text_width, text_layers, text_heads, embed_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))  # logarithm, as in the authors' code
        self.tokenizer = Tokenizer([], context_length)
        self.crop_size, self.crop_scale, self.flip_prob = crop_size, crop_scale, flip_prob
        self.vocab_size, self.context_length, self.max_logit_scale = vocab_size, context_length, max_logit_scale
        self.mask_duplicate_captions = mask_duplicate_captions

    def prepare(self, dataset: Any) -> None:
        """Learn the tokenizer's merges from all captions of the training set."""
        texts = [text for texts in dataset.captions for text in texts]
        num_merges = self.vocab_size - NUM_BYTE_SYMBOLS - 2  # besides the start and the end token
        self.tokenizer = Tokenizer.learn(texts, num_merges, self.context_length)

    def get_extra_state(self) -> Tensor:
        """Return the tokenizer's M merges (M, 2) int64, pairs of token ids, which are saved with the weights."""
        return torch.tensor(self.tokenizer.pairs, dtype=torch.long).view(-1, 2)

    def set_extra_state(self, state: Tensor) -> None:
        self.tokenizer = Tokenizer([(int(a), int(b)) for a, b in state], self.context_length)

    def embed_images(self, images: Tensor) -> Tensor:
        return self.visual_projection(self.encoder.cls_tokens(images))

    def embed_text(self, texts: list[str]) -> Tensor:
        tokens = self.tokenizer(texts, truncate=True, trim=True)  # (B, up to L)
        return self.text(tokens.to(self.logit_scale.device, non_blocking=True))

    def loss(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Compute `clip_loss` of augmented crops and a sampled caption of each; "scale" is the inverse temperature."""
        crops = random_resized_crop(batch.images, self.crop_size, self.crop_scale)
        image = self.embed_images(normalize(random_horizontal_flip(crops, self.flip_prob))).float()  # (B, E)
        text = self.embed_text(self.sample_captions(batch)).float()  # (B, E)
        ignore_mask = None
        if self.mask_duplicate_captions and batch.captions is not None:
            ignore_mask = duplicate_caption_mask(batch.captions).to(image.device, non_blocking=True)  # (B, W B)
        scale = self.logit_scale.exp()
        return {"loss": clip_loss(image, text, scale, ignore_mask), "scale": scale}

    def sample_captions(self, batch: Batch) -> list[str]:
        """Sample one caption of each image; the result does not depend on the number of processes."""
        assert batch.captions is not None
        n = len(batch.captions)
        numbers = [random.random() for _ in range(world_size() * n)][rank() * n :]
        return [texts[int(number * len(texts))] for texts, number in zip(batch.captions, numbers)]

    def num_candidates(self, batch_size: int) -> dict[str, int]:
        return {"loss": batch_size}  # the captions of the batch

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Clamp the inverse temperature, exp(logit_scale), to [1, max_logit_scale]."""
        self.logit_scale.clamp_(0, math.log(self.max_logit_scale))
