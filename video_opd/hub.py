"""Models of the Hugging Face hub: ORG/NAME or ORG/NAME@REVISION where a model folder is expected.

The driver finds out the commit once; every process then names that commit and takes its files from the cache
of its own node, which downloads what it lacks. Only data is downloaded: no pickles and no Python.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from video_opd.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from video_opd.config import Config

FILES = ("*.json", "merges.txt", "chat_template.jinja")  # configuration, tokenizer, processors
WEIGHTS = "*.safetensors"
_ID = re.compile(r"(?!models/|datasets/|spaces/)([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
_SNAPSHOT = re.compile(r".*/models--[^/]+?--([^/]+)/snapshots/([0-9a-f]{40})/?")  # of the hub's cache


def is_hub_model(model: str, base: Path = Path()) -> bool:
    """Whether it names a model of the hub: by its form, and there is no such path (relative to `base`)."""
    return _ID.fullmatch(model) is not None and not (base / model).exists()


def model_name(model: str | Path) -> str:
    """NAME of a model of the hub or of its snapshot in the cache; of other paths the last part."""
    if found := _SNAPSHOT.fullmatch(str(model)):
        return found[1]
    return Path(str(model).partition("@")[0] if is_hub_model(str(model)) else model).name


def commit_of(folder: str | Path) -> str | None:
    """The commit of a snapshot in the hub's cache; None: another folder."""
    return found[2] if (found := _SNAPSHOT.fullmatch(str(folder))) else None


def fetch(model: str, weights: bool = True) -> str:
    """The folder of a model on this node: a path as it is; of the hub's models the cache's, downloaded first.

    weights: false for all files but those. HF_HUB_OFFLINE=1: the cache alone. Raises ModelError.
    """
    if not is_hub_model(model):
        return model
    from huggingface_hub import constants, errors, snapshot_download

    name, _, revision = model.partition("@")
    patterns = [*FILES, WEIGHTS] if weights else [*FILES]
    try:
        return snapshot_download(
            name, revision=revision or None, allow_patterns=patterns, ignore_patterns="*/*"
        )
    except errors.GatedRepoError:
        ask = f"ask at https://hf.co/{name}, then `hf auth login` or HF_TOKEN"
        why = f"its owner gives access on request: {ask}"
    except errors.RepositoryNotFoundError:
        why = "the hub has no such model, or it is private: correct the name, or `hf auth login` or HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = f"it has no revision {revision}: leave out @{revision} for the newest"
    except errors.LocalEntryNotFoundError as error:
        where = "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        is_partial = isinstance(error, errors.IncompleteSnapshotError)
        lacks = "has only some of its files" if is_partial else "lacks it"
        got = f"`hf download {name}` where there is a network"
        why = f"{where}, and the cache {constants.HF_HUB_CACHE} {lacks}: {got}"
    except Exception as error:  # of the hub, the network or the disk
        why = (str(error).splitlines() or [type(error).__name__])[0]
    raise ModelError(f"{model} cannot be had from the hub, and no folder has that name: {why}")


def on_this_node(config: "Config", teachers: bool) -> "Config":
    """The config with folders of this node for the student and, if asked, the teachers; see `fetch`.

    Raises ModelError, ConfigError.
    """
    named = [model for model in _models(config) if is_hub_model(model)]
    if config.trust_remote_code and named:
        how = f"`hf download {named[0]} --local-dir FOLDER`, read its code, and name the folder"
        raise ConfigError(f"trust_remote_code=true, but no code is downloaded from the hub: {how}")
    student, *others = _models(config)
    return _with(config, [fetch(student), *(fetch(model) if teachers else model for model in others)])


def without_weights(config: "Config") -> tuple["Config", list[str]]:
    """As on_this_node, but of the hub's models no weights; models that cannot be had stay, and why not."""
    found, missing = [], []
    for model in _models(config):
        try:
            found.append(fetch(model, weights=False))
        except ModelError as error:
            found.append(model)
            missing.append(str(error))
    return _with(config, found), missing


def pinned(config: "Config", local: "Config") -> "Config":
    """The config with the commit of each model of the hub. local: what on_this_node made of it."""
    pins = []
    for model, folder in zip(_models(config), _models(local), strict=True):
        commit = commit_of(folder) if is_hub_model(model) else None
        pins.append(f"{model.partition('@')[0]}@{commit}" if commit else model)
    return _with(config, pins)


def with_models_of(config: "Config", other: "Config") -> "Config":
    """The config with the models of another one, which are as many."""
    return _with(config, _models(other))


def _models(config: "Config") -> list[str]:
    return [m for m in (config.student, config.teacher, *(t.model for t in config.teachers)) if m]


def _with(config: "Config", models: list[str]) -> "Config":
    """The config with other models, in the order of _models."""
    student, *rest = models
    teacher = rest.pop(0) if config.teacher else config.teacher
    teachers = (t.model_copy(update={"model": m}) for t, m in zip(config.teachers, rest, strict=True))
    return config.model_copy(update={"student": student, "teacher": teacher, "teachers": tuple(teachers)})
