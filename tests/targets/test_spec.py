"""What a targets folder holds: one object gives its identity, its codec, and whether it serves a wish."""

from dataclasses import replace

import pytest

from ki_ds.targets.codec import Codec
from ki_ds.targets.quanta import quantum
from ki_ds.targets.selection import Selection
from ki_ds.targets.spec import TargetSpec

TOP_K = TargetSpec(Selection("top_k", 20), (2.0,), 2e-4, 100)
DRAWS = TargetSpec(Selection("sampled", 50, temperature=2.0), (2.0,), 2e-4, 100)


def test_one_is_always_among_the_temperatures_but_of_draws():
    assert TOP_K.temperatures == (1.0, 2.0) and TargetSpec(TOP_K.selection, (), 2e-4, 1).temperatures == (1.0,)
    assert DRAWS.temperatures == () and DRAWS.mean_distortion is None


def test_temperatures_are_those_that_their_names_give():
    spec = TargetSpec(TOP_K.selection, (1 / 3, 3.0, 1.0), 2e-4, 1)
    assert spec.temperatures == (0.333333333333, 1.0, 3.0)
    assert spec.config["scalars"] == ["first", "truth", "tail@0.333333333333", "tail@1", "tail@3"]
    assert Codec.read(spec.codec(300).record) == spec.codec(300)
    assert spec.codec(300).stores(1 / 3) and spec.serves(spec, (1 / 3,))


def test_config_is_that_of_folders_written_before():
    """Their fingerprints stay."""
    assert TOP_K.config == {
        "selection": {"kind": "top_k", "k": 20, "p": 1.0, "temperature": 1.0},
        "scalars": ["first", "truth", "tail@1", "tail@2"],
        "target_distortion": 2e-4,
    }
    assert DRAWS.config == {
        "selection": {"kind": "sampled", "k": 50, "p": 1.0, "temperature": 2.0},
        "scalars": ["truth"],
    }


@pytest.mark.parametrize("spec", [TOP_K, DRAWS, TargetSpec(Selection("top_p", 9, p=0.9), (0.5, 4.0), 1e-3, 100)])
def test_config_says_it_all_but_the_length(spec):
    assert TargetSpec.from_config({**spec.config, "seed": 1}, 100) == spec
    assert TargetSpec.from_config(spec.config, 7) == replace(spec, samples=7)


def test_codec_of_log_probabilities():
    assert TOP_K.codec(300) == Codec(300, 20, quantum(2e-4), ("first", "truth", 1.0, 2.0))
    cold = TargetSpec(Selection("top_k", 20), (0.5,), 2e-4, 1)
    assert cold.codec(300).quantum == quantum(2e-4, 0.5) < quantum(2e-4)
    with pytest.raises(ValueError, match="k ≤ vocabulary"):
        TOP_K.codec(19)


def test_codec_of_draws_has_no_more_entries_than_ids():
    assert DRAWS.codec(300) == Codec(300, 50, 0.0, ("truth",)) and DRAWS.codec(300).counts
    assert DRAWS.codec(8) == Codec(8, 8, 0.0, ("truth",))


def test_log_probabilities_need_a_bound():
    with pytest.raises(ValueError, match="need a bound"):
        TargetSpec(Selection("top_k", 20), (), None, 1)


@pytest.mark.parametrize(
    ("wanted", "tails", "serves"),
    [
        (TOP_K, (), True), (TOP_K, (1.0, 2.0), True), (TOP_K, (3.0,), False),
        (replace(TOP_K, temperatures=(3.0,)), (), True), (replace(TOP_K, temperatures=(3.0,)), (3.0,), False),
        (replace(TOP_K, selection=Selection("top_k", 7)), (2.0,), True),
        (replace(TOP_K, selection=Selection("top_k", 21)), (), False),
        (replace(TOP_K, selection=Selection("top_p", 20, p=0.9)), (), False),
        (replace(TOP_K, mean_distortion=1e-3, samples=10**6), (), True),
        (DRAWS, (), False),
    ],
)  # fmt: skip
def test_a_folder_serves_what_it_holds(wanted, tails, serves):
    assert TOP_K.serves(wanted, tails) == serves


def test_draws_serve_draws_at_their_temperature():
    assert DRAWS.serves(DRAWS, ())
    assert not DRAWS.serves(replace(DRAWS, selection=Selection("sampled", 50, temperature=1.0)), ())
