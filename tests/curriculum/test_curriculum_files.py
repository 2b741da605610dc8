"""What the curriculum keeps on disk: answers of teacher and student, found by content."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curriculum import answers as on_disk
from curriculum.answers import (
    FILE,
    PARTS,
    find_answers,
    forget_student_answers,
    prompt_keys,
    read_answers,
    settings_key,
    student_parts,
    student_prompt_keys,
    student_settings_key,
    write_part,
)
from tests.fakes import make_prompt
from video_opd.config import Config
from video_opd.content import file_digest, folder_digest
from video_opd.datasets import read_prompts
from video_opd.schemas import write_parquet
from video_opd.types import Prediction


def overridden(config: Config, **sections: dict) -> Config:
    return config.model_copy(
        update={name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    )


# --- content ---


def test_a_large_file_has_the_digest_of_its_size_and_of_blocks_all_over_it(tmp_path):
    path, changed = tmp_path / "weights", tmp_path / "changed"
    data = bytearray(np.random.default_rng(0).bytes(8 << 20))
    path.write_bytes(data)
    digest = file_digest(path)
    shutil.copy(path, changed)
    assert file_digest(changed) == digest
    changed.write_bytes(data + b"x")
    assert file_digest(changed) != digest
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):  # training changes a tensor, not a byte
        other = bytearray(data)
        at = int(share * (len(data) - (300 << 10)))
        other[at : at + (300 << 10)] = bytes(300 << 10)
        changed.write_bytes(other)
        assert file_digest(changed) != digest, share


def test_any_byte_of_a_small_file_and_any_name_in_a_folder_counts(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 1000)
    digests = {folder_digest(tmp_path)}
    (tmp_path / "a").write_bytes(b"x" * 999 + b"y")
    digests.add(folder_digest(tmp_path))
    (tmp_path / "a").rename(tmp_path / "b")
    digests.add(folder_digest(tmp_path))
    assert len(digests) == 3


# --- the teacher's answers ---


def test_the_settings_key_follows_what_decides_the_answers_and_nothing_else(config):
    key = settings_key(config)
    assert settings_key(config.model_copy(update={"seed": 5, "num_steps": 3})) == key
    assert (
        settings_key(
            overridden(config, curriculum={"teacher_threshold": 0.1}, teacher_pool={"num_replicas": 3})
        )
        == key
    )
    assert settings_key(overridden(config, teacher_pool={"engine": config.teacher_engine})) == key
    others = [
        overridden(config, curriculum={"num_teacher_predictions": 2}),
        overridden(config, rollout={"max_response_tokens": 5}),
        overridden(config, teacher_pool={"engine": "vllm"}),
    ]
    keys = {key, *(settings_key(other) for other in others)}
    (Path(config.teacher) / "config.json").write_text('{"a": 1}')
    assert len(keys | {settings_key(config)}) == 5


def test_prompt_keys_follow_the_file_the_frames_and_the_text(config, tmp_path):
    prompts = read_prompts(config.data.train, config.video, 32)
    keys = prompt_keys(prompts, config)
    assert len(set(keys)) == len(prompts)
    copied = tmp_path / "elsewhere"
    shutil.copytree(Path(config.data.train.videos), copied / "videos")
    moved = overridden(
        config, data={"train": config.data.train.model_copy(update={"videos": str(copied / "videos")})}
    )
    assert prompt_keys(read_prompts(moved.data.sources[""], config.video, 32), config) == keys, (
        "content, not path"
    )
    fewer = config.video.model_copy(update={"fps": 1.0})
    assert not set(prompt_keys(read_prompts(config.data.train, fewer, 32), config)) & set(keys)
    assert not set(prompt_keys(prompts, overridden(config, prompt={"video_first": True}))) & set(keys)


def write_answers(run: Path, settings: str, answers: dict[str, list[Prediction]]) -> None:
    on_disk.write_answers(run / FILE, settings, answers)


def answers_of(prompt_id: str, *spans) -> list[Prediction]:
    return [
        Prediction(prompt_id=prompt_id, text=str(span), spans_s=(span,) if span else ()) for span in spans
    ]


def test_answers_of_a_version_with_one_span_each_are_read(tmp_path):
    names = ("prompt_key", "prompt_id", "text", "start_s", "end_s")
    rows = [("k", "a", "1 to 2", 1.0, 2.0), ("k", "a", "no", None, None), ("l", "b", "2 to 1", 2.0, 1.0)]
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])
    pq.write_table(table.replace_schema_metadata({"settings": "s"}), tmp_path / "old.parquet")
    read = on_disk.read_answers([tmp_path / "old.parquet"], "s")
    assert {key: [a.spans_s for a in answers] for key, answers in read.items()} == {
        "k": [((1.0, 2.0),), ()],
        "l": [((2.0, 1.0),)],
    }


def test_answers_are_found_in_other_runs_by_key_and_settings(tmp_path):
    answers = {"k1": answers_of("a", (1.0, 2.0), None), "k2": answers_of("b", (0.5, 3.0), (0.5, 3.0))}
    write_answers(tmp_path / "one", "settings", answers)
    write_answers(tmp_path / "two", "settings", {"k3": answers_of("c", None, None)})
    write_answers(tmp_path / "other", "other settings", {"k4": answers_of("d", (0.0, 1.0))})
    for key in ("k5", "k6"):  # of a run that was interrupted
        write_part(tmp_path / "half" / PARTS, "settings", {key: answers_of("e", (0.0, 1.0))})
    (tmp_path / "half" / PARTS / "part-000002.parquet.tmp").write_bytes(b"half a file")
    (tmp_path / "half" / PARTS / "part-000003.parquet").write_bytes(b"")  # after a power cut
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / FILE.parent).mkdir(parents=True)
    (tmp_path / "broken" / FILE).write_bytes(b"not parquet")
    found = find_answers(sorted(tmp_path.iterdir()), "settings", {"k1", "k3", "k4", "k6", "k7"})
    expected = {"k1": answers["k1"], "k3": answers_of("c", None, None), "k6": answers_of("e", (0.0, 1.0))}
    assert found == expected


def test_a_video_that_cannot_be_read_has_a_key_too(config):
    prompts = read_prompts(config.data.train, config.video, 32)
    keys = prompt_keys(prompts, config)
    gone = Path(prompts[0].clip.video_path)
    gone.rename(gone.with_suffix(".gone"))
    try:
        changed = [a != b for a, b in zip(prompt_keys(prompts, config), keys, strict=True)]
    finally:
        gone.with_suffix(".gone").rename(gone)
    assert changed == [p.clip.video_path == str(gone) for p in prompts] and any(changed)


def test_the_students_answers_are_those_of_one_step_and_one_setting(config, tmp_path):
    config = config.model_copy(update={"student": config.teacher})
    prompts = read_prompts(config.data.train, config.video, 32)
    settings, keys = student_settings_key(config, 4), student_prompt_keys(prompts, config)
    given = {key: answers_of(p.prompt_id, (1.0, 2.0)) for key, p in zip(keys, prompts, strict=True)}
    for step in (2, 4):
        write_part(student_parts(tmp_path, step), student_settings_key(config, step), given)
    files = sorted(student_parts(tmp_path, 4).iterdir())
    assert read_answers(files, settings, {*keys}) == given
    shorter, other = overridden(config, rollout={"max_response_tokens": 5}), make_prompt("p0")
    asked = overridden(config, prompt={"template": "Find {query}"})
    for settings_of, keys_of in ((shorter, keys), (config, student_prompt_keys(prompts, asked))):
        assert read_answers(files, student_settings_key(settings_of, 4), {*keys_of}) == {}
    assert read_answers(files, student_settings_key(config, 2), {*keys}) == {}
    assert len({*student_prompt_keys([other, make_prompt("p1")], config)}) == 2
    forget_student_answers(tmp_path, but_of=4)
    assert [f.name for f in student_parts(tmp_path, 4).parent.iterdir()] == ["step-4"]
    forget_student_answers(tmp_path)
    assert not list(student_parts(tmp_path, 4).parent.iterdir())


def test_a_file_of_an_earlier_version_has_no_reverse_kl(tmp_path):
    [answer] = given = answers_of("a", (1.0, 2.0))
    scored = replace(answer, reverse_kl=-0.1)
    write_answers(tmp_path / "new", "settings", {"k": [scored]})
    assert find_answers([tmp_path / "new"], "settings", {"k"}) == {"k": [scored]}
    older = pq.read_table(tmp_path / "new" / FILE).drop_columns("reverse_kl")
    write_parquet(older, tmp_path / "old" / FILE)
    assert find_answers([tmp_path / "old"], "settings", {"k"}) == {"k": given}


def test_a_prompt_answered_in_two_runs_is_taken_from_one(tmp_path):
    for run in ("one", "two"):
        write_answers(tmp_path / run, "settings", {"k": answers_of("a", (1.0, 2.0), (1.0, 3.0))})
    assert len(find_answers(sorted(tmp_path.iterdir()), "settings", {"k"})["k"]) == 2
