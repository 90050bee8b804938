"""The graph of models: broken references, orders, how far a teacher is read."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ki_ds.corpus.stream import Mix
from ki_ds.experiment.graph import check, needs, order, targets_name, taught_by, wanted_targets
from ki_ds.experiment.schema import Experiment
from ki_ds.experiment.strict import parse
from ki_ds.stages import Corpus, Evaluate, Report, Teach, Tokenizer, Train
from ki_ds.stages.pipeline import stages
from ki_ds.targets.quanta import quantum
from ki_ds.targets.selection import Selection

calm = settings(deadline=None)


def model(start_from=None, teachers=None, on=None, steps=100, batch_size=8, k=10, length=None, targets=None,
          temperature=None, **more):  # fmt: skip
    """A model of the experiment; `teachers` maps corpora to teachers."""
    train = {"on": on or {"wb": 1.0}, "steps": steps, "batch_size": batch_size, "learning_rate": 1e-3}
    made = {"start_from": start_from} if start_from else {"architecture": "gpt-tiny"}
    if teachers:
        made["inherit"] = {"from": teachers, "targets": targets or {"k": k}, **(length or {"alpha_T": 1.0})}
        made["inherit"] |= {"temperature": temperature} if temperature else {}
    return {**made, "train": train, **more}


def experiment(models, corpora=("wb", "cs"), **more):
    data = {
        "name": "e",
        "objective": "clm",
        "tokenizer": {"train": {"vocabulary_size": 300, "on": ["wb"]}},
        "corpora": {name: {"sources": [{"text": "a.txt"}]} for name in corpora},
        "models": models,
    }
    return parse(Experiment, {**data, **more}, "e.json")


# ---------------------------------------------------------------------------------------------------- references


def test_a_sound_graph_has_no_problems():
    assert check(experiment({"t": model(), "s": model(teachers={"wb": "t"})})) == []


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"teacher": model(), "s": model(start_from="techer")},
         'models.s.start_from: there is no model "techer"; the file has teacher, s; did you mean "teacher"?'),
        ({"teacher": model(), "s": model(teachers={"wb": "teachr"})},
         'models.s.inherit.from.wb: there is no model "teachr"; the file has teacher, s; did you mean "teacher"?'),
        ({"s": model(on={"wbb": 1.0})},
         'models.s.train.on.wbb: there is no corpus "wbb"; the file has wb, cs; did you mean "wb"?'),
        ({"t": model(), "s": model(on={"wb": 1.0}, teachers={"cs": "t"})},
         'models.s.inherit.from.cs: there is no corpus in train.on "cs"; the file has wb'),
        ({"t": model(), "s": model(teachers={"wb": "t"}, k=301)},
         "models.s.inherit.targets.k: found 301; expected at most the vocabulary size, 300"),
        ({"t": model(), "s": model(teachers={"wb": "t"}, length={"schedule": "constant", "teacher_steps": 101})},
         "models.s.inherit.teacher_steps: found 101; expected at most train.steps, 100"),
        ({"t": model(), "s": model(teachers={"wb": "t"}, length={"schedule": "heaviside", "teacher_steps": 101})},
         "models.s.inherit.teacher_steps: found 101; expected at most train.steps, 100"),
        ({"t": model(), "s": model(teachers={"wb": "t"}, length={"teacher_steps": 200})},
         "models.s.inherit.teacher_steps: found 200; expected at most train.steps, 100; an alpha that ends above 0 is"
         ' given by its slope, here "alpha_T": 0.5'),
        ({"s": model(on={"wb": 1.0, "cs": 1e6})},
         "models.s.train.on: a weight is less than about 1/32768 of the rest, too little to ever be read"),
    ],
)  # fmt: skip
def test_broken_reference_names_place_and_neighbour(models, message):
    assert check(experiment(models)) == [message]


def test_k_may_equal_the_vocabulary():
    assert check(experiment({"t": model(), "s": model(teachers={"wb": "t"}, k=300)})) == []


def test_tokenizer_of_an_unknown_corpus():
    e = experiment({"a": model()}, tokenizer={"train": {"vocabulary_size": 300, "on": ["wb", "css"]}})
    assert check(e) == ['tokenizer.train.on: there is no corpus "css"; the file has wb, cs; did you mean "cs"?']


def test_pretrained_model_with_a_tokenizer_of_our_own():
    (line,) = check(experiment({"p": {"pretrained": "gpt2"}}))
    assert line.startswith("models.p.pretrained: this experiment trains a tokenizer of its own")
    assert '"tokenizer": {"pretrained": …}' in line
    assert check(experiment({"p": {"pretrained": "gpt2"}}, tokenizer={"pretrained": "gpt2"})) == []


def test_comparison_of_models_that_are_not_trained():
    e = experiment(
        {"base": model(), "p": {"pretrained": "gpt2"}},
        tokenizer={"pretrained": "gpt2"},
        compare=[{"student": "p", "baseline": "bse"}],
    )
    assert check(e) == [
        'compare.0.student: there is no trained model "p"; the file has base',
        'compare.0.baseline: there is no trained model "bse"; the file has base; did you mean "base"?',
    ]


@pytest.mark.parametrize(
    ("models", "cycle"),
    [
        ({"a": model(teachers={"wb": "a"})}, "models.a: a cycle: a needs a;"),
        ({"a": model(start_from="a")}, "models.a: a cycle: a needs a;"),
        ({"a": model(teachers={"wb": "b"}), "b": model(teachers={"wb": "a"})}, "models.a: a cycle: a needs b needs a;"),
        ({"a": model(start_from="b"), "b": model(teachers={"wb": "a"})}, "models.a: a cycle: a needs b needs a;"),
        ({"x": model(start_from="a"), "a": model(start_from="b"), "b": model(start_from="a")},
         "models.a: a cycle: a needs b needs a;"),
    ],
)  # fmt: skip
def test_cycle_is_named_model_by_model(models, cycle):
    (line,) = check(experiment(models))
    assert line.startswith(cycle)


def test_a_broken_reference_does_not_hide_a_cycle():
    lines = check(experiment({"a": model(start_from="b"), "b": model(start_from="a", teachers={"wb": "zzz"})}))
    assert any("a cycle" in line for line in lines) and any('no model "zzz"' in line for line in lines)


def test_a_teacher_that_is_also_the_origin_is_needed_once():
    assert needs(experiment({"t": model(), "s": model(start_from="t", teachers={"wb": "t"})}), "s") == ["t"]


# ------------------------------------------------------------------------------------------------------- order


@st.composite
def graphs(draw):
    """Random graphs without cycles, in random order of the file."""
    count = draw(st.integers(1, 7))
    rank = draw(st.permutations(range(count)))
    models = {}
    for number in draw(st.permutations(range(count))):
        below = [f"m{other}" for other in range(count) if rank[other] < rank[number]]
        start = draw(st.sampled_from([None, *below]))
        teacher = st.sampled_from([None, *below])
        teachers = {corpus: found for corpus in ("wb", "cs") if (found := draw(teacher))}
        models[f"m{number}"] = model(start, teachers, on={"wb": 1.0, "cs": 2.0})
    return experiment(models)


@calm
@given(graphs())
def test_order_puts_every_model_behind_what_it_needs(e):
    assert check(e) == []
    ordered = order(e)
    assert sorted(ordered) == sorted(e.models)
    for name in ordered:
        assert all(ordered.index(other) < ordered.index(name) for other in needs(e, name))


def test_order_keeps_the_files_where_it_can():
    assert order(experiment({"c": model(), "a": model(), "b": model()})) == ["c", "a", "b"]


def test_sixty_generations_are_ordered_at_once():
    """Each needs the two before it: visited anew by every path, this would take until the end of time."""
    models = {"g0": model(), "g1": model(start_from="g0")}
    for n in range(2, 60):
        models[f"g{n}"] = model(start_from=f"g{n - 1}", teachers={"wb": f"g{n - 2}"})
    e = experiment(dict(reversed(models.items())))
    assert check(e) == [] and order(e) == list(models)


@calm
@given(graphs())
def test_every_stage_stands_behind_its_inputs_and_once(e):
    found = stages(e)
    assert len(set(found)) == len(found) and found[0] == Tokenizer("tokenizer")
    assert found[-1] == Report("report")
    place = {stage: index for index, stage in enumerate(found)}

    def before(stage, *inputs):
        assert all(place[one] < place[stage] for one in inputs)

    for name, made in e.models.items():
        before(Evaluate(name), Train(name))
        before(Train(name), *(Corpus(corpus) for corpus in made.train.on))
        before(Train(name), *(Train(other) for other in needs(e, name)))
        for corpus, teacher in (made.inherit.teachers if made.inherit else {}).items():
            taught = Teach(targets_name(teacher, corpus, made.inherit))
            before(taught, Train(teacher), Corpus(corpus))
            before(Train(name), taught)
    assert {stage.name for stage in found if stage.kind == "corpus"} == set(e.corpora)


def test_a_pretrained_teacher_is_evaluated_but_not_trained():
    e = experiment(
        {"p": {"pretrained": "gpt2"}, "s": model(teachers={"wb": "p"})}, ["wb"], tokenizer={"pretrained": "gpt2"}
    )
    assert [str(stage) for stage in stages(e)] == [
        "tokenizer", "corpus wb", "teach p@wb", "train s", "evaluate p", "evaluate s", "report",
    ]  # fmt: skip


def test_folders_of_the_stages():
    e = experiment({"t": model(), "s": model(teachers={"wb": "t"})}, ["wb"])
    assert [stage.folder for stage in stages(e)] == [
        "tokenizer", "corpora/wb", "models/t", "targets/t@wb", "models/s", "results/t", "results/s", "report",
    ]  # fmt: skip


def test_two_students_share_the_targets_of_a_pair():
    e = experiment({"t": model(), "a": model(teachers={"wb": "t"}), "b": model(teachers={"wb": "t"})})
    assert sum(stage.kind == "teach" for stage in stages(e)) == 1


def taught(**students):
    """An experiment with one teacher; each student's targets settings and temperature."""
    made = {
        name: model(teachers={"wb": "t"}, targets=targets, temperature=temperature)
        for name, (targets, temperature) in students.items()
    }
    return experiment({"t": model(), **made}, ["wb"])


def teach_stages(e):
    return [stage.name for stage in stages(e) if stage.kind == "teach"]


def test_a_sweep_over_k_tail_and_temperature_shares_one_folder():
    """What one run of the teacher serves must not be paid for four times."""
    e = taught(
        a=({"k": 10}, 1.0), b=({"k": 50}, 2.0), c=({"select": "top_k", "k": 20}, 4.0),
        d=({"select": "top_k_tail", "k": 30}, 3.0),
    )  # fmt: skip
    assert teach_stages(e) == ["t@wb"]
    needed = wanted_targets(e, "t@wb")
    assert needed.spec.selection == Selection("top_k", 50)
    assert needed.spec.temperatures == (1.0, 2.0, 3.0, 4.0)
    assert needed.tails == (3.0,)


def test_top_p_has_a_folder_for_each_p_whatever_k_and_temperature():
    e = taught(
        a=({"select": "top_p", "p": 0.9, "k": 10}, 1.0), b=({"select": "top_p", "p": 0.9, "k": 40}, 2.0),
        c=({"select": "top_p", "p": 0.95}, 2.0), d=({"k": 7}, 2.0),
    )  # fmt: skip
    assert teach_stages(e) == ["t@wb@top_p-0.9", "t@wb@top_p-0.95", "t@wb"]
    assert wanted_targets(e, "t@wb@top_p-0.9").spec.selection == Selection("top_p", 40, p=0.9)
    assert wanted_targets(e, "t@wb@top_p-0.95").spec.selection == Selection("top_p", 100, p=0.95)
    assert wanted_targets(e, "t@wb").spec.selection == Selection("top_k", 7)


def test_draws_have_a_folder_for_each_number_and_temperature():
    """Draws from one distribution say nothing of another, and fewer of them are not a part of more."""
    e = taught(
        a=({"select": "sampled"}, 2.0), b=({"select": "sampled", "draws": 50}, 2.0),
        c=({"select": "sampled", "draws": 60}, 2.0), d=({"select": "sampled"}, 1.5),
    )  # fmt: skip
    assert teach_stages(e) == ["t@wb@sampled-50-t2", "t@wb@sampled-60-t2", "t@wb@sampled-50-t1.5"]
    assert wanted_targets(e, "t@wb@sampled-60-t2").spec.selection == Selection("sampled", 60, temperature=2.0)
    assert wanted_targets(e, "t@wb@sampled-50-t2").tails == ()


def test_numbers_that_differ_little_do_not_share_a_folder():
    e = taught(a=({"select": "top_p", "p": 0.9}, 2.0), b=({"select": "top_p", "p": 0.9000001}, 2.0),
               c=({"select": "sampled"}, 2.0), d=({"select": "sampled"}, 2.0000001))  # fmt: skip
    assert len(set(teach_stages(e))) == 4


def test_more_draws_than_the_vocabulary_has_ids_are_no_mistake():
    e = experiment(
        {"t": model(), "s": model(teachers={"wb": "t"}, targets={"select": "sampled", "draws": 255})},
        tokenizer={"train": {"vocabulary_size": 261, "on": ["wb"]}},
    )
    assert check(e) == []


@pytest.mark.parametrize("select", [{"select": "top_k_tail"}, {"select": "top_p", "p": 0.5}])
def test_k_beyond_the_vocabulary_is_refused_for_every_selection_that_takes_it(select):
    (line,) = check(experiment({"t": model(), "s": model(teachers={"wb": "t"}, targets={**select, "k": 301})}))
    assert line.startswith("models.s.inherit.targets.k: found 301; expected at most the vocabulary size, 300")


@pytest.mark.parametrize(("temperature", "mean"), [(0.0157, 2e-4), (0.9, 5e-8)])
def test_a_temperature_that_no_quantum_serves_is_refused_before_any_teacher_is_trained(temperature, mean):
    """Of draws, and of predictions that are stored already, it is no matter."""

    def found(**targets):
        teacher = {"targets": {"wb": "elsewhere"}} if targets.pop("stored", False) else model()
        student = model(teachers={"wb": "t"}, temperature=temperature, targets=targets)
        return check(experiment({"t": teacher, "s": student}, target_distortion={"mean": mean}))

    (line,) = found(k=10)
    assert re.match(rf"models\.s\.inherit\.temperature: found {temperature}; expected at least", line)
    lowest = float(re.search(r"at least ([\d.]+)", line)[1])
    assert quantum(mean, lowest * 1.01) == 1 / 1024
    assert found(select="sampled") == [] == found(k=10, stored=True)


# --------------------------------------------------------------------------------------------- stored teachers

STORED = {"targets": {"wb": "elsewhere"}}


def test_stored_teacher_is_neither_run_nor_evaluated():
    e = experiment({"t": STORED, "s": model(teachers={"wb": "t"})}, ["wb"])
    assert check(e) == []
    assert [str(stage) for stage in stages(e)] == ["tokenizer", "corpus wb", "train s", "evaluate s", "report"]
    assert taught_by(e, e.models["s"]) == {"wb": None}


def test_stored_and_computed_teachers_side_by_side():
    e = experiment({"t": STORED, "u": model(), "s": model(teachers={"wb": "t", "cs": "u"}, on={"wb": 1.0, "cs": 1.0})})
    assert check(e) == []
    assert taught_by(e, e.models["s"]) == {"wb": None, "cs": "u@cs"}
    assert teach_stages(e) == ["u@cs"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({"t": {"targets": {"wbb": "x"}}, "s": model()},
         'models.t.targets.wbb: there is no corpus "wbb"; the file has wb, cs; did you mean "wb"?'),
        ({"t": STORED, "s": model(on={"cs": 1.0}, teachers={"cs": "t"})},
         'models.s.inherit.from.cs: there is no corpus in its targets "cs"; the file has wb'),
        ({"t": STORED, "s": model(start_from="t")},
         'models.s.start_from: of "t" there are only predictions ("targets"), no weights'),
    ],
)  # fmt: skip
def test_what_a_stored_teacher_cannot_give_is_refused(models, message):
    assert check(experiment(models)) == [message]


def test_stored_teacher_is_not_compared():
    e = experiment({"t": STORED, "s": model(teachers={"wb": "t"})}, compare=[{"student": "s", "baseline": "t"}])
    assert check(e) == ['compare.0.baseline: there is no trained model "t"; the file has s']


# ---------------------------------------------------------------------------------------------- targets needed


def test_targets_reach_as_far_as_the_furthest_student_and_as_deep_as_the_deepest():
    e = experiment(
        {
            "t": model(steps=999),
            "far": model(teachers={"wb": "t"}, steps=100, batch_size=8, k=10, length={"teacher_steps": 30}),
            "deep": model(teachers={"wb": "t"}, steps=100, batch_size=2, k=20, length={"alpha_T": 4.0}),
            "other": model(teachers={"cs": "t"}, on={"cs": 1.0}, steps=100, batch_size=64, k=30),
        }
    )
    wb, cs = wanted_targets(e, "t@wb"), wanted_targets(e, "t@cs")
    assert (wb.teacher, wb.corpus, wb.spec.samples, wb.spec.selection) == ("t", "wb", 240, Selection("top_k", 20))
    assert (cs.teacher, cs.corpus, cs.spec.samples, cs.spec.selection) == ("t", "cs", 6400, Selection("top_k", 30))
    assert wanted_targets(e, "far@wb").spec.samples == 0


@calm
@given(
    weights=st.lists(st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0, 7.0]), min_size=2, max_size=4),
    steps=st.integers(1, 40),
    batch_size=st.integers(1, 16),
    taught=st.integers(1, 40),
)
def test_targets_of_a_mix_are_those_that_the_student_reads_and_not_one_more(weights, steps, batch_size, taught):
    corpora = [f"c{n}" for n in range(len(weights))]
    student = model(
        teachers=dict.fromkeys(corpora, "t"),
        on=dict(zip(corpora, weights, strict=True)),
        steps=steps,
        batch_size=batch_size,
        length={"teacher_steps": taught},
    )
    tokenizer = {"train": {"vocabulary_size": 300, "on": ["c0"]}}
    e = experiment({"t": model(on={"c0": 1.0}), "s": student}, corpora, tokenizer=tokenizer)
    streams, places = Mix(weights)(np.arange(min(taught, steps) * batch_size))
    for number, name in enumerate(corpora):
        read = places[streams == number]
        assert wanted_targets(e, f"t@{name}").spec.samples == (read.max() + 1 if len(read) else 0)
