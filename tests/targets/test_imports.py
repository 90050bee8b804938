"""What reading and writing targets needs."""

import subprocess
import sys

from helpers.targets import (
    FIELDS,
)

from ki_ds.targets.codec import Planes


def test_reading_and_writing_do_not_need_torch():
    """Whoever only looks at targets, a data loader's worker for one, does not wait for torch."""
    names = "ki_ds.sealed, ki_ds.targets.manifest, ki_ds.targets.spec, ki_ds.targets.shard"
    code = f"import sys, {names}; print([n for n in ('torch', 'fsspec', 'transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_planes_have_the_fields_that_are_compared_here():
    assert tuple(Planes.__dataclass_fields__) == FIELDS
