"""Configuration files: YAML and `section.key=value` overrides in, a Config or one line per problem out."""

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_data import ConfigSection
from video_opd.errors import ConfigError

ENVIRONMENT = "environment"  # the key of a run's config.yaml that is not configuration
Section = TypeVar("Section", bound=ConfigSection)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file and applies the overrides in order. Raises ConfigError."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} must be a mapping of keys to values")
    for override in overrides:
        _apply(tree, override)
    tree.pop(ENVIRONMENT, None)
    return parse_config(tree, str(path))


def load_demo(overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The embedded demo's config, which works from any directory. Raises ConfigError."""
    return resolve_paths(load_config(ROOT / "configs" / "demo.yaml", overrides), ROOT)


def parse_config(tree: dict[str, Any], source: str) -> Config:
    """Validates a tree of plain values; `source` names it in errors. Raises ConfigError."""
    return parse_section(Config, tree, f"config {source}")


def parse_section(section: type[Section], tree: dict[str, Any], source: str) -> Section:
    """Validates one section. Raises ConfigError, one line for all problems."""
    try:
        return section.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(f"{source}: {_explain(e)}" for e in error.errors())) from error


def dump_config(config: Config, environment: dict[str, Any]) -> str:
    """YAML that load_config reads back; `environment` (versions, commit) is for people."""
    return yaml.safe_dump(config.model_dump(mode="json") | {ENVIRONMENT: environment}, sort_keys=False)


def resolve_paths(config: Config, base: Path) -> Config:
    """Makes relative paths absolute against `base`: the run's processes have other working directories."""
    tree = config.model_dump()
    paths = [(tree, ("student", "teacher", "runs_dir")), (tree["video"], ("quarantine", "cache_dir"))]
    paths += [(teacher, ("model",)) for teacher in tree["teachers"]]
    paths += [(split, ("annotations", "lengths", "videos")) for split in tree["data"].values()]
    for section, names in paths:
        for name in names:
            if section[name] is not None:
                section[name] = str((base / section[name]).resolve())
    return Config.model_validate(tree)


def describe_keys() -> Iterator[str]:
    """One line per key: name, default, meaning."""
    for name, field in _keys(Config):
        if not _is_section(field):
            default = "required" if field.is_required() else field.default
            yield f"  {name}={default}  {field.description or ''}".rstrip()


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key and section below `section`, by its dotted name."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        if _is_section(field):
            yield from _keys(field.annotation, f"{prefix}{name}.")  # pyright: ignore[reportArgumentType]


def _is_section(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        section = node.get(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node[parent] = dict(section)  # a YAML anchor may share it with another section
        node = node[parent]
    try:
        node[leaf] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"override {override!r}: the value is not YAML") from error


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors."""
    key, message = ".".join(str(part) for part in error["loc"]), error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, [name for name, _ in _keys(Config)], n=1, cutoff=0.0)[0]
        return f"unknown key {key}; did you mean {near}?"
    if error["type"] == "missing":
        return f"missing key {key}"
    if isinstance(error["input"], dict):
        return f"{key}: {message}" if key else message
    return f"{key}={error['input']!r}: {message}"
