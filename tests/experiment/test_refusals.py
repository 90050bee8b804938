"""Every mistake in an experiment file is named with file, JSON path, finding and remedy."""

import json
import math
import re

import pytest
from helpers.experiment_file import DESIGN, source, student

from ki_ds.errors import UserError
from ki_ds.experiment.schema import Experiment
from ki_ds.experiment.sources import SOURCE_KINDS
from ki_ds.experiment.strict import merge_patch, parse
from ki_ds.targets.quanta import quantum

# ---------------------------------------------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("patch", "place", "meant"),
    [
        ({"sed": 1}, "sed", "seed"),
        ({"tokenizer": {"trian": {}}}, "tokenizer.trian", "train"),
        ({"tokenizer": {"train": {"vocab_size": 1}}}, "tokenizer.train.vocab_size", "vocabulary_size"),
        ({"masking": {"view": 1}}, "masking.view", "views"),
        ({"corpora": {"wb": {"validaton": 1}}}, "corpora.wb.validaton", "validation"),
        (source(jsonl="a", filed="b"), "corpora.wb.sources.1.filed", "field"),
        (source(parquet="a", filed="b"), "corpora.wb.sources.1.filed", "field"),
        (source(dataset="a", splt="b"), "corpora.wb.sources.1.splt", "split"),
        (source(text="a", tex="b"), "corpora.wb.sources.1.tex", "text"),
        ({"models": {"base": {"architcture": "x"}}}, "models.base.architcture", "architecture"),
        ({"models": {"base": {"train": {"batchsize": 1}}}}, "models.base.train.batchsize", "batch_size"),
        (student(inherit={"form": {}}), "models.base-to-large.inherit.form", "from"),
        (student(inherit={"targets": {"selct": 1}}), "models.base-to-large.inherit.targets.selct", "select"),
        ({"compare": [{"student": "base", "baseline": "large", "basline": "x"}]}, "compare.0.basline", "baseline"),
    ],
)  # fmt: skip
def test_unknown_key_at_every_level_names_its_neighbour(failure, patch, place, meant):
    (line,) = failure(patch)
    assert line.startswith(f"{place}: unknown key; allowed: ")
    assert meant in line.split("allowed: ")[1].split(";")[0].split(", ")
    assert line.endswith(f'; did you mean "{meant}"?')


def test_a_key_of_former_versions_names_its_new_name(failure):
    (line,) = failure({"positions_per_shard": 8})
    assert line.startswith("positions_per_shard: unknown key") and 'did you mean "samples_per_shard"?' in line


def test_unknown_key_like_no_other_lists_the_allowed_ones_only(failure):
    (line,) = failure({"masking": {"qqqq": 1}})
    assert line == "masking.qqqq: unknown key; allowed: probability, views"


def test_the_python_name_of_an_aliased_field_is_no_key(failure):
    lines = failure(student(inherit={"from": None, "teachers": {"wb": "base"}}))
    assert any(line.startswith("models.base-to-large.inherit.teachers: unknown key; allowed: from, ") for line in lines)
    assert "models.base-to-large.inherit.from: missing; it is required" in lines


# ------------------------------------------------------------------------------------------------- wrong types


@pytest.mark.parametrize(
    ("patch", "message"),
    [
        ({"seed": "1"}, 'seed: expected an integer; found "1"'),
        ({"seed": True}, "seed: expected an integer; found true"),
        ({"seed": 1.0}, "seed: expected an integer; found 1.0"),
        ({"corpora": 5}, "corpora: expected an object; found 5"),
        ({"corpora": {"wb": {"sources": {"text": "a"}}}}, 'corpora.wb.sources: expected an array; found {"text": "a"}'),
        (source(text=3), "corpora.wb.sources.1.text: expected a string; found 3"),
        ({"tokenizer": {"train": {"on": ["wb", 3]}}}, "tokenizer.train.on.1: expected a string; found 3"),
        ({"tokenizer": "gpt2"}, 'tokenizer: expected an object; found "gpt2"'),
        ({"engine": 3}, "engine: expected a string or an object; found 3"),
        ({"models": {"base": {"architecture": [1]}}},
         "models.base.architecture: expected a string or an object; found [1]"),
        ({"models": {"base": 5}}, "models.base: expected an object; found 5"),
        ({"models": {"base": {"padded_vocabulary": 1}}},
         "models.base.padded_vocabulary: expected true or false; found 1"),
        ({"models": {"base": {"train": {"learning_rate": "5e-4"}}}},
         'models.base.train.learning_rate: expected a number; found "5e-4"'),
        ({"models": {"base": {"train": {"on": ["wb"]}}}}, 'models.base.train.on: expected an object; found ["wb"]'),
        ({"models": {"base": {"train": {"betas": 0.9}}}}, "models.base.train.betas: expected an array; found 0.9"),
        ({"compare": {"student": "x"}}, 'compare: expected an array; found {"student": "x"}'),
        ({"scales": {"small": 3}}, "scales.small: expected an object; found 3"),
    ],
)  # fmt: skip
def test_wrong_type_shows_what_was_found(failure, patch, message):
    assert failure(patch) == [message]


@pytest.mark.parametrize(
    ("patch", "place", "limit"),
    [
        ({"sequence_length": 4}, "sequence_length", "greater than or equal to 8"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 1 << 32}, "seed", "less than 4294967296"),
        ({"tokenizer": {"train": {"vocabulary_size": 260}}}, "tokenizer.train.vocabulary_size", "equal to 261"),
        ({"tokenizer": {"train": {"on": []}}}, "tokenizer.train.on", "at least 1"),
        ({"masking": {"probability": 1.0}}, "masking.probability", "less than 1"),
        ({"masking": {"views": 0}}, "masking.views", "greater than 0"),
        ({"corpora": {"wb": {"validation": 0}}}, "corpora.wb.validation", "greater than 0"),
        ({"corpora": {"wb": {"sources": []}}}, "corpora.wb.sources", "at least 1"),
        ({"models": {"base": {"train": {"steps": 0}}}}, "models.base.train.steps", "greater than 0"),
        ({"models": {"base": {"train": {"warmup": 1.5}}}}, "models.base.train.warmup", "less than or equal to 1"),
        ({"models": {"base": {"train": {"betas": [0.9, 2]}}}}, "models.base.train.betas.1", "less than 1"),
        ({"models": {"base": {"train": {"dropout": 1}}}}, "models.base.train.dropout", "less than 1"),
        ({"models": {"base": {"train": {"on": {"wb": 0}}}}}, "models.base.train.on.wb", "greater than 0"),
        (student(inherit={"temperature": 0}), "models.base-to-large.inherit.temperature", "greater than 0"),
        (student(inherit={"targets": {"k": 1025}}), "models.base-to-large.inherit.targets.k", "equal to 1024"),
        (student(inherit={"targets": {"select": "top_p", "p": 0}}), "models.base-to-large.inherit.targets.p", "than 0"),
        (
            student(inherit={"targets": {"select": "top_p", "p": 1.01}}),
            "models.base-to-large.inherit.targets.p",
            "equal to 1",
        ),
        (
            student(inherit={"targets": {"select": "sampled", "k": None, "draws": 256}}),
            "models.base-to-large.inherit.targets.draws",
            "equal to 255",
        ),
        ({"target_distortion": {"mean": 0}}, "target_distortion.mean", "equal to 0.00000005"),
        ({"target_distortion": {"mean": 0.05}}, "target_distortion.mean", "equal to 0.04"),
        ({"target_distortion": {"max": 0}}, "target_distortion.max", "greater than 0"),
        ({"models": {"base": {"architecture": None, "train": None, "targets": {}}}}, "models.base.targets", "least 1"),
        ({"samples_per_shard": 0}, "samples_per_shard", "greater than 0"),
        *(
            (
                {"models": {"base": {"train": {key: most * 1.5 if isinstance(most, float) else most + 1}}}},
                f"models.base.train.{key}",
                "less than or equal to",
            )
            for key, most in {
                "steps": 10**9,
                "batch_size": 1 << 17,
                "micro_batch_size": 1 << 17,
                "learning_rate": 1e3,
                "epsilon": 1e3,
                "weight_decay": 1e3,
                "gradient_clipping": 1e9,
                "evaluate_every": 10**9,
                "checkpoint_every": 10**9,
                "keep_checkpoints": 10**9,
                "decay_steps": 10**9,
            }.items()
        ),
        ({"models": {"base": {"train": {"on": {"wb": 1e300}}}}}, "models.base.train.on.wb", "less than or equal to"),
        (student(inherit={"temperature": 1e300}), "models.base-to-large.inherit.temperature", "equal to 1000"),
        (student(inherit={"teacher_steps": None, "alpha_T": 1e300}), "models.base-to-large.inherit.alpha_T", "less"),
        ({"target_distortion": {"max": 1e300}}, "target_distortion.max", "less than or equal to 1000"),
        ({"inference": {"tensor_parallel": 1 << 62}}, "inference.tensor_parallel", "less than or equal to"),
    ],
)
def test_number_out_of_range_names_the_limit(failure, patch, place, limit):
    (line,) = failure(patch)
    assert line.startswith(f"{place}: ") and limit in line and "; found " in line


def test_an_infinite_number_is_refused_wherever_it_comes_from(load):
    data = merge_patch(json.loads(DESIGN), {"models": {"base": {"train": {"learning_rate": math.inf}}}})
    with pytest.raises(UserError, match=re.escape("x: models.base.train.learning_rate: ")):
        parse(Experiment, data, "x")
    with pytest.raises(UserError, match="learning_rate=1e999: the number 1e999 is too large"):
        load(settings=["models.base.train.learning_rate=1e999"])


@pytest.mark.parametrize(
    ("patch", "place", "allowed", "meant"),
    [
        ({"objective": "mln"}, "objective", "mlm, clm", "mlm"),
        ({"corpora": {"wb": {"invalid_utf8": "replaced"}}}, "corpora.wb.invalid_utf8", "replace, refuse", "replace"),
        (student(inherit={"schedule": "linaer"}), "models.base-to-large.inherit.schedule",
         "linear, heaviside, constant", "linear"),
        (student(inherit={"targets": {"select": "topk"}}), "models.base-to-large.inherit.targets.select",
         "top_k, top_k_tail, top_p, sampled", "top_k"),
    ],
)  # fmt: skip
def test_bad_literal_lists_the_allowed_and_the_nearest(failure, patch, place, allowed, meant):
    (line,) = failure(patch)
    assert line.startswith(f"{place}: found ") and f'; allowed: {allowed}; did you mean "{meant}"?' in line


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", ".a", "-a", "a@b", "é", "a" * 101])
def test_bad_names_are_refused_everywhere(failure, name):
    for patch, place in [
        ({"name": name}, "name"),
        ({"corpora": {name: {"sources": [{"text": "a"}]}}}, f"corpora.{name}"),
        ({"models": {name: json.loads(DESIGN)["models"]["base"]}}, f"models.{name}"),
        (student(inherit={"from": {"wb": name}}), "models.base-to-large.inherit.from.wb"),
        ({"models": {"base": {"train": {"on": {name: 1.0}}}}}, f"models.base.train.on.{name}"),
        ({"scales": {name: {}}}, f"scales.{name}"),
    ]:
        text = "\n".join(failure(patch))
        assert f"{place}: a name is letters, digits, '.', '_' and '-', at most 100 of them; found " in text


def test_a_name_with_a_line_break_is_refused():
    with pytest.raises(UserError, match="e: name: a name is letters"):
        parse(Experiment, merge_patch(json.loads(DESIGN), {"name": "a\n"}), "e")


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "a" * 100])
def test_good_names_are_accepted(load, name):
    assert name in load({"models": {name: json.loads(DESIGN)["models"]["base"]}}).models


@pytest.mark.parametrize("key", ["name", "objective", "tokenizer", "corpora", "models"])
def test_missing_key_is_named(failure, key):
    assert f"{key}: missing; it is required" in failure({key: None})


@pytest.mark.parametrize("key", ["on", "steps", "batch_size", "learning_rate"])
def test_missing_training_key_is_named(failure, key):
    assert failure({"models": {"base": {"train": {key: None}}}}) == [
        f"models.base.train.{key}: missing; it is required"
    ]


@pytest.mark.parametrize("keys", [{}, {"txt": "a"}, {"text": "a", "jsonl": "b"}, {"field": "text"}])
def test_a_source_of_no_kind_or_of_two_lists_the_kinds(failure, keys):
    (line,) = failure(source(**keys))
    assert line == (
        f"corpora.wb.sources.1: a source has exactly one of the keys {', '.join(SOURCE_KINDS)}; "
        f"found {json.dumps(keys)}"
    )


def test_a_source_of_former_versions_says_what_to_do_instead(failure):
    (line,) = failure(source(installed_documentation=["torch"]))
    assert line.startswith('corpora.wb.sources.1: "installed_documentation" is no source any more: `ki-ds demo` writes')
    assert 'Expected {"jsonl": "documentation.jsonl"}' in line


# ------------------------------------------------------------------------------------------- keys that contradict


@pytest.mark.parametrize(
    ("patch", "place", "words"),
    [
        ({"tokenizer": {"pretrained": "gpt2"}}, "tokenizer", ['exactly one of "train" and "pretrained"']),
        ({"tokenizer": {"train": None}}, "tokenizer", ['exactly one of "train" and "pretrained"']),
        ({"models": {"base": {"train": {"warmup_steps": 5}}}}, "models.base.train",
         ['"schedule": "linear" takes warmup; it has warmup_steps']),
        ({"models": {"base": {"train": {"schedule": "constant", "warmup": 0.1, "warmup_steps": 5}}}},
         "models.base.train", ['"schedule": "constant" takes warmup_steps; it has warmup and warmup_steps']),
        ({"models": {"base": {"train": {"schedule": "constant", "decay_steps": 5, "warmup_steps": 5}}}},
         "models.base.train", ['"schedule": "constant" takes warmup_steps; it has decay_steps and warmup_steps']),
        ({"models": {"base": {"train": {"schedule": "wsd", "decay_steps": 5}}}}, "models.base.train",
         ['"schedule": "wsd" takes decay_steps and warmup_steps; it has decay_steps']),
        ({"models": {"base": {"train": {"schedule": "wsd", "warmup_steps": 5}}}}, "models.base.train",
         ['"schedule": "wsd" takes decay_steps and warmup_steps; it has warmup_steps']),
        ({"models": {"base": {"train": {"schedule": "wsd", "warmup_steps": 125_000, "decay_steps": 7}}}},
         "models.base.train", ['"warmup_steps" and "decay_steps" are together more than "steps"']),
        ({"models": {"base": {"train": {"schedule": "constant"}}}}, "models.base.train", ["it has none"]),
        ({"models": {"base": {"start_from": "large"}}}, "models.base",
         ['exactly one of "architecture", "start_from", "pretrained" and "targets"']),
        ({"models": {"base": {"pretrained": "gpt2"}}}, "models.base",
         ['exactly one of "architecture", "start_from", "pretrained" and "targets"']),
        ({"models": {"base": {"architecture": None}}}, "models.base",
         ['exactly one of "architecture", "start_from", "pretrained" and "targets"']),
        ({"models": {"base": {"targets": {"wb": "t"}}}}, "models.base",
         ['exactly one of "architecture", "start_from", "pretrained" and "targets"']),
        ({"models": {"base": {"train": None}}}, "models.base",
         ['only a model with "pretrained" or "targets" can go without "train"']),
        ({"models": {"base": {"architecture": None, "targets": {"wb": "t"}}}}, "models.base",
         ['"targets" are predictions of a model made elsewhere; it cannot be trained here']),
        (student(architecture=None, targets={"wb": "t"}, train=None), "models.base-to-large",
         ['"inherit" needs "train"']),
        (student(architecture=None, pretrained="x", train=None), "models.base-to-large", ['"inherit" needs "train"']),
        (student(inherit={"alpha_T": 3}), "models.base-to-large.inherit",
         ['exactly one of "alpha_T" and "teacher_steps"']),
        (student(inherit={"teacher_steps": None}), "models.base-to-large.inherit",
         ['exactly one of "alpha_T" and "teacher_steps"']),
        (student(inherit={"alpha": 0.5}), "models.base-to-large.inherit", ['"alpha" belongs to the constant schedule']),
        (student(inherit={"schedule": "constant", "alpha_T": 3}), "models.base-to-large.inherit", ['not "alpha_T"']),
        ({"objective": "clm"}, "(top)", ['"masking" belongs to the objective "mlm"']),
    ],
)  # fmt: skip
def test_contradiction_is_named(failure, patch, place, words):
    (line,) = failure(patch)
    assert line.startswith(f"{place}: ") and all(word in line for word in words)


@pytest.mark.parametrize(
    ("select", "key", "value", "own"),
    [
        ("top_k", "p", 0.9, "k"),
        ("top_k", "draws", 50, "k"),
        ("top_k_tail", "p", 0.9, "k"),
        ("top_k_tail", "draws", 50, "k"),
        ("top_p", "draws", 50, "k, p"),
        ("sampled", "k", 100, "draws"),
        ("sampled", "p", 0.9, "draws"),
    ],
)
def test_key_of_another_selection_is_refused_even_with_its_default(failure, select, key, value, own):
    """The file's reader would believe that it does something."""
    needed = {"p": 0.5} if select == "top_p" else {}
    (line,) = failure(student(inherit={"targets": {"k": None, **needed, "select": select, key: value}}))
    said = f'models.base-to-large.inherit.targets: "{key}" does not belong to "select": "{select}", which takes {own}'
    assert line.startswith(f"{said}; found {{")


def test_top_p_needs_p(failure):
    for more in ({}, {"k": None}):
        (line,) = failure(student(inherit={"targets": {"select": "top_p", **more}}))
        assert line.startswith('models.base-to-large.inherit.targets: "top_p" needs "p", the mass to be reached; found')


@pytest.mark.parametrize(
    ("given", "kind", "k", "tail"),
    [
        ({}, "top_k", 100, False),
        ({"k": 7}, "top_k", 7, False),
        ({"select": "top_k_tail", "k": 7}, "top_k", 7, True),
        ({"select": "top_p", "p": 0.9}, "top_p", 100, False),
        ({"select": "top_p", "p": 1, "k": 7}, "top_p", 7, False),
        ({"select": "sampled"}, "sampled", 50, False),
        ({"select": "sampled", "draws": 255}, "sampled", 255, False),
    ],
)
def test_what_a_folder_holds_for_the_settings(load, given, kind, k, tail):
    whole = {"k": None, "select": None, **given}
    inherit = load(student(inherit={"targets": whole, "temperature": 3.0})).models["base-to-large"].inherit
    found = inherit.targets.selection(inherit.temperature)
    assert (found.kind, found.k, inherit.targets.tail) == (kind, k, tail)
    assert found.p == given.get("p", 1.0)
    assert found.temperature == (3.0 if kind == "sampled" else 1.0)  # only draws depend on it


def test_smallest_allowed_distortion_has_a_quantum(load, failure):
    """Below it no quantum is left, which must not come up while a teacher runs."""
    assert quantum(load({"target_distortion": {"mean": 5e-8}}).target_distortion.mean) == 1 / 1024
    with pytest.raises(ValueError, match="below what the smallest quantum"):
        quantum(4.9e-8)
    assert failure({"target_distortion": {"mean": 4.9e-8}})[0].startswith("target_distortion.mean: ")


def test_constant_schedule_may_end_early_or_never(load):
    for patch in ({"schedule": "constant"}, {"schedule": "constant", "teacher_steps": None, "alpha": 0.3}):
        assert load(student(inherit=patch)).models["base-to-large"].inherit.schedule == "constant"


def test_unknown_scale_lists_the_scales(failure):
    assert failure(scale="smal") == ['scales: there is no scale "smal"; the file has small; did you mean "small"?']
    assert failure({"scales": None}, scale="small") == ['scales: there is no scale "small"; the file has none']


def test_a_scale_that_is_no_object(failure):
    assert failure({"scales": {"small": 3}}, scale="small") == [
        "scales.small: expected an object, a merge patch over this file"
    ]


def test_a_mistake_in_a_scale_shows_once_it_is_applied(load, failure):
    patch = {"scales": {"small": {"sed": 1}}}
    load(patch)
    assert failure(patch, scale="small")[0].startswith("sed: unknown key; ")


def test_all_problems_come_at_once(failure):
    lines = failure({"sed": 1, "seed": "x", "objective": "mln", "models": {"base": {"train": {"steps": 0}}}})
    assert {line.split(":")[0] for line in lines} == {"sed", "seed", "objective", "models.base.train.steps"}


def test_broken_references_come_with_the_file(failure):
    lines = failure(
        {"models": {"base": {"train": {"on": {"wbb": 1.0}}}}, "compare": [{"student": "bas", "baseline": "x"}]}
    )
    assert lines[0] == 'models.base.train.on.wbb: there is no corpus "wbb"; the file has wb; did you mean "wb"?'
    assert lines[1].startswith('compare.0.student: there is no trained model "bas"')


def test_a_long_finding_is_cut(failure):
    (line,) = failure({"seed": "x" * 10_000})
    assert len(line) < 150 and line.endswith("...")
