"""What launchers tell a process, and what is said where ranks cannot be joined."""

import os

import pytest
from helpers.commands import environment
from helpers.slurm import srun, stand_in

from ki_ds.errors import UserError
from ki_ds.launch import distributed


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
