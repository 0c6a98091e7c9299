"""The numbers of an encoder are what they say they are."""

import json

import pytest
import torch

from minissl import evaluate, scores
from minissl.data import Images
from minissl.data.images import Factor
from minissl.evaluate.segment import IGNORED
from minissl.method import Tokens
from minissl.scores import pixel_classes, score_attention, score_patches


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


class Mirror:
    """An encoder whose patch is its mean colour, and one number that is always the same."""

    training = False

    def __call__(self, images):
        patches = torch.nn.functional.avg_pool2d(images, 4).permute(0, 2, 3, 1)
        return Tokens(images.mean((2, 3)), torch.cat([patches, torch.ones_like(patches[..., :1])], dim=-1))


def painted(n, places=2):
    """Colours say what is where: the ground which place, the object which kind, its parts their number."""
    torch.manual_seed(0)
    masks, labels, place = torch.zeros(n, 16, 16, dtype=torch.uint8), torch.arange(n) % 2, torch.arange(n) // 2 % places
    masks[:, 4:8, 4:12], masks[:, 8:12, 4:12] = 1, 2
    images = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    images[:, 0] = torch.where(masks > 0, 0, 250 * place[:, None, None]).to(torch.uint8)
    images[:, 1] = torch.where(masks > 0, 100 + 150 * labels[:, None, None], 0).to(torch.uint8)
    images[:, 2] = (120 * masks).to(torch.uint8)
    factors = {"place": Factor(place, ("here", "there"), ())}
    return Images(images, labels, ("a", "b"), masks, factors=factors)


def test_patches_that_show_all_are_scored_so():
    found = score_patches(Mirror(), painted(16), painted(8), 16)
    assert set(found) == {"miou_object", "miou_part", "miou_place", "correspondence"}
    assert min(found[f"miou_{question}"] for question in ("object", "part", "place")) > 0.6  # blurred at the edges
    assert found["correspondence"] > 0.7


def test_patches_that_show_nothing_are_scored_so():
    class Blind(Mirror):
        def __call__(self, images):
            tokens = super().__call__(images)
            return Tokens(tokens.cls, torch.ones_like(tokens.patches))

    found = score_patches(Blind(), painted(16), painted(8), 16)
    assert found["miou_object"] < 0.35  # background everywhere: one class of three, and not all of it
    assert found["miou_part"] < 0.2


def test_pixels_are_numbered_alike_in_every_set():
    few, many = painted(2), painted(8)
    few.masks[few.masks == 2] = 1  # its largest part is another
    answers = pixel_classes(few)["part"].unique(), pixel_classes(many)["part"].unique()
    assert set(answers[0].tolist()) < set(answers[1].tolist())
    assert set(pixel_classes(many)["place"].unique().tolist()) == {IGNORED, 0, 1}


def test_the_table_so_far_has_the_first_rows_of_a_board(tmp_path):
    seeds = {str(i): dict.fromkeys(scores.STORY, i / 4) for i in range(3)}
    (tmp_path / "board.json").write_text(json.dumps({"rows": {"a": seeds, "b": seeds, "c": seeds}}))
    head, *rows = scores.table_so_far(tmp_path / "board.json", 2).splitlines()
    assert head.split("  ")[-1] == "J&F of clips"
    assert [row.split()[0] for row in rows] == ["a", "b"]
    assert rows[0].count("25.0 ± 25.0") == len(scores.STORY)
    assert len({len(line) for line in (head, *rows)}) == 1
