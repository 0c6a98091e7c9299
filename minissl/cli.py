"""The command line: `minissl COMMAND ...`, also `python -m minissl COMMAND ...`.

Every option of `train` is an argument of the method's constructor, of `models.factory.create_encoder` (as
--encoder.NAME) or of `training.config.TrainConfig`. Their defaults are the paper's; a preset replaces those that need
other hardware. Modules are imported by the command that needs them, so that --help and errors come at once.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from minissl import __version__
from minissl.data.names import DATASET_NAMES
from minissl.errors import InputError, suggestion
from minissl.methods import list_methods

if TYPE_CHECKING:
    from minissl.reports.dataset_stats import DatasetStats
    from minissl.training.run import RunConfig

USAGE = """minissl: self-supervised vision, step by step

  minissl recommend folder:DIR [--minutes M] [--out DIR] [--train true|false] [--resume]
  minissl train METHOD [--data NAME] [--out DIR] [--preset cpu|gpu] [--minutes M] [--resume] [--seed S]
  minissl evaluate DIR [--data NAME]
  minissl visualize DIR [--data NAME]
  minissl compare DIR DIR ... --out FILE.png
  minissl few-shot DIR DIR ... --data NAME
  minissl track ENCODER FOLDER
  minissl doctor DIR
  minissl export DIR FILE.safetensors [--form timm|huggingface]
  minissl --version

METHOD is one of: {methods}; or the path of a Python file that defines one
NAME is {datasets}
minissl COMMAND --help lists every option."""


class Parser(ArgumentParser):
    """A parser that raises InputError with one sentence instead of exiting. Options are never abbreviated."""

    def __init__(self, **kwargs: Any):
        super().__init__(**{"allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sentence = " ".join(re.sub(r"^Parser key", "Option", str(message)).split()).removesuffix(".")
        unknown = re.search(r"[Uu]nrecognized arguments?: (--[\w.-]+)", sentence)
        options = [option for action in self._actions for option in action.option_strings]
        raise InputError(f"{sentence}{suggestion(unknown[1], options) if unknown else ''}. --help lists the options.")


def train_parser(method: str, preset: str) -> Parser:
    """Build the parser of `train METHOD`, with the preset's values as defaults."""
    from minissl.methods.registry import get_method_class
    from minissl.models.factory import create_encoder
    from minissl.training.config import TrainConfig

    method_class = get_method_class(method)
    presets = method_class.presets
    if preset not in presets:
        raise InputError(f"Unknown preset {preset!r}{suggestion(preset, presets)}; choose {', '.join(presets)}.")
    parser = Parser(prog=f"minissl train {method}", description=_first_line(method_class))
    parser.add_argument("--data", default="scenes", help=DATASET_NAMES)
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/METHOD)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")
    parser.add_argument("--preset", default=preset, help="cpu learns in minutes on two cores; gpu is the paper's")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.add_argument("--init_from", default="", help="folder of a run whose final weights this one starts from")
    parser.add_argument("--teacher", default="", help="a run's folder or a method's exported file to distill")
    parser.add_argument("--image_size", type=int, default=256, help="side in pixels at which images are stored")
    parser.add_class_arguments(TrainConfig)
    parser.add_class_arguments(method_class, skip={"encoder"})
    parser.add_function_arguments(create_encoder, "encoder", skip={"image_size"})
    parser.set_defaults(presets[preset])
    return parser


def with_underscores(word: str) -> str:
    """Return --batch-size=64 as --batch_size=64; values and words that are no options stay."""
    name, equals, value = word.partition("=")
    return (re.sub(r"(?<=\w)-(?=\w)", "_", name) if word.startswith("--") else name) + equals + value


def parse_run(words: Sequence[str]) -> tuple[RunConfig, dict[str, Any]]:
    """Parse the words after `train` into a run's configuration and all options by name."""
    from minissl.methods.registry import get_method_class, method_options
    from minissl.training.config import TrainConfig
    from minissl.training.device import choose_device
    from minissl.training.run import RunConfig

    if not words or words[0].startswith("-"):
        raise InputError(f"Name the method to train: {', '.join(list_methods())}, or the path of a Python file.")
    method, words = words[0], [with_underscores(word) for word in words[1:]]
    if method.endswith(".py"):
        method = str(Path(method).expanduser().resolve())
    preset = re.search(r"(?:^| )--preset[= ](\S+)", " ".join(words))
    named = re.search(r"(?:^| )--device[= ](\S+)", " ".join(words))
    device = choose_device(named[1] if named else None)
    parser = train_parser(method, preset[1] if preset else "gpu" if device.type == "cuda" else "cpu")
    options = parser.parse_args(words).as_dict()
    train = {field.name: options[field.name] for field in fields(TrainConfig)}
    own = {name: options[name] for name in method_options(get_method_class(method))}
    encoder = options["encoder"] | {"image_size": own.get("crop_size", options["image_size"])}
    run = RunConfig(
        method=method, data=options["data"], image_size=options["image_size"], encoder=encoder, method_options=own,
        train=train, init_from=options["init_from"], teacher=options["teacher"],
    )  # fmt: skip
    return run, options | {"device": str(device)}


def train(words: Sequence[str]) -> None:
    """Train a method, evaluate its encoder and draw its figures."""
    from minissl import distributed
    from minissl.training.run import start_run

    run, options = parse_run(words)
    with distributed.peer_failures_as_input_errors():
        start_run(run, options["out"] or Path("runs") / Path(run.method).stem, options["device"], options["resume"])


def recommend(words: Sequence[str]) -> None:
    """Recommend options for a folder of images, train with them and write a report."""
    from minissl.reports import html
    from minissl.reports.recommend import command, table
    from minissl.training import checkpoint
    from minissl.training.run import start_run

    parser = Parser(prog="minissl recommend", description=_first_line(recommend))
    parser.add_argument("data", help="folder:DIR, of images or class folders of images")
    parser.add_argument("--minutes", type=float, default=0.0, help="of training (default: recommended)")
    parser.add_argument("--method", default="", help="simclr or dino (default: recommended)")
    parser.add_argument("--out", type=Path, default=Path("runs/recommend"), help="the run's folder")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the fastest available)")
    parser.add_argument("--train", type=bool, default=True, help="false prints the recommendation only")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder with its own options")
    options = parser.parse_args(words)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("recommend runs in one process; give torchrun the command that --train false prints.")
    stats = _dataset_stats(options)
    line = command(stats, str(options.out))
    print(f"{table(stats)}\n\nminissl {shlex.join(line)}\n")
    if options.train:
        run, chosen = parse_run(line[1:])
        checkpoint.make_folder(options.out)
        checkpoint.write_json(options.out / "dataset_stats.json", asdict(stats))
        start_run(run, options.out, chosen["device"], options.resume)
        print(f"Report: {html.write_report(options.out, stats)}")


def _dataset_stats(options: Namespace) -> DatasetStats:
    """Measure the folder and the machine, or, for --resume, load what was measured when the run began."""
    from minissl.reports.dataset_stats import DatasetStats, compute_dataset_stats, measure_speed
    from minissl.reports.recommend import command
    from minissl.training import checkpoint
    from minissl.training.config import TrainConfig
    from minissl.training.device import choose_device

    if options.minutes < 0:
        raise InputError(f"--minutes is {options.minutes:g}; give a positive number, or leave it out.")
    path, has_run = options.out / "dataset_stats.json", (options.out / "config.json").exists()
    stored = checkpoint.read_json(path)
    if options.train and options.resume and stored:
        try:
            stats = DatasetStats(**stored)
        except TypeError:  # of another version, or another program's
            raise checkpoint.damaged_file_error(path) from None
        if stats.data != options.data:
            raise InputError(f"{options.out} holds a run on {stats.data}, not {options.data}; choose another --out.")
        return stats
    if options.train and options.resume and has_run:
        raise InputError(
            f"{options.out} holds a run that `recommend` did not start; continue with train, or choose another --out."
        )
    if options.train and has_run:
        raise InputError(f"{options.out} already holds a run; continue it with --resume, or choose another --out.")
    stats = compute_dataset_stats(options.data, choose_device(options.device), options.minutes, options.method)
    run, chosen = parse_run(command(stats, str(options.out))[1:])
    return measure_speed(stats, run.build().to(chosen["device"]), run.image_size, TrainConfig(**run.train))


def evaluate(words: Sequence[str]) -> None:
    """Evaluate a run's encoder beside the same encoder with random weights."""
    from minissl.training.run import evaluate_run

    parser = Parser(prog="minissl evaluate", description=_first_line(evaluate))
    parser.add_argument("dir", type=Path, help="a run's folder")
    parser.add_argument("--data", help="data set to evaluate on (default: the run's own)")
    options = parser.parse_args(words)
    evaluate_run(options.dir, options.data)


def visualize(words: Sequence[str]) -> None:
    """Draw a run's figures: attention, PCA of patches, curves and collapse diagnostics."""
    from minissl.training.run import visualize_run

    parser = Parser(prog="minissl visualize", description=_first_line(visualize))
    parser.add_argument("dir", type=Path, help="a run's folder")
    parser.add_argument("--data", help="data set of the images that are drawn (default: the run's own)")
    options = parser.parse_args(words)
    visualize_run(options.dir, data_name=options.data)


def compare(words: Sequence[str]) -> None:
    """Compare the linear probes of several runs in one figure."""
    from minissl.reports.compare import compare_runs

    parser = Parser(prog="minissl compare", description=_first_line(compare))
    parser.add_argument("dirs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument("--out", type=Path, default=Path("runs/compare.png"), help="the figure")
    options = parser.parse_args(words)
    compare_runs(options.dirs, options.out)


def few_shot(words: Sequence[str]) -> None:
    """Measure accuracy on another task by the number of labels per class."""
    from minissl.reports.few_shot import few_shot_report

    parser = Parser(prog="minissl few-shot", description=_first_line(few_shot))
    parser.add_argument("dirs", type=Path, nargs="+", help="folders of runs that differ in their seed")
    parser.add_argument("--data", default="scenes:new", help="data set of the task")
    parser.add_argument("--seeds", type=int, default=3, help="random samples of the labels for each run")
    options = parser.parse_args(words)
    few_shot_report(options.dirs, options.data, options.dirs[0] / "few_shot.png", options.seeds)


def track(words: Sequence[str]) -> None:
    """Propagate the object masks of a clip's first frame and measure J&F."""
    from minissl.reports.tracking import track_clips

    parser = Parser(prog="minissl track", description=_first_line(track))
    parser.add_function_arguments(track_clips, as_positional=True)
    track_clips(**parser.parse_args(words).as_dict())


def doctor(words: Sequence[str]) -> int:
    """Diagnose a run that does not learn; exit code 1 if something is wrong."""
    from minissl.reports.diagnose import diagnose_run

    parser = Parser(prog="minissl doctor", description=_first_line(doctor))
    parser.add_argument("dir", type=Path, help="a run's folder")
    return 1 if diagnose_run(parser.parse_args(words).dir) else 0


def export(words: Sequence[str]) -> None:
    """Export a run as one file, or its encoder in the format of timm or Hugging Face."""
    from minissl.training.run import export_run

    parser = Parser(prog="minissl export", description=_first_line(export))
    parser.add_argument("dir", type=Path, help="a run's folder")
    parser.add_argument("file", type=Path, help="a .safetensors file; for huggingface a folder")
    parser.add_argument("--form", default="minissl", help="minissl, timm or huggingface; the last two hold the encoder")
    options = parser.parse_args(words)
    export_run(options.dir, options.file, options.form)


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "recommend": recommend,
    "train": train,
    "evaluate": evaluate,
    "visualize": visualize,
    "compare": compare,
    "few-shot": few_shot,
    "track": track,
    "doctor": doctor,
    "export": export,
}


def main(words: Sequence[str]) -> int:
    """Run a command. Returns 0 for success, 1 if doctor found something, 2 for bad input, 130 after Ctrl-C."""
    try:
        if not words or words[0] in ("-h", "--help"):
            print(_usage())
        elif words[0] == "--version":
            print(f"minissl {__version__}")
        elif (name := words[0].replace("_", "-")) not in COMMANDS:
            raise InputError(f"Unknown command {words[0]!r}{suggestion(name, COMMANDS)}; choose {', '.join(COMMANDS)}.")
        else:
            if "torch" not in sys.modules and _is_first_process():
                print("Loading PyTorch.", file=sys.stderr, flush=True)  # which takes seconds
            return COMMANDS[name](words[1:]) or 0
    except InputError as error:
        print(f"minissl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if _is_first_process():
            print("Stopped. The same command with --resume continues a training.", file=sys.stderr)
        return 130
    finally:
        if distributed := sys.modules.get("minissl.distributed"):  # not imported for --help
            distributed.shutdown_distributed()
    return 0


def _is_first_process() -> bool:
    """Return whether this is the first of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def console() -> NoReturn:
    """Run the command line and exit; the entry point of the command `minissl`."""
    sys.exit(main(sys.argv[1:]))


def _usage() -> str:
    return USAGE.format(methods=", ".join(list_methods()), datasets=DATASET_NAMES)


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").strip().splitlines()[0]
