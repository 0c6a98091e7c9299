"""Tests of the metrics of an encoder on a data set, and of the course's table of results."""

import json

import pytest
import torch

from minissl import evaluation
from minissl.data.images import Factor, Images
from minissl.errors import InputError
from minissl.evaluation.benchmark import evaluate_attention, evaluate_encoder, evaluate_patches, pixel_labels
from minissl.evaluation.segmentation import IGNORE_INDEX
from minissl.notebook.course_table import COURSE_METRICS, course_table
from tests.golden import tiny_vit
from tests.toy_encoders import ConstantEncoder, LeftRightAttention, MeanColorEncoder


def object_images(sides):
    """Black images with an object in their left or right half."""
    masks = torch.zeros(len(sides), 16, 16, dtype=torch.uint8)
    for mask, side in zip(masks, sides):
        mask[:, slice(0, 8) if side == "left" else slice(8, 16)] = 1
    return Images(torch.zeros(len(sides), 3, 16, 16, dtype=torch.uint8), masks=masks)


def test_the_head_is_chosen_on_the_first_half_and_measured_on_the_second():
    metrics = evaluate_attention(LeftRightAttention(), object_images(["left"] * 4 + ["right"] * 4))
    assert metrics["attention_pointing"] == 0  # the left head, and all objects of the second half are to the right
    assert metrics["attention_head_iou"] < 0.4
    metrics = evaluate_attention(LeftRightAttention(), object_images(["left", "right", "left", "left"] * 2))
    assert metrics["attention_pointing"] == 0.75


def test_attention_metrics_equal_their_parts():
    dataset = object_images(["left", "right", "left", "left"] * 2)
    maps = evaluation.dense_attention(LeftRightAttention(), dataset.images, 16)
    metrics = evaluate_attention(LeftRightAttention(), dataset, 16)
    fraction = evaluation.attention_fraction(maps, dataset.masks).mean(0)[0]
    shuffled = evaluation.attention_fraction(maps, dataset.masks.roll(1, 0)).mean(0)[0]
    assert metrics["attention_fraction"] == pytest.approx(float(fraction))
    assert metrics["attention_fraction_shuffled"] == pytest.approx(float(shuffled))
    overlap = evaluation.attention_iou(maps[4:, :1], dataset.masks[4:])
    assert metrics["attention_head_iou"] == pytest.approx(float(overlap.mean()))
    assert metrics["object_fraction"] == 0.5


def test_attention_metrics_of_one_image():
    assert evaluate_attention(LeftRightAttention(), object_images(["left"]))["attention_pointing"] == 1


def colored_images(n, num_places=2):
    """Images whose red, green and blue tell the background class, the object class and the part."""
    masks, labels = torch.zeros(n, 16, 16, dtype=torch.uint8), torch.arange(n) % 2
    place = torch.arange(n) // 2 % num_places
    masks[:, 4:8, 4:12], masks[:, 8:12, 4:12] = 1, 2
    images = torch.zeros(n, 3, 16, 16, dtype=torch.uint8)
    images[:, 0] = torch.where(masks > 0, 0, 250 * place[:, None, None]).to(torch.uint8)
    images[:, 1] = torch.where(masks > 0, 100 + 150 * labels[:, None, None], 0).to(torch.uint8)
    images[:, 2] = (120 * masks).to(torch.uint8)
    factors = {"place": Factor(place, ("here", "there"), ())}
    return Images(images, labels, ("a", "b"), masks, factors=factors)


def test_patch_metrics_of_an_encoder_that_keeps_everything():
    metrics = evaluate_patches(MeanColorEncoder(), colored_images(16), colored_images(8))
    assert set(metrics) == {"miou_object", "miou_part", "miou_place", "correspondence"}
    assert min(metrics[f"miou_{target}"] for target in ("object", "part", "place")) > 0.6  # blurred at the edges
    assert metrics["correspondence"] > 0.7


def test_patch_metrics_of_an_encoder_that_keeps_nothing():
    metrics = evaluate_patches(ConstantEncoder(), colored_images(16), colored_images(8))
    assert metrics["miou_object"] < 0.35  # background everywhere: one class of three, and not all of it
    assert metrics["miou_part"] < 0.2


def test_pixel_labels_do_not_depend_on_the_other_images():
    few, many = colored_images(2), colored_images(8)
    few.masks[few.masks == 2] = 1  # its largest part is another
    labels = pixel_labels(few)["part"].unique(), pixel_labels(many)["part"].unique()
    assert set(labels[0].tolist()) < set(labels[1].tolist())
    assert set(pixel_labels(many)["place"].unique().tolist()) == {IGNORE_INDEX, 0, 1}


def test_evaluate_encoder_uses_the_size_of_the_data_set():
    torch.manual_seed(0)
    encoder = tiny_vit()
    train_set, test_set = colored_images(60), colored_images(20)
    metrics = evaluate_encoder(encoder, train_set, test_set)
    assert metrics == evaluate_encoder(encoder, train_set, test_set, 16)
    names = {"rank_me", "knn", "linear", "few_shot_10", "linear_place", "object_fraction"}
    of_attention = ("iou", "fraction", "fraction_shuffled", "head_iou", "pointing")
    assert set(metrics) == names | {f"attention_{name}" for name in of_attention}
    predictions = evaluation.knn(
        evaluation.extract_features(encoder, train_set.images), train_set.labels,
        evaluation.extract_features(encoder, test_set.images),
    )  # fmt: skip
    assert metrics["knn"] == float((predictions == test_set.labels).float().mean())
    assert evaluation.quick_evaluation(encoder, train_set, test_set) == {"knn": metrics["knn"]}


def test_evaluate_encoder_rejects_data_sets_with_different_classes():
    other = colored_images(8)
    other.classes = ("b", "a")
    with pytest.raises(InputError, match="classes"):
        evaluate_encoder(tiny_vit(), colored_images(8), other)
    other = colored_images(8)
    other.factors = {}
    with pytest.raises(InputError, match="place"):
        evaluate_encoder(tiny_vit(), colored_images(8), other)


def test_the_course_table_has_the_first_rows_of_a_scoreboard(tmp_path):
    seeds = {str(i): dict.fromkeys(COURSE_METRICS, i / 4) for i in range(3)}
    (tmp_path / "board.json").write_text(json.dumps({"rows": {"a": seeds, "b": seeds, "c": seeds}}))
    head, *rows = course_table(tmp_path / "board.json", 2).splitlines()
    assert head.split("  ")[-1] == COURSE_METRICS["J&F"]
    assert [row.split()[0] for row in rows] == ["a", "b"]
    assert rows[0].count("25.0 ± 25.0") == len(COURSE_METRICS)
    assert len({len(line) for line in (head, *rows)}) == 1
