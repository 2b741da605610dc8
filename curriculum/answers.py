"""Answers of the teacher (TRPV) and of the student (DBTP) to the pool: Parquet files of the run folder.

While a model answers, each part is a file, so that an interrupted run keeps it. Runs share teacher's answers.
"""

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from video_opd.config import Config
from video_opd.config_teachers import TeacherModel
from video_opd.content import file_digest, folder_digest
from video_opd.schemas import ANSWERS, answers_in, answers_table, write_parquet
from video_opd.types import Prediction, Prompt

FILE = Path("curriculum") / "teacher_answers.parquet"
PARTS = FILE.with_suffix("")  # until all are there
STUDENT_PARTS = Path("curriculum") / "student_answers"
TEMPERATURE = 1.0
FORMAT = 2  # changes whenever the same teacher answers otherwise, or its answers are read otherwise
BLOCKS_A_VIDEO, NUM_READERS = 4, 16
_SETTINGS = b"settings"


def settings_key(config: Config) -> str:
    """Digest of the teacher's folder and of every setting that decides its answers, except the seed."""
    pool = config.teacher_pool
    # With several teachers, the one that answers is part of the prompt's key instead.
    folder = "" if config.teachers else folder_digest(config.teacher_models[0].model)
    number, temperature = sampling(config.curriculum.num_teacher_predictions)
    lengths = (number, config.rollout.max_response_tokens)
    return _digest((FORMAT, folder, config.teacher_engine, pool.dtype, temperature, *lengths))


def sampling(num_answers: int) -> tuple[int, float]:
    """How many answers a model gives to each prompt, and at which temperature; a single one is greedy: 0."""
    return num_answers, TEMPERATURE if num_answers > 1 else 0.0


def student_settings_key(config: Config, step: int) -> str:
    """Digest of what decides the student's answers. Its weights: those of `step`, for one run alone.

    With scores_student they are rollouts, and their scores those of the run's teachers.
    """
    rollout, teachers = config.rollout, config.teacher_models
    sampled: tuple = sampling(config.curriculum.num_student_predictions)
    if config.curriculum.scores_student:
        scored = [(folder_digest(t.model), t.weight, t.prompts, *_view(t)) for t in teachers]
        sampled = (rollout.temperature, config.teacher_engine, config.teacher_pool.dtype, scored)
    weights = folder_digest(config.student), step, rollout.dtype, rollout.max_response_tokens
    return _digest((*weights, config.seed, sampled))


def prompt_keys(prompts: Sequence[Prompt], config: Config) -> list[str]:
    """One key per prompt: digest of the video file, the frames shown, their times and size, and the text."""

    def digest(path: str) -> str:  # of a few blocks; the prompt's fingerprint needs every clip decoded
        try:
            return folder_digest(path) if Path(path).is_dir() else file_digest(path, BLOCKS_A_VIDEO)
        except OSError:  # the teacher will say what is wrong with it
            return path

    paths = list(dict.fromkeys(p.clip.video_path for p in prompts))
    with ThreadPoolExecutor(NUM_READERS) as readers:
        videos = dict(zip(paths, readers.map(digest, paths), strict=True))
    models = {t.name: (folder_digest(t.model), *_view(t)) for t in config.teachers}

    def teacher(prompt: Prompt) -> tuple[str, ...]:
        return models[config.teachers_of(prompt.prompt_id)[0].name] if models else ()

    return [_digest((videos[p.clip.video_path], *_shown(p, config), *teacher(p))) for p in prompts]


def _view(teacher: TeacherModel) -> tuple[str, ...]:
    """What it sees otherwise than the student; empty: nothing."""
    own = teacher.prompt, teacher.video, teacher.crop_margin_frac
    return (repr(own),) if teacher.has_view else ()


def student_prompt_keys(prompts: Sequence[Prompt], config: Config) -> list[str]:
    """One key per prompt, for one run alone: files are known by their path."""
    return [_digest((p.prompt_id, p.clip.video_path, *_shown(p, config))) for p in prompts]


def _shown(prompt: Prompt, config: Config) -> tuple:
    """What a model is shown of a video, and asked."""
    clip, words = prompt.clip, config.prompt.of_style(prompt.style)
    asked = words.template, words.video_first
    frames = (clip.frame_indices.tobytes(), clip.timestamps_s.tobytes(), clip.duration_s, clip.frame_size)
    return (*frames, prompt.query, asked, *(["sets"] if words.asks_for_sets else []))


def _digest(parts: tuple) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def write_answers(path: Path, settings: str, answers: Mapping[str, Sequence[Prediction]]) -> None:
    """Writes a file, whole or not at all; `answers` maps prompt keys to a model's answers."""
    write_parquet(answers_table(answers, ANSWERS.with_metadata({_SETTINGS: settings})), path)


def write_part(folder: Path, settings: str, answers: Mapping[str, Sequence[Prediction]]) -> None:
    """Writes one more file of `folder`, with answers that no other file of it has."""
    write_answers(folder / f"part-{len(list(folder.glob('part-*.parquet'))):06d}.parquet", settings, answers)


def find_answers(runs: Iterable[Path], settings: str, wanted: Set[str]) -> dict[str, list[Prediction]]:
    """Prompt key -> teacher's answers, from the runs with the same settings; unknown prompts are left out."""
    files = [path for run in runs for path in (run / FILE, *sorted((run / PARTS).glob("part-*.parquet")))]
    return read_answers(files, settings, wanted)


def read_answers(
    files: Iterable[Path], settings: str, wanted: Set[str] | None = None
) -> dict[str, list[Prediction]]:
    """Prompt key -> answers, from the files with the same settings; a prompt's are those of one file.

    wanted: the keys of the prompts; None: all.
    """
    found: dict[str, list[Prediction]] = {}
    for path in files:
        try:
            if (pq.read_schema(path).metadata or {}).get(_SETTINGS) != settings.encode():
                continue
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid):  # no answers in this run, or not a file of answers
            continue
        if wanted is not None:
            table = table.filter([key in wanted for key in table["prompt_key"].to_pylist()])
        for key, answers in answers_in(table).items():
            found.setdefault(key, answers)
    return found


def student_parts(run_dir: Path, step: int) -> Path:
    """The folder of the answers that the student of `step` gave so far."""
    return run_dir / STUDENT_PARTS / f"step-{step}"


def forget_student_answers(run_dir: Path, but_of: int | None = None) -> None:
    """Removes the student's answers, which belong to the weights of a step; `but_of`: of the others."""
    for folder in (run_dir / STUDENT_PARTS).glob("step-*"):
        if but_of is None or folder != student_parts(run_dir, but_of):
            shutil.rmtree(folder)
