"""From the words of the command line to the settings of a run, by Hydra."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from recollect.train._check import check, check_given, documented, kind_text, nearest_keys
from recollect.train._errors import InvalidRunError, UsageError, choose_from, did_you_mean
from recollect.train._presets import preset_names, store_presets
from recollect.train._settings import FREE_KEYS, GROUP_KEYS, MODELS, ScalableSettings, Settings
from recollect.train._stored import check_settings_text, read_text

__all__ = ["MODULE", "changed", "defaults", "groups", "parse", "parse_override", "read", "write"]

MODULE = "recollect.train.conf"

Values = dict[str, Any]  # by key: "model.num_layers"


@functools.cache
def groups() -> Mapping[str, list[str]]:
    """Config groups and their options: the folders of the config package and the YAML files in them, and presets."""
    found: dict[str, list[str]] = {}
    for folder in sorted(resources.files(MODULE).iterdir(), key=lambda entry: entry.name):
        if folder.is_dir() and not folder.name.startswith("_"):
            names = (entry.name for entry in folder.iterdir())
            found[folder.name] = sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
    return types.MappingProxyType(found | {"preset": preset_names()})


def defaults(*choices: str) -> Mapping[str, Any]:
    """Key -> value, for every key that can be set once these group options (``"dataset=cora"``) are chosen."""
    return types.MappingProxyType(_leaves(OmegaConf.to_container(_compose(choices), resolve=False)))


def parse(overrides: Sequence[str]) -> Settings:
    """Compose and check the settings.

    Args:
        overrides: Hydra's: ``"dataset=cora"``, ``"model.num_layers=112"``, ``"config=FILE"``, ...

    Raises:
        UsageError: a group option, key or value is wrong; the message names the nearest right one.
    """
    chosen: dict[str, str] = {}
    values: Values = {}
    for text in overrides:
        override = parse_override(text)
        if override.is_sweep_override():
            raise UsageError(f"{text!r} has several values: train -m makes a run of each; a list is key=[a,b]")
        key, value = override.key_or_group, override.value()
        if key in groups():
            chosen[key] = _checked_option(key, value, override.get_value_element_as_str())
        else:
            values[key] = value
    stored: Values = {}
    if values.get("config"):
        file_chosen, stored = _file(Path(values["config"]).expanduser(), chosen)
        chosen = file_chosen | chosen
    known = _compose([f"{group}={option}" for group, option in chosen.items()])
    config = copy.deepcopy(known)
    OmegaConf.set_struct(config, False)
    for key, value in (stored | values).items():
        _check_key(key, value, known, given=key in values)
        OmegaConf.update(config, key, value, merge=False)
    if OmegaConf.select(config, "model.target") and OmegaConf.select(config, "model.folder") is None:
        OmegaConf.update(config, "model.folder", str(Path.cwd()))  # also for who goes on with the run elsewhere
    settings = _to_settings(config)
    check_given(settings, values)
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
    config = OmegaConf.create(dataclasses.asdict(settings))
    for text in overrides:
        key = parse_override(text).key_or_group
        if key not in allowed and key.partition(".")[0] not in allowed:
            raise UsageError(
                f"{key} cannot change in a run that is there; what can: {', '.join(allowed)}. A new run begins with "
                f"its settings by config={path / 'config.yaml'} {text}"
            )
        _check_key(key, parse_override(text).value(), config, given=True)
        OmegaConf.update(config, key, parse_override(text).value(), merge=False)
    return _to_settings(config)


def write(settings: Settings) -> str:
    """The settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(settings)))


def read(path: Path) -> Settings:
    """The settings of a file that `write` filled.

    Raises:
        InvalidRunError: the file is not one of these.
    """
    try:
        loaded = OmegaConf.create(check_settings_text(read_text(path), path))
        if not isinstance(loaded, DictConfig) or not loaded:
            raise InvalidRunError(f"{path} holds no settings of a run")
        defaults_of_new_keys = {"config": None, "resume": None, "run_dir": None, "devices": 1, "memory_budget": None}
        return _to_settings(cast(DictConfig, OmegaConf.merge(defaults_of_new_keys, loaded)))
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InvalidRunError(f"{path} cannot be read as the settings of a run: {_first_line(error)}") from error


def parse_override(text: str) -> Override:
    """Read an override, and take paths as they stand.

    Raises:
        UsageError: it is none, or it adds or removes keys.
    """
    key, equals, value = text.partition("=")
    is_path = documented().get(key, {}).get("path", False)
    if equals and is_path and value not in ("", "null") and value[0] not in "'\"":
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


def _compose(choices: Sequence[str]) -> DictConfig:
    store_presets(choice.removeprefix("preset=") for choice in choices if choice.startswith("preset="))
    hydra = GlobalHydra.instance()
    outer, hydra.hydra = hydra.hydra, None  # of a caller that uses Hydra itself
    try:
        with initialize_config_module(MODULE, version_base="1.3"):
            return compose("config", overrides=list(choices))
    except HydraException as error:
        raise UsageError(_first_line(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer


def _file(path: Path, chosen: Mapping[str, str]) -> tuple[dict[str, str], Values]:
    """Group options and values of a file of settings, without those of groups that were chosen otherwise."""
    try:
        text = check_settings_text(read_text(path), path)
        loaded = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except InvalidRunError as error:
        raise UsageError(f"config={path}: {error}") from error
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"config={path} cannot be read: {_first_line(error)}") from error
    if not isinstance(loaded, dict):
        raise UsageError(f"config={path} holds no settings: a file has lines such as epochs: 100")
    options: dict[str, str] = {}
    for group in groups():
        found = loaded.get(group)
        if isinstance(found, dict):
            option = found.pop(
                "kind" if "kind" in found else "name", None
            )  # a model's name may be a label of one's own
        else:
            option = loaded.pop(group, None)
        if option is not None:
            options[group] = _checked_option(group, option, str(option))
        if group in chosen:
            loaded.pop(group, None)
    left_out = {"config", "resume", "run_dir"}
    if options.get("dataset") != "file":
        left_out |= {"dataset.path", "dataset.features"}  # written as null, and keys of this dataset alone
    values = {key: value for key, value in _leaves(loaded).items() if key not in left_out}
    return options, values


def _checked_option(group: str, value: Any, text: str) -> str:
    if value not in groups()[group]:
        raise UsageError(choose_from(group, text, groups()[group]))
    return cast(str, value)


def _is_free(key: str, config: DictConfig) -> bool:
    frees = (free for free in FREE_KEYS if key == free or key.startswith(f"{free}."))
    return any(OmegaConf.select(config, free) is not None for free in frees)


def _check_key(key: str, value: Any, config: DictConfig, given: bool) -> None:
    """Refuse a key that is not there, and an option of another type than the one in the config file."""
    if given and (group := GROUP_KEYS.get(key)):
        said = f"{key} is set by its group, with all that belongs to it: write {group}=NAME"
        raise UsageError(f"{said}; {did_you_mean(value, groups()[group])}")
    if _is_free(key, config):
        return
    known = _leaves(OmegaConf.to_container(config, resolve=False))
    if key not in known:
        below = [name for name in known if name.startswith(f"{key}.")]
        if below:
            raise UsageError(f"{key!r} is a group of keys; set one of them: {', '.join(below)}")
        if needs := documented().get(key, {}).get("needs"):
            raise UsageError(f"{key} counts only with {needs[0]}={' or '.join(needs[1:])}: write that as well")
        raise UsageError(f"there is no key {key!r}: {nearest_keys(key, [*groups(), *known])}")
    if ".options." in key:
        kind = type(known[key])
        fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
        if known[key] is not None and (not fits or (isinstance(value, bool) and kind is not bool)):
            raise UsageError(f"{key}={value}: must be of type {kind.__name__}, as {known[key]} is")


def _leaves(node: Any, prefix: str = "") -> Values:
    def walk(items: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for name, value in items.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and key not in FREE_KEYS:
                yield from walk(value, f"{key}.")
            else:
                yield key, value

    return dict(walk(node, prefix))


def _to_settings(config: DictConfig) -> Settings:
    try:
        kind = OmegaConf.select(config, "model.kind")
        schema = OmegaConf.structured(Settings)
        OmegaConf.set_readonly(schema, False)  # OmegaConf takes frozen dataclasses for read-only nodes
        schema.model = OmegaConf.structured(MODELS.get(str(kind), ScalableSettings))
        for node in (schema._get_node(name) for name in schema):
            if OmegaConf.is_config(node):
                OmegaConf.set_readonly(node, False)
        settings = cast(Settings, OmegaConf.to_object(OmegaConf.merge(schema, config)))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "a setting"
        kind = kind_text(key) if isinstance(error, ValidationError) else None
        if kind:
            found = OmegaConf.select(config, key)
            raise UsageError(f"{key}={'null' if found is None else found}: must be {kind}") from error
        raise UsageError(f"{key}: {_first_line(error)}") from error
    check(settings)
    return settings


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
