"""Where labels are calculated and sweeps worked on: the families, and jobs on Slurm, PBS or Kubernetes.

What works elsewhere calls functions there (`Calls`); clusters do so through Parsl (an optional extra).  No jax here.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from almlip_jax.errors import InputError
from almlip_jax.kinds import Spec
from almlip_jax.packages import package_version
from almlip_jax.settings import unit

if TYPE_CHECKING:
    from almlip_jax.oracles.base import SourceSettings
    from almlip_jax.oracles.executor import Backend
    from almlip_jax.sweep.bench import Bench
    from almlip_jax.sweep.points import Workers

HEARTBEAT_SECONDS = 30
"""Time after which a dead worker is noticed; a dead job is noticed after four times as long."""

# Ctrl-C is for the program alone, which then ends the jobs; where it is killed, they end by themselves.
_INTERCHANGE = """
import os, runpy, signal, threading, time
def end_with_parent(parent=os.getppid()):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
signal.signal(signal.SIGINT, signal.SIG_IGN)
threading.Thread(target=end_with_parent, daemon=True).start()
runpy.run_module("parsl.executors.high_throughput.interchange", run_name="__main__")
"""


class ExecutorSettings(Spec):
    """Where labels are calculated: on this machine, or elsewhere (`RemoteSettings`)."""

    may_be_idle: ClassVar[bool] = False
    """Whether it may be named beside a label source whose labels are made elsewhere."""

    @property
    def threads(self) -> int:
        """Threads of the label source in each worker."""
        return 1

    @abstractmethod
    def backend(self, oracle: SourceSettings, spool: Path) -> Backend:
        """What runs label tasks there.

        Args:
            oracle: settings of the label source.
            spool: folder for results on their way, absolute.

        Raises:
            InputError: there is no such place.
        """


class SweepExecutorSettings(Spec):
    """Where points of a sweep are worked on: on this machine, or elsewhere (`RemoteSettings`)."""

    @property
    def in_process(self) -> bool:
        """Whether the program works on them by itself, one after the other, and needs no workers."""
        return False

    @abstractmethod
    def crew(self, bench: Bench, most: int, tell: Callable[[str], None]) -> Workers:
        """Workers on groups of points.

        Args:
            bench: of the sweep, whose folder the caller has locked.
            most: groups that there are at a time.
            tell: is told what the user should know.

        Raises:
            InputError: there is no such place.
        """


class WorkerGone(RuntimeError):
    """The worker that was called is gone, or its whole job: it was killed, or its time was up."""


class Calls(ABC):
    """Calls functions in workers elsewhere, until it is closed."""

    @abstractmethod
    def call(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Calls a function of a module there; `outcome` says what came of it."""

    @abstractmethod
    def close(self) -> None:
        """Ends all workers."""

    def outcome(self, call: Future[Any]) -> Any:
        """What a call that has ended gave, or raised.

        Raises:
            InputError: no workers can be had.
            WorkerGone: the worker or its job did not survive.
        """
        return call.result()


class RemoteSettings(ExecutorSettings, SweepExecutorSettings):
    """Executors that call functions in workers elsewhere, which serve labels and sweeps alike."""

    @abstractmethod
    def calls(self, folder: Path, *, whole_nodes: bool, retries: int) -> Calls:
        """Workers in which functions are called.

        Args:
            folder: for files of its own; on a file system that the workers share with this machine where there is one.
            whole_nodes: whether a worker has a node, or an accelerator of it, for itself; otherwise as many as the
                cores of a node allow, with `threads` each.
            retries: how often a call is repeated whose worker or job did not survive; what raises is not repeated.

        Raises:
            InputError: there is no such place.
        """

    # what runs in the workers stands above this module, and is imported when it is asked for

    def backend(self, oracle: SourceSettings, spool: Path) -> Backend:
        """Runs label tasks as calls."""
        from almlip_jax.oracles.cluster import ClusterBackend

        return ClusterBackend(oracle, self, spool)

    def crew(self, bench: Bench, most: int, tell: Callable[[str], None]) -> Workers:
        """Runs groups as calls."""
        from almlip_jax.sweep.cluster import ClusterCrew

        return ClusterCrew(bench, self, tell)


class ClusterSettings(RemoteSettings):
    """Settings that all clusters share, which are reached through Parsl."""

    max_blocks: int = Field(default=1, ge=1, le=100_000)
    """Most jobs (blocks, or pods on Kubernetes) at a time."""

    workers_per_node: int | None = Field(default=None, ge=1, le=4096)
    """Workers on each node; by default as many label workers as its cores allow, and one worker of a sweep."""

    accelerators_per_node: int | None = Field(default=None, ge=1, le=256)
    """Accelerators of each node that workers use, each worker one of its own; there are no more workers then."""

    cores_per_worker: int = Field(default=1, ge=1, le=4096)
    """Cores of each worker, and threads of a label source; workers of a sweep share all cores of the node."""

    worker_init: str = ""
    """Shell commands that prepare a worker's environment, such as ``module load`` or activating an environment."""

    address: str | None = None
    """Address at which the nodes reach this machine; found by probing where not given."""

    @property
    def threads(self) -> int:
        """As many as cores."""
        return self.cores_per_worker

    def calls(self, folder: Path, *, whole_nodes: bool, retries: int) -> Jobs:
        """Jobs; Parsl's own files are in the folder ``parsl``."""
        alone = whole_nodes and not self.accelerators_per_node
        return Jobs(
            self, folder / "parsl", workers_per_node=1 if alone else None, share_cores=whole_nodes, retries=retries
        )

    def provider(self) -> Any:
        """The Parsl provider that these settings describe.

        Raises:
            InputError: Parsl (or the Kubernetes client) is missing, or no Kubernetes cluster is configured.
        """
        package_version("parsl", "parsl")
        return self.make_provider({"init_blocks": 1, "max_blocks": self.max_blocks, "worker_init": self.preparation()})

    def preparation(self) -> str:
        """The shell commands that each job begins with."""
        return self.worker_init

    @abstractmethod
    def make_provider(self, blocks: dict[str, Any]) -> Any:
        """The Parsl provider, where Parsl is installed.

        Args:
            blocks: keyword arguments that all providers take: of how many jobs, and of what prepares a worker.
        """


class _BatchSettings(ClusterSettings):
    """What batch systems have in common."""

    nodes: int = Field(default=1, ge=1, le=100_000)
    """Nodes of each job."""

    walltime: str = Field(default="01:00:00", examples=["01:00:00"], pattern=r"^(\d+-)?\d+:\d\d:\d\d$")
    """Time limit of a job, ``HH:MM:SS``."""

    account: str | None = None
    """Account that is charged."""

    scheduler_options: str = ""
    """Further lines for the head of the job script."""

    def preparation(self) -> str:
        """Programs of the environment of this process come first, unless `worker_init` puts others before them."""
        return "\n".join(filter(None, [f"export PATH={shlex.quote(_programs())}:$PATH", self.worker_init]))


class SlurmSettings(_BatchSettings):
    """Work is done in Slurm jobs, through Parsl."""

    kind: Literal["slurm"] = "slurm"

    partition: str | None = None
    """Partition to submit to."""

    qos: str | None = None
    """Quality of service."""

    constraint: str | None = None
    """Features that nodes must have."""

    memory_per_node: int | None = Field(default=None, ge=1, le=10**6, json_schema_extra=unit("GB"))
    """Memory of each node in GB."""

    exclusive: bool = True
    """Whether a job takes whole nodes."""

    def make_provider(self, blocks: dict[str, Any]) -> Any:
        """Slurm's."""
        from parsl.launchers import SrunLauncher
        from parsl.providers import SlurmProvider

        return SlurmProvider(
            partition=self.partition,
            account=self.account,
            qos=self.qos,
            constraint=self.constraint,
            nodes_per_block=self.nodes,
            mem_per_node=self.memory_per_node,
            walltime=self.walltime,
            scheduler_options=self.scheduler_options,
            exclusive=self.exclusive,
            launcher=SrunLauncher(),
            **blocks,
        )


class PBSSettings(_BatchSettings):
    """Work is done in PBS jobs, through Parsl."""

    kind: Literal["pbs"] = "pbs"

    queue: str | None = None
    """Queue to submit to."""

    cores_per_node: int = Field(default=1, ge=1, le=4096)
    """Cores to ask for on each node."""

    select_options: str = ""
    """Appended to the ``-l select`` request."""

    def make_provider(self, blocks: dict[str, Any]) -> Any:
        """That of PBS Pro."""
        from parsl.launchers import SingleNodeLauncher
        from parsl.providers import PBSProProvider

        return PBSProProvider(
            queue=self.queue,
            account=self.account,
            nodes_per_block=self.nodes,
            cpus_per_node=self.cores_per_node,
            walltime=self.walltime,
            scheduler_options=self.scheduler_options,
            select_options=self.select_options,
            launcher=SingleNodeLauncher(),
            **blocks,
        )


class KubernetesSettings(ClusterSettings):
    """Work is done in Kubernetes pods, through Parsl."""

    kind: Literal["kubernetes"] = "kubernetes"

    image: str
    """Container image with almlip-jax, and the label source where labels are asked for."""

    namespace: str = "default"
    """Namespace of the pods."""

    memory: str = "2Gi"
    """Memory of a pod."""

    cores: float = Field(default=1.0, gt=0, le=4096.0)
    """Cores of a pod."""

    service_account: str | None = None
    """Service account of the pods."""

    persistent_volumes: tuple[tuple[str, str], ...] = ()
    """Pairs of a persistent volume claim and the path at which pods see it."""

    def make_provider(self, blocks: dict[str, Any]) -> Any:
        """That of Kubernetes, if a cluster is configured."""
        from parsl.providers import KubernetesProvider

        try:
            return KubernetesProvider(
                image=self.image,
                namespace=self.namespace,
                init_cpu=self.cores,
                max_cpu=self.cores,
                init_mem=self.memory,
                max_mem=self.memory,
                service_account_name=self.service_account,
                persistent_volumes=list(self.persistent_volumes),
                **blocks,
            )
        except Exception as error:  # the client raises its own types, and its absence one of Parsl's
            reason = " ".join(str(error).split())
            raise InputError(
                f"Kubernetes cannot be reached ({reason}); install the client with pip install kubernetes and "
                "configure a cluster."
            ) from error


class ParslLocalSettings(ClusterSettings):
    """Work is done on this machine, but through Parsl; for trying a set-up out."""

    kind: Literal["parsl_local"] = "parsl_local"

    address: str | None = "127.0.0.1"
    """Address at which the workers reach this process."""

    def make_provider(self, blocks: dict[str, Any]) -> Any:
        """That of this machine."""
        from parsl.providers import LocalProvider

        return LocalProvider(**blocks)

    def preparation(self) -> str:
        """The shell of a job need not find the environment of this process by itself."""
        places = {
            "PATH": [_programs(), os.environ.get("PATH", "")],
            "PYTHONPATH": [entry or os.getcwd() for entry in sys.path],
        }
        exports = [f"export {name}={shlex.quote(os.pathsep.join(path))}" for name, path in places.items()]
        return "\n".join([*exports, self.worker_init])


def _programs() -> str:
    """The folder with the programs of this process's environment, those of Parsl's workers among them."""
    return str(Path(sys.executable).parent)


class Jobs(Calls):
    """Calls functions in jobs, which begin when there is something to call and end when there is nothing.

    Args:
        settings: of the cluster.
        folder: for Parsl's own files, with the scripts of the jobs and what they print.
        workers_per_node: where the settings do not say; by default as many as the cores of a node allow.
        share_cores: whether each worker keeps to its share of the cores.
        retries: how often a call is repeated whose worker or job did not survive; what raises is not repeated.

    Raises:
        InputError: as `ClusterSettings.provider`.
    """

    def __init__(
        self,
        settings: ClusterSettings,
        folder: Path,
        *,
        workers_per_node: int | None = None,
        share_cores: bool = False,
        retries: int = 0,
    ) -> None:
        provider = settings.provider()
        logging.getLogger("parsl").propagate = False  # `outcome` says what matters in its tracebacks
        logging.getLogger("parsl").addHandler(logging.NullHandler())
        from parsl import Config, HighThroughputExecutor
        from parsl.dataflow.dflow import DataFlowKernel
        from parsl.jobs.error_handlers import windowed_error_handler

        workers = HighThroughputExecutor(
            label="workers",
            provider=provider,
            address=settings.address,
            cores_per_worker=settings.cores_per_worker,
            max_workers_per_node=settings.workers_per_node or workers_per_node,
            available_accelerators=settings.accelerators_per_node or (),
            cpu_affinity="block" if share_cores else "none",
            heartbeat_period=HEARTBEAT_SECONDS,
            heartbeat_threshold=4 * HEARTBEAT_SECONDS,
            interchange_launch_cmd=[sys.executable, "-c", _INTERCHANGE],
            block_error_handler=windowed_error_handler,  # gives up when three jobs in a row have failed
        )
        config = Config(
            executors=[workers],
            strategy="htex_auto_scale",  # ends jobs that have nothing to do while others work
            retries=retries,
            retry_handler=_cost_of_retry,
            run_dir=str(folder),
            initialize_logging=False,
            usage_tracking=0,
        )
        self._kernel = DataFlowKernel(config)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Calls a function of a module on a node; `outcome` says what came of it."""
        return self._kernel.submit(
            function, app_args=arguments, executors=["workers"], cache=False, ignore_for_cache=[], app_kwargs={}
        )

    def close(self) -> None:
        """Ends the jobs."""
        self._kernel.cleanup()

    def outcome(self, call: Future[Any]) -> Any:
        """See `Calls.outcome`."""
        from parsl.executors.errors import BadStateException
        from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost

        try:
            return call.result()
        except BadStateException as error:
            reason = " ".join(str(error).split())
            raise InputError(f"the cluster runs no jobs ({reason}); correct the executor.") from error
        except (ManagerLost, WorkerLost) as error:
            raise WorkerGone(str(error)) from error


def _cost_of_retry(error: Exception, _: Any) -> float:
    """What a failed call takes of its retries: one where its worker is gone, all of them where it raised."""
    from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost

    return 1.0 if isinstance(error, (ManagerLost, WorkerLost)) else float("inf")
