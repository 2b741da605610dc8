"""What is kept on disk: model folders, tables, metrics and the trajectory log."""

import copy
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from driver.records.sinks import MetricSinks, TrajectoryLog, read_metrics
from tests.fakes import make_group
from video_opd.errors import InputError, ModelError
from video_opd.models.model_files import check_same_tokenizer, read_model_info
from video_opd.schemas import RECORDS as RECORDS_SCHEMA
from video_opd.schemas import write_parquet
from video_opd.types import StepReport

TOKENIZER = {
    "added_tokens": [
        {"id": 4, "content": "<|im_end|>", "special": True},
        {"id": 5, "content": "<|video_pad|>", "special": True},
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "ba": 3}, "merges": [["a", "b"], ["b", "a"]]},
}
CONFIG = {
    "model_type": "qwen3_vl",
    "text_config": {"vocab_size": 6, "hidden_size": 8, "intermediate_size": 32, "num_hidden_layers": 2},
    "vision_config": {"depth": 1, "hidden_size": 4, "patch_size": 16, "spatial_merge_size": 2},
}


def write_model(folder: Path, tokenizer: dict = TOKENIZER, config: dict = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def student(tmp_path):
    return write_model(tmp_path / "student")


def one_line(caught, kind: type[InputError], *named: str) -> str:
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message
    for name in named:
        assert name in message
    return message


# --- model folders ---


def test_the_same_tokenizer_passes_whatever_the_order_of_its_file(student, tmp_path):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer["model"]["vocab"] = dict(reversed(tokenizer["model"]["vocab"].items()))
    tokenizer["added_tokens"].reverse()
    check_same_tokenizer(student, write_model(tmp_path / "teacher", tokenizer))


def test_embeddings_padded_to_another_size_are_no_other_tokenizer(student, tmp_path):
    config = CONFIG | {"text_config": CONFIG["text_config"] | {"vocab_size": 1024}}
    check_same_tokenizer(student, write_model(tmp_path / "teacher", config=config))


def _other_id(tokenizer: dict) -> None:
    tokenizer["model"]["vocab"] |= {"ab": 3, "ba": 2}


def _missing_token(tokenizer: dict) -> None:
    del tokenizer["model"]["vocab"]["ab"]


def _more_tokens(tokenizer: dict) -> None:
    tokenizer["model"]["vocab"]["aba"] = 9


def _other_added_id(tokenizer: dict) -> None:
    tokenizer["added_tokens"][1]["id"] = 7


def _other_merge(tokenizer: dict) -> None:
    tokenizer["model"]["merges"][1] = ["b", "b"]


def _merges_in_another_order(tokenizer: dict) -> None:
    tokenizer["model"]["merges"].reverse()


def _other_pre_tokenizer(tokenizer: dict) -> None:
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True


def _other_normalizer(tokenizer: dict) -> None:
    tokenizer["normalizer"] = {"type": "NFC"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_id, "2 tokens differ ('ab': 2 / 3, 'ba': 3 / 2)"),
        (_missing_token, "1 tokens differ ('ab': 2 / None)"),
        (_more_tokens, "1 tokens differ ('aba': None / 9)"),
        (_other_added_id, "1 tokens differ ('<|video_pad|>': 5 / 7)"),
        (_other_merge, "merges"),
        (_merges_in_another_order, "merges"),
        (_other_pre_tokenizer, "pre_tokenizer"),
        (_other_normalizer, "normalizer"),
    ],
)
def test_another_tokenizer_is_refused_with_what_differs(student, tmp_path, change, named):
    tokenizer = copy.deepcopy(TOKENIZER)
    change(tokenizer)
    teacher = write_model(tmp_path / "teacher", tokenizer)
    with pytest.raises(ModelError) as caught:
        check_same_tokenizer(student, teacher)
    one_line(caught, ModelError, str(student), str(teacher), named)


@pytest.mark.parametrize("text", ["{", "\x00", '{"added_tokens": []}', "[]"])
def test_a_damaged_tokenizer_is_named(student, tmp_path, text):
    teacher = write_model(tmp_path / "teacher")
    (teacher / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        check_same_tokenizer(student, teacher)
    one_line(caught, ModelError, str(teacher))


def test_a_model_folder_says_what_the_run_is_planned_by(student):
    info = read_model_info(student)
    assert (info.path, info.model_type, info.size_multiple) == (str(student), "qwen3_vl", 32)
    assert info.shapes == {
        "model_type": "qwen3_vl",
        "text.vocab_size": 6,
        "text.hidden_size": 8,
        "text.intermediate_size": 32,
        "text.num_hidden_layers": 2,
        "vision.depth": 1,
        "vision.hidden_size": 4,
        "vision.patch_size": 16,
    }


def test_a_missing_model_folder_is_named(tmp_path):
    with pytest.raises(ModelError) as caught:
        read_model_info(tmp_path / "none")
    one_line(caught, ModelError, str(tmp_path / "none"), "No such file")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{'model_type'", "not JSON"),
        ("{}", "None"),
        ('{"model_type": "llama"}', "'llama' is not supported"),
        ('{"model_type": "qwen3_vl"}', "config"),
        (json.dumps(CONFIG | {"text_config": {"vocab_size": 6}}), "hidden_size"),
        ("[]", "config"),
    ],
)
def test_a_config_of_no_supported_model_is_named(student, text, named):
    (student / "config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        read_model_info(student)
    one_line(caught, ModelError, str(student), named)


@pytest.mark.parametrize(
    ("settings", "windows"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, 1),
        ({"use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 2),
        ({"use_sliding_window": True, "max_window_layers": 2}, 0),
        ({"use_sliding_window": True}, 0),
        ({"use_sliding_window": True, "max_window_layers": 1, "sliding_window": None}, 0),
        ({"use_sliding_window": False, "max_window_layers": 1}, 0),
    ],
)
def test_layers_with_sliding_windows_are_refused(student, settings, windows):
    text = CONFIG["text_config"] | settings
    (student / "config.json").write_text(json.dumps(CONFIG | {"text_config": text}))
    if not windows:
        assert read_model_info(student).path
        return
    with pytest.raises(ModelError) as caught:
        read_model_info(student)
    one_line(caught, ModelError, str(student), f"{windows} layers with sliding windows", "use_sliding_window")


def test_a_model_folder_without_weights_is_named(student):
    (student / "model.safetensors").unlink()
    with pytest.raises(ModelError) as caught:
        read_model_info(student)
    one_line(caught, ModelError, str(student), "no safetensors weights")


# --- tables ---

RECORDS = pa.Table.from_pylist(
    [
        {
            "prompt_id": "a",
            "teacher_iou": 0.1 + 0.2,
            "student_iou": [None, 0.5],
            "num_rollouts": 3,
            "last_step": -1,
            "selected": True,
        }
    ],
    schema=RECORDS_SCHEMA,
)


def test_records_come_back_from_parquet_as_they_were(tmp_path):
    path = tmp_path / "new" / "folder" / "records.parquet"
    write_parquet(RECORDS, path)
    assert pq.read_table(path) == RECORDS
    assert [p.name for p in path.parent.iterdir()] == ["records.parquet"]


# --- the trajectory log ---


def read_log(path: Path) -> list[dict]:
    """Every whole batch of the stream, up to where it was cut off."""
    rows = []
    try:
        for batch in pa.ipc.open_stream(path.read_bytes()):
            rows += batch.to_pylist()
    except (pa.ArrowInvalid, OSError):
        pass
    return rows


def test_the_log_holds_every_trajectory_as_it_was_trained_on(tmp_path):
    log = TrajectoryLog(tmp_path / "trajectories", start_step=3)
    groups = [
        make_group("a", [2, 5], policy_version=2, seed=1),
        make_group("b", [1], policy_version=3, seed=2),
    ]
    log.write(groups, step=3)
    log.close()
    rows = read_log(tmp_path / "trajectories" / "from-step-000003.arrows")
    pairs = [(t, s) for g in groups for t, s in zip(g.group.trajectories, g.scores, strict=True)]
    assert len(rows) == len(pairs) == 3
    for row, (t, s) in zip(rows, pairs, strict=True):
        assert (
            row["step"] == 3 and row["trajectory_id"] == t.trajectory_id and row["prompt_id"] == t.prompt_id
        )
        assert row["policy_version"] == t.policy_version and row["prompt_fingerprint"] == t.prompt_fingerprint
        assert row["num_prompt_tokens"] == len(t.prompt_token_ids)
        assert row["response_token_ids"] == t.response_token_ids.tolist()
        np.testing.assert_array_equal(np.float32(row["actor_logprobs"]), t.actor_logprobs)
        np.testing.assert_array_equal(np.float32(row["teacher_logprobs"]), s.teacher_logprobs)
        assert (row["finish_reason"], row["text"]) == ("stop", t.text)
        assert tuple(map(tuple, row["spans_s"])) == t.predicted_spans_s


def test_what_was_logged_before_a_crash_is_readable(tmp_path):
    log = TrajectoryLog(tmp_path, start_step=0)
    path = tmp_path / "from-step-000000.arrows"
    sizes = []
    for step in range(3):
        log.write([make_group(f"p{step}", [4, 2])], step)
        sizes.append(path.stat().st_size)
        assert [r["step"] for r in read_log(path)] == [
            s for s in range(step + 1) for _ in range(2)
        ]  # while still open
    whole = path.read_bytes()
    for cut in (sizes[2] - 1, sizes[1] + 8, sizes[1]):
        (tmp_path / "cut.arrows").write_bytes(whole[:cut])
        assert [r["step"] for r in read_log(tmp_path / "cut.arrows")] == [0, 0, 1, 1]
    log.close()


def test_each_start_of_a_run_logs_into_a_file_of_its_own(tmp_path):
    for start_step in (0, 40):
        log = TrajectoryLog(tmp_path, start_step)
        log.write([make_group("p", [1])], start_step)
        log.close()
    assert [r["step"] for p in sorted(tmp_path.iterdir()) for r in read_log(p)] == [0, 40]


def test_a_log_of_a_version_with_one_span_each_keeps_its_columns(tmp_path):
    schema = pa.schema([("step", pa.int64()), ("start_s", pa.float64()), ("end_s", pa.float64())])
    path = tmp_path / "from-step-000000.arrows"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for step in range(3):
            row = {"step": step, "start_s": 1.0, "end_s": 2.0}
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=schema))
    TrajectoryLog(tmp_path, start_step=2).close()
    assert [(r["step"], r["start_s"], r["end_s"]) for r in read_log(path)] == [(0, 1.0, 2.0), (1, 1.0, 2.0)]


# --- metrics ---


def write_steps(run_dir: Path, start_step: int, end_step: int, value: float) -> None:
    sinks = MetricSinks(run_dir, start_step)
    for step in range(start_step, end_step):
        sinks.write(
            StepReport(step=step, policy_version=step + 1, metrics={"learner/loss": value + step}),
            wall_s=float(step),
        )
    sinks.close()


def test_metrics_are_one_line_a_step(tmp_path):
    write_steps(tmp_path, 0, 3, 0.5)
    assert read_metrics(tmp_path) == [
        {"step": s, "policy_version": s + 1, "wall_s": float(s), "learner/loss": 0.5 + s} for s in range(3)
    ]


def test_a_resumed_run_keeps_each_step_once(tmp_path):
    """The run crashed in step 6 while it wrote a line; its last checkpoint is of step 3."""
    write_steps(tmp_path, 0, 6, 0.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "policy_ver')
    assert [m["step"] for m in read_metrics(tmp_path)] == [0, 1, 2, 3, 4, 5]
    write_steps(tmp_path, 3, 8, 100.0)
    metrics = read_metrics(tmp_path)
    assert [m["step"] for m in metrics] == list(range(8))
    assert [m["learner/loss"] for m in metrics] == [0.0, 1.0, 2.0, *(100.0 + s for s in range(3, 8))]


def test_metrics_are_on_disk_before_the_run_ends(tmp_path):
    sinks = MetricSinks(tmp_path, 0)
    sinks.write(StepReport(step=0, policy_version=1, metrics={"x": 1.0}), wall_s=0.0)
    assert read_metrics(tmp_path)[0]["x"] == 1.0
    sinks.close()
