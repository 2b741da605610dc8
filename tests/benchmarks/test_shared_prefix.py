"""benchmarks.shared_prefix and saved_tokens: trees give what sequences apart give, and what is counted."""

import json
import os

import numpy as np
import pytest

from benchmarks import shared_prefix
from benchmarks.command import in_new_process
from benchmarks.saved_tokens import computed_share, main, queries_per_clip
from benchmarks.shared_prefix import compare, giving_back, relative_difference, rows_of, summary

PEAKS = [{"peak_ratio": 0.5}, {"peak_ratio": 0.6}]


@pytest.mark.engine  # a process with a teacher and a learner of tiny models
def test_scores_and_gradients_of_trees_are_those_of_sequences_apart(monkeypatch):
    def measure_times_alone(work, *arguments):
        return in_new_process(work, *arguments) if work is shared_prefix.measure else PEAKS

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(shared_prefix, "in_new_process", measure_times_alone)
    result = summary(rows_of((4, 1, 128), "cpu", 1))
    assert 0 < result["max_logprob_diff"] < 1e-5 and 0 < result["max_gradient_diff"] < 1e-5
    for row, phase, peaks in zip(result["rows"], ("score", "update"), PEAKS, strict=True):
        same = {"queries": 4, "rollouts": 1, "video_tokens": 128, "phase": phase, "device": "cpu"}
        assert same.items() <= row.items() and peaks.items() <= row.items()
        assert row["decodes"] == row["vision_passes"] == 1.0
        assert row["ratio"] > 0 and 128 < row["prefix"] < 256 and row["tokens"] < 0.5


def test_the_ratio_is_of_medians_and_to_the_faster_other_way():
    seconds = [(1.0, 4.0, 5.0), (2.0, 5.0, 4.0), (9.0, 6.0, 9.0)]
    row = compare([dict(zip(("trees", "alone", "padded"), values, strict=True)) for values in seconds])
    assert row["ratio"] == row["ratio_alone"] == row["ratio_padded"] == 2.0 / 5.0
    assert (row["lowest"], row["highest"]) == (0.25, 1.5)
    row = compare([{"trees": 1.0, "alone": 4.0, "padded": 2.0}])
    assert (row["ratio"], row["ratio_alone"], row["ratio_padded"]) == (0.5, 0.25, 0.5)


def test_the_worst_parameter_counts_relative_to_its_own_gradient():
    theirs = {"large": np.array([3e6, 4e6]), "small": np.array([3e-6, 4e-6]), "none": np.zeros(2)}
    ours = {"large": np.array([3e6, 4e6 + 5]), "small": np.array([3e-6, 4.5e-6]), "none": np.zeros(2)}
    assert relative_difference(ours, theirs) == pytest.approx(0.1)
    assert relative_difference(ours | {"none": np.array([0, 7])}, theirs) == 7


def test_only_the_processes_that_measure_memory_give_all_of_it_back():
    with giving_back():
        assert os.environ["MALLOC_MMAP_THRESHOLD_"] == "65536"
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ


def test_saved_tokens_follow_the_real_numbers_of_queries():
    assert computed_share([1, 1], 1) == 1.0
    assert computed_share([4], 1) == (8000 + 400) / (4 * 8100)
    assert computed_share([1, 4], 1) == (8100 + 8000 + 400) / (5 * 8100)
    assert computed_share([40], 1) == (2 * 8000 + 4000) / (40 * 8100), "a tree has 32 branches at most"
    assert computed_share([1], 8) == (8000 + 800) / (8 * 8100)


def test_queries_of_the_same_clip_are_counted(tmp_path, capsys, monkeypatch):
    lines, lengths = tmp_path / "charades_sta_test.txt", tmp_path / "lengths.csv"
    lines.write_text("AB 0.0 2.0##a\nCD 0.0 2.0##b\nAB 1.0 3.0##c\n")
    lengths.write_text("id,length\nAB,9\nCD,9\n")
    assert queries_per_clip(str(lines), str(lengths)) == [2, 1]
    parts, same = tmp_path / "parts.json", {"duration": 9, "timestamp": [1, 2], "sentence": "a"}
    cuts = [{"video": "v.mp4", "video_start": s, "video_end": s + 9} | same for s in (0, 20, 0)]
    parts.write_text(json.dumps(cuts))
    assert queries_per_clip(str(parts)) == [2, 1]
    monkeypatch.setattr("sys.argv", ["saved_tokens", str(lines)])
    assert main() == 2 and capsys.readouterr().err.count("\n") == 1
