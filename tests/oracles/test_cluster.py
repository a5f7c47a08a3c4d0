"""Labelling through Parsl: the providers are what the config says, and a local one really labels."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import label_calculators as trouble
import pytest
from ase import Atoms
from label_calculators import assert_same_labels
from pydantic import TypeAdapter, ValidationError

from almlip_jax.cluster import KubernetesSettings, ParslLocalSettings, SlurmSettings, build_provider
from almlip_jax.errors import InputError
from almlip_jax.oracles import ExecutorSettings, Labeller, LabelStore, LocalSettings, MDRun, run_label_md
from almlip_jax.oracles.sources.calculator import CalculatorSettings

Waters = Callable[..., list[Atoms]]
EXECUTORS: TypeAdapter[ExecutorSettings] = TypeAdapter(ExecutorSettings)


def test_slurm_provider_says_what_the_config_says() -> None:
    pytest.importorskip("parsl")
    settings = EXECUTORS.validate_python(
        dict(kind="slurm", partition="short", account="chem", nodes=3, max_blocks=4, walltime="00:30:00", qos="low")
    )
    provider = build_provider(settings)
    assert (provider.partition, provider.account, provider.qos) == ("short", "chem", "low")
    assert (provider.nodes_per_block, provider.max_blocks, provider.walltime) == (3, 4, "00:30:00")
    assert type(provider.launcher).__name__ == "SrunLauncher"


def test_pbs_provider_says_what_the_config_says() -> None:
    pytest.importorskip("parsl")
    settings = EXECUTORS.validate_python(
        dict(kind="pbs", queue="small", cores_per_node=16, worker_init="module load xtb", scheduler_options="#PBS -m n")
    )
    provider = build_provider(settings)
    assert (provider.queue, provider.cpus_per_node, provider.nodes_per_block) == ("small", 16, 1)
    assert provider.worker_init == "module load xtb" and provider.scheduler_options == "#PBS -m n"
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
    provider = build_provider(KubernetesSettings(image="lab/almlip:1", namespace="chem", cores=2, memory="3Gi"))
    assert (provider.image, provider.namespace, provider.max_cpu, provider.max_mem) == (
        "lab/almlip:1",
        "chem",
        2,
        "3Gi",
    )
    config.write_text("")
    with pytest.raises(InputError, match="Kubernetes cannot be reached"):
        build_provider(KubernetesSettings(image="lab/almlip:1"))


def test_executor_settings_are_chosen_by_kind_and_checked() -> None:
    assert isinstance(EXECUTORS.validate_python({"kind": "local"}), LocalSettings)
    with pytest.raises(ValidationError, match="did you mean 'partition'"):
        EXECUTORS.validate_python({"kind": "slurm", "partitions": "x"})
    with pytest.raises(ValidationError, match="walltime"):
        EXECUTORS.validate_python({"kind": "slurm", "walltime": "an hour"})


def test_missing_parsl_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InputError, match=r'pip install "almlip-jax\[parsl\]"'):
        build_provider(SlurmSettings())


@pytest.mark.slow
def test_labels_and_dynamics_through_parsl(waters: Waters, springs: CalculatorSettings, tmp_path: Path) -> None:
    pytest.importorskip("parsl")
    oracle = springs.model_copy(update={"timeout": 3.0})
    frames = waters(4) + waters(1, trouble.ABORT) + waters(1, trouble.HANG)
    runs = [MDRun(300, 10)]
    results, trajectories = {}, {}
    for name, executor in {"local": LocalSettings(workers=2), "parsl": ParslLocalSettings(workers_per_node=2)}.items():
        with LabelStore(tmp_path / f"{name}.db") as store, Labeller(oracle, store, executor) as labeller:
            results[name] = labeller.label(frames, {"purpose": "train"})
            trajectories[name] = run_label_md(frames[0], labeller, runs, seed=0, purpose="initial")
            assert store.count_calls() == 16
            assert [row.label.identity for row in store.labelled("train")] == [r.identity for r in results[name][:4]]
    for local, remote in zip(results["local"], results["parsl"], strict=True):
        assert local.error == remote.error
        if local.atoms is not None and remote.atoms is not None:
            assert_same_labels(local.atoms, remote.atoms)
    assert [result.error is None for result in results["parsl"]] == [True] * 4 + [False] * 2
    for frame, same in zip(trajectories["local"][0].frames, trajectories["parsl"][0].frames, strict=True):
        assert_same_labels(frame, same)


@pytest.mark.slow
def test_label_source_that_cannot_be_used_is_one_sentence_through_parsl(
    waters: Waters, springs: CalculatorSettings, tmp_path: Path
) -> None:
    pytest.importorskip("parsl")
    oracle = springs.model_copy(update={"calculator": "no_such_module:Springs"})
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store, ParslLocalSettings()) as labeller:
        with pytest.raises(InputError, match="no_such_module"):
            labeller.label(waters(1), {"purpose": "train"})
