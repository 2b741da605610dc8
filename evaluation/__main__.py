"""Scores a model, a run or a file of predictions on a split: R1@0.3/0.5/0.7 and mIoU under a named protocol.

  python -m evaluation --run runs/NAME                                    its config, its last checkpoint's student
  python -m evaluation --model FOLDER --config CONFIG.yaml [key=value ...]
  python -m evaluation --predictions FILE.parquet [--config CONFIG.yaml]  without a model

The questions are those of the config's data.eval. docs/evaluation.md says what every number means.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

import video_opd  # noqa: F401  # first: makes transformers importable
from evaluation.predictions import match_texts, read_failures, read_questions, read_texts, write_answers
from evaluation.protocols import PROTOCOLS, Protocol, protocol_named
from evaluation.scoring import (
    METRICS,
    Question,
    bootstrap_intervals,
    constant_baseline,
    questions_of,
    random_baseline,
    score_answers,
    summarise_answers,
)
from evaluation.timelines import write_timelines
from video_opd.config import Config
from video_opd.config_file import load_config, resolve_paths
from video_opd.datasets import read_prompts
from video_opd.errors import ConfigError, InputError, VideoOPDError
from video_opd.files.checkpoint import find_checkpoint
from video_opd.files.run_folder import write_json
from video_opd.models.model_files import read_model_info
from video_opd.types import FailedPrompt, Prediction, Prompt

COUNTS = ("n", "unparsed", "reversed", "out_of_range", "missing")
NO_FRAMES = 1  # read_prompts' multiple where nobody looks at a frame: its size does not matter
NAMES = {"best_constant": "best constant", "random": "random", "no_video": "no video"}


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What is to be scored."""

    questions: list[Question]
    texts: dict[str, str | None]  # by prompt id
    why_missing: dict[str, str]
    train: list[Prompt]  # empty: no best constant interval
    blank: dict[str, str | None] | None  # answers to grey frames; None: not asked for
    seed: int
    other_prompts: int = 0  # answers to none of the questions


def ask_model(
    config: Config, prompts: Sequence[Prompt], blanks: bool
) -> list[list[Prediction | FailedPrompt]]:
    """The greedy answers of the model `config.student`, prompts_per_call at a time as the actors give them; with `blanks`, a
    second list of answers on grey frames."""
    from video_opd.models.prompting import PromptEncoder
    from video_opd.models.vllm_engine import SamplingEngine, predict

    encoder = PromptEncoder(config.student, config.prompt, config.video, config.trust_remote_code)
    trust = {"trust_remote_code": config.trust_remote_code}
    engine = SamplingEngine(config.student, config.rollout, config.seed, encoder.pad_ids, **trust)
    size, passes = config.rollout.prompts_per_call, []
    for blank_video in (False, True) if blanks else (False,):
        chunks = [prompts[i : i + size] for i in range(0, len(prompts), size)]
        said = track(chunks, "grey frames" if blank_video else "answers", console=Console(stderr=True))
        passes.append([answer for chunk in said for answer in predict(encoder, engine, chunk, blank_video)])
    return passes


def answers_of_model(config: Config, baselines: bool) -> Answers:
    """Starts vLLM in this process. Raises InputError before that."""
    multiple = read_model_info(config.student, config.trust_remote_code).size_multiple
    prompts = read_prompts(config.data.eval, config.video, multiple)
    questions = questions_of(prompts)
    train = read_prompts(config.data.train, config.video, multiple) if baselines else []
    answers, *blank = ask_model(config, prompts, blanks=baselines)
    return Answers(
        questions=questions,
        texts=_texts(answers),
        why_missing={a.prompt_id: a.reason for a in answers if isinstance(a, FailedPrompt)},
        train=train,
        blank=_texts(blank[0]) if blank else None,
        seed=config.seed,
    )


def _texts(answers: Sequence[Prediction | FailedPrompt]) -> dict[str, str | None]:
    return {a.prompt_id: a.text for a in answers if isinstance(a, Prediction)}


def answers_of_file(path: Path, config: Config | None, baselines: bool) -> Answers:
    """The file's answers to the config's questions, or without a config to its own. Raises InputError."""
    texts, train = read_texts(path), []
    if config is None:
        questions = read_questions(path)
    else:
        questions = questions_of(read_prompts(config.data.eval, config.video, NO_FRAMES))
        train = read_prompts(config.data.train, config.video, NO_FRAMES) if baselines else []
    return Answers(
        questions=questions,
        texts=texts,
        why_missing=read_failures(path),
        train=train,
        blank=None,
        seed=config.seed if config else 0,
        other_prompts=match_texts(questions, texts, path),
    )


def evaluate(answers: Answers, protocol: Protocol, baselines: bool, folder: Path) -> dict[str, Any]:
    """Scores, and writes PROTOCOL.parquet, PROTOCOL.png and PROTOCOL.json into `folder`; returns what the last holds."""
    scored = score_answers(answers.questions, answers.texts, protocol, answers.why_missing)
    blind: dict[str, Any] = {}
    if baselines and answers.train:
        blind["best_constant"] = constant_baseline(answers.questions, answers.train, protocol)
    if baselines:
        blind["random"] = random_baseline(answers.questions, protocol, answers.seed)
    if answers.blank is not None:
        blind["no_video"] = summarise_answers(
            score_answers(answers.questions, answers.blank, protocol, {}), protocol
        )
    result = {
        "protocol": protocol.name,
        "source": protocol.source,
        "result": summarise_answers(scored, protocol),
        "intervals_95": bootstrap_intervals(scored, protocol, answers.seed),
        "num_videos": len({q.video for q in answers.questions}),
        "baselines": blind,
        "other_prompts": answers.other_prompts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_answers(folder / f"{protocol.name}.parquet", scored)
    write_timelines(folder / f"{protocol.name}.png", scored)
    write_json(folder / f"{protocol.name}.json", result)
    return result


def print_result(result: dict[str, Any], folder: Path) -> None:
    """The table and the counts on standard output."""
    main, intervals = result["result"], result["intervals_95"]
    table = Table(
        title=f"protocol {result['protocol']}, {main['n']} prompts on {result['num_videos']} videos"
    )
    table.add_column("")
    for name in METRICS:
        table.add_column(name.replace("miou", "mIoU").replace("r1", "R1"), justify="right")
    table.add_row("answers", *(f"{main[m]:.3f}" for m in METRICS))
    table.add_row("95 % interval", *("{:.3f}–{:.3f}".format(*intervals[m]) for m in METRICS))
    for name, values in result["baselines"].items():
        table.add_row(NAMES[name], *(f"{values[m]:.3f}" for m in METRICS))
    console = Console()
    console.print(table)
    console.print(
        ", ".join(f"{name.replace('_', ' ')} {main[name]}" for name in COUNTS),
        highlight=False,
        soft_wrap=True,
    )
    if result["other_prompts"]:
        console.print(
            f"{result['other_prompts']} answers are to none of these prompts: left out", soft_wrap=True
        )
    console.print(f"rules: {result['source']}", soft_wrap=True, highlight=False)
    console.print(
        f"written: {folder / result['protocol']}.parquet, .png, .json", soft_wrap=True, highlight=False
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m evaluation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="configuration values, e.g. data.eval.max_prompts=100",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, metavar="FOLDER", help="transformers folder; needs --config")
    what.add_argument("--run", type=Path, metavar="RUN", help="run folder, e.g. runs/NAME")
    what.add_argument(
        "--predictions", type=Path, metavar="FILE", help="Parquet with the columns prompt_id and text"
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="YAML file that names the data; for --predictions of this command not needed",
    )
    parser.add_argument(
        "--protocol", default="strict", metavar="NAME", help=f"{', '.join(PROTOCOLS)} (default: strict)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: RUN/evaluation, or evaluation-NAME here"
    )
    parser.add_argument(
        "--no-baselines",
        dest="baselines",
        action="store_false",
        help="leave out the blind baselines and the training split",
    )
    return parser.parse_args(arguments)


def read_config(parsed: argparse.Namespace) -> Config | None:
    """The config to evaluate with, `student` being the model asked for. Raises InputError."""
    if parsed.run and parsed.config:
        raise ConfigError("--run evaluates with the run's own config: leave out --config")
    if parsed.model and not parsed.config:
        raise ConfigError("--model needs --config CONFIG.yaml: it names the data, the frames and the prompt")
    if parsed.run and not (parsed.run / "config.yaml").is_file():
        raise ConfigError(f"{parsed.run} is not a run folder: it has no config.yaml")
    path = parsed.run / "config.yaml" if parsed.run else parsed.config
    if path is None:
        if parsed.overrides:
            raise ConfigError(f"{parsed.overrides[0]} changes a config, and there is none: give --config")
        return None
    overrides = list(parsed.overrides)
    if not parsed.predictions:
        overrides.append(f"student={parsed.model or find_checkpoint(parsed.run) / 'student'}")
    return resolve_paths(load_config(path, overrides), Path.cwd())


def output_folder(parsed: argparse.Namespace) -> Path:
    if parsed.out:
        return parsed.out
    if parsed.run:
        return parsed.run / "evaluation"
    return Path(f"evaluation-{parsed.model.resolve().name if parsed.model else parsed.predictions.stem}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the run failed, 2 bad input."""
    parsed = parse_arguments(arguments)
    try:
        protocol, config = protocol_named(parsed.protocol), read_config(parsed)
        if parsed.predictions:
            answers = answers_of_file(parsed.predictions, config, parsed.baselines)
        else:
            assert config is not None, "read_config gives one for a model or a run"
            os.environ.update(
                config.worker_env
            )  # before torch is imported: the model computes as in the run's processes
            answers = answers_of_model(config, parsed.baselines)
        print_result(
            evaluate(answers, protocol, parsed.baselines, output_folder(parsed)), output_folder(parsed)
        )
    except VideoOPDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
