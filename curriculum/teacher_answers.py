"""The teacher's answers to the pool (TRPV): Parquet in the run folder, reused by other runs."""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from video_opd.config import Config
from video_opd.content import file_digest, folder_digest
from video_opd.schemas import TEACHER_ANSWERS, span_columns, write_parquet
from video_opd.types import Prediction, Prompt

FILE = Path("curriculum") / "teacher_answers.parquet"
TEMPERATURE = 1.0
FORMAT = 2  # changes whenever the same teacher answers otherwise, or its answers are read otherwise
BLOCKS_A_VIDEO, NUM_READERS = 4, 16
_SETTINGS = b"settings"


def settings_key(config: Config) -> str:
    """Digest of the teacher's folder and of every setting that decides its answers, except the seed."""
    pool = config.teacher_pool
    # With several teachers, the one that answers is part of the prompt's key instead.
    folder = "" if config.teachers else folder_digest(config.teacher_models[0].model)
    lengths = (config.curriculum.num_teacher_predictions, config.rollout.max_response_tokens)
    return _digest((FORMAT, folder, pool.engine, pool.dtype, TEMPERATURE, *lengths))


def prompt_keys(prompts: Sequence[Prompt], config: Config) -> list[str]:
    """One key per prompt: digest of the video file, the frames shown, their times and size, and the text."""

    def digest(path: str) -> str:  # of a few blocks; the prompt's fingerprint needs every clip decoded
        return folder_digest(path) if Path(path).is_dir() else file_digest(path, BLOCKS_A_VIDEO)

    paths = list(dict.fromkeys(p.clip.video_path for p in prompts))
    with ThreadPoolExecutor(NUM_READERS) as readers:
        videos = dict(zip(paths, readers.map(digest, paths), strict=True))
    models = {t.name: folder_digest(t.model) for t in config.teachers}
    asked = (config.prompt.template, config.prompt.video_first)

    def key(prompt: Prompt) -> str:
        clip = prompt.clip
        frames = (clip.frame_indices.tobytes(), clip.timestamps_s.tobytes(), clip.duration_s, clip.frame_size)
        teacher = (models[config.teachers_of(prompt.prompt_id)[0].name],) if models else ()
        return _digest((videos[clip.video_path], *frames, prompt.query, asked, *teacher))

    return [key(p) for p in prompts]


def _digest(parts: tuple) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def write_answers(folder: Path, settings: str, answers: Mapping[str, Sequence[Prediction]]) -> None:
    """Writes the run's file; `answers` maps prompt keys to the teacher's answers."""
    rows = [
        {"prompt_key": key, "prompt_id": p.prompt_id, "text": p.text, **span_columns(p.span_s)}
        for key, predictions in answers.items()
        for p in predictions
    ]
    schema = TEACHER_ANSWERS.with_metadata({_SETTINGS: settings})
    write_parquet(pa.Table.from_pylist(rows, schema=schema), folder / FILE)


def find_answers(runs: Iterable[Path], settings: str, wanted: Collection[str]) -> dict[str, list[Prediction]]:
    """Prompt key -> answers, from the runs with the same settings key; unknown prompts are left out."""
    found: dict[str, list[Prediction]] = {}
    for path in (run / FILE for run in runs):
        try:
            if (pq.read_schema(path).metadata or {}).get(_SETTINGS) != settings.encode():
                continue
            missing = pa.array([key for key in wanted if key not in found], pa.string())
            rows = pq.read_table(path, filters=pc.field("prompt_key").isin(missing)).to_pylist()
        except (OSError, pa.ArrowInvalid):  # no answers in this run, or not a file of answers
            continue
        for row in rows:
            span = None if row["start_s"] is None else (row["start_s"], row["end_s"])
            answer = Prediction(prompt_id=row["prompt_id"], text=row["text"], span_s=span)
            found.setdefault(row["prompt_key"], []).append(answer)
    return found
