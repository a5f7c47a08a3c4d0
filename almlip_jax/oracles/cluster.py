"""Labels on a cluster: the same tasks through Parsl, on Slurm, PBS or Kubernetes (an optional extra).

Each Parsl worker keeps one label worker process of its own, so that time limits and crashes are dealt with as they are
locally.  Where the run directory is on a file system that the nodes share, results land in its spool too, and survive
the end of the program that asked for them.
"""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.oracles.base import SourceSettings, package_version
from almlip_jax.oracles.processes import WorkerProcess, as_finished, ask_patiently
from almlip_jax.oracles.settings import parse_oracle
from almlip_jax.oracles.worker import Failure, Task
from almlip_jax.settings import Settings


class _ParslSettings(Settings):
    """What every Parsl executor is told."""

    max_blocks: int = Field(default=1, ge=1)
    """Most jobs (blocks, or pods on Kubernetes) at a time."""

    workers_per_node: int | None = Field(default=None, ge=1)
    """Label workers on each node; by default as many as its cores allow."""

    cores_per_worker: int = Field(default=1, ge=1)
    """Cores, and threads, of each label worker."""

    worker_init: str = ""
    """Shell commands that prepare a worker's environment, such as ``module load`` or activating an environment."""

    address: str | None = None
    """Address at which the nodes reach this machine; found by probing where not given."""


class _BatchSettings(_ParslSettings):
    """What batch systems have in common."""

    nodes: int = Field(default=1, ge=1)
    """Nodes of each job."""

    walltime: str = Field(default="01:00:00", pattern=r"^(\d+-)?\d+:\d\d:\d\d$")
    """Time limit of a job, ``HH:MM:SS``."""

    account: str | None = None
    """Account that is charged."""

    scheduler_options: str = ""
    """Further lines for the head of the job script."""


class SlurmSettings(_BatchSettings):
    """Labels are calculated in Slurm jobs, through Parsl."""

    kind: Literal["slurm"] = "slurm"

    partition: str | None = None
    """Partition to submit to."""

    qos: str | None = None
    """Quality of service."""

    constraint: str | None = None
    """Features that nodes must have."""

    memory_per_node: int | None = Field(default=None, ge=1)
    """Memory of each node in GB."""

    exclusive: bool = True
    """Whether a job takes whole nodes."""


class PBSSettings(_BatchSettings):
    """Labels are calculated in PBS jobs, through Parsl."""

    kind: Literal["pbs"] = "pbs"

    queue: str | None = None
    """Queue to submit to."""

    cores_per_node: int = Field(default=1, ge=1)
    """Cores to ask for on each node."""

    select_options: str = ""
    """Appended to the ``-l select`` request."""


class KubernetesSettings(_ParslSettings):
    """Labels are calculated in Kubernetes pods, through Parsl."""

    kind: Literal["kubernetes"] = "kubernetes"

    image: str
    """Container image with almlip-jax and the label source."""

    namespace: str = "default"
    """Namespace of the pods."""

    memory: str = "2Gi"
    """Memory of a pod."""

    cores: float = Field(default=1.0, gt=0)
    """Cores of a pod."""

    service_account: str | None = None
    """Service account of the pods."""

    persistent_volumes: tuple[tuple[str, str], ...] = ()
    """Pairs of a persistent volume claim and the path at which pods see it."""


class ParslLocalSettings(_ParslSettings):
    """Labels are calculated on this machine, but through Parsl; for trying a set-up out."""

    kind: Literal["parsl_local"] = "parsl_local"

    address: str | None = "127.0.0.1"
    """Address at which the workers reach this process."""


ClusterSettings = SlurmSettings | PBSSettings | KubernetesSettings | ParslLocalSettings


def build_provider(settings: ClusterSettings) -> Any:
    """The Parsl provider that these settings describe.

    Raises:
        InputError: Parsl (or the Kubernetes client) is missing, or no Kubernetes cluster is configured.
    """
    package_version("parsl", "parsl")
    from parsl.launchers import SingleNodeLauncher, SrunLauncher
    from parsl.providers import PBSProProvider, SlurmProvider

    blocks: dict[str, Any] = {
        "init_blocks": 1,
        "max_blocks": settings.max_blocks,
        "worker_init": settings.worker_init,
    }
    match settings:
        case SlurmSettings():
            return SlurmProvider(
                partition=settings.partition,
                account=settings.account,
                qos=settings.qos,
                constraint=settings.constraint,
                nodes_per_block=settings.nodes,
                mem_per_node=settings.memory_per_node,
                walltime=settings.walltime,
                scheduler_options=settings.scheduler_options,
                exclusive=settings.exclusive,
                launcher=SrunLauncher(),
                **blocks,
            )
        case PBSSettings():
            return PBSProProvider(
                queue=settings.queue,
                account=settings.account,
                nodes_per_block=settings.nodes,
                cpus_per_node=settings.cores_per_node,
                walltime=settings.walltime,
                scheduler_options=settings.scheduler_options,
                select_options=settings.select_options,
                launcher=SingleNodeLauncher(),
                **blocks,
            )
        case KubernetesSettings():
            return _kubernetes(settings, blocks)
        case ParslLocalSettings():
            return _local(blocks)


def _kubernetes(settings: KubernetesSettings, blocks: dict[str, Any]) -> Any:
    from parsl.providers import KubernetesProvider

    try:
        return KubernetesProvider(
            image=settings.image,
            namespace=settings.namespace,
            init_cpu=settings.cores,
            max_cpu=settings.cores,
            init_mem=settings.memory,
            max_mem=settings.memory,
            service_account_name=settings.service_account,
            persistent_volumes=list(settings.persistent_volumes),
            **blocks,
        )
    except Exception as error:  # the client raises its own types, and its absence one of Parsl's
        reason = " ".join(str(error).split())
        raise InputError(
            f"Kubernetes cannot be reached ({reason}); install the client with pip install kubernetes and configure a "
            "cluster."
        ) from error


def _local(blocks: dict[str, Any]) -> Any:
    from parsl.providers import LocalProvider

    # Its shell need not find the environment of this process by itself.
    places = {
        "PATH": [str(Path(sys.executable).parent), os.environ.get("PATH", "")],
        "PYTHONPATH": [entry or os.getcwd() for entry in sys.path],
    }
    exports = [f"export {name}={shlex.quote(os.pathsep.join(path))}" for name, path in places.items()]
    return LocalProvider(**blocks | {"worker_init": "\n".join([*exports, blocks["worker_init"]])})


class ClusterBackend:
    """Runs tasks through Parsl's `HighThroughputExecutor`.

    Args:
        oracle: settings of the label source.
        executor: of the cluster.
        spool: folder for results on their way; Parsl's own files go there too.

    Raises:
        InputError: as `build_provider`.
    """

    def __init__(self, oracle: SourceSettings, executor: Any, spool: Path) -> None:
        provider = build_provider(executor)
        from parsl import Config, HighThroughputExecutor
        from parsl.dataflow.dflow import DataFlowKernel

        self._arguments = (oracle.model_dump_json(), str(spool), executor.cores_per_worker)
        workers = HighThroughputExecutor(
            label="labels",
            provider=provider,
            address=executor.address,
            cores_per_worker=executor.cores_per_worker,
            max_workers_per_node=executor.workers_per_node,
            interchange_launch_cmd=[sys.executable, "-m", "parsl.executors.high_throughput.interchange"],
        )
        config = Config(
            executors=[workers], retries=2, run_dir=str(spool / "parsl"), initialize_logging=False, usage_tracking=0
        )
        self._kernel = DataFlowKernel(config)

    def run(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
        """Numbers of tasks with their outcomes, as they finish; a task that the cluster lost is a `Failure`.

        Raises:
            InputError: the label source cannot be used, or no jobs can be had.
        """
        from parsl.executors.errors import BadStateException

        futures = {self._submit(task): n for n, task in enumerate(tasks)}
        for n, future in as_finished(futures):
            try:
                yield n, future.result()
            except InputError:
                raise
            except BadStateException as error:
                reason = " ".join(str(error).split())
                raise InputError(f"the cluster runs no jobs ({reason}); correct the executor.") from error
            except Exception as error:  # whatever Parsl says when nodes or workers are gone
                yield n, Failure(f"lost on the cluster ({type(error).__name__}: {error})")

    def _submit(self, task: Task) -> Future[Any]:
        return self._kernel.submit(
            run_isolated,
            app_args=(*self._arguments, task),
            executors=["labels"],
            cache=False,
            ignore_for_cache=[],
            app_kwargs={},
        )

    def close(self) -> None:
        """Ends the jobs."""
        self._kernel.cleanup()


@functools.cache
def _worker(oracle: str, spool: str, threads: int) -> WorkerProcess:
    return WorkerProcess(parse_oracle(oracle), Path(spool), threads)


def run_isolated(oracle: str, spool: str, threads: int, task: Task) -> Any:
    """Runs a task in the label worker that belongs to this process; what Parsl calls on a node."""
    return ask_patiently(_worker(oracle, spool, threads), task, parse_oracle(oracle).attempts)
