"""Jobs on a cluster: providers and workers are what the config says."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from almlip_jax.cluster import (
    ClusterSettings,
    ExecutorSettings,
    Jobs,
    KubernetesSettings,
    ParslLocalSettings,
    SlurmSettings,
    SweepExecutorSettings,
)
from almlip_jax.errors import InputError
from almlip_jax.oracles import LocalSettings
from almlip_jax.oracles.executor import InlineBackend, build_backend
from almlip_jax.oracles.sources.calculator import CalculatorSettings
from almlip_jax.sweep.crew import ProcessesSettings


def test_every_cluster_serves_labels_and_sweeps() -> None:
    clusters = set(ClusterSettings.kinds())
    assert clusters == {"slurm", "pbs", "kubernetes", "parsl_local"}
    assert set(ExecutorSettings.kinds()) - clusters == {"local"} == set(SweepExecutorSettings.kinds()) - clusters
    assert ExecutorSettings.kinds()["local"] is LocalSettings
    assert SweepExecutorSettings.kinds()["local"] is ProcessesSettings


PACKAGE = '''
from typing import Literal
from almlip_jax.cluster import ClusterSettings, ExecutorSettings
from almlip_jax.oracles.executor import InlineBackend

class Desks(ClusterSettings):
    """Machines that stand about."""

    kind: Literal["desks"] = "desks"

    def make_provider(self, blocks):
        return "desks", blocks

class Here(ExecutorSettings):
    """Labels without workers; no place for sweeps."""

    kind: Literal["here"] = "here"

    def backend(self, oracle, spool):
        return InlineBackend(oracle)
'''
NOWHERE = """
class Nowhere(ExecutorSettings):
    kind: Literal["nowhere"] = "nowhere"
"""


def test_an_installed_package_adds_executors(with_kinds: Callable[[str], None], tmp_path: Path) -> None:
    pytest.importorskip("parsl")
    with_kinds(PACKAGE)
    for family in (ExecutorSettings, SweepExecutorSettings):
        name, blocks = family.parse({"kind": "desks", "max_blocks": 3}).provider()
        assert name == "desks" and blocks["max_blocks"] == 3
    oracle, here = CalculatorSettings(calculator="ase.calculators.emt:EMT"), ExecutorSettings.parse({"kind": "here"})
    assert isinstance(build_backend(oracle, here, tmp_path), InlineBackend)
    with pytest.raises(ValidationError, match="'here'.*expected tags: .*'desks'"):
        SweepExecutorSettings.parse({"kind": "here"})


def test_an_executor_that_says_no_place_is_refused(with_kinds: Callable[[str], None]) -> None:
    with_kinds(PACKAGE + NOWHERE)
    with pytest.raises(InputError, match=r"'other-kinds'.*kind 'nowhere', does not define backend\(\)"):
        ExecutorSettings.kinds()


def test_slurm_provider_says_what_the_config_says() -> None:
    pytest.importorskip("parsl")
    settings = ClusterSettings.parse(
        dict(kind="slurm", partition="short", account="chem", nodes=3, max_blocks=4, walltime="00:30:00", qos="low")
        | {"cores_per_worker": 6}
    )
    provider = settings.provider()
    assert (provider.partition, provider.account, provider.qos) == ("short", "chem", "low")
    assert (provider.nodes_per_block, provider.max_blocks, provider.walltime, settings.threads) == (3, 4, "00:30:00", 6)
    assert provider.worker_init.split("\n")[0] == f"export PATH={Path(sys.executable).parent}:$PATH"
    assert type(provider.launcher).__name__ == "SrunLauncher"


def test_pbs_provider_says_what_the_config_says() -> None:
    pytest.importorskip("parsl")
    settings = ClusterSettings.parse(
        dict(kind="pbs", queue="small", cores_per_node=16, worker_init="module load xtb", scheduler_options="#PBS -m n")
    )
    provider = settings.provider()
    assert (provider.queue, provider.cpus_per_node, provider.nodes_per_block) == ("small", 16, 1)
    assert provider.worker_init.split("\n") == [f"export PATH={Path(sys.executable).parent}:$PATH", "module load xtb"]
    assert provider.scheduler_options == "#PBS -m n"
    assert type(provider.launcher).__name__ == "SingleNodeLauncher"


def test_kubernetes_provider_says_what_the_config_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("parsl")
    pytest.importorskip("kubernetes")
    config = tmp_path / "config"
    config.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n"
        "clusters: [{name: k, cluster: {server: 'https://localhost:1'}}]\n"
        "users: [{name: u, user: {token: t}}]\n"
        "contexts: [{name: c, context: {cluster: k, user: u}}]\n"
    )
    from kubernetes.config import kube_config

    monkeypatch.setattr(kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(config))
    provider = KubernetesSettings(image="lab/almlip:1", namespace="chem", cores=2, memory="3Gi").provider()
    assert (provider.image, provider.namespace, provider.max_cpu, provider.max_mem) == (
        "lab/almlip:1",
        "chem",
        2,
        "3Gi",
    )
    config.write_text("")
    with pytest.raises(InputError, match="Kubernetes cannot be reached"):
        KubernetesSettings(image="lab/almlip:1").provider()


def test_missing_parsl_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match=r'pip install "almlip-jax\[parsl\]"'):
        SlurmSettings().provider()


@pytest.mark.parametrize(
    ("settings", "workers", "accelerators"),
    [({}, 1, []), ({"workers_per_node": 3}, 3, []), ({"accelerators_per_node": 2}, 1, ["0", "1"])],
)
def test_workers_are_as_many_as_the_config_says(
    settings: dict[str, Any], workers: int, accelerators: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("parsl")
    begun = []
    monkeypatch.setattr("parsl.dataflow.dflow.DataFlowKernel", begun.append)
    Jobs(ParslLocalSettings(**settings), tmp_path, workers_per_node=1, share_cores=True)
    (executor,) = begun[0].executors
    assert (executor.max_workers_per_node, executor.available_accelerators) == (workers, accelerators)
    assert executor.cpu_affinity == "block"
