"""From the words of the command line to the settings of a run: Hydra's grammar, the tables, OmegaConf's types."""

from __future__ import annotations

import dataclasses
import functools
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException, ValidationError

from recollect.train._check import check, check_given
from recollect.train._errors import InvalidRunError, UsageError, choose_from, did_you_mean, nearest_keys
from recollect.train._keys import show
from recollect.train._options import OPTIONS, preset, rows
from recollect.train._settings import Settings, about, keys, model_class, values
from recollect.train._stored import check_settings_text, read_text

__all__ = [
    "changed",
    "code_of",
    "defaults",
    "groups",
    "parse",
    "parse_override",
    "read",
    "with_absolute_paths",
    "with_code",
    "write",
]

Values = dict[str, Any]  # by key: "model.num_layers"

_OWN = ("config", "resume", "run_dir")  # of one call, and not of what it begins with or goes on with
_NEW = {  # not in files of older runs
    **dict.fromkeys(_OWN),
    **{"devices": 1, "memory_budget": None, "training.combine": None, "training.combine_score": "x^2"},
}


@functools.cache
def groups() -> Mapping[str, list[str]]:
    """Groups and their options, presets among them."""
    return {**{group: sorted(options) for group, options in OPTIONS.items()}, "preset": sorted(rows())}


def defaults(*choices: str) -> Values:
    """Key -> value, for every key that can be set once these group options (``"dataset=cora"``) are chosen."""
    return values(_composed(dict(choice.split("=") for choice in choices), {}))


def parse(overrides: Sequence[str]) -> Settings:
    """Compose and check the settings.

    Args:
        overrides: in Hydra's syntax: ``"dataset=cora"``, ``"model.num_layers=112"``, ``"config=FILE"``, ...

    Raises:
        UsageError: a group option, key or value is wrong; the message names the nearest right one.
    """
    chosen: dict[str, str] = {}
    given: Values = {}
    for text in overrides:
        word = parse_override(text)
        key, value = word.key_or_group, _value(word)
        if key in groups():
            chosen[key] = _option(key, value, word.get_value_element_as_str())
        elif group := about(key).group:
            said = f"{key} is set by its group, with all that belongs to it: write {group}=NAME"
            raise UsageError(f"{said}; {did_you_mean(value, groups()[group])}")
        else:
            given[key] = value
    stored: Values = {}
    if given.get("config"):
        path = Path(given["config"]).expanduser()
        options, stored = _file(path, chosen)
        stored.pop("model.folder", None)
        _check_code(stored.get("model.target"), given.get("model.target"), f"{path} names", "add")
        chosen = options | chosen
    settings = _composed(chosen, stored | given)
    check_given(settings, given)
    if settings.data.root and Path(settings.data.root).expanduser().is_file():
        raise UsageError(f"data.root={settings.data.root} is a file: give the folder that the raw files are in")
    return settings


def changed(settings: Settings, overrides: Sequence[str], allowed: Sequence[str], path: Path) -> Settings:
    """Settings of a run that is there, with other values of keys that may change.

    Args:
        settings: of the run.
        overrides: as of `parse`.
        allowed: keys, or groups of keys, that may be among them.
        path: of the run's folder.

    Raises:
        UsageError: another key, or a wrong value.
    """
    given: Values = {}
    for text in overrides:
        word = parse_override(text)
        key = word.key_or_group
        if key not in allowed and key.partition(".")[0] not in allowed:
            raise UsageError(
                f"{key} cannot change in a run that is there; what can: {', '.join(allowed)}. A new run begins with "
                f"its settings by config={path / 'config.yaml'} {text}"
            )
        given[key] = _value(word)
    return _updated(settings, given)


def _check_code(named: str | None, said: Any, where: str, do: str) -> None:
    """Refuse code (``model.target``) that a file names and the command line does not: no file decides what runs."""
    if named is not None and named != said:
        target = shlex.quote(f"model.target={named}")
        raise UsageError(
            f"{where} code that would run, {target}, and a file may be anybody's: if you trust it, {do} {target}"
        )


def code_of(settings: Settings) -> Values:
    """The values of the keys that say which code runs, where the network has them."""
    return {key: value for key, value in values(settings).items() if about(key).code}


def with_code(settings: Settings, said: Values, path: Path) -> Settings:
    """The settings of a run that is there, with the code that whoever goes on with it names.

    Args:
        settings: of its file.
        said: ``model.target``, and ``model.folder`` if that is not the working directory.
        path: of the run's folder.

    Raises:
        UsageError: the file names code that was not said.
    """
    code = code_of(settings)
    if not code.get("model.target"):
        return settings
    _check_code(code["model.target"], said.get("model.target"), f"the run in {path} has", "go on with")
    return _updated(
        settings, {"model.folder": str(Path(said.get("model.folder") or Path.cwd()).expanduser().resolve())}
    )


def with_absolute_paths(settings: Settings) -> Settings:
    """The settings with paths that do not depend on the working directory."""
    paths = {key: value for key, value in values(settings).items() if value and about(key).path}
    return _updated(settings, {key: str(Path(value).expanduser().resolve()) for key, value in paths.items()})


def write(settings: Settings) -> str:
    """The settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(settings)))


def read(path: Path) -> Settings:
    """The settings of a file that `write` filled.

    Raises:
        InvalidRunError: the file is not one of these.
    """
    try:
        said = _NEW | _leaves(_loaded(path), options=True)
        kind = str(said.get("model.kind"))
        if lacking := [key for key in keys(kind) if key not in said]:
            raise UsageError(f"{lacking[0]} is not there")
        alike = next(name for name, own in OPTIONS["model"].items() if isinstance(own, model_class(kind)))
        return _typed(_chosen({"model": alike}), said)  # which says all that stands in the option
    except (UsageError, OmegaConfBaseException) as error:
        raise InvalidRunError(f"{path} cannot be read as the settings of a run: {_first_line(error)}") from error


def parse_override(text: str) -> Override:
    """Read an override, and take paths, and words that a key knows, as they stand.

    Raises:
        UsageError: it is none, or it adds or removes keys.
    """
    key, equals, value = text.partition("=")
    stands = about(key).path or value in about(key).choices
    if equals and stands and value not in ("", "null") and value[0] not in "'\"":
        quoted = value.replace("\\", "\\\\").replace('"', '\\"') if '"' in value else value
        text = f'{key}="{quoted}"'
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except (HydraException, RecursionError, ValueError) as error:  # a bare HydraException where there is no "="
        raise UsageError(f"{text!r} cannot be read: write key=value, and quote unusual values: key='a, b'") from error
    if not override.key_or_group:
        raise UsageError(f"{text!r} has no key: write key=value")
    if override.is_add() or override.is_delete() or override.package is not None:
        raise UsageError(f"{text!r}: keys cannot be added, removed or moved here; write key=value")
    return override


def _value(word: Override) -> Any:
    if word.is_sweep_override():
        raise UsageError(f"{word.input_line!r} has several values: train -m makes a run of each; a list is key=[a,b]")
    return word.value()


def _composed(chosen: Mapping[str, str], said: Values) -> Settings:
    """The options that were chosen, the rest of the preset and of the tables, and on top what was said."""
    name = chosen.get("preset")
    options, row = preset(name) if name else ({}, {})
    base = _chosen({**options, **chosen})
    if others := [key for key in row if key not in values(base)]:
        raise UsageError(
            f"preset={name} sets {', '.join(others)}, which model={base.model.name} does not have: leave one "
            "of them out"
        )
    said = row | said
    if said.get("model.target"):
        if said.get("model.folder") is None:
            said["model.folder"] = str(Path.cwd())  # also for who goes on with the run elsewhere
        said.setdefault("model.name", str(said["model.target"]).rpartition(":")[2])
    return _updated(base, said)


def _chosen(options: Mapping[str, str]) -> Settings:
    """What these options of groups have, and the first of each other group."""
    table = {group: found[options.get(group, next(iter(found)))] for group, found in OPTIONS.items()}
    return Settings(**table, preset=options.get("preset"))


def _file(path: Path, chosen: Mapping[str, str]) -> tuple[dict[str, str], Values]:
    """Group options and values of a file of settings, without those of groups that were chosen otherwise."""
    try:
        loaded = _loaded(path)
    except InvalidRunError as error:
        raise UsageError(f"config={path}: {error}") from error
    options: dict[str, str] = {}
    found = {key: value for key, value in _leaves(loaded).items() if key not in _OWN}
    for group in groups():  # a model's name may be a label of one's own
        named = next((key for key in (f"{group}.kind", f"{group}.name", group) if key in found), "")
        if (option := found.pop(named, None)) is not None:
            options[group] = _option(group, option, str(option))
        if group in chosen:
            found = {key: value for key, value in found.items() if not key.startswith(f"{group}.")}
    return options, found


def _loaded(path: Path) -> Values:
    """The groups and keys of a file.

    Raises:
        InvalidRunError: it holds none.
    """
    try:
        loaded = OmegaConf.to_container(OmegaConf.create(check_settings_text(read_text(path), path)), resolve=False)
    except (ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InvalidRunError(f"{path} cannot be read as the settings of a run: {_first_line(error)}") from error
    except AssertionError:  # OmegaConf's, of a number alone
        loaded = None
    if not isinstance(loaded, dict):
        raise InvalidRunError(f"{path} holds no settings: a file has lines such as epochs: 100")
    return cast(Values, loaded)


def _leaves(node: Mapping[str, Any], prefix: str = "", options: bool = False) -> Values:
    """Key -> value of a tree; ``options``: those of a group as one value, as in a file of all settings."""
    found: Values = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        whole = about(key).free or (options and key in keys())
        found |= _leaves(value, f"{key}.", options) if isinstance(value, dict) and not whole else {key: value}
    return found


def _option(group: str, value: Any, text: str) -> str:
    if value not in groups()[group]:
        said = choose_from(group, text, groups()[group])
        own = group == "dataset" and "did you mean" not in said
        raise UsageError(said + ("; a graph of your own is dataset=file dataset.path=PATH" if own else ""))
    return cast(str, value)


def _updated(settings: Settings, said: Values) -> Settings:
    """The settings with other values of keys.

    Raises:
        UsageError: a key is not there, or a value is wrong.
    """
    known = values(settings)
    for key, value in said.items():
        if not any(key.startswith(f"{name}.") for name in known if about(name).free):
            _check_key(key, value, known)
    return _typed(settings, said)


def _check_key(key: str, value: Any, known: Values) -> None:
    """Refuse a key that is not there, and an option of another type than the one in the table."""
    if key not in known:
        if below := [name for name in known if name.startswith(f"{key}.")]:
            raise UsageError(f"{key!r} is a group of keys; set one of them: {', '.join(below)}")
        meanings = {name: about(name).help for name in [*groups(), *known]}
        raise UsageError(f"there is no key {key!r}: {nearest_keys(key, meanings)}")
    if ".options." in key:
        kind = type(known[key])
        fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{key}={value}: must be of type {kind.__name__}, as {known[key]} is")
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{key}={value}: must be a finite number")


def _typed(settings: Settings, said: Values) -> Settings:
    """The settings with other values of keys, in OmegaConf's types.

    Raises:
        UsageError: a value is of another type, or wrong.
    """
    config, known, key = OmegaConf.structured(settings), keys(settings.model.kind), ""
    try:
        for node in (config, *(config._get_node(name) for name in config)):
            OmegaConf.set_readonly(node, False)  # as which OmegaConf takes frozen dataclasses
        for key, value in said.items():
            OmegaConf.update(config, key, value, merge=False)
        key = ""
        typed = cast(Settings, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        key = key or error.full_key or "a setting"
        whole = key.partition("[")[0]  # of an item of a list
        if whole in known and isinstance(error, (ValidationError, MissingMandatoryValue)):
            raise UsageError(f"{whole}={show(said.get(whole))}: must be {known[whole].kind}") from error
        raise UsageError(f"{key}: {_first_line(error)}") from error
    check(typed)
    return typed


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
