"""launch.py's arguments, its config, and the run to resume."""

import argparse
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from tempfile import TemporaryDirectory

from demo.clips import ensure_clips
from driver.progress import SavedRun, find_saved_run
from driver.upload import fetch_config, fetch_run
from preflight.devices import DEFAULT, DEVICES, Utilisation
from preflight.inputs import Plan, make_plan
from video_opd import ROOT
from video_opd.cluster.command_line import Parser
from video_opd.config import Config
from video_opd.config_file import describe_keys, load_config, load_demo, resolve_paths
from video_opd.errors import CheckpointError, ConfigError
from video_opd.files.checkpoint import CHECKPOINTS, checkpoint_steps
from video_opd.files.durable import finish_interrupted_writes

ABOUT = """Video-OPD: on-policy distillation of a video LLM for temporal grounding.

Actors sample, the teacher scores, the curriculum steers, the learner steps.
Without arguments it runs the embedded demo on a CPU."""
ADDRESS = """HOST:PORT of a node of a Ray cluster, auto, or local for one of its own
(default: RAY_ADDRESS, else the cluster that this machine is in, else its own)"""
SHARES = ("PREFILL", "TRAINING", "BANDWIDTH")
UTILISATION = f"""with --dry-run: the shares of the GPU's FLOP/s and of its bandwidth that are reached
(default: {" ".join(f"{share:g}" for share in astuple(Utilisation()))})"""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Raises ConfigError."""
    keys = "configuration keys and their defaults:\n" + "\n".join(describe_keys())
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python launch.py", description=ABOUT, epilog=keys, formatter_class=layout)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="configuration values, e.g. learner.lr=1e-6")
    add("--config", type=Path, help="YAML file (default: configs/demo.yaml, the embedded demo)")
    add(
        "--resume",
        metavar="RUN",
        help="continue a run folder, or a copy of a URL, from its newest checkpoint",
    )
    add("--step", type=int, metavar="N", help="with --resume: from the checkpoint of step N, not the newest")
    add("--address", help=ADDRESS)
    add("--dry-run", action="store_true", help="check what is here, print plan and memory, start nothing")
    add("--check-cluster", type=Path, metavar="FILE", help="check a file of machines for Ray, start nothing")
    add("--gpu-memory-gib", type=float, help="memory of one GPU (default: this machine's, or 80 without one)")
    add("--device", choices=DEVICES, help=f"with --dry-run: the GPU (default: this machine's, or {DEFAULT})")
    add("--utilisation", nargs=3, type=float, metavar=SHARES, help=UTILISATION)
    parsed = parser.parse_intermixed_args(arguments)  # values and options in any order
    if not parsed.dry_run and (parsed.device or parsed.utilisation):
        parser.error("--device and --utilisation are for the plan that --dry-run prints: add it")
    return parsed


def read_config(arguments: argparse.Namespace) -> Config:
    """The resumed run's config, that of --config, or the demo's, with the overrides. Raises InputError."""
    resume, path = arguments.resume, arguments.config
    if arguments.step is not None and not resume:
        raise ConfigError("--step chooses a checkpoint of the run that --resume names: give --resume RUN")
    if resume and path:
        raise ConfigError("--resume continues with the run's own config: leave out --config")
    if resume == "":
        raise ConfigError("--resume names no run: give a run folder, or a URL")
    if not resume and not path:  # the demo runs from anywhere
        return load_demo(arguments.overrides)
    with TemporaryDirectory() as folder:
        if resume and "://" in resume:
            path = fetch_config(resume, Path(folder))
        elif resume and not (path := Path(resume) / "config.yaml").is_file():
            raise CheckpointError(f"{resume} is not a run folder: it has no config.yaml")
        return resolve_paths(load_config(path, arguments.overrides), Path.cwd())


def prepare(config: Config, resumes: bool = False) -> Plan:
    """make_plan, after writing the demo's clips where they are missing. Raises InputError; starts nothing."""
    demo = ROOT / "demo" / "data"
    if any(Path(source.annotations).is_relative_to(demo) for source in config.data.sources.values()):
        ensure_clips(demo)
    return make_plan(config, resumes)


def resumed_folder(arguments: argparse.Namespace, config: Config) -> Path | None:
    """The run folder that --resume names, or a copy, made here, of what its URL holds."""
    if arguments.resume and "://" in arguments.resume:
        return fetch_run(arguments.resume, Path(config.runs_dir), arguments.step)
    return Path(arguments.resume).resolve() if arguments.resume else None


def saved_run_to_resume(folder: Path, config: Config, plan: Plan, step: int | None) -> SavedRun | None:
    """The newest whole checkpoint, or that of `step`. None: the run has none yet, so it begins anew.

    Raises InputError if it cannot be resumed.
    """
    for parent in (folder, folder / CHECKPOINTS):
        finish_interrupted_writes(parent)
    if step is None and not checkpoint_steps(folder):
        return None
    saved = find_saved_run(folder, config, plan, step)
    if saved.progress.step > config.num_steps:
        at = f"{folder} is at step {saved.progress.step}"
        raise ConfigError(f"{at}, beyond num_steps={config.num_steps}: raise num_steps")
    return saved
