"""Scores a model, a run or a file of predictions on a split: R1@0.3/0.5/0.7 and mIoU under a named protocol.

  python -m evaluation --run runs/NAME                                    its last checkpoint's student
  python -m evaluation --model FOLDER --config CONFIG.yaml [key=value ...]
  python -m evaluation --teacher NAME --config CONFIG.yaml [key=value ...]  on its own view of the prompts
  python -m evaluation --predictions FILE [--config CONFIG.yaml]          without a model
  python -m evaluation compare A B                                        two runs or files, prompt by prompt

The questions are those of the config's data.eval. docs/evaluation.md says what every number means.
"""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import video_opd  # noqa: F401  # first: makes transformers importable
from evaluation import scoring, timelens
from evaluation.compare import check_same_questions, compare, print_comparison
from evaluation.predictions import count_others, read_answers, read_questions, write_answers
from evaluation.protocols import PROTOCOLS, Protocol, protocol_named
from evaluation.scoring import Question, questions_of
from evaluation.timelines import write_timelines
from video_opd.cluster.command_line import exit_code_of
from video_opd.config import Config
from video_opd.config_file import load_config, resolve_paths
from video_opd.config_teachers import TeacherModel
from video_opd.datasets import read_prompts, read_sources
from video_opd.errors import ConfigError, DataError
from video_opd.files.checkpoint import checkpoint_folder, checkpoint_steps, find_checkpoint, is_partial
from video_opd.files.run_folder import write_json
from video_opd.grounding import describe_odd, odd_truth
from video_opd.hub import model_name, on_this_node
from video_opd.models.lengths import PromptLengths, rollout_limit, too_long
from video_opd.models.model_files import ModelInfo, read_model_info
from video_opd.passes import by_video
from video_opd.types import FailedPrompt, Prediction, Prompt
from video_opd.video.descriptions import end_workers
from video_opd.video.views import all_viewed, check_crop_model

COUNTS = ("n", "unparsed", "reversed", "out_of_range", "missing")
UNKNOWN = "unknown, the answers are a file's"  # of a video budget or a model
Answer = Prediction | FailedPrompt
NO_FRAMES = 1  # read_prompts' multiple when no frame is read: its size does not matter


@dataclass(frozen=True)
class Answers:
    """What is to be scored."""

    questions: list[Question]
    texts: Mapping[str, str | None]  # by prompt id
    why_missing: dict[str, str]
    train: list[Prompt]  # empty: no best constant interval
    seed: int
    blank: Mapping[str, str | None] | None = None  # answers on grey frames; None: not asked for
    other_prompts: int = 0  # answers to none of the questions
    video: str = UNKNOWN  # VideoConfig.budget of the model that was asked
    model: str = UNKNOWN  # its folder


def ask_model(config: Config, prompts: Sequence[Prompt], blanks: bool) -> list[list[Answer]]:
    """The greedy answers of `config.student`; with `blanks`, a second list of its answers on grey frames.

    Starts vLLM in this process.
    """
    from video_opd.models.engine_loop import EngineLoop, predict
    from video_opd.models.prompting import PromptEncoder
    from video_opd.models.vllm_engine import SamplingEngine

    student, rollout, trust = config.student, config.rollout, config.trust_remote_code
    encoder = PromptEncoder(student, config.prompt, config.video, trust)
    how = (student, rollout, config.seed, encoder.pad_ids)
    start = partial(SamplingEngine, *how, trust_remote_code=trust)
    order, passes, terminal = by_video(prompts), [], Console(stderr=True)
    # also when the user interrupts: to end Python under a thread that computes aborts it
    with closing(EngineLoop(start, rollout.max_num_seqs)) as loop, Progress(console=terminal) as progress:
        for blank_video in (False, True) if blanks else (False,):
            shown = progress.add_task("grey frames" if blank_video else "answers", total=len(prompts))
            asked, on_answer = [prompts[i] for i in order], partial(progress.advance, shown)
            answers = asyncio.run(predict(loop, encoder, asked, blank_video, on_answer=on_answer))
            of_prompt = (a if isinstance(a, FailedPrompt) else a[0] for a in answers)
            placed = dict(zip(order, of_prompt, strict=True))
            passes.append([placed[i] for i in range(len(prompts))])
    return passes


def read_splits(config: Config, multiple: int, baselines: bool) -> tuple[list[Prompt], list[Prompt]]:
    """data.eval as published, and for the baselines data.train."""
    data, video, runs_dir = config.data, config.video, config.runs_dir
    prompts = read_prompts(data.eval, video, multiple, as_published=True, runs_dir=runs_dir)
    train = read_sources(data, video, multiple, runs_dir).prompts if baselines else []
    end_workers(video)
    return prompts, train


def answers_of_model(config: Config, baselines: bool, teacher: TeacherModel | None = None) -> Answers:
    """The answers of `config.student` to the prompts of data.eval.

    teacher: `config.student` is its model. It is asked its own prompts, on its own view. If that is a crop,
    there are no answers on grey frames, because the times of a crop show the truth. Raises InputError before
    vLLM starts.
    """
    info = read_model_info(config.student, config.trust_remote_code)
    prompts, train = read_splits(config, info.size_multiple, baselines)
    prompts, crop = (prompts_of(teacher, prompts), teacher.crop_margin_frac) if teacher else (prompts, None)
    questions = questions_of(prompts)
    if teacher:
        config, prompts = as_seen(config, teacher, prompts, info)
    lengths = PromptLengths(config.student, info.model_type, info.size_multiple, config.prompt)
    if failed := too_long(prompts, lengths.of(prompts), [rollout_limit(config)]):
        first, reason = next(iter(failed.items()))
        raise DataError(f"prompt {first}: {reason} ({len(failed)} such prompts)")
    passes = ask_model(config, prompts, blanks=baselines and crop is None)
    texts, *blank = ({a.prompt_id: a.text for a in got if isinstance(a, Prediction)} for got in passes)
    why_missing = {a.prompt_id: a.reason for a in passes[0] if isinstance(a, FailedPrompt)}
    answers = Answers(questions, texts, why_missing, train, config.seed, blank[0] if blank else None)
    part = "" if crop is None else f", of the true span and {crop:g} of its length on both sides"
    return replace(answers, video=config.video.budget + part, model=config.student)


def prompts_of(teacher: TeacherModel, prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those that it scores in a run. Raises DataError if there are none."""
    own = [prompt for prompt in prompts if teacher.scores(prompt.prompt_id)]
    if not own:
        raise DataError(f"teacher {teacher.name} scores no prompt of data.eval: its `prompts` match none")
    return own


def as_seen(
    config: Config, teacher: TeacherModel, prompts: Sequence[Prompt], info: ModelInfo
) -> tuple[Config, list[Prompt]]:
    """The config and the prompts of the teacher's own view. Raises InputError."""
    check_crop_model(teacher, info.model_type)
    seen = all_viewed(config, teacher, prompts, info.size_multiple)
    end_workers(config.video)
    prompt, video = teacher.view(config.prompt, config.video)
    return config.model_copy(update={"prompt": prompt, "video": video}), seen


def answers_of_file(path: Path, config: Config | None, baselines: bool) -> Answers:
    """The file's answers to the config's questions, or without a config to its own. Raises InputError."""
    is_timelens = path.suffix in timelens.SUFFIXES
    if config is None:
        if is_timelens:
            return Answers(*timelens.own_questions(path), why_missing={}, train=[], seed=0)
        texts, why_missing = read_answers(path)
        return Answers(read_questions(path), texts, why_missing, train=[], seed=0)
    prompts, train = read_splits(config, NO_FRAMES, baselines)
    questions = questions_of(prompts)
    if is_timelens:
        texts, why_missing = timelens.answers_to(questions, path), {}
    else:
        texts, why_missing = read_answers(path)
    others = count_others(questions, texts, path)
    return Answers(questions, texts, why_missing, train, config.seed, other_prompts=others)


def evaluate(answers: Answers, protocol: Protocol, baselines: bool, folder: Path) -> dict[str, Any]:
    """Writes PROTOCOL.parquet, PROTOCOL.png and PROTOCOL.json into `folder`; returns what the last holds."""
    questions = answers.questions
    scored = scoring.score_answers(questions, answers.texts, protocol, answers.why_missing)
    blind = scoring.blind_baselines(questions, answers.train, protocol, answers.seed) if baselines else {}
    if answers.blank is not None:
        on_grey = scoring.score_answers(questions, answers.blank, protocol, {})
        blind["no_video"] = scoring.summarise_answers(on_grey, protocol)
    result = {
        "protocol": protocol.name,
        "source": protocol.source,
        "model": answers.model,
        "video": answers.video,
        "result": scoring.summarise_answers(scored, protocol),
        "intervals_95": scoring.bootstrap_intervals(scored, protocol, answers.seed),
        "num_videos": len({q.video for q in questions}),
        "odd_truth": odd_truth((q.answer_spans_s, q.duration_s) for q in questions),
        "baselines": blind,
        "other_prompts": answers.other_prompts,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_answers(folder / f"{protocol.name}.parquet", scored)
    write_timelines(folder / f"{protocol.name}.png", scored)
    write_json(folder / f"{protocol.name}.json", result)
    return result


def print_result(result: dict[str, Any], folder: Path) -> None:
    main, name = result["result"], result["protocol"]
    metrics = result["intervals_95"]
    title = f"protocol {name}, {main['n']} prompts on {result['num_videos']} videos"
    table = Table("", *map(scoring.heading, metrics), title=title)
    table.add_row("answers", *(f"{main[m]:.3f}" for m in metrics))
    table.add_row("95 % interval", *("{:.3f}–{:.3f}".format(*interval) for interval in metrics.values()))
    for baseline, values in result["baselines"].items():
        table.add_row(baseline.replace("_", " "), *(f"{values[m]:.3f}" for m in metrics))
    lines = [f"video budget: {result['video']}"]
    lines += [", ".join(f"{count.replace('_', ' ')} {main[count]}" for count in COUNTS)]
    if odd := result["odd_truth"]:
        lines.append(describe_odd(odd))
    if result["other_prompts"]:
        lines.append(f"{result['other_prompts']} answers are to none of these prompts: left out")
    lines += [f"rules: {result['source']}", f"written: {folder / name}.parquet, .png, .json"]
    Console().print(table)
    print(*lines, sep="\n")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m evaluation", description=__doc__, formatter_class=layout)
    add, values = parser.add_argument, "configuration values, e.g. data.eval.max_prompts=100"
    add("overrides", nargs="*", metavar="key=value", help=values)
    what = parser.add_mutually_exclusive_group(required=True)
    model = "transformers folder, or ORG/NAME[@REVISION] of the Hugging Face hub; needs --config"
    what.add_argument("--model", type=Path, metavar="MODEL", help=model)
    what.add_argument("--run", type=Path, metavar="RUN", help="run folder, e.g. runs/NAME")
    teacher = "one of the config's `teachers`, on its own view (`prompt`, `video`, `crop_margin_frac`)"
    what.add_argument("--teacher", metavar="NAME", help=teacher)
    file = "Parquet with the columns prompt_id and text, or TimeLens' JSON of predictions"
    what.add_argument("--predictions", type=Path, metavar="FILE", help=file)
    needed = "YAML file that names the data; not needed for --predictions that this command wrote"
    add("--config", type=Path, help=needed)
    add("--protocol", default="strict", metavar="NAME", help=f"{', '.join(PROTOCOLS)} (default: strict)")
    add("--out", type=Path, metavar="FOLDER", help="default: RUN/evaluation, or evaluation-NAME here")
    without = "leave out the blind baselines and the training split"
    add("--no-baselines", dest="baselines", action="store_false", help=without)
    return parser.parse_args(arguments)


def config_of_run(folder: Path) -> Path:
    """Raises ConfigError."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{folder} is not a run folder: it has no config.yaml")
    return path


def read_config(parsed: argparse.Namespace) -> Config | None:
    """The config to evaluate with; its `student` is the model asked for. Raises InputError."""
    path, overrides = parsed.config, list(parsed.overrides)
    if parsed.run:
        if path:
            raise ConfigError("--run evaluates with the run's own config: leave out --config")
        path = config_of_run(parsed.run)
        overrides.append(f"student={find_checkpoint(parsed.run) / 'student'}")
    elif parsed.model:
        if not path:
            raise ConfigError("--model needs --config CONFIG.yaml: it names data, frames and prompt")
        overrides.append(f"student={parsed.model}")
    elif parsed.teacher and not path:
        raise ConfigError("--teacher needs --config CONFIG.yaml: it names the teachers")
    elif not path:
        if overrides:
            raise ConfigError(f"{overrides[0]} changes a config, and there is none: give --config")
        return None
    return resolve_paths(load_config(path, overrides), Path.cwd())


def teacher_named(config: Config, name: str) -> TeacherModel:
    """Raises ConfigError."""
    names = [teacher.name for teacher in config.teacher_models]
    if name not in names:
        raise ConfigError(f"--teacher {name}: the config's teachers are {', '.join(names) or 'none'}")
    return config.teacher_models[names.index(name)]


def run(parsed: argparse.Namespace) -> None:
    """Raises VideoOPDError."""
    protocol, config = protocol_named(parsed.protocol), read_config(parsed)
    if parsed.predictions:
        answers, name = answers_of_file(parsed.predictions, config, parsed.baselines), parsed.predictions.stem
    else:
        assert config is not None, "read_config gives one for a model or a run"
        os.environ.update(config.worker_env)  # as in the run's processes, before torch is imported
        teacher = teacher_named(config, parsed.teacher) if parsed.teacher else None
        if teacher:
            config = config.model_copy(update={"student": teacher.model})
        config = on_this_node(config, teachers=False)
        answers = answers_of_model(config, parsed.baselines, teacher)
        name = f"teacher-{teacher.name}" if teacher else model_name(config.student)
    folder = parsed.out or (parsed.run / "evaluation" if parsed.run else Path(f"evaluation-{name}"))
    print_result(evaluate(answers, protocol, parsed.baselines, folder), folder)


def answers_of_run(folder: Path, protocol: Protocol) -> tuple[Answers, str]:
    """The answers of a run's last student, and its video budget: files only, no model is asked.

    They are those of `python -m evaluation --run`, or of the run's own end where there are none. Answers of
    before the newest checkpoint, of a run that was resumed since, are not taken. Raises InputError.
    """
    config = resolve_paths(load_config(config_of_run(folder)), Path.cwd())
    evaluated, summary = folder / "evaluation" / f"{protocol.name}.parquet", folder / "summary.json"
    newest = max((s for s in checkpoint_steps(folder) if not is_partial(folder, s)), default=None)
    about, end = read_json(evaluated.with_suffix(".json")), read_json(summary)
    asked = Path(about.get("model", "")).parent.name
    if evaluated.exists() and (newest is None or asked == checkpoint_folder(folder, newest).name):
        # values given to --run may have changed the video budget of the config
        return answers_of_file(evaluated, config=None, baselines=False), about.get("video", UNKNOWN)
    is_last = end and end["steps"] >= (newest or 0)
    texts = end["examples"].get("student_after") if is_last else None
    if not texts:
        advice = f"run `python -m evaluation --run {folder} --protocol {protocol.name}` first"
        raise DataError(f"{folder} has no answers of its last student: {advice}")
    questions = questions_of(read_splits(config, NO_FRAMES, baselines=False)[0])
    return Answers(questions, texts, {}, train=[], seed=0), config.video.budget


def read_json(path: Path) -> dict[str, Any]:
    """Empty if there is no such file. Raises DataError."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): remove it, and evaluate the run again") from error


def run_compare(arguments: Sequence[str]) -> None:
    """Raises VideoOPDError."""
    parser = argparse.ArgumentParser("python -m evaluation compare", description="B against A.")
    what = "a run folder, or a file PROTOCOL.parquet that `python -m evaluation` wrote"
    parser.add_argument("a", type=Path, metavar="A", help=what)
    parser.add_argument("b", type=Path, metavar="B", help="another, of the same questions")
    parser.add_argument("--protocol", default="strict", metavar="NAME", help=", ".join(PROTOCOLS))
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parsed = parser.parse_args(arguments)
    protocol, sides, scored = protocol_named(parsed.protocol), {}, []
    questions: list[Question] = []
    for side, path in (("a", parsed.a), ("b", parsed.b)):
        if path.is_dir():
            answers, video = answers_of_run(path, protocol)
        else:
            answers, video = answers_of_file(path, config=None, baselines=False), UNKNOWN
        if questions:
            check_same_questions(questions, answers.questions, (str(parsed.a), str(parsed.b)))
        questions = questions or answers.questions
        sides[side] = {"name": str(path), "video": video}
        scored.append(scoring.score_answers(questions, answers.texts, protocol, answers.why_missing))
    result = sides | compare(scored[0], scored[1], protocol)
    if parsed.json:
        print(json.dumps(result, indent=2))
    else:
        print_comparison(result)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 the run failed, 2 bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        return exit_code_of(lambda: run_compare(arguments[1:]))
    parsed = parse_arguments(arguments)
    return exit_code_of(lambda: run(parsed))


if __name__ == "__main__":
    sys.exit(main())
