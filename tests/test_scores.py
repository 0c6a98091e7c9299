"""The numbers of an encoder are what they say they are."""

import pytest
import torch

from minissl import evaluate
from minissl.data import Images
from minissl.scores import score_attention


class Heads:
    """An encoder of two heads on a grid of 2 x 2: the first looks to the left, the second to the right."""

    def attention(self, images):
        left = torch.tensor([[0.9, 0.1], [0.9, 0.1]]) / 2
        return torch.stack([left, left.flip(1)]).expand(len(images), 2, 2, 2)


def objects(places):
    """Images with an object in their left or right half; the images themselves are empty."""
    masks = torch.zeros(len(places), 16, 16, dtype=torch.uint8)
    for mask, place in zip(masks, places):
        mask[:, slice(0, 8) if place == "left" else slice(8, 16)] = 1
    return Images(torch.zeros(len(places), 3, 16, 16, dtype=torch.uint8), masks=masks)


def test_the_head_is_chosen_on_the_first_half_and_measured_on_the_other():
    found = score_attention(Heads(), objects(["left"] * 4 + ["right"] * 4), 16)
    assert found["attention_pointing"] == 0  # the head that looks left, where all objects are to the right
    assert found["attention_head_iou"] < 0.4
    found = score_attention(Heads(), objects(["left", "right", "left", "left"] * 2), 16)
    assert found["attention_pointing"] == 0.75


def test_what_is_said_of_attention_equals_its_parts():
    torch.manual_seed(0)
    images = objects(["left", "right", "left", "left"] * 2)
    maps = evaluate.fine_attention(Heads(), images.images, 16)
    found = score_attention(Heads(), images, 16)
    assert found["attention_share"] == pytest.approx(float(evaluate.attention_share(maps, images.masks).mean(0)[0]))
    overlap = evaluate.attention_iou(maps[4:, :1], images.masks[4:])
    assert found["attention_head_iou"] == pytest.approx(float(overlap.mean()))
    assert found["object_share"] == 0.5


def test_one_image_is_enough():
    assert score_attention(Heads(), objects(["left"]), 16)["attention_pointing"] == 1
