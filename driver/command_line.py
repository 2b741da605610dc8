"""launch.py's arguments, its config, and the run folder to resume."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from demo.clips import ensure_clips
from driver.checkpoints import find_progress
from driver.upload import fetch_config, fetch_run
from preflight.inputs import Plan, make_plan
from video_opd import ROOT
from video_opd.cluster.command_line import Parser
from video_opd.config import Config
from video_opd.config_file import describe_keys, load_config, load_demo, resolve_paths
from video_opd.errors import CheckpointError, ConfigError
from video_opd.files.checkpoint import CHECKPOINTS
from video_opd.files.durable import finish_interrupted_writes

ABOUT = """Video-OPD: on-policy distillation of a video LLM for temporal grounding.

Actors sample, the teacher scores, the curriculum steers, the learner steps. Without arguments it runs the embedded
demo on a CPU."""


def prepare(config: Config) -> Plan:
    """The plan; the demo's clips are written where they are missing. Raises InputError; starts nothing."""
    if Path(config.data.train.annotations).is_relative_to(ROOT / "demo" / "data"):
        ensure_clips(ROOT / "demo" / "data")
    return make_plan(config)


def step_to_resume(folder: Path, config: Config, plan: Plan, step: int | None) -> int:
    """Of the newest whole checkpoint, or `step`. Raises CheckpointError, or ConfigError, if the run cannot go on from it."""
    for half_written in (folder, folder / CHECKPOINTS):
        finish_interrupted_writes(half_written)
    step = find_progress(folder, config, plan, step).step
    if step > config.num_steps:
        raise ConfigError(
            f"{folder} stands at step {step}, beyond num_steps={config.num_steps}: raise num_steps"
        )
    return step


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises ConfigError."""
    parser = Parser(
        prog="python launch.py",
        description=ABOUT,
        epilog="configuration keys and their defaults:\n" + "\n".join(describe_keys()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="configuration values, e.g. learner.lr=1e-6"
    )
    parser.add_argument(
        "--config", type=Path, help="YAML file (default: configs/demo.yaml, the embedded demo)"
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="go on in this run folder from its newest checkpoint, or in a copy of a URL",
    )
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="with --resume: from its checkpoint of step N, not from the newest",
    )
    parser.add_argument(
        "--address",
        help="HOST:PORT of a node of a Ray cluster, auto, or local for one of its own (default: RAY_ADDRESS, else the cluster "
        "that this machine is in, else its own)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check what is here, print plan and memory, start nothing"
    )
    parser.add_argument(
        "--check-cluster", type=Path, metavar="FILE", help="check a file of machines for Ray, start nothing"
    )
    parser.add_argument(
        "--gpu-memory-gib", type=float, help="memory of one GPU (default: this machine's, or 80 without one)"
    )
    return parser.parse_args(arguments)


def read_config(arguments: argparse.Namespace) -> Config:
    if arguments.step is not None and not arguments.resume:
        raise ConfigError("--step chooses a checkpoint of the run that --resume names: give --resume RUN")
    if arguments.resume and arguments.config:
        raise ConfigError("--resume goes on with the run's own config: leave out --config")
    if arguments.resume == "":
        raise ConfigError("--resume names no run: give a run folder, or a URL")
    if arguments.resume and "://" in arguments.resume:
        with TemporaryDirectory() as folder:
            return resolve_paths(
                load_config(fetch_config(arguments.resume, Path(folder)), arguments.overrides), Path.cwd()
            )
    if arguments.resume and not (Path(arguments.resume) / "config.yaml").is_file():
        raise CheckpointError(f"{arguments.resume} is not a run folder: it has no config.yaml")
    if not arguments.resume and not arguments.config:  # the demo runs from anywhere
        return load_demo(arguments.overrides)
    path = Path(arguments.resume) / "config.yaml" if arguments.resume else arguments.config
    return resolve_paths(load_config(path, arguments.overrides), Path.cwd())


def resumed_folder(arguments: argparse.Namespace, config: Config) -> Path | None:
    """The run folder to go on in: the one that is named, or a copy of what its URL holds, made here."""
    if arguments.resume and "://" in arguments.resume:
        return fetch_run(arguments.resume, Path(config.runs_dir), arguments.step)
    return Path(arguments.resume).resolve() if arguments.resume else None
