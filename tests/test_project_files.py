"""What surrounds the code: versions, and the links of the docs."""

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from video_opd import ROOT, __version__

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def constraints() -> dict[str, str]:
    """Package -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines if not line.startswith("#")]
    assert all(pins), "a line of constraints.txt is not NAME==VERSION, without a local version"
    return {canonicalize_name(pin[1]): pin[2] for pin in pins if pin}


def test_the_version_is_the_same_everywhere():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    assert PROJECT["project"]["version"] == str(cited) == __version__


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


@pytest.mark.parametrize("doc", ["README.md", "CONTRIBUTING.md"])
def test_the_first_docs_are_short(doc: str):
    assert len((ROOT / doc).read_text().splitlines()) < 100
