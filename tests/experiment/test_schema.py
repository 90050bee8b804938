"""The experiment file: what is read."""

import json

import jsonschema
import pydantic
import pytest
from helpers.experiment_file import DESIGN, json_values, source, student
from hypothesis import example, given
from hypothesis import strategies as st

from ki_ds.errors import UserError, nearest
from ki_ds.experiment.schema import Experiment, Inherit
from ki_ds.experiment.sources import JsonLinesSource
from ki_ds.experiment.strict import merge_patch, parse
from ki_ds.files import digest

# --------------------------------------------------------------------------------------------------- the example


def test_the_example_of_the_design_loads(load):
    e = load()
    assert e.corpora["wb"].sources[1] == JsonLinesSource(jsonl="data/books.jsonl.zst")
    inherit = e.models["base-to-large"].inherit
    assert inherit.teachers == {"wb": "base"} and inherit.teacher_steps == 40000 and inherit.targets.k == 100
    assert e.views == 10 and e.model_seed("base") == 1
    assert e.models["base"].train.betas == (0.9, 0.98)
    assert e.models["base"].train.evaluation_steps == 6250 and e.models["base"].train.checkpoint_steps == 12500


def test_a_scale_patches_over_the_file(load):
    e = load(scale="small")
    assert e.sequence_length == 64 and list(e.models) == ["base", "base-to-large"]
    assert e.models["base"].train.steps == 100 and e.models["base"].train.batch_size == 2048
    assert e.models["base-to-large"].inherit.alpha_T == 3.0


def test_a_causal_model_has_one_view(load):
    assert load({"objective": "clm", "masking": None}).views == 1


def test_a_models_own_seed_wins_even_when_it_is_zero(load):
    assert load({"models": {"base": {"seed": 0}}}).model_seed("base") == 0


@pytest.mark.parametrize("steps", [1, 9, 19])
def test_short_runs_are_still_evaluated_and_saved(load, steps):
    train = load({"models": {"base": {"train": {"steps": steps}}}}).models["base"].train
    assert train.evaluation_steps >= 1 and train.checkpoint_steps >= 1


def test_objects_are_frozen(load):
    e = load()
    for thing, key in [(e, "seed"), (e.models["base"], "train"), (e.models["base-to-large"].inherit.targets, "k")]:
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(thing, key, None)


def test_dumped_experiment_loads_again_and_is_the_same(load, tmp_path):
    e = load()
    dumped = e.model_dump(mode="json", exclude_unset=True)
    assert "from" in dumped["models"]["base-to-large"]["inherit"]
    assert parse(Experiment, json.loads(json.dumps(dumped)), "again") == e


def test_schema_is_json_and_speaks_the_files_names():
    schema = json.loads(json.dumps(Experiment.model_json_schema(), allow_nan=False))
    assert set(schema["$defs"]["Inherit"]["properties"]) == {
        "from", "schedule", "alpha_T", "teacher_steps", "alpha", "temperature", "targets",
    }  # fmt: skip
    assert "from" in schema["$defs"]["Inherit"]["required"]
    assert schema["additionalProperties"] is False


def described(schema, place="(top)"):
    """The places of a JSON Schema's properties that have no description."""
    found = []
    if isinstance(schema, dict):
        for key, one in schema.get("properties", {}).items():
            found += [] if one.get("description") else [f"{place}.{key}"]
        for key, one in schema.items():
            found += described(one, f"{place}.{key}")
    elif isinstance(schema, list):
        found = [one for number, item in enumerate(schema) for one in described(item, f"{place}.{number}")]
    return found


def test_every_property_of_the_schema_is_described():
    assert described(Experiment.model_json_schema()) == []


@pytest.mark.parametrize(
    ("patch", "path"),
    [
        ({"sed": 1}, []),
        ({"tokenizer": {"train": {"vocab": 1}}}, ["tokenizer", "train"]),
        ({"models": {"base": {"train": {"stesp": 1}}}}, ["models", "base", "train"]),
        (student(inherit={"temprature": 1}), ["models", "base-to-large", "inherit"]),
        (student(inherit={"targets": {"kk": 1}}), ["models", "base-to-large", "inherit", "targets"]),
        ({"models": {"base": {"train": {"micro_batch_size": "8"}}}}, ["models", "base", "train", "micro_batch_size"]),
        (source(text="a", tex="b"), ["corpora", "wb", "sources", 1]),
        (source(jsonl="a", field=3), ["corpora", "wb", "sources", 1, "field"]),
        (source(text="a", jsonl="b"), ["corpora", "wb", "sources", 1]),
        ({"inference": {"precison": "bf16"}}, ["inference"]),
    ],
)
def test_an_editor_underlines_a_mistake_where_it_is(patch, path):
    """And not the whole optional block around it, as beside "or null"."""
    validator = jsonschema.Draft202012Validator(Experiment.model_json_schema())
    data = merge_patch(json.loads(DESIGN), patch)
    errors = list(validator.iter_errors(data))
    assert errors and {tuple(error.absolute_path) for error in errors} == {tuple(path)}
    assert any(error.validator in ("additionalProperties", "type", "oneOf") for error in errors)
    assert list(validator.iter_errors(json.loads(DESIGN))) == []


def test_a_file_may_name_its_schema(load):
    """For editors: neither the experiment's identity nor what a stage sees of it changes."""
    named = load({"$schema": "./experiment.schema.json"})
    assert digest(named.model_dump(mode="json")) == digest(load().model_dump(mode="json"))
    assert "$schema" in Experiment.model_json_schema()["properties"]


# ----------------------------------------------------------------------------------------------------- properties

PLACES = [
    ("models", "base", "train", "steps"),
    ("models", "base-to-large", "inherit"),
    ("corpora", "wb", "sources"),
    ("tokenizer",),
    ("engine",),
    ("compare",),
    ("scales",),
]


@given(st.sampled_from(PLACES), json_values)
@example(("scales",), {"small": None})
def test_any_value_anywhere_loads_or_is_reported_at_its_place(place, value):
    """No value makes the reader itself fail, and no error points to a place that the file does not have."""
    data = json.loads(DESIGN)
    *above, last = place
    holder = data
    for key in above:
        holder = holder[key]
    holder[last] = value
    try:
        parse(Experiment, data, "e.json")
    except UserError as error:
        for line in str(error).splitlines():
            shown = line.removeprefix("e.json: ").split(": ")[0].split(".")
            upper = ".".join(shown[: len(place)])
            assert upper == ".".join(place) or tuple(shown) == place[: len(shown)] or shown == ["(top)"]


def test_the_length_of_inheritance_is_the_same_however_inherit_is_made():
    by_alias = parse(Inherit, {"from": {"a": "b"}, "alpha_T": 2}, "x")
    assert by_alias == Inherit(teachers={"a": "b"}, alpha_T=2.0)


def test_nearest_is_silent_where_nothing_is_near():
    assert nearest("steps", ["steps_"]) == '; did you mean "steps_"?'
    assert nearest("steps", ["qqq"]) == "" and nearest("steps", []) == ""
