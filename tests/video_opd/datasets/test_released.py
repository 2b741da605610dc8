"""The released data set: literal rows in its layout -> prompts, and the errors of bad rows."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from video_opd.config_data import STYLES, DatasetConfig, PromptConfig, VideoConfig
from video_opd.config_file import parse_section
from video_opd.datasets import __main__ as command
from video_opd.datasets import read_prompts
from video_opd.datasets.check import Asked, check, convert
from video_opd.errors import ConfigError, DataError

VIDEO = VideoConfig(fps=2, max_frames=24, max_video_tokens=256)
TIMELENS = (
    "Please find the visual event described by the sentence '{}', determining its starting and ending times. "
    "The format should be: 'The event happens in <start time> - <end time> seconds'."
)


def row(user: str | None, answer: str | None, name: str = "a") -> dict:
    """As scripts/upload_opd_to_huggingface.py writes one: every column a text, the messages as JSON."""
    texts = {"system": "You are a helpful assistant.", "user": user, "assistant": answer}
    return {
        "video": f"videos/cosmo_cap/{name}.mp4",
        "video_filename": f"{name}.mp4",
        "subset": "cosmo_cap",
        "system_prompt": texts["system"],
        "user_query": user,
        "assistant_response": answer,
        "messages": json.dumps([{"role": role, "content": text} for role, text in texts.items()]),
    }


@pytest.fixture
def folder(split_folder, tmp_path) -> Path:
    """The released folder with one clip of 12 s."""
    (tmp_path / "videos" / "cosmo_cap").mkdir(parents=True)
    (tmp_path / "videos" / "cosmo_cap" / "a.mp4").symlink_to(split_folder / "videos" / "train00000.mp4")
    return tmp_path


def dataset(folder: Path, rows: list[dict], name: str = "auto", **options) -> DatasetConfig:
    path = folder / "data" / "train.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return DatasetConfig.model_validate(
        {"format": name, "annotations": str(path), "videos": str(folder), **options}
    )


def read(of: DatasetConfig) -> list[tuple]:
    return [(p.prompt_id, p.query, p.answer_spans_s) for p in read_prompts(of, VIDEO, 32)]


@pytest.mark.parametrize("name", ["auto", "video_opd"])
@pytest.mark.parametrize("videos", [".", "videos"])
def test_rows_become_prompts_named_or_detected_below_either_folder(name, videos, folder):
    rows = [
        row("<video>" + TIMELENS.format("The cat's nap"), "The event happens in 1.0 - 4.5 seconds."),
        row("<video>\n" + TIMELENS.format("a 'b', c "), "The event happens in 2.0 - 3.0 seconds."),
    ]
    of = dataset(folder, rows, name).model_copy(update={"videos": str(folder / videos)})
    assert read(of) == [("a:1", "The cat's nap", ((1.0, 4.5),)), ("a:2", "a 'b', c ", ((2.0, 3.0),))]


@pytest.mark.parametrize("style", STYLES)
def test_queries_and_intervals_in_every_published_style(style, folder):
    of = STYLES[style]
    user, (answer, _) = of["template"].format(query="two men\nwave"), PromptConfig(**of).answer([(1, 4)])
    needed = {k: row(user, answer)[k] for k in ("video", "user_query", "assistant_response")}
    for rows in ([row(user, answer)], [needed]):
        assert read(dataset(folder, rows)) == [("a:1", "two men\nwave", ((1.0, 4.0),))]


def test_another_prompt_is_named_unless_a_pattern_finds_its_query(folder):
    rows = [row("When does [a dog bark]?", "From 1 to 2 seconds.")]
    with pytest.raises(DataError) as caught:
        read(dataset(folder, rows))
    message = str(caught.value)
    assert "\n" not in message and "train.parquet: row 1: user_query must hold one of" in message
    assert "'When does [a dog bark]?': set data.*.query_pattern" in message
    assert read(dataset(folder, rows, query_pattern=r"\[(.*)\]")) == [("a:1", "a dog bark", ((1.0, 2.0),))]
    assert read(dataset(folder, rows, query_pattern="(.*)"))[0][1] == "When does [a dog bark]?"
    convert(dataset(folder, rows, query_pattern="(.*)"), folder / "m.parquet", Asked(read="none"))
    metadata = pq.read_schema(folder / "m.parquet").metadata
    assert metadata[b"video_opd.format"] == b"video_opd" and metadata[b"video_opd.query_pattern"] == b"(.*)"


@pytest.mark.parametrize("answer", ["I cannot tell.", "", None, "It happens soon, after 3 seconds."])
def test_a_row_without_an_interval_is_named_or_listed_and_never_lost(answer, folder):
    good = row(TIMELENS.format("q"), "The event happens in 1 - 2 seconds.")
    of = dataset(folder, [good, row(TIMELENS.format("p"), answer)])
    with pytest.raises(DataError, match=r"train\.parquet: row 2: there is no interval: write one or remove"):
        read(of)
    assert [p.prompt_id for p in read_prompts(of.model_copy(update={"faulty": "drop"}), VIDEO, 32)] == ["a:1"]
    found = {a.prompt_id: [f.kind for f in faults] for a, faults in check(of, Asked(read="none"))}
    assert found == {"a:1": [], "a:2": ["no_span"]}
    num, _, listed = convert(of, folder / "m.parquet", Asked(read="none"))
    assert num == 1 and "train.parquet: row 2,a:2,no_span" in listed.read_text()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"user_query": None}, "row 1: user_query must be text, found 'None'"),
        ({"user_query": 5}, "row 1: user_query must be text, found '5'"),
        ({"assistant_response": 5}, "row 1: assistant_response must be text, found '5'"),
        ({"assistant_response": "from 4 to 1 seconds"}, "row 1: 4.0 to 1.0 is not an interval"),
        ({"assistant_response": "from 4 to 99 seconds"}, "row 1: the annotation ends at 99.0 s"),
        ({"user_query": TIMELENS.format("")}, "row 1: the query is empty"),
        ({"video": None}, "row 1: the video must be text"),
        ({"video": "../a.mp4"}, "is not inside"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_its_row(change, named, folder):
    good = row(TIMELENS.format("q"), "The event happens in 1 - 2 seconds.")
    with pytest.raises(DataError) as caught:
        read(dataset(folder, [good | change]))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_the_released_one_is_named(folder):
    of = dataset(folder, [{"video": "a", "user_query": "q"}], "video_opd")
    with pytest.raises(DataError, match=r"lacks the columns assistant_response: name another format"):
        read(of)
    with pytest.raises(DataError, match=r"lacks the columns prompt_id"):  # detected as a manifest
        read(of.model_copy(update={"format": "auto"}))
    Path(of.annotations).write_text("{}")
    with pytest.raises(DataError, match=r"train\.parquet is not Parquet"):
        read(of)


@pytest.mark.parametrize("pattern", ["query", "(a)(b)"])
def test_a_pattern_has_one_group(pattern, capsys):
    values = {"annotations": "a", "videos": "v", "query_pattern": pattern}
    with pytest.raises(ConfigError, match="must have one group, the query"):
        parse_section(DatasetConfig, values, "data.train")
    assert command.main(["check", "a", "--videos", "v", f"--query-pattern={pattern}"]) == 2
    assert "must have one group" in capsys.readouterr().err
