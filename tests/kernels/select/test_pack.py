"""The one packer against a definition of its own."""

import numpy as np
import torch
from helpers.definition import by_definition
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.kernels.select.pack import Selected, pack
from ki_ds.targets.codec import Codec


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 999), k=st.integers(1, 40), scale=st.sampled_from([0.3, 3.0, 30.0, 300.0]),
    quantum=st.sampled_from([1 / 1024, 1 / 16, 61 / 1024, 1.0]), left_out=st.booleans(), wide=st.booleans(),
    temperatures=st.sampled_from([(1.0,), (1.0, 2.0), (0.5, 1.0, 3.0)]),
)  # fmt: skip
def test_packs_what_the_definition_packs(seed, k, scale, quantum, left_out, wide, temperatures):
    g = torch.Generator().manual_seed(seed)
    given_NK = -scale * torch.rand(6, k, generator=g)
    if left_out:
        given_NK[torch.rand(6, k, generator=g) < 0.3] = -torch.inf
        given_NK[0] = -torch.inf
    given_NK -= given_NK.amax(1, keepdim=True).nan_to_num(neginf=0)
    vocabulary = 70_000 if wide else 60_000
    ids = torch.stack([torch.randperm(vocabulary, generator=g)[:k] for _ in range(6)])
    names = ("first", *temperatures)
    how = Codec(vocabulary, k, quantum, scalars=names)
    planes, lost = by_definition(how, ids.numpy(), given_NK.numpy(), dict.fromkeys(names, np.zeros(6)))
    found = pack(Selected(ids, given_NK, {}), k, quantum, temperatures, wide)
    np.testing.assert_array_equal(found.ids_NK.numpy().view(np.uint16), planes.ids_nK)
    np.testing.assert_array_equal(found.values_NK.numpy(), planes.values_nK)
    np.testing.assert_array_equal(found.count_N.numpy(), planes.count_n)
    assert found.high_NK is None if not wide else (found.high_NK.numpy() == planes.high_nK).all()
    np.testing.assert_allclose(found.distortion_N.numpy(), lost, rtol=1e-4, atol=3e-7)
