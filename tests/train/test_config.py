from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from recollect import data
from recollect.train import _config
from recollect.train._config import defaults, groups, parse, read, write
from recollect.train._errors import InvalidRunError, UsageError
from recollect.train._settings import keys


def model_of(*words: str) -> Any:
    """The settings of a model, which has keys of its kind."""
    return parse(list(words)).model


def test_datasets_of_the_config_group_are_those_of_the_library():
    assert groups()["dataset"] == sorted(["file", *data.names()])


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, names in groups().items() for o in names])
def test_every_option_composes_under_its_own_name(group, option):
    of_kind = ["model=gcn"] if group == "training" and option != "wholegraph" else []
    settings = parse([f"{group}={option}", *of_kind])
    assert (settings.preset if group == "preset" else getattr(settings, group).name) == option


def test_nothing_said_is_a_deep_network_on_digits():
    settings = parse([])
    assert (settings.dataset.name, settings.model.name) == ("digits", "revgnn")
    assert settings.model.num_layers >= 64
    assert settings.device == "auto"


def test_options_keys_and_values_are_set():
    settings = parse(["dataset=cora", "model.num_layers=112", "model=revgnn", "seed=3", "model.norm=null"])
    assert (settings.dataset.name, settings.model.num_layers, settings.seed) == ("cora", 112, 3)
    model: Any = settings.model
    assert model.norm is None
    assert settings.dataset.options == {"split": "public", "download": False}


@pytest.mark.parametrize(
    ("model", "layers", "channels", "dropout"), [("revgnn_deep", 1001, 80, 0.1), ("revgnn_wide", 448, 224, 0.2)]
)
def test_published_networks_have_the_published_numbers(model, layers, channels, dropout):
    settings = model_of(f"model={model}")
    assert (settings.num_layers, settings.hidden_channels, settings.dropout) == (layers, channels, dropout)
    assert (settings.num_groups, settings.shared_dropout, settings.conv_kwargs) == (2, True, {"aggr": "max"})


# Layers, channels, dropout, parts, parts of a step, rate, two weight decays, clipping, epochs: arXiv 2106.05609.
PUBLISHED = {
    "cora_gcn": (2, 16, 0.5, 40, 10, 0.01, 5e-4, 0, 1.0, 200, 20),
    "citeseer_gcn": (2, 16, 0.5, 24, 8, 0.01, 5e-4, 0, None, 200, 20),
    "cora_gat": (2, 8, 0.6, 40, 10, 0.005, 5e-4, 0, 1.0, 400, 20),
    "citeseer_gat": (2, 8, 0.6, 24, 8, 0.005, 5e-4, 0, None, 400, 20),
    "cora_appnp": (10, 64, 0.5, 4, 2, 0.01, 0.005, 0, None, 600, 20),
    "citeseer_appnp": (10, 64, 0.5, 24, 6, 0.01, 0.005, 0, 1.0, 600, 20),
    "cora_gcn2": (64, 64, 0.6, 2, 1, 0.01, 0.01, 5e-4, None, 1000, 10),
    "citeseer_gcn2": (32, 256, 0.7, 40, 20, 0.01, 0.01, 5e-4, 1.0, 1000, 10),
}
LARGE = {
    "ogbn-arxiv_gcn": (3, 256, 80, 40, 0.01, 300, 0.0),
    "reddit_gcn": (2, 256, 200, 100, 0.01, 400, 0.0),
    "ogbn-products_gcn": (3, 256, 7, 1, 0.005, 300, 0.0),
    "ogbn-products_gcn2": (5, 128, 150, 1, 0.001, 240, 0.8),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_of_the_small_benchmark_have_the_published_numbers(preset):
    s = parse([f"preset={preset}"])
    found: tuple = (s.model.num_layers, s.model.hidden_channels, s.model.dropout)
    found += (s.training.num_parts, s.training.parts_per_batch, s.optimizer.lr)
    found += (s.optimizer.weight_decay, s.optimizer.other_weight_decay, s.clip_norm, s.epochs, s.runs)
    assert found == PUBLISHED[preset]
    assert (s.training.name, s.training.partition, s.optimizer.name) == ("autoscale", "metis", "adam")
    assert (s.patience, s.warmup_epochs, s.data.features) == (None, 0, "rows")


@pytest.mark.parametrize("preset", LARGE)
def test_presets_of_the_large_benchmark_have_the_published_numbers(preset):
    s = parse([f"preset={preset}"])
    found = (s.model.num_layers, s.model.hidden_channels, s.training.num_parts, s.training.parts_per_batch)
    assert (*found, s.optimizer.lr, s.epochs, s.training.edge_dropout) == LARGE[preset]


def test_heads_and_strengths_are_the_published_ones():
    gat = model_of("preset=cora_gat").options
    assert gat == {"hidden_heads": 8, "out_heads": 1, "batch_norm": False, "residual": False}
    assert model_of("preset=citeseer_appnp").options == {"alpha": 0.1}
    thetas = [model_of(f"preset={name}_gcn2").options["theta"] for name in ("cora", "citeseer")]
    assert thetas == [0.5, 0.6]


def test_there_is_a_preset_for_each_graph_and_network_of_both_benchmarks():
    small = (
        "cora",
        "citeseer",
        "pubmed",
        "coauthor-cs",
        "coauthor-physics",
        "amazon-computers",
        "amazon-photo",
        "wikics",
    )
    large = ("reddit", "ppi", "flickr", "yelp", "ogbn-arxiv", "ogbn-products")
    expected = {f"{graph}_{model}" for graph in small for model in ("gcn", "gat", "appnp", "gcn2")}
    expected |= {f"{graph}_{model}" for graph in large for model in ("gcn", "gcn2", "pna", "pna_jk")}
    assert set(groups()["preset"]) == expected


def test_one_switch_changes_how_a_preset_trains_and_nothing_else():
    full, parts = (parse(["preset=cora_gcn", f"training={name}"]) for name in ("full", "autoscale"))
    assert replace(full, training=replace(full.training, name="autoscale")) == parts


def test_a_preset_may_have_keys_that_do_not_count_but_nobody_gives_them():
    assert parse(["preset=cora_gcn", "training=full"]).training.num_parts == 40
    with pytest.raises(UsageError, match=r"training.num_parts counts only with training=autoscale"):
        parse(["preset=cora_gcn", "training=full", "training.num_parts=4"])
    with pytest.raises(UsageError, match=r"objective.samples counts only with objective=iwrm"):
        parse(["objective=multitask", "objective.samples=4", "objective.weighting=mgda"])


def test_what_is_said_goes_before_the_preset():
    settings = parse(["preset=cora_gcn", "runs=2", "model.dropout=0.25", "training.num_parts=12", "optimizer=sgd"])
    assert (settings.runs, settings.model.dropout, settings.training.num_parts) == (2, 0.25, 12)
    assert (settings.optimizer.name, settings.model.num_layers) == ("sgd", 2)


@pytest.mark.parametrize(
    "path", ["/data/a b", "a,b", "x=(1)", "it's", 'say "so"', "[brackets]", "{braces}", "~/here", "back\\slash", "5"]
)
def test_paths_are_taken_as_they_stand(path):
    settings = parse([f"data.root={path}", f"run_dir={path}", f"resume={path}"])
    assert (settings.data.root, settings.run_dir, settings.resume) == (path, path, path)


def test_options_of_a_convolution_are_free():
    assert model_of("model.conv_kwargs.aggr=max").conv_kwargs == {"aggr": "max"}
    assert model_of("model.conv_kwargs={aggr: max, root_weight: false}").conv_kwargs == {
        "aggr": "max",
        "root_weight": False,
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset=coraa", r"no dataset 'coraa'; did you mean cora or actor\?$"),
        ("dataset=graphs/mine.npz", r"and \d+ more; a graph of your own is dataset=file dataset.path=PATH$"),
        ("model=[a]", "choose from: appnp, gat, "),
        ("optimizer=rmsprop", "choose from: adam, adamw, sgd"),
        ("model.num_layer=3", r"there is no key 'model.num_layer': did you mean model.num_layers\?$"),
        ("optimizer.learning_rate=3", r"did you mean optimizer.lr\?$"),
        ("lr=3", r"did you mean optimizer.lr\?$"),
        ("layers=3", r"did you mean model.num_layers\?$"),
        ("optimiser.lr=3", r"did you mean optimizer.lr\?$"),
        ("objective.weightings=mgda", r"did you mean objective.weighting\?$"),
        ("zzzzz=3", "all keys: recollect train --help"),
        ("models=x", r"no key 'models': did you mean model\?$"),
        ("hydra.run.dir=x", "there is no key 'hydra.run.dir'"),
        ("optimizer.options.foo=3", "there is no key 'optimizer.options.foo': did you mean optimizer.options"),
        ("measure=false", "is a group of keys; set one of them: measure.enabled"),
        ("dataset.options.k=many", "must be of type int, as 10 is"),
        ("optimizer.options.eps=true", "must be of type float"),
        ("seed=a", "seed=a: must be a whole number$"),
        ("seed=true", "seed=true: must be a whole number"),
        ("epochs=1.5", "epochs=1.5: must be a whole number"),
        ("epochs=null", "epochs=null: must be a whole number$"),
        ("patience=often", "patience=often: must be a whole number or null"),
        ("optimizer.lr=high", "optimizer.lr=high: must be a number$"),
        ("model.tied=maybe", "model.tied=maybe: must be true or false"),
        ("measure.depths=3", r"measure.depths=3: must be a list of whole numbers, such as \[8,16\], or null"),
        ("measure.depths=[0]", "each at least 1"),
        ("measure.depths={a: 1}", r"measure.depths={a:1}: must be a list of whole numbers, such as \[8,16\], or null"),
        ("model.tied=???", r"model.tied=\?\?\?: must be true or false"),  # OmegaConf's word for what is missing
        ("runs=10001", "runs=10001: must be at least 1 and below 10001"),
        ("measure.depths=[]", "must be a list of numbers of layers"),
        ("model.conv_kwargs=3", "model.conv_kwargs=3: must be keys and values"),
        ("model.norm=group", "model.norm: there is no value 'group'; choose from: layer, batch, null$"),
        ("device=tpu", r"did you mean cpu\? Choose from: auto, cpu, cuda"),
        ("precision=8", "choose from: 32-true, bf16-mixed, 16-mixed"),
        ("model.dropout=1", "model.dropout=1.0: must be at least 0 and below 1"),
        ("model.dropout=nan", "must be a finite number"),
        ("optimizer.lr=inf", "must be a finite number"),
        ("seed=4294967296", "must be at least 0 and below 4294967296"),
        ("data.seed=-1", "data.seed=-1: must be at least 0"),
        ("clip_norm=0", "clip_norm=0.0: must be above 0"),
        ("dataset.name=cora", r"is set by its group, .*: write dataset=NAME; did you mean cora or actor\?"),
        ("model.kind=gcn", r"write model=NAME; did you mean gcn"),
        ("training.name=autoscale", r"write training=NAME; did you mean autoscale\? Choose from: autoscale, full"),
        (
            "training.num_parts=4",
            "training.num_parts counts only with training=autoscale or wholegraph, and this is training=full",
        ),
        (
            "objective.weighting=mgda",
            "only with objective=iwrm or multitask, .*: leave it out, or write objective=iwrm",
        ),
        ("objective.samples=3", "only with objective=iwrm, and this is objective=mean"),
        ("epochs=0", "epochs=0: must be at least 1"),
        ("model.options.alpha=1", "there is no key 'model.options.alpha'"),
        ("preset=cora", r"there is no preset 'cora'; did you mean cora_"),
        ("training.history_dtype=int4", r"did you mean int8\? Choose from: float32, float16, bfloat16, int8"),
        ("training.edge_dropout=0.5", "model=revgnn takes no notice of the edges' weights"),
        ("seed=${foo}", "Interpolation key 'foo' not found"),
        ("resume=", "resume=: names no path; give one, or write resume=null"),
        ("training.history_path=", "training.history_path=: names no path"),
        ("seed=1,2", "has several values"),
        ("seed", "write key=value"),
        ("=3", "write key=value"),
        ("a=b=c,", "write key=value"),
        ("+x=1", "write key=value"),
        ("~seed", "write key=value"),
        ("dataset@x=cora", "write key=value"),
    ],
)
def test_what_is_wrong_is_said_with_what_is_right(override, message):
    with pytest.raises(UsageError, match=message):
        parse([override])


def test_all_runs_have_a_seed_that_there_is() -> None:
    assert parse(["seed=4294967293", "runs=3"]).runs == 3
    with pytest.raises(UsageError, match="seed=4294967293 and runs=4: the last run's seed must be below 4294967296"):
        parse(["seed=4294967293", "runs=4"])


def test_a_step_has_no_more_parts_than_there_are():
    with pytest.raises(UsageError, match=r"training.parts_per_batch=8: must be at most training.num_parts=4"):
        parse(["model=gcn", "training=autoscale", "training.num_parts=4"])


@pytest.mark.parametrize(
    ("overrides", "found"),
    [
        (["model=gcn"], "gcn"),
        (["model=revgnn"], "revgnn"),
        (["model=gin"], "model.options.noise=0.0 and model.num_layers=4"),
        (["model=gin", "model.options.noise=0.1", "model.num_layers=1"], "noise=0.1 and model.num_layers=1"),
    ],
)
def test_a_network_without_lipschitz_loss_takes_no_weight_of_it(overrides, found):
    with pytest.raises(UsageError, match=rf"training.lipschitz=0.1: needs model=gin .* \(got .*{found}\)"):
        parse([*overrides, "training.lipschitz=0.1"])


def test_buffers_need_a_pool():
    with pytest.raises(UsageError, match=r"training.buffer_size=5: .* training.pool_size=2"):
        parse(["model=gcn", "training=autoscale", "training.buffer_size=5"])
    assert parse(["model=gcn", "training=autoscale", "training.buffer_size=5", "training.pool_size=1"])


def test_every_key_is_listed():
    values = defaults("optimizer=sgd")
    assert values["optimizer.options.momentum"] == 0.9
    assert values["model.num_layers"] == 64
    assert "dataset.options.k" in values


def test_settings_survive_their_file(tmp_path):
    settings = parse(["dataset=sbm", "model.conv_kwargs.aggr=max", "measure.depths=[3,5]", "data.root=/a b", "seed=7"])
    file = tmp_path / "config.yaml"
    file.write_text(write(settings))
    assert read(file) == settings


@pytest.mark.parametrize("text", ["", "- 1", "seed: 1", "a: [", "dataset: 3", "\x00"])
def test_another_file_is_refused(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(InvalidRunError, match=r"config.yaml"):
        read(file)


def test_a_file_of_settings_is_begun_with(tmp_path):
    file = tmp_path / "a b.yaml"
    file.write_text("model: gcn\ntraining:\n  name: autoscale\n  num_parts: 12\nepochs: 7\n")
    settings = parse([f"config={file}", "epochs=9"])
    assert (settings.model.kind, settings.training.name, settings.training.num_parts) == ("gcn", "autoscale", 12)
    assert (settings.epochs, settings.config) == (9, str(file))


def test_a_runs_own_settings_are_begun_with(tmp_path):
    run = parse(["preset=cora_gat", "model.name=mine", "model.dropout=0.25", "run_dir=a", "optimizer=sgd"])
    file = tmp_path / "config.yaml"
    file.write_text(write(run))
    again = parse([f"config={file}"])
    assert replace(again, config=None, run_dir="a") == run
    other = parse([f"config={file}", "model=gcn", "seed=3"])
    assert other.model == parse(["model=gcn"]).model
    assert replace(other, model=run.model, seed=0, config=None, run_dir="a") == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "cannot be read"),
        ("- 1", "holds no settings"),
        ("optimizer: {learning_rate: 3}", r"did you mean optimizer.lr\?"),
        ("model: gnc", r"there is no model 'gnc'; did you mean gin or gcn"),
        ("epochs: many", "epochs=many: must be a whole number"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        parse([f"config={file}"])


def test_a_folder_of_raw_files_is_no_file(tmp_path):
    (tmp_path / "graph.pt").touch()
    with pytest.raises(UsageError, match="is a file: give the folder"):
        parse([f"data.root={tmp_path / 'graph.pt'}"])


def test_arguments_of_a_network_of_ones_own_are_free():
    assert model_of("model=import", "model.kwargs.heads=3").kwargs == {"heads": 3}


def test_every_key_that_can_be_set_is_told_of_and_no_other():
    kinds = ("revgnn", "gcn", "import")
    for kind in kinds:
        found = {key.partition(".options.")[0] + ".options" * (".options." in key) for key in defaults(f"model={kind}")}
        assert found == set(keys(kind))
    assert set(keys()) == set().union(*(keys(kind) for kind in kinds))
    assert all(about.help and about.kind for about in keys().values())


def test_nothing_is_composed_twice(monkeypatch):
    calls = []
    typed = _config._typed
    monkeypatch.setattr(_config, "_typed", lambda *given: calls.append(given) or typed(*given))
    settings: Any = parse(["preset=cora_gcn", "model.options.batch_norm=true", "epochs=3"])
    assert len(calls) == 1
    assert (settings.model.options["batch_norm"], settings.epochs, settings.runs) == (True, 3, 20)


def test_a_preset_is_not_laid_over_a_network_that_lacks_its_keys():
    with pytest.raises(UsageError, match=r"ppi_gcn sets model.options.drop_input, which model=gat does not have"):
        parse(["preset=ppi_gcn", "model=gat"])


def test_a_table_of_options_is_not_changed_by_what_is_said():
    parse(["model.conv_kwargs.aggr=max", "optimizer.options.eps=1"])
    assert (defaults()["model.conv_kwargs"], defaults()["optimizer.options.eps"]) == ({}, 1e-8)


def test_a_file_of_an_older_run_has_the_values_that_new_keys_had(tmp_path):
    settings = parse(["training=autoscale", "model=gcn"])
    new = ("devices:", "memory_budget:", "  combine:", "  combine_score:")
    lines = [line for line in write(settings).splitlines() if not line.startswith(new)]
    assert len(lines) == len(write(settings).splitlines()) - 4
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(lines))
    assert read(file) == settings


@pytest.mark.parametrize("key", ["devices", "  combine"])
def test_a_file_of_a_run_in_which_a_value_is_missing_is_refused(tmp_path, key):
    file = tmp_path / "config.yaml"
    text = write(parse([]))
    file.write_text(re.sub(rf"(?m)^{key}: .*", f"{key}: ???", text))
    with pytest.raises(InvalidRunError, match=rf"{key.strip()}=\?\?\?: must be a"):
        read(file)


@pytest.mark.parametrize("word", ["1", "x", "x^2", "2x-x^2", "sin(x)"])
def test_words_that_a_key_knows_are_taken_as_they_stand(word):
    words = ["model=gcn", "training=autoscale", "training.compensate=cut", "training.combine=1"]
    settings = parse([*words, f"training.combine_score={word}"])
    assert (settings.training.combine, settings.training.combine_score) == (1.0, word)


@pytest.mark.parametrize("key", ["seed", "runs", "model.exact", "dataset.path", "training.name"])
def test_a_file_of_a_run_that_lacks_a_key_is_refused(tmp_path, key):
    lines = write(parse([])).splitlines()
    group, _, name = key.rpartition(".")
    start = lines.index(f"{group}:") if group else 0
    (line,) = [k for k, text in enumerate(lines) if k >= start and text.startswith(f"{'  ' * bool(group)}{name}:")][:1]
    file = tmp_path / "config.yaml"
    file.write_text("\n".join(lines[:line] + lines[line + 1 :]))
    with pytest.raises(InvalidRunError, match=f"{key} is not there"):
        read(file)
