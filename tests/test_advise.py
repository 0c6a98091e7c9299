"""Advice for one's own pictures: facts that are measured, advice that follows, a page that holds everything."""

import json
import math
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from minissl import __main__ as commands
from minissl import album, doctor, markup, page, runs, survey
from minissl.advise import advise, cautions, command, table
from minissl.doctor import Finding
from minissl.errors import InputError
from minissl.method import Tokens
from tests.folders import class_folders, flat_folder, picture

PHOTOS = survey.Facts(
    "folder:my photos", train=9000, test=1000, broken=0, classes=0, smallest=300, low=400, middle=500, aspect=1.5,
    looked=1000, grey=0.0, copies=0.0, alike=0.7, texture=0.4, device="cpu", cores=2, free=8 * 10**9, rate=400.0,
    took=10**9,
)  # fmt: skip
DINO = {"method": "dino", "minutes": 15.0}
CASES = {
    "photos": {},
    "a teacher": DINO,
    "minutes": {"minutes": 3.0},
    "long": {"minutes": 600.0},
    "an instant": {"minutes": 0.1, "method": "dino"},
    "hundreds": {"train": 300, "test": 33},
    "a handful": {"train": 9, "test": 1},
    "icons": {"smallest": 20, "low": 24, "middle": 24},
    "digits": {"smallest": 28, "low": 28, "middle": 28, "method": "dino"},
    "one is small": {"smallest": 17},
    "textures": {"texture": 0.95},
    "classes": {"classes": 10},
    "a GPU": {"device": "cuda", "free": 80 * 10**9, "rate": 1200.0},
    "a small GPU": {"device": "cuda", "free": 4 * 10**9, "rate": 100.0},
    "a GPU, small pictures": {"device": "cuda", "free": 80 * 10**9, "smallest": 32, "low": 32, "middle": 32},
}


def advised(**changes):
    """Option -> value."""
    return {one.option: one.value for one in advise(replace(PHOTOS, **changes))}


def reason(option, **changes):
    return next(one.reason for one in advise(replace(PHOTOS, **changes)) if one.option == option)


@pytest.fixture
def any_device(monkeypatch):
    """Parsing for a GPU needs none."""
    monkeypatch.setattr(commands, "choose_device", lambda name=None: torch.device(name or "cpu"))


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_the_command_is_one_that_train_takes(any_device, changes):
    facts = replace(PHOTOS, **changes)
    line = shlex.split(shlex.join(command(facts, "runs/my photos")))
    assert line[0] == "train"
    run, asked = commands.parse_run(line[1:])
    assert run.data == "folder:my photos"
    assert str(asked["out"]) == "runs/my photos"
    assert asked["device"] == facts.device
    found = {one.option.removeprefix("--"): one.value for one in advise(facts) if one.option.startswith("--")}
    for name, value in found.items():
        kept = run.encoder["patch_size"] if name == "encoder.patch_size" else asked[name]
        assert kept == (value if value != "true" else True), name


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_what_is_advised_can_be_built_and_the_doctor_agrees(any_device, changes):
    facts = replace(PHOTOS, **changes)
    run, _ = commands.parse_run(command(facts, "runs/x")[1:])
    with torch.device("meta") if facts.gpu else torch.device("cpu"):
        method = run.build()
    steps = round(60 * run.loop["minutes"] * facts.rate / run.loop["batch_size"])
    assert doctor.on_options(asdict(run), steps, method) == []
    assert run.loop["batch_size"] <= facts.train
    assert run.size <= min(run.image_size, facts.smallest)
    assert run.size % run.encoder["patch_size"] == 0


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_every_reason_is_one_sentence(changes):
    facts = replace(PHOTOS, **changes)
    for said in [*(one.reason for one in advise(facts)), *cautions(facts)]:
        assert said.endswith(".")
        assert said[0].isupper() or said[0].isdigit()
        assert not re.search(r"[.!?] [A-Z]", said), said


def test_time_and_numbers_choose_the_method():
    assert [advised(minutes=m)["method"] for m in (0.0, 29.0, 30.0)] == ["simclr", "simclr", "dino"]
    assert [advised(train=n, minutes=30.0)["method"] for n in (999, 1000)] == ["simclr", "dino"]
    assert "256 prototypes and a momentum of 0.95" in reason("teacher")
    assert advised(train=300, device="cuda")["method"] == "dino"
    assert advised(minutes=3.0, method="dino")["method"] == "dino"
    with pytest.raises(InputError, match="advice for simclr and dino here, not for 'clip'"):
        advised(method="clip")


def test_prototypes_have_pictures_each():
    asked = {2048: 64, 4095: 64, 4096: 128, 8191: 128, 8192: 256, 10**6: 256}
    assert {n: advised(train=n, **DINO)["--prototypes"] for n in asked} == asked
    assert reason("--prototypes", train=2048, **DINO).startswith("2,048 pictures are 32 a prototype;")
    heads = {20_000: 1024, 20_001: 2048, 10**6: 65_536}
    assert {n: advised(train=n, device="cuda")["--prototypes"] for n in heads} == heads


def test_a_teacher_of_few_steps_moves_faster():
    assert advised(**DINO)["--momentum"] == 0.95
    asked = {"method": "dino", "minutes": 10.0, "rate": 10.0}  # 94 steps of 64
    assert advised(**asked)["--momentum"] == round(1 - 10 / 94, 3)
    left, usual = (f"{math.exp(-share / 2 * 94):.2%}" for share in (0.106, 0.05))
    assert f"94 steps this leaves {left} of the random teacher" in reason("--momentum", **asked)
    assert reason("--momentum", **asked).endswith(f"the preset's 0.95 leaves {usual}.")


def test_sizes_follow_the_smallest_picture_and_the_median():
    assert [advised(middle=m, smallest=30)["--image_size"] for m in (40, 500)] == [40, 64]
    assert [advised(smallest=s)["--size"] for s in (300, 33, 31, 24)] == [32, 32, 24, 24]
    small = advised(smallest=23)
    assert (small["--size"], small["--encoder.patch_size"]) == (20, 4)
    assert "--encoder.patch_size" not in advised(smallest=24)
    with pytest.raises(InputError, match="smallest picture is 15 pixels"):
        advised(smallest=15)


def test_crops_may_be_smaller_where_a_part_shows_the_whole():
    assert [advised(texture=t, **DINO)["--global_scale"] for t in (0.79, 0.8)] == [(0.5, 1.0), (0.4, 1.0)]
    assert "agree by 0.40" in reason("--global_scale", **DINO)
    assert "agree by 0.40" in reason("--scale")


def test_a_batch_fits_the_pictures_and_the_memory():
    assert [advised(train=n)["--batch_size"] for n in (9, 255, 256, 1000)] == [8, 128, 256, 256]
    assert advised(**DINO)["--batch_size"] == 64
    much, some, little = (advised(device="cuda", free=free * 10**9) for free in (80, 20, 4))
    assert (much["--batch_size"], some["--batch_size"], little["--batch_size"]) == (256, 256, 128)
    assert ("--recompute" in much, "--recompute" in some, "--lr" in some) == (False, True, False)
    assert little["--lr"] == 2.5e-4


def test_what_to_expect_is_what_was_tried():
    found = advised(minutes=16.0)
    assert found["steps"] == "1,500"  # 16 minutes of 400 images a second, 256 a step
    assert "384,000 images at 400 a second, as just tried, are 42.7 passes" in reason("steps", minutes=16.0)
    assert found["memory"] == f"{1 + 10_000 * 3 * 64**2 / 1e9:.1f} GB"
    assert "steps" not in advised(rate=0.0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"train": 3, "test": 1}, "Pictures to learn from: 3, of which about 3 are no copies; these"),
        ({"train": 500, "copies": 0.99}, "500, of which about 5 are no copies"),
    ],
)
def test_too_few_to_tell_apart(changes, says):
    with pytest.raises(InputError, match=says):
        advised(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"broken": 2}, "left out: 2."),
        ({"grey": 1.0}, "100% are grey"),
        ({"aspect": 4.0}, "the middle square is kept, 25% of such a picture"),
        ({"copies": 0.2}, "20% nearly repeat another"),
        ({"alike": 0.97}, "(cosine 0.97)"),
        ({"rate": 40.0, "minutes": 15.0}, "4.0 passes are few: for 100, as DINO's 89.6 took, 375 minutes would do"),
        ({"train": 300}, "300 pictures are few"),
        ({"smallest": 17}, "19 of 20 have 400 pixels or more"),
    ],
)
def test_what_no_option_mends_is_said(changes, says):
    assert cautions(PHOTOS) == []
    (said,) = cautions(replace(PHOTOS, **changes))
    assert says in said
    assert f"Beware: {said}" in table(replace(PHOTOS, **changes))


def saved(folder, images):
    """Images (N, 3, H, W) uint8 as files."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")
    return folder


def looked(folder):
    return survey.look(f"folder:{folder}", torch.device("cpu"))


def noise(n, size=32, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=chance)


def test_a_folder_is_counted(tmp_path):
    flat = flat_folder(tmp_path / "flat", 30)
    picture(flat / "wide.png", (20, 200))
    (flat / "broken.jpg").write_text("no picture")
    Image.fromarray(np.ones((20, 20), np.float32)).save(flat / "of floats.tiff")
    facts = looked(flat)
    assert (facts.train + facts.test, facts.broken, facts.classes) == (31, 2, 0)
    assert (facts.smallest, facts.low, facts.middle, facts.aspect) == (20, 20, 20, 1.2)
    assert (facts.grey, facts.copies) == (0.0, 0.0)
    parts = looked(class_folders(tmp_path / "classes", train=6, test=3))
    assert (parts.train, parts.test, parts.classes) == (12, 6, 2)
    assert parts.copies == 0.5  # cats and dogs are the same noise


def test_odd_folders(tmp_path):
    same = looked(saved(tmp_path / "same", noise(1).expand(40, -1, -1, -1)))
    assert same.different == 1
    with pytest.raises(InputError, match="about 1 are no copies"):
        advise(same)
    plain = noise(40, 1).expand(-1, -1, 32, 32)
    assert looked(saved(tmp_path / "plain", plain)).different == 1
    grey = noise(40)[:, :1].expand(-1, 3, -1, -1)
    assert looked(saved(tmp_path / "grey", grey)).grey == 1.0
    wide = noise(40, 64)[:, :, :16]
    assert looked(saved(tmp_path / "wide", wide)).aspect == 4.0
    with pytest.raises(InputError, match="Pictures to learn from: 3,"):
        advise(looked(saved(tmp_path / "three", noise(3))))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no picture")
    with pytest.raises(InputError, match="None of the 1 files"):
        looked(tmp_path / "texts")
    with pytest.raises(InputError, match="give folder:photos"):
        survey.look("photos", torch.device("cpu"))


def test_a_texture_is_told_from_a_thing():
    plain = torch.rand(60, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    striped = plain * (1 + 0.5 * torch.sin(torch.arange(64.0)))
    assert survey.texture((striped.expand(-1, -1, 64, -1) * 150).to(torch.uint8)) > 0.95
    quarters = torch.rand(60, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    things = F.interpolate(quarters, size=(64, 64))
    assert survey.texture((things * 255).to(torch.uint8)) < 0.2


def test_steps_are_tried_on_pictures_of_the_right_size(monkeypatch):
    seen = {}

    def plan(method, data, config):
        seen.update(images=data.images, precision=config.precision)
        return survey.train.Plan(10, 0.5, 123)

    monkeypatch.setattr(survey.train, "plan", plan)
    config = survey.train.TrainConfig(batch_size=8)
    facts = survey.try_out(PHOTOS, nn.Linear(1, 1), 24, config)
    assert (facts.rate, facts.took) == (16.0, 123)
    assert seen["images"].shape == (8, 3, 24, 24)
    assert seen["precision"] in ("fp32", "bf16")


def test_groups_are_sorted_and_begin_in_their_middle():
    chance = torch.Generator().manual_seed(0)
    middles = torch.eye(3).repeat_interleave(torch.tensor([5, 20, 10]), 0)
    features = middles + 0.1 * torch.randn(35, 3, generator=chance)
    features[17] = middles[17]  # of the group of 20
    found = album.groups(features, 3)
    assert [len(rows) for rows in found] == [20, 10, 5]
    assert set(found[0].tolist()) == set(range(5, 25))
    unit = F.normalize(features, dim=-1)
    near = unit[found[0]] @ unit[found[0]].mean(dim=0)
    assert torch.equal(near, near.sort(descending=True).values)


def test_no_picture_is_its_own_neighbour():
    turn = torch.tensor([0.0, 0.1, 0.25, 1.0, 3.0])
    features = torch.stack([turn.cos(), turn.sin()], dim=1)
    assert album.neighbours(features, torch.tensor([0, 3]), 2).tolist() == [[1, 2], [2, 1]]
    copies = torch.ones(5, 2)
    found = album.neighbours(copies, torch.arange(5), 3)
    assert found.shape == (5, 3)


def test_a_stranger_is_odd_even_with_a_copy():
    features = torch.cat([torch.randn(40, 4, generator=torch.Generator().manual_seed(0)) * 0.1 + 1, -torch.ones(2, 4)])
    assert set(album.odd_ones(features, 2).tolist()) == {40, 41}


def test_repeats_are_found_mirrored_too():
    images = noise(20, 8).repeat_interleave(4, -1).repeat_interleave(4, -2)
    images[7], images[15], images[3] = images[2], images[2].flip(-1), images[9] // 4 * 3 + noise(1, 32)[0] // 8
    assert [rows.tolist() for rows in album.repeats(images)] == [[2, 7, 15], [3, 9]]
    images[9] = images[3]
    images[2] = images[7] // 4 * 3 + noise(1, 32)[0] // 8
    assert [rows.tolist() for rows in album.repeats(images)] == [[3, 9], [2, 7, 15]]


class Mean(nn.Module):
    """The mean colour of a picture, or nothing of it."""

    def __init__(self, blind=False):
        super().__init__()
        self.blind = blind

    def forward(self, images):
        found = images.mean(dim=(2, 3)) * (not self.blind) + torch.tensor([1.0, 0.0, 0.0])
        return Tokens(found, found[:, None, None])


def test_crops_of_one_picture_meet():
    colors = F.one_hot(torch.arange(60) % 3, 3) * torch.linspace(50, 250, 60)[:, None]
    images = colors.to(torch.uint8)[:, :, None, None].expand(-1, -1, 32, 32)
    assert album.reunited(Mean(), images, 16) > 0.9
    assert album.reunited(Mean(blind=True), images, 16) <= 0.05
    hard = [album.reunited(Mean(), noise(200, 16), 16) for _ in range(2) if torch.rand(7) is not None]
    assert 0.01 < hard[0] == hard[1] < 0.9


def test_the_verdict_is_honest():
    wrong = Finding("uniform", "It stays.", "It means.", "Turn it.")
    said = album.verdict([wrong], 1000, 40.0, 1.4)
    assert said[0].startswith("Something went wrong")
    assert said[1] == "It stays. It means. Turn it."
    assert album.verdict([], 99, 40.0, 1.4)[0].startswith("99 steps are too few")
    assert "all but collapsed" in album.verdict([], 1000, 1.5, 1.4)[0]
    assert "about 40 directions (RankMe; 1 is collapse), untrained 1" in album.verdict([], 1000, 40.0, 1.4)[0]
    assert album.learnt((0.1, 0.2), 500)[0].endswith("nothing was learnt.")
    assert "57% of cases, an untrained network in 17%." in album.learnt((0.57, 0.17), 500)[0]
    assert album.learnt((1.0, 0.5), 5) == []
    assert album.labelled({"rank_me": 3.0}, 0) == []
    assert "43% of the kept pictures" in album.labelled({"knn": 0.43, "random_knn": 0.2}, 10)[0]


def test_a_page_escapes_what_it_is_told():
    name = "<script>alert('x')</script>.png"
    shown = markup.tile(np.zeros((4, 4, 3), np.uint8), f"picture {name}", note=name)
    whole = markup.document("a < b", markup.say("1 < 2"), {"One": shown, "None": ""}, "end")
    assert "<script" not in whole
    assert "a &lt; b" in whole
    assert whole.count("<section") == 1
    assert whole.count("<a href") == 1


def whole(text, pictures):
    """A page that needs nothing else, with words for every picture."""
    assert "<script" not in text
    assert "http" not in text
    images = re.findall(r"<img [^>]*>", text)
    assert len(images) >= pictures
    assert all(re.search(r'alt="[^"]+"', image) and 'src="data:image/' in image for image in images)
    assert set(re.findall(r"""(?:href|src)=["']([^"']{1,5})""", text)) == {"#part", "data:"}
    ids = re.findall(r'id="(part\d)"', text)
    assert [f"#{name}" for name in ids] == re.findall(r'href="(#part\d)"', text)
    return True


def test_a_page_of_a_run_that_failed_says_so_first(tmp_path):
    """An album by hand: class folders, an untrained encoder, the doctor's finding."""
    root = class_folders(tmp_path / "<b>cats", train=12)
    facts = replace(PHOTOS, data=f"folder:{root}", train=24, test=24, classes=2, smallest=20, low=20, middle=20)
    run, _ = commands.parse_run(command(facts, "runs/x")[1:])
    encoder, (files, pictures) = runs.untrained(run), survey.some(facts.data, "train", 20, run.size)
    features = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    made = album.Album(
        facts, run, 200, encoder, files, pictures, features, features, features, album.groups(features, 2), [],
        files, pictures, (0.5, 0.1), [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "knn": 0.5}],
        {"knn": 0.5, "random_knn": 0.4, "test_images": 20}, [Finding("uniform", "It stays.", "It means.", "Turn it.")],
    )  # fmt: skip
    text = page.page(made, "runs/x")
    assert whole(text, pictures=60)
    lead = re.search(r'<p class="lead beware">(.*?)</p>', text)[1]
    assert "Something went wrong, and what is below means little. It stays. It means. Turn it." in lead
    assert "What is in &lt;b&gt;cats" in text
    for title in ("The advice", "Classes", "Groups", "Nearest neighbours", "Where it looks", "Odd ones out"):
        assert f"<h2>{title}</h2>" in text
    assert "None among 20 pictures." in text
    assert "Largest class" in text
    assert re.search(r"<h3>1\. \d+ pictures: \d+% (cat|dog)", text)


def test_without_training_nothing_is_written(tmp_path, capsys, monkeypatch):
    flat = flat_folder(tmp_path / "flat", 40)
    words = ["advise", f"folder:{flat}", "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert commands.main([*words, "--train", "false"]) == 0
    said = capsys.readouterr().out
    assert "36 pictures are few" in said
    line = re.search(r"^python -m minissl (train .*)$", said, re.MULTILINE)[1]
    run, _ = commands.parse_run(shlex.split(line)[1:])
    assert (run.method, run.loop["minutes"]) == ("simclr", 3.0)
    assert not (tmp_path / "run").exists()
    assert commands.main(["advise", "scenes"]) == 2
    assert "Advice is for folders" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert commands.main(words) == 2
    assert "one process" in capsys.readouterr().err


@pytest.mark.parametrize(("n", "of", "rows"), [(8, 4, [0, 1, 2, 3]), (2, 8, [2, 6]), (3, 0, [])])
def test_pictures_are_drawn_evenly_and_none_of_them_twice(n, of, rows):
    assert page.spaced(n, of) == rows


def test_a_report_holds_names_that_are_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "open_album", lambda *_: None)
    monkeypatch.setattr(page, "page", lambda *_: "picture \udce4.png")
    assert page.write(tmp_path, None).read_bytes() == b"picture ?.png"


def test_advice_is_not_asked_for_less_than_no_time_or_for_another_run(tmp_path, capsys):
    words = ["advise", f"folder:{flat_folder(tmp_path / 'flat', 12)}", "--out", str(tmp_path / "run")]
    assert commands.main([*words, "--minutes=-5"]) == 2
    assert "--minutes is -5; give how long to train" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    assert commands.main([*words, "--resume"]) == 2
    assert "holds a run that was not advised; go on with train" in capsys.readouterr().err


@pytest.mark.slow
def test_from_a_folder_to_a_report(tmp_path, capsys):
    flat, out = flat_folder(tmp_path / "flat", 40), tmp_path / "run"
    words = ["advise", f"folder:{flat}", "--minutes", "0.005", "--out", str(out), "--device", "cpu"]
    assert commands.main(words) == 0
    report = (out / "report.html").read_text(encoding="utf-8")
    assert whole(report, pictures=30)
    assert len(report) < 5_000_000
    assert "too few to judge" in report
    assert "<h2>Classes</h2>" not in report
    before = json.loads((out / "config.json").read_text())
    assert before["run"]["method"] == "simclr"
    assert commands.main(words) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert commands.main([*words[:1], f"folder:{tmp_path}", *words[2:], "--resume"]) == 2
    assert "holds a run on folder:" in capsys.readouterr().err
    (out / "report.html").unlink()
    facts = (out / "facts.json").read_text()
    (out / "facts.json").write_text('{"odd": 1}')
    assert commands.main([*words, "--resume"]) == 2
    assert "facts.json is damaged" in capsys.readouterr().err
    (out / "facts.json").write_text(facts)
    assert commands.main([*words, "--resume"]) == 0
    assert json.loads((out / "config.json").read_text()) == before
    assert (out / "report.html").exists()


@pytest.mark.parametrize("case", CASES)
def test_what_is_quoted_with_a_deviation_is_in_the_readme(case):
    readme = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")
    said = " ".join(one.reason for one in advise(replace(PHOTOS, **CASES[case])))
    quoted = re.findall(r"\d+\.\d ± \d+\.\d", said)
    assert [number for number in quoted if number not in readme] == []
    assert quoted or case not in ("photos", "minutes", "hundreds")
