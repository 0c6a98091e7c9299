"""The analysis of a folder of images with a trained encoder, and its HTML report."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minissl import cli
from minissl.models.outputs import Encoder, Tokens
from minissl.reports import analysis, dataset_stats, html
from minissl.reports.recommend import command
from minissl.training.diagnostics import Finding
from minissl.training.run import random_init_encoder
from tests.folders import class_folders
from tests.test_recommend import STATS, noise

FINDING = Finding("uniform", "It stays.", "It means.", "Change it.")


def test_clusters_are_sorted_by_size_and_begin_at_their_mean():
    generator = torch.Generator().manual_seed(0)
    means = torch.eye(3).repeat_interleave(torch.tensor([5, 20, 10]), 0)
    features = means + 0.1 * torch.randn(35, 3, generator=generator)
    features[17] = means[17]  # in the cluster of 20
    groups = analysis.cluster_groups(features, 3)
    assert [len(rows) for rows in groups] == [20, 10, 5]
    assert set(groups[0].tolist()) == set(range(5, 25))
    unit = F.normalize(features, dim=-1)
    cosines = unit[groups[0]] @ unit[groups[0]].mean(dim=0)
    assert torch.equal(cosines, cosines.sort(descending=True).values)


def test_an_image_is_not_its_own_neighbor():
    angles = torch.tensor([0.0, 0.1, 0.25, 1.0, 3.0])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert analysis.nearest_images(features, torch.tensor([0, 3]), 2).tolist() == [[1, 2], [2, 1]]
    duplicates = torch.ones(5, 2)
    assert analysis.nearest_images(duplicates, torch.arange(5), 3).shape == (5, 3)


def test_outliers_with_a_duplicate_are_found():
    features = torch.cat([torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * 0.1 + 1, -torch.ones(2, 4)])
    assert set(analysis.outliers(features, 2).tolist()) == {40, 41}


def test_duplicates_are_found_also_when_mirrored():
    images = noise(20, 8).repeat_interleave(4, -1).repeat_interleave(4, -2)
    images[7], images[15], images[3] = images[2], images[2].flip(-1), images[9] // 4 * 3 + noise(1, 32)[0] // 8
    assert [rows.tolist() for rows in analysis.duplicate_sets(images)] == [[2, 7, 15], [3, 9]]
    images[9] = images[3]
    images[2] = images[7] // 4 * 3 + noise(1, 32)[0] // 8
    assert [rows.tolist() for rows in analysis.duplicate_sets(images)] == [[3, 9], [2, 7, 15]]


class MeanColor(Encoder):
    """Encode an image as its mean color, or, if `constant`, every image alike."""

    embed_dim, patch_size = 3, 16

    def __init__(self, constant=False):
        super().__init__()
        self.constant = constant

    def forward(self, images):
        features = images.mean(dim=(2, 3)) * (not self.constant) + torch.tensor([1.0, 0.0, 0.0])
        return Tokens(features, features[:, None, None])


def test_crop_retrieval_measures_whether_crops_of_one_image_match():
    colors = F.one_hot(torch.arange(60) % 3, 3) * torch.linspace(50, 250, 60)[:, None]
    images = colors.to(torch.uint8)[:, :, None, None].expand(-1, -1, 32, 32)
    assert analysis.crop_retrieval(MeanColor(), images, 16) > 0.9
    assert analysis.crop_retrieval(MeanColor(constant=True), images, 16) <= 0.05


def test_crop_retrieval_is_reproducible_and_leaves_the_generator_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = analysis.crop_retrieval(MeanColor(), noise(200, 16), 16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    assert 0.01 < first == analysis.crop_retrieval(MeanColor(), noise(200, 16), 16) < 0.9


def test_the_training_summary_begins_with_failures():
    sentences = analysis.training_summary([FINDING], 1000, 40.0, 1.4)
    assert len(sentences) == 2
    assert "failed" in sentences[0]
    assert sentences[1] == "It stays. It means. Change it."
    assert analysis.training_summary([], 99, 40.0, 1.4)[0].startswith("99 steps are too few")
    assert "collapsed" in analysis.training_summary([], 1000, 1.5, 1.4)[0]
    assert "is 40, at random init 1." in analysis.training_summary([], 1000, 40.0, 1.4)[0]


def test_summaries_compare_with_random_init():
    assert "nothing was learned" in analysis.retrieval_summary((0.1, 0.2), 500)[0]
    (sentence,) = analysis.retrieval_summary((0.57, 0.17), 500)
    assert "57% of 500" in sentence
    assert "17%" in sentence
    assert "nothing" not in sentence
    assert analysis.retrieval_summary((1.0, 0.5), 5) == []
    assert analysis.label_summary({"rank_me": 3.0}, 0) == []
    (sentence,) = analysis.label_summary({"knn": 0.43, "random_knn": 0.2}, 10)
    assert all(part in sentence for part in ("43%", "20%", "10 classes"))


def test_text_is_escaped():
    name = "<script>alert('x')</script>.png"
    tile = html.tile(np.zeros((4, 4, 3), np.uint8), f"image {name}", note=name)
    page = html.document("a < b", html.paragraph("1 < 2"), {"One": tile, "Empty": ""}, "end")
    assert "<script" not in page
    assert "a &lt; b" in page
    assert page.count("<section") == 1
    assert page.count("<a href") == 1


def assert_self_contained(page, num_images):
    """Assert that a page loads nothing, runs no script, links within itself only, and describes every image."""
    assert "<script" not in page
    assert "http" not in page
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) >= num_images
    assert all(re.search(r'alt="[^"]+"', image) and 'src="data:image/' in image for image in images)
    assert set(re.findall(r"""(?:href|src)=["']([^"']{1,5})""", page)) == {"#part", "data:"}
    ids = re.findall(r'id="(part\d)"', page)
    assert [f"#{name}" for name in ids] == re.findall(r'href="(#part\d)"', page)


def failed_run(root):
    """Return the analysis of a run on class folders with a randomly initialized encoder and a finding."""
    stats = replace(
        STATS, data=f"folder:{root}", num_train=24, num_test=24, num_classes=2, min_side=20, p5_side=20, median_side=20
    )
    run, _ = cli.parse_run(command(stats, "runs/x")[1:])
    files, images = dataset_stats.load_sample(stats.data, "train", 20, run.crop_size)
    features = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    return analysis.FolderAnalysis(
        stats=stats,
        run=run,
        steps=200,
        encoder=random_init_encoder(run),
        files=files,
        images=images,
        features=features,
        sample_features=features,
        random_features=features,
        groups=analysis.cluster_groups(features, 2),
        duplicates=[],
        test_files=files,
        test_images=images,
        crop_retrieval=(0.5, 0.1),
        log=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "knn": 0.5}],
        metrics={"knn": 0.5, "random_knn": 0.4, "test_images": 20},
        findings=[FINDING],
    )


def test_the_report_of_a_failed_run_begins_with_the_failure(tmp_path):
    page = html.render_report(failed_run(class_folders(tmp_path / "<b>cats", train=12)), "runs/x")
    assert_self_contained(page, num_images=60)
    lead = re.search(r'<p class="lead warning">(.*?)</p>', page)[1]
    assert "It stays. It means. Change it." in lead
    assert "&lt;b&gt;cats</h1>" in page
    assert len(re.findall("<h2>", page)) == 9
    assert "Largest class" in page
    assert re.search(r"<h3>1\. \d+ images: \d+% (cat|dog)", page)


def test_the_report_shows_duplicates_if_there_are_any(tmp_path):
    made = failed_run(class_folders(tmp_path / "data", train=12))
    without = html.section_duplicates(made)
    assert "<img" not in without
    section = html.section_duplicates(replace(made, duplicates=[torch.tensor([0, 10]), torch.tensor([1, 11, 3])]))
    assert section.count("<img") == 4


@pytest.mark.parametrize(("n", "total", "rows"), [(8, 4, [0, 1, 2, 3]), (2, 8, [2, 6]), (3, 0, [])])
def test_evenly_spaced_indices_are_distinct(n, total, rows):
    assert html.evenly_spaced(n, total) == rows


def test_file_names_may_hold_invalid_unicode(tmp_path, monkeypatch):
    monkeypatch.setattr(html, "analyze_run", lambda *_: None)
    monkeypatch.setattr(html, "render_report", lambda *_: "image \udce4.png")
    assert html.write_report(tmp_path, None).read_bytes() == b"image ?.png"
