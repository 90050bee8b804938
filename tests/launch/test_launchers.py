"""Ranks started by others than ki-ds itself: with the same results; and what is said where they cannot be joined."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.commands import command, environment, folder_digest, ki_ds
from helpers.tiny_experiment import tiny, trained

from ki_ds.errors import UserError
from ki_ds.launch import distributed
from ki_ds.launch.distributed import free_port

RUNNERS = Path(__file__).parents[2] / "runners"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An experiment's file, and its work directory as two ranks under the deepspeed launcher made it."""
    folder = tmp_path_factory.mktemp("launchers")
    file = tiny(folder)
    ki_ds("run", file, "--workdir", folder / "work", "--processes", 2)
    return file, folder / "work"


@pytest.fixture
def here(finished, tmp_path):
    """The work directory as it was before the student was trained."""
    shutil.copytree(finished[1], tmp_path / "work")
    shutil.rmtree(tmp_path / "work" / "models" / "s")
    return tmp_path / "work"


def run(stage, file, work, *ranks, name):
    """Run a stage to its end under each of these (launcher, variables), all at the same time."""
    arguments = [RUNNERS / f"{stage}.py", file, "--workdir", work, "--name", name]
    processes = [
        subprocess.Popen(
            [*launcher, sys.executable, *map(str, arguments)], env=environment() | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for launcher, variables in ranks
    ]  # fmt: skip
    outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)


@pytest.mark.timeout(600)  # the first here: with the run that all are compared to
def test_mpirun_teaches_and_trains_the_same(finished, here):
    """DeepSpeed finds the ranks through mpi4py."""
    if not shutil.which("mpirun") or find_spec("mpi4py") is None:
        pytest.skip("mpirun needs: apt-get install openmpi-bin; pip install mpi4py")
    file, work = finished
    shutil.rmtree(here / "targets")
    run("teach", file, here, (MPIRUN, {}), name="t@a")
    run("train", file, here, (MPIRUN, {}), name="s")
    assert folder_digest(here / "targets") == folder_digest(work / "targets")
    assert trained(here, "s") == trained(work, "s")


def test_torchrun_trains_the_same(finished, here):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--no_python"]
    run("train", finished[0], here, ([*torchrun, "--master_port", str(free_port())], {}), name="s")
    assert trained(here, "s") == trained(finished[1], "s")


def test_srun_trains_the_same(finished, here, tmp_path):
    """Two tasks in the environment that srun makes, and a scontrol that names their hosts."""
    stand_in(tmp_path, 'test "$*" = "show hostnames localhost" && echo localhost')
    tasks = [srun(tmp_path, SLURM_PROCID=str(task), SLURM_LOCALID=str(task)) for task in (0, 1)]
    run("train", finished[0], here, *(([], task) for task in tasks), name="s")
    assert trained(here, "s") == trained(finished[1], "s")


def test_ki_ds_starts_ranks_by_open_mpi(finished, here, tmp_path):
    if not shutil.which("ompi_info") or find_spec("mpi4py") is None:
        pytest.skip("mpirun needs: apt-get install openmpi-bin; pip install mpi4py")
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    how = "--allow-run-as-root --oversubscribe --bind-to none --mca btl_tcp_if_include lo"
    options = ("--hostfile", tmp_path / "hosts", "--launcher", "openmpi", "--launcher-args", how)
    ki_ds("train", finished[0], "--workdir", here, "--name", "s", *options)
    assert trained(here, "s") == trained(finished[1], "s")


SRUN = """#!/bin/sh
# srun -n N --export=… program: two tasks here
while [ "${1#--export}" = "$1" ]; do shift; done; shift
test "$2" = -u || exit 9
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@"; code=$?
wait $first || code=$?
exit $code
"""


def test_ki_ds_starts_ranks_by_slurm(finished, here, tmp_path):
    """With a stand-in for srun: what DeepSpeed calls it with must start ranks that find each other."""
    for name, script in (("srun", SRUN), ("sinfo", "#!/bin/sh\n"), ("scontrol", "#!/bin/sh\necho localhost\n")):
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    variables = srun(tmp_path)
    given = environment() | {name: variables[name] for name in variables if name.startswith("SLURM_STEP")}
    given |= {"SLURM_JOB_ID": "7", "PATH": variables["PATH"]}
    options = ["--hostfile", tmp_path / "hosts", "--launcher", "slurm"]
    done = subprocess.run(
        command("train", finished[0], "--workdir", here, "--name", "s", *options), env=given, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert trained(here, "s") == trained(finished[1], "s")


def test_plain_python_trains_the_same_to_rounding(finished, here):
    """A world of its own: sums over the batch are taken in another order."""
    run("train", finished[0], here, ([], {}), name="s")
    (one, _), (two, _) = trained(here, "s"), trained(finished[1], "s")
    for key in ("loss", "ce", "gradient_norm"):
        assert [line[key] for line in one] == pytest.approx([line[key] for line in two], rel=2e-5), key


# -------------------------------------------------------------------------------------------- what launchers tell


def srun(tools, **changes):
    """The environment of a task of a step of two; programs in `tools` come first."""
    return {
        "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", **changes,
    }  # fmt: skip


def stand_in(folder, script):
    """An `scontrol` of this folder."""
    (folder / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "scontrol").chmod(0o755)


@pytest.fixture
def told(monkeypatch):
    """Give this process what a launcher tells: its environment is one without a launcher, and these variables."""

    def only(**variables):
        monkeypatch.setattr(os, "environ", environment() | variables)
        return distributed.rank(), distributed.local_rank(), distributed.world_size()

    return only


OMPI = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
TORCH = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}
BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a[1-4]"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({}, (0, 0, 1)), (OMPI, (5, 1, 8)), (TORCH | OMPI, (2, 0, 3)), (srun(""), (1, 1, 2)), (BATCH, (0, 0, 1))],
    ids=["plain", "mpirun", "deepspeed within mpirun", "srun", "batch script of Slurm"],
)
def test_place_is_the_same_before_and_after_the_environment_is_completed(told, variables, expected):
    assert told(**({"MASTER_ADDR": "a", "MASTER_PORT": "1234"} | variables)) == expected
    assert distributed.under_launcher() == (expected[2] > 1)
    distributed.complete_environment()
    assert tuple(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")) == expected
    assert os.environ["MASTER_ADDR"] == ("a" if expected[2] > 1 else "127.0.0.1")


def test_ranks_of_a_job_take_the_same_port_and_other_jobs_another(told, tmp_path):
    stand_in(tmp_path, "echo first; echo second")
    ports = []
    for job, rank in (("7", "0"), ("7", "1"), ("8", "0")):
        told(**srun(tmp_path, SLURM_JOB_ID=job, SLURM_PROCID=rank))
        distributed.complete_environment()
        assert os.environ["MASTER_ADDR"] == "first"
        ports.append(int(os.environ["MASTER_PORT"]))
    assert ports[0] == ports[1] != ports[2] and all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "SLURM_STEP_NODELIST=localhost: there is no scontrol .*; set MASTER_ADDR"),
        ("echo no controller >&2; exit 1", "exit code 1: no controller; set MASTER_ADDR"),
        ("exit 0", "exit code 0: nothing; set MASTER_ADDR"),
    ],
)
def test_first_host_that_cannot_be_named_is_asked_for(told, tmp_path, script, words):
    if script:
        stand_in(tmp_path, script)
    told(**srun(tmp_path, **({} if script else {"PATH": str(tmp_path)})))
    with pytest.raises(UserError, match=words):
        distributed.complete_environment()


def test_mpirun_without_mpi4py_is_told_what_to_install(told, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    told(**OMPI)
    with pytest.raises(UserError, match=r"mpi4py is not installed.*pip install 'ki_ds\[mpi\]'.*-x MASTER_ADDR"):
        distributed.complete_environment()


def test_rank_without_an_address_is_refused(told):
    told(RANK="1", WORLD_SIZE="2")
    with pytest.raises(UserError, match="RANK=1 and WORLD_SIZE=2 are set, MASTER_ADDR and MASTER_PORT are not"):
        distributed.complete_environment()
