"""Configuration files: YAML and `section.key=value` overrides in, a Config or one line per problem out."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from video_opd import ROOT
from video_opd.config import Config
from video_opd.config_data import FORMS, ConfigSection
from video_opd.errors import ConfigError
from video_opd.hub import is_hub_model

QUOTES = "'\"!|>&"  # a value that begins with one is not as it is written
NUM_PROBLEMS = 8  # of a configuration, that an error names
ENVIRONMENT = "environment"  # the key of a run's config.yaml that is not configuration
Section = TypeVar("Section", bound=ConfigSection)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML file and applies the overrides in order. Raises ConfigError."""
    try:
        tree = _parse(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"config {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path} must be a mapping of keys to values")
    for override in overrides:
        _apply(tree, override)
    tree.pop(ENVIRONMENT, None)
    return parse_config(_construct(tree, Config), str(path))


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
        named = [f"{source}: {_explain(e)}" for e in error.errors()[:NUM_PROBLEMS]]
        more = [f"{error.error_count() - NUM_PROBLEMS} more"] if error.error_count() > NUM_PROBLEMS else []
        raise ConfigError("; ".join(named + more)) from error


def dump_config(config: Config, environment: dict[str, Any]) -> str:
    """YAML that load_config reads back; `environment` (versions, commit) is for people."""
    return yaml.safe_dump(config.model_dump(mode="json") | {ENVIRONMENT: environment}, sort_keys=False)


def resolve_paths(config: Config, base: Path) -> Config:
    """Makes relative paths absolute against `base`: the run's processes have other working directories."""
    tree = config.model_dump()
    paths = [(tree, ("student", "teacher", "runs_dir")), (tree["video"], ("quarantine", "cache_dir"))]
    paths += [(teacher, ("model",)) for teacher in tree["teachers"]]
    train, held_out = tree["data"]["train"], tree["data"]["eval"]
    splits = [held_out, *([train] if isinstance(train, dict) else train)]
    paths += [(split, ("annotations", "lengths", "videos")) for split in splits]
    for section, names in paths:
        for name in names:
            is_model = name in ("student", "teacher", "model")
            if section[name] is not None and not (is_model and is_hub_model(section[name], base)):
                section[name] = str((base / section[name]).resolve())
    return Config.model_validate(tree)


def describe_keys() -> Iterator[str]:
    """One line per key: name, default, meaning."""
    for name, field in _keys(Config):
        if not _forms(field.annotation)[0]:
            default = "required" if field.is_required() else field.default
            yield f"  {name}={default}  {field.description or ''}".rstrip()


def _keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key and section below `section`, by its dotted name."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        one, several = _forms(field.annotation)
        if one:
            yield from _keys(one, f"{prefix}{name}.")
        if one and several:  # the keys that only an item of a list has
            own = several.model_fields.keys() - one.model_fields.keys()
            yield from ((f"{prefix}{name}.N.{key}", several.model_fields[key]) for key in sorted(own))


def _forms(kind: Any) -> tuple[Any, Any]:
    """The section that a key is, and that of the items of the list that it may be; None: it is none."""
    is_union = get_origin(kind) in (Union, UnionType)
    members = [_bare(member) for member in get_args(kind)] if is_union else [kind]
    lists = [get_args(member)[0] for member in members if get_origin(member) is tuple]
    return next(filter(_is_model, members), None), next(filter(_is_model, lists), None)


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


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
        value = _parse(text)
    except (yaml.YAMLError, ValueError) as error:
        advice = "put text between single quotes"
        raise ConfigError(f"override {override!r}: the value is not YAML: {advice}") from error
    plain = isinstance(value, str | _Scalar) and text.strip()[:1] not in QUOTES
    node[leaf] = _Scalar(text.strip()) if plain else value


@dataclass(frozen=True)
class _Scalar:
    """A value without quotes, as written: text or a number, as its key wants it."""

    text: str

    def value(self) -> Any:
        try:
            return yaml.safe_load(self.text)
        except ValueError:  # an impossible date
            return self.text


class _Loader(yaml.SafeLoader):
    """Keeps values that are not text as they are written."""


for _kind in ("int", "float", "bool", "timestamp"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", lambda _, node: _Scalar(node.value))


def _parse(text: str) -> Any:
    """One YAML document. Raises YAMLError or ValueError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _construct(tree: Any, kind: Any) -> Any:
    """Plain values from those of _parse, for a key of type `kind`: text is as it is written."""
    kind = _bare(kind)
    if all(forms := _forms(kind)):
        kind = tuple[forms[1], ...] if isinstance(tree, list) else forms[0]
    if isinstance(tree, _Scalar):
        return tree.text if _is_text(kind) else tree.value()
    if isinstance(tree, dict):
        fields = kind.model_fields if _is_model(kind) else {}
        of_all = get_args(kind)[1] if get_origin(kind) is dict else Any
        named = {key.text if isinstance(key, _Scalar) else key: value for key, value in tree.items()}
        kinds = {key: fields[key].annotation if key in fields else of_all for key in named}
        return {key: _construct(value, kinds[key]) for key, value in named.items()}
    if isinstance(tree, list):
        return [_construct(value, (*get_args(kind), Any)[0]) for value in tree]
    return tree


def _bare(kind: Any) -> Any:
    """A type without annotations and without None."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType) and len(kinds := set(get_args(kind)) - {NoneType}) == 1:
        return _bare(kinds.pop())
    return kind


def _is_text(kind: Any) -> bool:
    """Whether a bare type holds nothing but text."""
    return kind is str or (get_origin(kind) is Literal and all(isinstance(v, str) for v in get_args(kind)))


def _explain(error: Any) -> str:
    """One line for one of pydantic's errors."""
    key = ".".join(str(part) for part in error["loc"] if part not in FORMS)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, [name for name, _ in _keys(Config)], n=1, cutoff=0.0)[0]
        return f"unknown key {key}; did you mean {near}?"
    if error["type"] == "missing":
        return f"missing key {key}"
    if isinstance(error["input"], dict):
        return f"{key}: {message}" if key else message
    return f"{key}={error['input']!r:.120}: {message}"
