"""README.md of RUN/student, the hub's model card: what the model is, how it was made, how good it is."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from driver.export import CARD, STUDENT
from driver.records.masking import MASK, masked
from driver.records.report import COLUMNS, ROWS
from video_opd.config import Config
from video_opd.files.run_folder import COMMANDS, environment, write_atomically
from video_opd.hub import is_hub_model, model_name

CARD_TEMPLATE = Path(__file__).with_name("card.md.jinja")


def note_command(folder: Path, arguments: Sequence[str] | None, resumes: bool) -> None:
    """Adds a line to the run's commands.txt: launch.py with these arguments, secrets masked.

    None: the run was started from Python.
    """
    is_known = not resumes or (folder / COMMANDS).exists()
    with (folder / COMMANDS).open("a") as file:
        if not is_known:
            file.write("# earlier commands are not known\n")
        file.write(f"{'# started from Python' if arguments is None else describe_command(arguments)}\n")


def write_card(folder: Path, config: Config, summary: dict[str, Any]) -> None:
    """Writes RUN/student/README.md, if there is a student."""
    student = folder / STUDENT
    if not student.is_dir():
        return
    exported = json.loads((student / CARD).read_text())
    scores = summary | summary["baselines"]
    rows = [(label, [f"{scores[n][c]:.3f}" for c in COLUMNS]) for n, label in ROWS.items() if scores[n]]
    card = jinja2.Template(CARD_TEMPLATE.read_text(), trim_blocks=True).render(
        name=folder.name,
        head=yaml.safe_dump(_head(config.student), sort_keys=False),
        base=config.student,
        base_name=model_name(config.student),
        teachers=", ".join(t.model for t in config.teacher_models) if config.needs_teacher else "none",
        config=config,
        exported=exported,
        columns=[*COLUMNS.values()],
        rows=rows,
        data=", ".join(source.annotations for source in config.data.sources.values()),
        num_prompts=summary["baselines"]["random"]["n"],
        steps=summary["steps"],
        commands=(folder / COMMANDS).read_text().rstrip("\n"),
        environment=environment(),
    )
    write_atomically(student / "README.md", card)


def _head(student: str) -> dict[str, Any]:
    """What the hub reads of a card. A base model that is a folder has no name there."""
    base = {"base_model": student.partition("@")[0]} if is_hub_model(student) else {}
    tags = ["video-opd", "on-policy-distillation", "temporal-grounding"]
    return {**base, "library_name": "transformers", "pipeline_tag": "video-text-to-text", "tags": tags}


def describe_command(arguments: Sequence[str]) -> str:
    """The command without secrets."""
    shown = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        secret = equals and key.startswith("worker_env")
        shown.append(f"{key}={MASK}" if secret else masked(f"{key}{equals}{masked(value, key)}"))
    return shlex.join(["python", "launch.py", *shown])
