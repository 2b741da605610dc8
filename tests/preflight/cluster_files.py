"""The cluster files of the checkout, for the tests beside this."""

from typing import Any

import yaml

from video_opd import ROOT

RAY_UP = ["cluster.yaml", "deploy/gcp.yaml", "deploy/on_prem.yaml"]
FILES = [*RAY_UP, "deploy/kuberay.yaml"]
AWS, GCP, LOCAL, KUBERAY = FILES
CLOUDS = [AWS, GCP]


def load(name: str) -> Any:
    documents = list(yaml.safe_load_all((ROOT / name).read_text()))
    return documents if len(documents) > 1 else documents[0]
