"""What both commands do: time, tune on the validation split, learn with several seeds, and read the rows."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import command
from benchmarks.claims import kinds, tables
from benchmarks.claims.case import GROUPS, Case, Labels, Part, data_folder
from benchmarks.claims.measure import measure
from benchmarks.claims.reading import Group, Tuned, tuned, with_seconds
from benchmarks.claims.rows import Rows, code_digest, data_digest, estimate_s, run_missing
from benchmarks.command import Row
from demo.gaps import ensure_gaps
from video_opd import ROOT
from video_opd.files.run_folder import write_atomically

Overrides = Callable[[str, int], tuple[str, ...]]
Kind = tuple[str, str]  # its name and its labels; none: it sees no label


def make_runs_parser(
    name: str, about: str | None, quick: str, names: Sequence[str], seeds: int, steps: int
) -> argparse.ArgumentParser:
    """The parser of a command that keeps a row for each run."""
    parser = command.make_parser(name, about, quick, overrides=True)
    add = parser.add_argument
    add("--kinds", nargs="+", choices=names, default=list(names))
    add("--seeds", type=int, default=seeds, help="number of seeds")
    add("--steps", type=int, default=steps, help=f"updates of {GROUPS} prompts")
    add("--jobs", type=int, default=2, help="runs at one time; timing runs are alone")
    kept = "folder of data, runs, rows.jsonl and Markdown; a run in rows.jsonl is not done again"
    add("--out", type=Path, default=ROOT / "runs" / "claims", help=kept)
    add("--reuse", nargs="+", default=[], metavar="CODE", help="use rows of this other code, too")
    add("--paste", type=Path, metavar="DOCUMENT", help="put the Markdown between its markers, too")
    return parser


def make_parser(
    name: str, about: str | None, quick: str, names: Sequence[str], seeds: int = 5
) -> argparse.ArgumentParser:
    """The parser of a command that compares kinds over seeds."""
    parser = make_runs_parser(name, about, quick, names, seeds, kinds.STEPS)
    add = parser.add_argument
    add("--labels", nargs="+", choices=("clean", "wrong"), help="of kinds that see labels")
    rates = "learning rates tried on the validation split, for every objective the same"
    add("--lrs", nargs="+", type=float, default=list(kinds.LEARNING_RATES), help=rates)
    swept = "experiment: run the kinds with each value of one configuration key"
    add("--sweep", nargs="+", metavar=("KEY", "VALUE"), help=swept)
    return parser


@dataclass(frozen=True)
class Study:
    """The runs of one command. overrides: of a kind, by its name and updates.

    tuned_as: the objective whose trials give the learning rate of a kind."""

    arguments: argparse.Namespace
    rows: Rows
    kinds: Sequence[Kind]
    overrides: Overrides
    tuned_as: Callable[[Kind], Kind]
    is_timed: bool

    @property
    def start(self) -> Case:
        """The start itself, before any training."""
        return Case("start", "start", "clean", overrides=tuple(self.arguments.overrides))

    def case(self, part: Part, kind: Kind, lr: float, seed: int = 0, steps: int | None = None) -> Case:
        num_steps: int = steps or self.arguments.steps
        of_kind = self.overrides if part == "learn" else kinds.objective_overrides
        overrides = (*of_kind(kind[0], num_steps), *self.arguments.overrides)
        labels: Labels = "wrong" if kind[1] == "wrong" else "clean"
        return Case(part, kind[0], labels, seed, lr, num_steps, overrides)

    def timing(self, kind: Kind) -> Case:
        """The same for clean and wrong labels: they cost the same."""
        steps = min(kinds.TIMED_STEPS, self.arguments.steps)
        return self.case("time", (kind[0], "none"), min(self.arguments.lrs), 0, steps)

    def timings(self) -> list[Case]:
        """A run of each kind, behind one that is not read: it decodes the clips that they have in common."""
        timed = [self.timing(kind) for kind in self.kinds if self.is_timed]
        return [*(replace(case, kind="warm-up") for case in timed[:1]), *timed]

    def trials(self, kind: Kind) -> list[Case]:
        return [self.case("tune", self.tuned_as(kind), lr) for lr in self.arguments.lrs]

    def learning(self, kind: Kind, lr: float, swept: Sequence[str] = ()) -> list[Case]:
        of_seeds = [self.case("learn", kind, lr, seed) for seed in range(self.arguments.seeds)]
        return [replace(case, overrides=(*case.overrides, *swept)) for case in of_seeds]

    def update_s(self) -> dict[str, float]:
        """Quiet seconds of an update, by the kinds that were timed."""
        timed = {kind[0]: self.timing(kind) for kind in self.kinds} if self.is_timed else {}
        return {name: self.rows[case]["update_s"] for name, case in timed.items() if case in self.rows}

    def run(self, wanted: Sequence[Case], jobs: int) -> None:
        run_all(wanted, self.rows, jobs, self.arguments.out, self.update_s())

    def print_estimate(self) -> None:
        """Of what is left, whatever learning rates tuning will give."""
        rates = self.arguments.lrs
        first = [self.start, *self.timings()]
        wanted = [*first, *(case for kind in self.kinds for case in self.trials(kind))]
        left = [case for case in dict.fromkeys(wanted) if case not in self.rows]
        every = [case for kind in self.kinds for case in self.learning(kind, rates[0])]
        learn = [c for c in every if not any(replace(c, lr=lr) in self.rows for lr in rates)]
        seconds = estimate_s([*left, *learn], self.update_s(), self.arguments.jobs)
        numbers = f"{len(left)} runs to time and tune, {len(learn)} to learn"
        print(f"{numbers}: about {seconds / 60:.0f} min", flush=True)

    def tune(self) -> dict[Kind, Tuned]:
        """Runs the start, the timing runs, each alone, and the trials."""
        self.print_estimate()
        self.run([self.start, *self.timings()], jobs=1)
        self.print_estimate()
        self.run([case for kind in self.kinds for case in self.trials(kind)], self.arguments.jobs)
        return {kind: tuned([self.rows[case] for case in self.trials(kind)]) for kind in self.kinds}

    def learn(self, found: Mapping[Kind, Tuned], swept: Sequence[str] = ()) -> list[Group]:
        """Runs all seeds of all kinds, one seed after the other. swept: overrides of an experiment."""
        of = {kind: self.learning(kind, found[kind].lr, swept) for kind in self.kinds}
        self.run([case for seed in zip(*of.values(), strict=True) for case in seed], self.arguments.jobs)
        return [self.group(kind, learned) for kind, learned in of.items()]

    def group(self, kind: Kind, learned: Sequence[Case]) -> Group:
        """The rows of a kind; with timing, their curves have quiet seconds."""
        rows = [self.rows[case] for case in learned]
        if self.is_timed:
            timing = self.rows[self.timing(kind)]
            rows = [with_seconds(row, timing["update_s"], timing["select_s"]) for row in rows]
        return Group(*kind, learned[0].lr, rows)


def run_all(
    wanted: Sequence[Case], rows: Rows, jobs: int, out: Path, update_s: Mapping[str, float] | None = None
) -> None:
    """Runs the cases that have no row, each in a process of its own. update_s: see rows.py."""

    def one(case: Case) -> Row:
        return command.in_new_process(measure, case, out)

    run_missing(list(dict.fromkeys(wanted)), rows, jobs, update_s or {}, one)


def open_rows(arguments: argparse.Namespace) -> Rows:
    """Writes the data that are missing. Rows of other code or data are named, and not used."""
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    ensure_gaps(data_folder(arguments.out))
    digests = code_digest(), data_digest(arguments.out)
    rows = Rows(arguments.out / "rows.jsonl", *digests, arguments.reuse)
    print(rows.describe(), flush=True)
    return rows


def sweep(study: Study, found: Mapping[Kind, Tuned]) -> None:
    """Runs the study's kinds with each value of --sweep; writes sweep_KEY.md."""
    key, *values = study.arguments.sweep
    groups = {value: study.learn(found, (f"{key}={value}",)) for value in values}
    write(study.arguments, {f"sweep_{key}": tables.markdown(tables.sweep_rows(key, groups))})


def write(arguments: argparse.Namespace, fragments: Mapping[str, str]) -> None:
    """Writes and prints OUT/NAME.md of each fragment; puts them into the document of --paste."""
    for name, text in fragments.items():
        write_atomically(arguments.out / f"{name}.md", text)
        print(f"\n{name}\n{text}")
    if arguments.paste:
        print("pasted:", *tables.paste(arguments.paste, arguments.out))


def setting(study: Study, groups: Sequence[Group]) -> str:
    """One sentence: what all runs of a table share."""
    arguments, rows = study.arguments, [row for group in groups for row in group.rows]
    teacher = next((row["teacher_miou"] for row in rows if row["teacher_miou"] is not None), None)
    scores = f"mIoU of the start {rows[0]['curve'][0]['miou']:.3f}"
    scores += f", of the teacher {teacher:.3f}" if teacher is not None else ""
    second = f"the start's accuracy on the second task {study.rows[study.start]['second_task']:.3f}"
    runs = f"{arguments.steps} updates of {GROUPS} prompts, {arguments.seeds} seed(s)"
    return f"{runs}: mean (lowest to highest). {scores}; {second}.\n\n"
