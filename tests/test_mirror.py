"""Tests mirror the source: who looks for the tests of a module finds them by its name, or in one table.

`recollect/a/_b.py` is tested in `tests/a/test_b.py`, or in several files `tests/a/test_b_*.py`.
"""

from pathlib import Path

import pytest

import recollect

SOURCE = Path(recollect.__file__).parent
TESTS = Path(__file__).parent

# Modules that are parts of one behaviour are tested together: file of tests -> what it tests beside its own module.
TOGETHER = {
    "aggregation/test_complementarity.py": "aggregation/_modulus",
    "aggregation/test_projecting.py": "aggregation/_dual_cone aggregation/_dualproj aggregation/_upgrad",
    "aggregation/test_state.py": "aggregation/_cr_mogm",
    "autogram/rules/test_recurrent.py": "autogram/rules/_cells autogram/rules/_steps",
    "autogram/rules/test_table.py": "autogram/rules/_view",
    "autogram/test_contract.py": "autogram/_factors autogram/_lookups autogram/_pieces autogram/_square",
    "autogram/test_engine.py": "autogram/_checks autogram/_sweep",
    "autogram/test_independence.py": "autogram/_structure",
    "autogram/test_operations.py": "autogram/_index",
    "autogram/test_passes.py": "autogram/_inputs autogram/_plan autogram/_sums",
    "autoscale/test_checks.py": "autoscale/loader/_checks",
    "autoscale/test_compensation.py": "autoscale/_conditions autoscale/_refresh autoscale/_separable "
    "autoscale/histories/_gradients",
    "autoscale/test_copies.py": "autoscale/_batch autoscale/loader/_storage autoscale/loader/_sub_data",
    "autoscale/test_history.py": "autoscale/histories/_codec autoscale/histories/_history autoscale/histories/_memory "
    "autoscale/histories/_selection autoscale/histories/_table autoscale/histories/_table_module",
    "autoscale/test_history_file.py": "autoscale/histories/_file autoscale/histories/_file_layout "
    "autoscale/histories/_file_table",
    "autoscale/test_history_places.py": "autoscale/histories/_plain",
    "autoscale/test_links.py": "autoscale/loader/_links",
    "autoscale/test_loader.py": "autoscale/loader/_cut autoscale/loader/_loader autoscale/loader/_local",
    "autoscale/test_node_weights.py": "autoscale/partitioning/_weights",
    "autoscale/test_operators.py": "autoscale/_adjacency",
    "autoscale/test_outward.py": "autoscale/loader/_outward",
    "autoscale/test_partition.py": "autoscale/_require autoscale/partitioning/_cache autoscale/partitioning/_methods "
    "autoscale/partitioning/_partition",
    "autoscale/test_permute.py": "autoscale/loader/_order",
    "autoscale/test_pool.py": "autoscale/histories/_pool autoscale/histories/_queues",
    "autoscale/test_roles.py": "autoscale/loader/_attributes autoscale/loader/_probe autoscale/loader/_roles",
    "autoscale/test_rows.py": "autoscale/histories/_rows_source",
    "autoscale/test_scalable.py": "autoscale/_exchange autoscale/_history_network autoscale/_network",
    "autoscale/test_scalable_graphs.py": "autoscale/_stamp",
    "autoscale/test_scalable_inference.py": "autoscale/_inference",
    "autoscale/test_scalable_options.py": "autoscale/_making",
    "autoscale/test_scalable_staleness.py": "autoscale/_staleness",
    "autoscale/test_subgraph.py": "autoscale/loader/_subgraph",
    "autoscale/test_undirected.py": "autoscale/partitioning/_undirected",
    "budget/test_plan.py": "budget/_bytes budget/_cost budget/_measure budget/_planning budget/_rows "
    "budget/_step budget/_units frames/_forward frames/_trial",
    "budget/test_solve.py": "budget/_problem",
    "data/files/test_from_file.py": "data/_describe data/files/_arrays data/files/_folder data/files/_formats "
    "data/files/_found data/files/_graphml data/files/_labels data/files/_parts data/files/_table",
    "data/test_hostile_files.py": "data/_errors data/_limits data/_pickles data/_stored",
    "data/test_raw.py": "data/_places",
    "data/test_registry.py": "data/_dataset",
    "device/test_outofcore.py": "outofcore/_crossing",
    "device/test_verdicts.py": "_verdicts",
    "distributed/test_compensations.py": "autoscale/_outside",
    "distributed/test_engines.py": "autogram/_exchange autogram/_ranks autogram/_sharded",
    "distributed/test_whole_graphs.py": "outofcore/_rank_tables",
    "distributed/test_ranks.py": "autoscale/_parts_state autoscale/histories/_ranks "
    "autoscale/loader/_own distributed/_group distributed/_routes distributed/_shares",
    "distributed/test_sharded.py": "budget/_ranks",
    "frames/sources/test_offload.py": "frames/sources/_file_store frames/sources/_host_store frames/sources/_stores",
    "frames/test_arguments.py": "_util/_tree frames/sources/_kept",
    "frames/test_certificate.py": "frames/_evidence",
    "frames/test_chain.py": "frames/_transform frames/sources/_coupling frames/sources/_inverse",
    "frames/test_checkpoint.py": "_arguments frames/sources/_source",
    "frames/test_conditions.py": "frames/_modes frames/_random frames/_region",
    "frames/test_errors.py": "frames/_guard",
    "frames/test_fingerprint.py": "frames/_bits frames/_reading",
    "frames/test_gradients.py": "frames/_frame frames/_rebuild",
    "frames/test_observation.py": "frames/_record frames/_recorder frames/_state frames/_watch",
    "frames/test_transforms.py": "_torch",
    "invertible/test_checks.py": "invertible/_measured",
    "invertible/test_linear.py": "_parameters invertible/_algebra",
    "messages/test_convolutions.py": "messages/_attention messages/_rules",
    "messages/test_products.py": "messages/_kernels",
    "models/test_rev_batches.py": "autoscale/_blockwise reversible/_beside",
    "models/test_rev_compensation.py": "autoscale/_block_compensation autoscale/_block_refresh autoscale/_blocks",
    "models/test_pygas.py": "autoscale/models",
    "models/test_scalable_formulas.py": "models/_aggregate models/_appnp models/_gat models/_gcn models/_gcn2 "
    "models/_layers models/_pna models/_pna_layer models/_stack models/_whole",
    "models/test_without_torch_geometric.py": "models/_convs",
    "outofcore/test_files.py": "outofcore/_journal outofcore/_tables",
    "outofcore/test_layered.py": "outofcore/_layers",
    "outofcore/test_objectives.py": "outofcore/_several",
    "outofcore/test_reach.py": "messages/reach outofcore/_blocks",
    "outofcore/test_whole_graph.py": "outofcore/_masks outofcore/_network outofcore/_parts outofcore/_reversible "
    "outofcore/_step",
    "reversible/test_streams.py": "reversible/_halving",
    "test_memory.py": "_ledger",
    "train/families/test_own.py": "train/families/_family train/families/_imported",
    "train/test_failures.py": "train/_command train/_errors",
    "train/test_config.py": "train/_keys train/_settings",
    "train/test_run.py": "train/_single train/_summary",
    "train/test_stored.py": "train/_stored_checkpoint",
    "train/test_sweep.py": "train/_sweep_report",
    "train/test_trainer.py": "train/_accelerator train/_surroundings",
}
MODULES = sorted(
    path.relative_to(SOURCE).with_suffix("").as_posix()
    for path in SOURCE.rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)


def own_tests(module: str) -> list[Path]:
    """The files whose name says that they test a module."""
    *folders, name = [part.removeprefix("_") for part in module.split("/")]
    folder = TESTS.joinpath(*folders)
    return [*folder.glob(f"test_{name}.py"), *folder.glob(f"test_{name}_*.py")]


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_its_tests(module):
    named = [file for file, modules in TOGETHER.items() if module in modules.split()]
    where = f"tests/{module.replace('/_', '/test_')}.py"
    assert len(named) + bool(own_tests(module)) == 1, f"{module} is tested in {where}, or in one line of TOGETHER"


def test_the_table_names_what_there_is():
    assert [file for file in TOGETHER if not (TESTS / file).is_file()] == []
    assert [name for modules in TOGETHER.values() for name in modules.split() if name not in MODULES] == []
