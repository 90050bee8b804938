"""The one way to start ranks without a launcher: real processes on the CPU, in a world of their own over gloo.

`run_ranks(function, 2, ...)` runs a function of a test module on every rank. `ranks(commands, logs)` gives the
processes themselves to a test that ends, stops or watches single ones. This file is also what each rank of the former
runs.
"""

import contextlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers.commands import environment

TESTS = Path(__file__).parents[1]


def run_ranks(function, world_size, *arguments, logs=None, timeout_s=200):
    """What a module-level function returns on each of so many ranks; with pickle, as its arguments.

    What rank n prints stands in `logs`/rank-n, where a folder is given. The first rank that fails, or the end of the
    time, fails the test with what all have printed, and ends the others.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        call = (function.__code__.co_filename, function.__name__, arguments)
        (folder / "call").write_bytes(pickle.dumps(call))
        with ranks([["-m", "helpers.ranks", folder]] * world_size, logs or folder) as processes:
            limit = time.monotonic() + timeout_s
            while not all(process.poll() == 0 for process in processes):
                if any(process.poll() for process in processes) or time.monotonic() > limit:
                    codes = [process.poll() for process in processes]
                    raise AssertionError(f"exit codes {codes} (None: ran on)\n" + printed(logs or folder, world_size))
                time.sleep(0.05)
        return [pickle.loads((folder / f"returned-{rank}").read_bytes()) for rank in range(world_size)]


@contextlib.contextmanager
def ranks(commands, logs):
    """A world with a rank for each of these lists of arguments to Python: its processes, all of which end with this.

    What rank n prints goes to `logs`/rank-n.
    """
    from ki_ds.launch.distributed import free_port

    logs.mkdir(parents=True, exist_ok=True)
    shared = environment() | {
        "WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        processes = []
        for rank, command in enumerate(commands):
            log = stack.enter_context((logs / f"rank-{rank}").open("w"))
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                [sys.executable, *map(str, command)], env=shared | place, stdout=log, stderr=subprocess.STDOUT
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        yield processes


def printed(logs, world_size):
    """What all ranks have printed."""
    return "\n".join(f"--- rank {rank}\n{(logs / f'rank-{rank}').read_text()}" for rank in range(world_size))


def main(folder):
    """One rank of `run_ranks`."""
    import torch

    from ki_ds.launch import distributed

    distributed.init_distributed()
    torch.set_num_threads(1)
    file, name, arguments = pickle.loads((folder / "call").read_bytes())
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    returned = getattr(module, name)(*arguments)
    (folder / f"returned-{distributed.rank()}").write_bytes(pickle.dumps(returned))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
