"""A user's own table: its separators, encodings, times and rows, and the line that names a bad one."""

import pytest

from video_opd.config_data import AnnotationFormat, DatasetConfig
from video_opd.datasets.fields import clock_seconds
from video_opd.datasets.formats import detect, read_annotations, resolve
from video_opd.datasets.source import read_source
from video_opd.errors import DataError

ROWS = [["video", "start", "end", "query"], ["a.mp4", "1", "2.5", "a cat"], ["b", "0:05", "1:00:05.5", "two"]]
READ = [("a:2", "a.mp4", "a cat", ((1.0, 2.5),)), ("b:3", "b", "two", ((5.0, 3605.5),))]


def read(path, name: AnnotationFormat = "csv"):
    dataset = resolve(DatasetConfig(format=name, annotations=str(path), videos="videos"))
    return [(a.prompt_id, a.video, a.query, a.spans_s) for a in read_annotations(dataset)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])  # utf-16: with its mark
def test_separators_and_encodings_are_recognised(separator, encoding, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\r\n".join(map(separator.join, ROWS)).encode(encoding))
    assert detect(read_source(path)) == "csv"
    assert read(path) == read(path, "auto") == READ


@pytest.mark.parametrize(
    "text",
    [
        'Query, END,"start",video,notes\na cat,2.5,1,a.mp4,"x, y"\ntwo,1:00:05.5,0:05,b,',
        "video;start;end;query\n a.mp4 ;1;2.5; a cat \nb;5.0;60:05.5;two\n;;;\n",
        'video,start,end,query\n"a.mp4","1","2.5","a cat"\n"a.mp4",1,2.50,a cat\nb,5,3605.5,two',
    ],
)
def test_order_other_columns_quotes_empty_and_equal_rows_change_nothing(text, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert [a[1:] for a in read(path)] == [a[1:] for a in READ]


def test_a_query_may_hold_the_separator_quotes_and_line_breaks_and_rows_are_a_spreadsheets(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('video,start,end,query\na,1,2,"he says ""no"",\nand goes"\n\nb,1,x,y')
    with pytest.raises(
        DataError, match="row 4: end must be seconds"
    ):  # as a spreadsheet counts, not an editor
        read(path)
    path.write_text(path.read_text().replace("x", "3"))
    assert read(path)[0][2] == 'he says "no",\nand goes' and read(path)[1][0] == "b:4"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("a,1,,q", "row 3: end must be seconds (62.5) or a clock time (1:02.5, 0:01:02.5), found ''"),
        ("a,1,2:60,q", "row 3: end must be"),
        ("a,1,1:5,q", "row 3: end must be"),
        ("a,nan,2,q", "row 3: start must be"),
        ("a,1:61:00,2,q", "row 3: start must be"),
        ('a,"1,5",2,q', "row 3: start must be"),
        (",1,2,q", "row 3: the video is empty"),
        ("a,1,2,q, and more", "row 3: 5 cells, the first row has 4: put"),
        ("a,1,2", "row 3: 3 cells, the first row has 4: put"),
        ('a,1,2,"q', "row 3: unexpected end of data: close the quotes"),
        ('a,1,2,"q" w', "row 3: ',' expected after '\"': close the quotes"),
    ],
)
def test_a_bad_row_is_named_by_its_number(line, named, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"video,start,end,query\nb,1,2,q\n{line}\n")
    with pytest.raises(DataError) as caught:
        read(path)
    assert f"{path}: {named}" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "first", ["video,start,query", "video,start;end;query", "a.mp4,1,2,q", "video,video,start,end,query"]
)
def test_a_header_that_lacks_a_column_or_mixes_separators_is_named(first, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"{first}\na,1,2,q\n")
    with pytest.raises(
        DataError, match=f"must name the columns video, start, end, query once each.*'{first}"
    ):
        read(path)
    with pytest.raises(DataError, match="none of the known formats"):
        read(path, "auto")


def test_clock_times_are_seconds():
    values = {"7": 7, "62.5": 62.5, "1:02": 62, "75:00.25": 4500.25, "0:01:02.5": 62.5, "12:00:00": 43200}
    assert {value: clock_seconds(value, "start", "here") for value in values} == values


def test_a_line_that_is_too_long_for_a_table_is_no_header(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 200_000)
    with pytest.raises(DataError, match="none of the known formats"):
        detect(read_source(tmp_path / "a.txt"))
    with pytest.raises(DataError, match="must name the columns"):
        read(tmp_path / "a.txt")
