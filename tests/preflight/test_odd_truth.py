"""Odd truth stops no launch where it is the held-out split's, and every launch where it is to be learned."""

import pytest

from preflight.inputs import make_draft, make_plan
from video_opd import ROOT
from video_opd.config_file import load_config
from video_opd.errors import DataError


@pytest.mark.parametrize("prepare", [make_plan, make_draft])
def test_the_held_out_truth_is_read_as_published_and_the_training_truth_strictly(
    prepare, split_folder, tmp_path
):
    (video, *_), *_ = map(str.split, (split_folder / "annotations.txt").read_text().splitlines())
    spans = {"odd": ["2.0 13.1", "3.0 3.0", "5.0 2.0"], "fine": ["1.0 4.0"] * 128}
    for name, of_file in spans.items():
        (tmp_path / name).write_text("".join(f"{video} {span}##a man stands\n" for span in of_file))

    def config(train: str, evaluation: str):
        files = [
            f"data.train.annotations={tmp_path / train}",
            f"data.eval.annotations={tmp_path / evaluation}",
        ]
        files += [f"data.{s}.lengths={split_folder / 'lengths.csv'}" for s in ("train", "eval")]
        files += [f"data.{s}.videos={split_folder / 'videos'}" for s in ("train", "eval")]
        return load_config(ROOT / "configs" / "demo.yaml", [*files, "data.eval.clamp_s=5"])

    prompts = prepare(config("fine", "odd")).eval
    assert [p.answer_spans_s for p in prompts] == [((2.0, 13.1),), ((3.0, 3.0),), ((5.0, 2.0),)]
    with pytest.raises(DataError, match="odd:1"):
        prepare(config("odd", "fine"))
