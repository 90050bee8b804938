"""Ranks started by others than ki-ds itself: with the same results."""

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.commands import command, environment, folder_digest, ki_ds
from helpers.outcomes import trained
from helpers.slurm import srun, stand_in

from ki_ds.launch.distributed import free_port

pytestmark = [
    pytest.mark.launch,
    pytest.mark.slow,
    pytest.mark.timeout(400),
]  # the first: with the run that all are compared to

RUNNERS = Path(__file__).parents[2] / "runners"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]


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
