"""rows.jsonl of a comparison: what is there is not run again. Runs what is missing, several at a time."""

import ast
import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

from benchmarks.claims.case import EVAL_EVERY, Case, data_folder
from benchmarks.command import Row, append_row, read_rows
from demo import gaps
from video_opd import ROOT
from video_opd.config_file import load_demo
from video_opd.content import file_digest, folder_digest

DECIDE = ("video_opd", "actors", "curriculum", "demo", "driver", "learner", "teacher_service", "launch.py")
DECIDE += ("benchmarks/claims/case.py", "benchmarks/claims/measure.py")
# Until an update of a kind is measured. Of a quiet machine, in seconds:
GUESSED_UPDATE_S, GUESSED_GRPO_S = 0.8, 3.4
START_S, EVAL_S = 25.0, 3.0  # start-up, evaluations at both ends and the second task; one evaluation
ASKING_S = 70.0  # of a curriculum that asks the student about the pool, once or before every round
CROWDED = 2.2  # how much longer a run takes beside two others on two cores: median of docs/results_rows.jsonl
MOST_FAILED = 3
ASKS = {f"curriculum.kind={kind}" for kind in ("tvdf", "scc", "difficulty")}


def code_digest(root: Path = ROOT) -> str:
    """Of all sources that decide what a run does, whatever their comments and layout."""
    folders = [root / part for part in DECIDE if not part.endswith(".py")]
    files = [root / part for part in DECIDE if part.endswith(".py")]
    files += [file for folder in folders for file in folder.rglob("*.py")]
    digest = hashlib.blake2b((root / "configs" / "demo.yaml").read_bytes(), digest_size=6)
    for file in sorted(files):
        digest.update(f"{file.relative_to(root)} {ast.dump(ast.parse(file.read_text()))}".encode())
    return digest.hexdigest()


def data_digest(out: Path) -> str:
    """Of the start, the teacher and the labels of all splits."""
    config = load_demo(gaps.overrides(data_folder(out), "wrong", "eval"))
    assert config.teacher
    labels = sorted(data_folder(out).glob("*/*.txt"))
    parts = [folder_digest(config.student), folder_digest(config.teacher), *map(file_digest, labels)]
    return hashlib.blake2b(" ".join(parts).encode(), digest_size=6).hexdigest()


class Rows:
    """The rows of a file that were measured with this code and data, by their case."""

    def __init__(self, path: Path, code: str, data: str, reused: Sequence[str] = ()):
        self._path, self._stamp, self._lock = path, {"code": code, "data": data}, threading.Lock()
        rows = read_rows(path)
        self._rows = {r["key"]: r for r in rows if r["data"] == data and r["code"] in (code, *reused)}
        self._others = [r for r in rows if r["key"] not in self._rows]

    def __contains__(self, case: Case) -> bool:
        return case.key in self._rows

    def __getitem__(self, case: Case) -> Row:
        return self._rows[case.key]

    def add(self, case: Case, measured: Row) -> None:
        row = {"key": case.key, **self._stamp, **asdict(case), **measured}
        with self._lock:
            append_row(self._path, row)
            self._rows[case.key] = row

    def describe(self) -> str:
        """One line: what the rows belong to, and those of the file that are not used."""
        ours = f"code {self._stamp['code']}, data {self._stamp['data']}: {len(self._rows)} rows"
        if not self._others:
            return ours
        codes = ", ".join(sorted({row["code"] for row in self._others}))
        unused = f"{len(self._others)} rows are of other code ({codes}) or data, and not used"
        return f"{ours}; {unused}: --reuse CODE takes those of the same data"


def seconds_of(case: Case, update_s: Mapping[str, float]) -> float:
    """About how long a run takes. update_s: quiet seconds of an update, by kind, where measured."""
    if case.part == "start":
        return START_S / 3
    guessed = GUESSED_GRPO_S if case.kind.startswith("grpo") else GUESSED_UPDATE_S
    each = update_s.get(case.kind, guessed)
    evaluating = EVAL_S * (case.steps // EVAL_EVERY) if case.part == "learn" else 0.0
    asking = ASKING_S if ASKS.intersection(case.overrides) else 0.0
    quiet = START_S + each * case.steps + evaluating + asking
    return quiet * (1.0 if case.part == "time" else CROWDED)


def estimate_s(cases: Sequence[Case], update_s: Mapping[str, float], jobs: int) -> float:
    """About how long the runs take, `jobs` of them at a time, but timing runs alone."""
    return sum(seconds_of(c, update_s) / (1 if c.part == "time" else jobs) for c in cases)


def run_missing(
    cases: Sequence[Case], rows: Rows, jobs: int, update_s: Mapping[str, float], run: Callable[[Case], Row]
) -> None:
    """Runs the cases that have no row, `jobs` at a time, and adds their rows as they end.

    Raises SystemExit, once the others have ended, if runs failed; after MOST_FAILED no other begins.
    """
    missing, failed = [case for case in cases if case not in rows], list[str]()

    def one(case: Case) -> None:
        if len(failed) >= MOST_FAILED:
            return
        began = time.monotonic()
        try:
            rows.add(case, run(case))
            print(f"{case.name}: {time.monotonic() - began:.0f} s", flush=True)
        except Exception as error:
            failed.append(f"{case.name}: {type(error).__name__}: {error}")
            print(f"failed: {failed[-1]}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        runs = {pool.submit(one, case): case for case in missing}
        left = dict(runs)
        try:
            for ended in as_completed(runs):
                del left[ended]
                minutes = estimate_s(list(left.values()), update_s, jobs) / 60
                done = f"{len(missing) - len(left)} of {len(missing)} runs"
                print(f"{done}, about {minutes:.0f} min left", flush=True)
        except BaseException:
            for future in left:
                future.cancel()
            raise
    if failed:
        again = "their output is in OUT/logs; the same command runs what is missing"
        raise SystemExit(f"{len(failed)} runs failed ({'; '.join(failed)}): {again}")
