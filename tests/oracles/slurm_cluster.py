"""A SLURM of its own on this machine: controller, node daemons and munge in a folder, on ports of their own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from almlip_jax.process_table import kill_all, marked

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel")

_CONFIG = """\
ClusterName=almlip
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=5
SlurmctldTimeout=5
InactiveLimit=0
KillWait=1
MinJobAge=300
SchedulerParameters=sched_interval=1,sched_min_interval=1,bf_interval=1
SlurmdParameters=config_overrides
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 Port={one} CPUs=2 State=UNKNOWN
NodeName=two NodeHostname={host} NodeAddr=127.0.0.1 Port={two} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why there can be none here; empty where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{absent[0]} is not installed"
    return "" if os.geteuid() == 0 else "node daemons and munge need root"


def until(holds: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits for something."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@dataclass
class Cluster:
    """A controller and two nodes of two cores.

    Attributes:
        folder: of their files.
        daemons: that run, by name.
    """

    folder: Path
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def config(self) -> Path:
        """What all programs of it read, as ``SLURM_CONF`` says."""
        return self.folder / "slurm.conf"

    def start(self, name: str) -> None:
        """Starts a daemon: ``munged``, ``slurmctld`` or a node."""
        key = ["--key-file", str(self.folder / "munge.key"), "--seed-file", str(self.folder / "munge.seed")]
        munge = ["munged", "--foreground", "--force", f"--socket={self.folder / 'munge.socket'}", *key]
        munge += [f"--pid-file={self.folder / 'munged.pid'}", f"--log-file={self.folder / 'munged.log'}"]
        command = {"munged": munge, "slurmctld": ["slurmctld", "-D", "-f", str(self.config)]}.get(name)
        with (self.folder / f"{name}.out").open("a") as out:
            self.daemons[name] = subprocess.Popen(
                command or ["slurmd", "-D", "-f", str(self.config), "-N", name],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"SLURM_CONF": str(self.config), "SLURM_TEST_DAEMON": f"{self.folder} {name}"},
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        """Ends a daemon as a crash does; with a node everything that runs on it."""
        daemon = self.daemons.pop(name)
        daemon.kill()
        daemon.wait()
        kill_all(lambda: marked("SLURM_TEST_DAEMON", f"{self.folder} {name}") | marked("SLURMD_NODENAME", name))

    def ask(self, *command: str) -> str:
        """What a program of SLURM prints."""
        environment = os.environ | {"SLURM_CONF": str(self.config)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30).stdout.strip()

    def jobs(self) -> list[str]:
        """Numbers of the jobs that run."""
        return self.ask("squeue", "--noheader", "--format=%i", "--states=R").split()

    def node(self) -> str:
        """The node of the job that runs."""
        return self.ask("squeue", "--noheader", "--format=%N", "--states=R").split()[0]


@contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster, all of which ends with the block."""
    cluster = Cluster(folder)
    with ExitStack() as ports:
        sockets = [ports.enter_context(socket.socket()) for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        controller, *nodes = (one.getsockname()[1] for one in sockets)
    host = socket.gethostname().partition(".")[0]
    given = {"host": host, "folder": folder, "controller": controller, "one": nodes[0], "two": nodes[1]}
    cluster.config.write_text(_CONFIG.format(**given))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    folder.chmod(0o755)
    for name in ("state", "spool-one", "spool-two"):
        (folder / name).mkdir()
    try:
        cluster.start("munged")
        until(lambda: (folder / "munge.socket").exists())
        for name in ("slurmctld", "one", "two"):
            cluster.start(name)
        until(lambda: cluster.ask("sinfo", "--noheader", "--format=%T %D") == "idle 2")
        yield cluster
    finally:
        for daemon in reversed([*cluster.daemons.values()]):
            daemon.kill()
            daemon.wait()
        # job steps, and what they started: they inherit the variable
        kill_all(lambda: marked("SLURM_CONF", str(cluster.config)) - {os.getpid()})
