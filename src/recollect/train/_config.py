"""From the words of the command line to the settings of a run, by Hydra."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
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

from recollect.train._check import check, check_given, documented, kind_text
from recollect.train._errors import InvalidRunError, UsageError, choose_from
from recollect.train._settings import FREE_KEYS, GROUP_KEYS, PATH_KEYS, RevGNNSettings, ScalableSettings, Settings
from recollect.train._stored import check_settings_text, read_text

__all__ = ["defaults", "groups", "parse", "read", "write"]

_MODULE = "recollect.train.conf"


def groups() -> dict[str, list[str]]:
    """Config groups and their options: the folders of the config package and the YAML files in them."""
    found: dict[str, list[str]] = {}
    for folder in sorted(resources.files(_MODULE).iterdir(), key=lambda entry: entry.name):
        if folder.is_dir() and not folder.name.startswith("_"):
            names = (entry.name for entry in folder.iterdir())
            options = (name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
            found[folder.name] = sorted(option for option in options if not option.startswith("_"))
    return found


@functools.cache
def defaults(*choices: str) -> Mapping[str, Any]:
    """Key -> value, for every key that can be set once these group options (``"dataset=cora"``) are chosen."""
    return types.MappingProxyType(_leaves(_compose(choices)))


def parse(overrides: Sequence[str]) -> Settings:
    """Compose and check the settings.

    Args:
        overrides: Hydra's: ``"dataset=cora"``, ``"model.num_layers=112"``, ...

    Raises:
        UsageError: a group option, key or value is wrong; the message lists the right ones.
    """
    options = groups()
    parsed = [_parse_one(text) for text in overrides]
    for override in parsed:
        name = override.key_or_group
        if name in options and override.value() not in options[name]:
            raise UsageError(choose_from(name, override.get_value_element_as_str(), options[name]))
    choices = [f"{o.key_or_group}={o.value()}" for o in parsed if o.key_or_group in options]
    texts = []
    for override in parsed:
        if override.key_or_group not in options:
            known = defaults(*choices)
            _check_key(override.key_or_group, known, options)
            _check_option(override.key_or_group, override.value(), known)
        # Hydra lets keys be added below a dictionary only where the override says so.
        texts.append(f"++{override.input_line}" if _is_free(override.key_or_group) else str(override.input_line))
    try:
        settings = _to_settings(_compose(texts))
        check_given(settings, (override.key_or_group for override in parsed))
        return settings
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(_first_line(error)) from error


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
        if not isinstance(loaded, DictConfig):
            raise InvalidRunError(f"{path} holds no settings of a run")
        return _to_settings(loaded)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise InvalidRunError(f"{path} cannot be read as the settings of a run: {_first_line(error)}") from error


def _compose(overrides: Sequence[str]) -> DictConfig:
    hydra = GlobalHydra.instance()
    outer, hydra.hydra = hydra.hydra, None  # of a caller that uses Hydra itself
    try:
        with initialize_config_module(_MODULE, version_base="1.3"):
            return compose("config", overrides=list(overrides))
    finally:
        GlobalHydra.instance().hydra = outer


def _parse_one(text: str) -> Override:
    key, equals, value = text.partition("=")
    if equals and key in PATH_KEYS and value not in ("", "null") and value[0] not in "'\"":
        quoted = value.replace("\\", "\\\\").replace('"', '\\"') if '"' in value else value
        text = f'{key}="{quoted}"'
    try:
        override: Override = OverridesParser.create().parse_override(text)
    except (HydraException, RecursionError, ValueError) as error:  # a bare HydraException where there is no "="
        raise UsageError(f"{text!r} cannot be read: write key=value, and quote unusual values: key='a, b'") from error
    if not override.key_or_group:
        raise UsageError(f"{text!r} has no key: write key=value")
    if override.is_sweep_override():
        raise UsageError(f"{text!r} has several values, and a run has one; give one, or a list as key=[a,b]")
    if override.is_add() or override.is_delete() or override.package is not None:
        raise UsageError(f"{text!r}: keys cannot be added, removed or moved here; write key=value")
    return override


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)


def _check_option(key: str, value: Any, known: Mapping[str, Any]) -> None:
    """Options have no declared type: theirs is that of the value in the config file."""
    if ".options." not in key:
        return
    kind = type(known[key])
    fits = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{key}={value}: must be of type {kind.__name__}, as {known[key]} is")


def _check_key(key: str, known: Mapping[str, Any], options: dict[str, list[str]]) -> None:
    if group := GROUP_KEYS.get(key):
        said = f"{key} is set by its group, with all that belongs to it: write {group}=..."
        raise UsageError(f"{said}; choose from: {', '.join(options[group])}")
    if key in known or _is_free(key):
        return
    if needs := documented().get(key, {}).get("needs"):
        raise UsageError(f"{key} counts only with {needs[0]}={' or '.join(needs[1:])}: write that as well")
    inside = {name.rpartition(".")[0] for name in known}
    if key in inside:
        raise UsageError(f"{key!r} is a group of keys; set one of them: {', '.join(_below(key, known))}")
    parent = key.rpartition(".")[0]
    while parent and parent not in inside:
        parent = parent.rpartition(".")[0]
    right = _below(parent, known) if parent else [*options, *known]
    raise UsageError(choose_from("key", key, right))


def _below(parent: str, known: Mapping[str, Any]) -> list[str]:
    return [name for name in known if name.startswith(f"{parent}.")]


def _leaves(config: DictConfig) -> dict[str, Any]:
    def walk(node: Any, prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in node.items():
            key = f"{prefix}{name}"
            if isinstance(value, dict) and key not in FREE_KEYS:
                found |= walk(value, f"{key}.")
            else:
                found[key] = value
        return found

    return walk(OmegaConf.to_container(config, resolve=False), "")


def _to_settings(config: DictConfig) -> Settings:
    try:
        schema = OmegaConf.structured(Settings)
        OmegaConf.set_readonly(schema, False)  # OmegaConf takes frozen dataclasses for read-only nodes
        kind = OmegaConf.select(config, "model.kind")
        schema.model = OmegaConf.structured(RevGNNSettings if kind == "revgnn" else ScalableSettings)
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
