"""What surrounds the code: packaging, pinned versions, and the paths and links of the docs."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import video_opd

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
OTHER_CODEBASES = {"evaluation/eval_dataloader.py"}  # of TimeLens


def constraints() -> dict[str, str]:
    """Package -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if not line.startswith("#")]
    assert all(pins), "a line of constraints.txt is not NAME==VERSION, without a local version"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def test_every_package_of_the_tree_is_installed():
    folders = {p.parent.relative_to(ROOT) for p in ROOT.glob("[a-z]*/**/__init__.py")}
    packages = {".".join(folder.parts) for folder in folders if folder.parts[0] != "tests"}
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert PROJECT["project"]["version"] == str(cited) == video_opd.__version__


def test_constraints_pin_what_is_required_and_nothing_of_the_gpu_extra():
    pins, extras = constraints(), PROJECT["project"]["optional-dependencies"]
    required = map(Requirement, [*PROJECT["project"]["dependencies"], *chain(*extras.values())])
    by_hand = {"video-opd", "vllm", "apache-tvm-ffi", "triton"}  # pyproject.toml pins these
    for requirement in required:
        if requirement.name not in by_hand:
            assert requirement.specifier.contains(pins[requirement.name]), requirement
    assert not by_hand & pins.keys()
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "flashinfer"))]


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: p.name)
def test_links_lead_somewhere(doc: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", doc.read_text()):
        path, _, heading = target.partition("#")
        if "://" not in target:
            file = (doc.parent / path) if path else doc
            assert file.exists(), target
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if heading else []
            anchors = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
            assert not heading or heading in anchors, target


@pytest.mark.parametrize("doc", DOCS, ids=lambda p: p.name)
def test_paths_of_the_checkout_exist(doc: Path):
    folders = "|".join(
        p.name for p in ROOT.iterdir() if p.is_dir() and p.name[0].isalpha() and p.name != "runs"
    )
    named = re.findall(rf"\b(?:{folders})/[\w/.-]*\.(?:py|md|ya?ml|yml|sh|json|png)\b", doc.read_text())
    assert [n for n in named if not (ROOT / n).exists() and n not in OTHER_CODEBASES] == []


@pytest.mark.parametrize("doc", ["README.md", "CONTRIBUTING.md"])
def test_the_first_docs_are_short(doc: str):
    assert len((ROOT / doc).read_text().splitlines()) < 100
