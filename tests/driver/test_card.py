"""The model card of RUN/student is one that huggingface_hub reads, and says what the run was."""

import json
from typing import Any

from huggingface_hub import ModelCard

from driver.export import CARD, STUDENT
from driver.records.card import note_command, write_card
from tests.driver.test_report import PROMPTS, SCORES
from tests.video_opd.test_config import MINIMAL
from video_opd.config_file import parse_config
from video_opd.files.run_folder import COMMANDS
from video_opd.grounding import blind_baselines

COMMIT = "c" * 40


def written(folder, student: str, miou: float | None = None, style: str = "timelens") -> Any:
    tree = MINIMAL | {"student": student, "teacher": "/models/Teacher-8B", "worker_env": {"A": "b"}}
    tree |= {"prompt": {"style": style}}
    scores = dict.fromkeys(("teacher", "student_before", "student_after"), SCORES)
    summary = scores | {"baselines": blind_baselines(PROMPTS, PROMPTS) | {"no_video": None}, "steps": 9}
    note_command(
        folder,
        ["--config", "my config.yaml", "worker_env.KEY=sesame", "checkpoint_url=s3://me:sesame@b/x"],
        resumes=False,
    )
    note_command(folder, ["--resume", "s3://me:sesame@sesame@b/x?signature=sesame"], resumes=True)
    write_card(folder, parse_config(tree, "test"), summary)  # without a student: nothing
    (folder / STUDENT).mkdir()
    (folder / STUDENT / CARD).write_text(json.dumps({"step": 7, "miou": miou}))
    write_card(folder, parse_config(tree, "test"), summary)
    return ModelCard.load(folder / STUDENT / "README.md")


def test_the_card_of_a_model_of_the_hub(tmp_path):
    card = written(tmp_path, f"Org/Student-2B@{COMMIT}", miou=0.5)
    assert card.data.base_model == "Org/Student-2B" and card.data.library_name == "transformers"
    text = (tmp_path / STUDENT / "README.md").read_text()
    assert card.data.license is None and "\n# license: name the one" in text
    for told in (
        *(f"Org/Student-2B@{COMMIT}", "/models/Teacher-8B", "loss.kind=opd", "7 of a run of 9", "mIoU 0.500"),
        "| student before | 0.500 | 1.000 | 0.500 | 0.000 |",
        "| video | 2 frames a second, 4 to 768, at most 8192 tokens |",
        "python launch.py --config 'my config.yaml' 'worker_env.KEY=***' 'checkpoint_url=s3://***@b/x'\n"
        "python launch.py --resume 's3://***@b/x?***'",
        "Greedy answers,\nthe first interval of each;\nan answer without",
    ):
        assert told in card.text
    assert "sesame" not in text


def test_the_card_of_a_folder_names_no_base_on_the_hub(tmp_path):
    card = written(tmp_path, "/models/Student-2B", style="timelens2")
    assert card.data.base_model is None and "| base model | /models/Student-2B |" in card.text
    assert "the best of the run" not in card.text
    assert "all intervals of each against all true ones" in card.text and "first interval" not in card.text


def test_a_command_that_is_not_known_is_said_to_be_so(tmp_path):
    note_command(tmp_path, ["--resume", "x"], resumes=True)
    note_command(tmp_path, None, resumes=True)
    lines = (tmp_path / COMMANDS).read_text().splitlines()
    assert lines == [
        "# earlier commands are not known",
        "python launch.py --resume x",
        "# started from Python",
    ]
