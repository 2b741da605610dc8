"""TimeLens' files of predictions, as its code writes and reads them, scored with a config and without."""

import json

import pytest

from evaluation.__main__ import main
from evaluation.timelens import read_entries
from tests.evaluation.test_evaluation import bad
from video_opd.errors import DataError

VALUE = {"timestamps": [[2.0, 4.0]], "answers": "The event happens in 2.1 - 4.2 seconds.", "duration": 12.0}
NAME = "a.mp4>>>two >>> arrows>>>[2.0, 6.0]"
LAYOUTS = {
    "items.json": lambda entries: json.dumps([{name: value} for name, value in entries.items()]),
    "lines.jsonl": lambda entries: "\n".join(json.dumps({n: v}) for n, v in entries.items()),
    "object.json": json.dumps,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_scored_without_a_config(name, tmp_path):
    entries = {NAME: VALUE, "b.mp4>>>q>>>(0, 10)": {"timestamps": [(0, 5), (7, 9)], "duration": 20}}
    entries |= {"b.mp4>>>r>>>[0.0, 10.0]": VALUE | {"answers": "nothing"}}
    path = tmp_path / name
    path.write_text(LAYOUTS[name](entries))
    first, second, _ = read_entries(path)
    assert first.key == ("a", "two >>> arrows", (2.0, 6.0)) and first.text == VALUE["answers"]
    assert second.text == "0.0 - 5.0, 7.0 - 9.0"
    out = tmp_path / "out"
    assert main(["--predictions", str(path), "--protocol", "timelens", "--out", str(out)]) == 0
    result = json.loads((out / "timelens.json").read_text())
    assert result["result"]["miou"] == pytest.approx((2 / 4 + 5 / 10 + 0) / 3)  # 2.1 - 4.2: whole seconds
    assert (result["result"]["n"], result["result"]["unparsed"], result["num_videos"]) == (3, 1, 2)


def test_a_file_is_scored_on_the_configs_split_by_video_query_and_span(
    config, split_folder, tmp_path, capsys
):
    lines = [line.split("##") for line in (split_folder / "annotations.txt").read_text().splitlines()]
    keys = [(times.split()[0], query, [*map(float, times.split()[1:])]) for times, query in lines]
    entries = {f"{v}.mp4>>>{q}>>>{span}": {"timestamps": [span], "duration": 9} for v, q, span in keys[1:]}
    path = tmp_path / "theirs.jsonl"
    path.write_text(json.dumps(entries | {NAME: VALUE}))
    assert main(["--predictions", str(path), "--out", str(tmp_path), "--no-baselines", *config]) == 0
    result = json.loads((tmp_path / "strict.json").read_text())
    n = len(keys)
    assert result["result"]["miou"] == pytest.approx((n - 1) / n) and result["other_prompts"] == 1
    assert (result["result"]["n"], result["result"]["missing"]) == (n, 1)
    path.write_text(json.dumps({NAME: VALUE}))
    assert "answers none of the" in bad(capsys, "--predictions", str(path), *config)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{}", "has no predictions"),
        ("[3]", "expected a JSON object"),
        (json.dumps({"a.mp4>>>q": VALUE}), "a key must be video>>>query>>>[start, end], found 'a.mp4>>>q'"),
        (json.dumps({"a.mp4>>>q>>>[[1, 2]]": VALUE}), "a key must be video>>>query>>>[start, end]"),
        (json.dumps({NAME: "2 - 3"}), "expected a JSON object"),
        (json.dumps({NAME: {"duration": 3}}), "lacks 'timestamps'"),
        (json.dumps({NAME: VALUE | {"duration": "3"}}), "duration must be a number"),
        (f"{json.dumps({NAME: VALUE})}\n{json.dumps({NAME: VALUE})}", "appears twice: keep one"),
        ("{", "not JSON"),
    ],
)
def test_a_bad_file_is_one_line(text, named, tmp_path, capsys):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_entries(path)
    assert named in str(caught.value) and str(path) in str(caught.value)
    assert named in bad(capsys, "--predictions", str(path))


def test_without_durations_a_config_is_asked_for(tmp_path, capsys):
    path = tmp_path / "p.json"
    path.write_text(json.dumps({NAME: {"answers": "1 - 2"}}))
    assert "give --config" in bad(capsys, "--predictions", str(path))
