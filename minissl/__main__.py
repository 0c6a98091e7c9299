"""python -m minissl advise folder:DIR | train METHOD | evaluate DIR | show DIR | compare DIR DIR ... | few DIR DIR ...
                         | track ENCODER FOLDER | doctor DIR | export DIR FILE

Every option is an argument of the method's constructor, of `encoders.make_encoder` (as --encoder.NAME) or of
`train.TrainConfig`. Their defaults are the paper's; a preset replaces those that the hardware cannot afford.
"""

import os
import re
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from minissl import advise as advisor
from minissl import checkpoint, footage, page, parallel, reports, runs, survey
from minissl.data.sources import NAMES
from minissl.encoders import make_encoder
from minissl.errors import InputError
from minissl.machine import choose_device
from minissl.method import available, find, options
from minissl.train import TrainConfig

USAGE = f"""minissl: self-supervised vision, step by step

  python -m minissl advise folder:DIR [--minutes M] [--out DIR] [--train true|false] [--resume]
  python -m minissl train METHOD [--data NAME] [--out DIR] [--preset cpu|gpu] [--minutes M] [--resume]
  python -m minissl evaluate DIR [--data NAME]
  python -m minissl show DIR
  python -m minissl compare DIR DIR ... --out FILE.png
  python -m minissl few DIR DIR ... --data NAME
  python -m minissl track ENCODER FOLDER
  python -m minissl doctor DIR
  python -m minissl export DIR FILE.safetensors [--form timm|huggingface]

METHOD is one of: {", ".join(available())}
NAME is {NAMES} (images, or class folders of images)
python -m minissl train METHOD --help lists every option."""


class Parser(ArgumentParser):
    """Says what is wrong in one sentence, and leaves the exit to `main`; an option is written out."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> None:
        sentence = " ".join(re.sub(r"^Parser key", "Option", str(message)).split())
        raise InputError(f"{sentence.removesuffix('.')}. --help lists the options.")


def train_parser(method: str, preset: str) -> Parser:
    """The options of a method's training, with the preset's values as defaults."""
    kind = find(method)
    if preset not in kind.presets:
        raise InputError(f"There is no preset {preset!r}; choose one of {', '.join(kind.presets)}.")
    parser = Parser(prog=f"minissl train {method}", description=kind.__doc__.splitlines()[0])
    parser.add_argument("--data", default="scenes", help=NAMES)
    parser.add_argument("--out", type=Path, help="the run's folder; runs/METHOD if not given")
    parser.add_argument("--device", help="cuda, mps or cpu; chosen if not given")
    parser.add_argument("--preset", default=preset, help="cpu learns in minutes on two cores, gpu is the paper's")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    parser.add_argument("--start", default="", help="a run to begin at the end of; sizes and rates may differ")
    parser.add_argument("--teacher", default="", help="a run, or a method's exported file, to distil")
    parser.add_argument("--image_size", type=int, default=256, help="pixels a side the images are kept at")
    parser.add_class_arguments(TrainConfig)
    parser.add_class_arguments(kind, skip={"encoder"})
    parser.add_function_arguments(make_encoder, "encoder", skip={"img_size"})
    parser.set_defaults(kind.presets[preset])
    return parser


def underscored(word: str) -> str:
    """--batch-size=64 as --batch_size=64; what is no option, and what stands behind the =, as it is."""
    name, equals, value = word.partition("=")
    return (re.sub(r"(?<=\w)-(?=\w)", "_", name) if word.startswith("--") else name) + equals + value


def parse_run(words: list[str]) -> tuple[runs.Run, dict]:
    """What `train METHOD ...` asks for: the run, and all options by name."""
    if not words or words[0].startswith("-"):
        raise InputError(f"Say which method to train: {', '.join(available())}.")
    method, words = words[0], [underscored(word) for word in words[1:]]
    given = re.search(r"(?:^| )--preset[= ](\S+)", " ".join(words))
    device = re.search(r"(?:^| )--device[= ](\S+)", " ".join(words))
    device = choose_device(device and device[1])
    parser = train_parser(method, given[1] if given else "gpu" if device.type == "cuda" else "cpu")
    asked = parser.parse_args(words).as_dict()
    loop = {field.name: asked[field.name] for field in fields(TrainConfig)}
    own = {name: asked[name] for name in options(find(method))}
    encoder = asked["encoder"] | {"img_size": asked["size"]}
    run = runs.Run(method, asked["data"], asked["image_size"], encoder, own, loop, asked["start"], asked["teacher"])
    return run, asked | {"device": str(device)}


def train(words: list[str]) -> None:
    """`train METHOD ...`."""
    run, asked = parse_run(words)
    with parallel.parted():
        runs.start(run, asked["out"] or Path("runs") / run.method, asked["device"], asked["resume"])


def advise(words: list[str]) -> None:
    """`advise folder:DIR [--minutes M] [--out DIR] [--train true|false]`."""
    parser = Parser(prog="minissl advise", description=page.__doc__.splitlines()[0])
    parser.add_argument("data", help="folder:DIR, of pictures or class folders of pictures")
    parser.add_argument("--minutes", type=float, default=0.0, help="of training; advised if not given")
    parser.add_argument("--method", default="", help="simclr or dino; advised if not given")
    parser.add_argument("--out", type=Path, default=Path("runs/advise"), help="the run's folder")
    parser.add_argument("--device", help="cuda, mps or cpu; chosen if not given")
    parser.add_argument("--train", type=bool, default=True, help="false: say it, and do nothing")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder, as it was advised then"
    )
    asked = parser.parse_args(words)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("Advice is found by one process; give torchrun the command that --train false prints.")
    facts = _facts(asked)
    line = advisor.command(facts, str(asked.out))
    print(f"{advisor.table(facts)}\n\npython -m minissl {shlex.join(line)}\n")
    if asked.train:
        run, options = parse_run(line[1:])
        checkpoint.make_folder(asked.out)
        checkpoint.write_json(asked.out / "facts.json", asdict(facts))
        runs.start(run, asked.out, options["device"], asked.resume)
        print(f"Report: {page.write(asked.out, facts)}")


def _facts(asked) -> survey.Facts:
    """What advice rests on: as it was measured when the run began, or measured now."""
    if asked.minutes < 0:
        raise InputError(f"--minutes is {asked.minutes:g}; give how long to train, or leave it out.")
    before = checkpoint.read_json(asked.out / "facts.json")
    if asked.train and asked.resume and before:
        try:
            facts = survey.Facts(**before)
        except TypeError:  # of another version, or of someone else
            raise checkpoint.damaged(asked.out / "facts.json") from None
        if facts.data != asked.data:
            raise InputError(f"{asked.out} holds a run on {facts.data}, not {asked.data}; choose another --out.")
        return facts
    if asked.train and asked.resume and (asked.out / "config.json").exists():
        raise InputError(f"{asked.out} holds a run that was not advised; go on with train, or choose another --out.")
    if asked.train and (asked.out / "config.json").exists():
        raise InputError(f"{asked.out} already holds a run; go on with --resume, or choose another --out.")
    facts = survey.look(asked.data, choose_device(asked.device), asked.minutes, asked.method)
    run, options = parse_run(advisor.command(facts, str(asked.out))[1:])
    return survey.try_out(facts, run.build().to(options["device"]), run.image_size, TrainConfig(**run.loop))


def evaluate(words: list[str]) -> None:
    """`evaluate DIR [--data NAME]`."""
    parser = Parser(prog="minissl evaluate", description=runs.measure.__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--data", help="another data set than the run's own")
    asked = parser.parse_args(words)
    runs.measure(asked.dir, asked.data)


def show(words: list[str]) -> None:
    """`show DIR`."""
    parser = Parser(prog="minissl show", description=runs.show.__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    runs.show(parser.parse_args(words).dir)


def compare(words: list[str]) -> None:
    """`compare DIR DIR ... [--out FILE.png]`."""
    parser = Parser(prog="minissl compare", description=reports.compare.__doc__.splitlines()[0])
    parser.add_argument("dirs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.png"), help="the picture")
    asked = parser.parse_args(words)
    reports.compare(asked.dirs, asked.out)


def few(words: list[str]) -> None:
    """`few DIR DIR ... --data NAME [--seeds N]`."""
    parser = Parser(prog="minissl few", description=reports.few.__doc__.splitlines()[0])
    parser.add_argument("dirs", type=Path, nargs="+", help="runs that differ in their seed")
    parser.add_argument("--data", default="scenes:new", help="the task the few labels are of")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the labels for each")
    asked = parser.parse_args(words)
    reports.few(asked.dirs, asked.data, asked.dirs[0] / "few_labels.png", asked.seeds)


def track(words: list[str]) -> None:
    """`track ENCODER FOLDER ...`."""
    parser = Parser(prog="minissl track", description=footage.track.__doc__.splitlines()[0])
    parser.add_function_arguments(footage.track, as_positional=True)
    footage.track(**parser.parse_args(words).as_dict())


def doctor(words: list[str]) -> int:
    """`doctor DIR`."""
    parser = Parser(prog="minissl doctor", description=reports.diagnose.__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    return 1 if reports.diagnose(parser.parse_args(words).dir) else 0


def export(words: list[str]) -> None:
    """`export DIR FILE [--form timm|huggingface]`."""
    parser = Parser(prog="minissl export", description=runs.export.__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--form", default="minissl", help="timm or huggingface: the encoder alone, for these libraries")
    asked = parser.parse_args(words)
    runs.export(asked.dir, asked.file, asked.form)


def main(words: list[str]) -> int:
    """Run a command. The exit code: 0 done, 1 the doctor found something, 2 bad input, 130 stopped by Ctrl-C."""
    commands = {
        "advise": advise, "train": train, "evaluate": evaluate, "show": show, "compare": compare, "few": few,
        "track": track, "doctor": doctor, "export": export,
    }  # fmt: skip
    try:
        if not words or words[0] in ("-h", "--help"):
            print(USAGE)
        elif words[0] not in commands:
            raise InputError(f"There is no command {words[0]!r}; choose one of {', '.join(commands)}.")
        else:
            return commands[words[0]](words[1:]) or 0
    except InputError as error:
        print(f"minissl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if parallel.rank() == 0:
            print("Stopped. The same command with --resume goes on.", file=sys.stderr)
        return 130
    finally:
        parallel.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
