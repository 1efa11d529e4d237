from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import simfluence as sf
from simfluence import specs
from simfluence.errors import InvalidInput
from simfluence.specs import CURRICULA, ExplicitCurricula, RecordingSpec, WhatIfSpec

GOOD = """
task: {name: digits, arguments: {n_train: 30, n_test: 10}}
recipe: {optimizer: AdamW, lr: 0.01, schedule: cosine, horizon: 5}
curricula: {runs: 3, steps: 5, batch_size: 4, subset: 0.5, seed: 2}
observe: {every: 2, measures: [margin]}
"""
TRAIN = sf.Examples.numbered(30, pd.DataFrame({"label": [i % 3 for i in range(30)], "length": range(30, 0, -1)}))


def curricula_of(text):
    return RecordingSpec.parse(f"curricula: {text}").curricula


def test_a_specification_makes_what_it_says():
    spec = RecordingSpec.parse(GOOD)
    task = spec.task.build()
    assert task.fingerprint == sf.tasks.digits(n_train=30, n_test=10).fingerprint
    assert spec.recipe == sf.Recipe(optimizer="adamw", lr=0.01, schedule="cosine", horizon=5)
    assert spec.observe == sf.Observe(every=2, measures=["margin"])
    expected = sf.random_curricula(n_train=30, runs=3, steps=5, batch_size=4, subset=0.5, seed=2)
    assert spec.curricula.build(task.train) == expected


SHAPE = "runs: 3, steps: 9, batch_size: 4, subset: 0.7, seed: 2"
KINDS = {
    f"{{{SHAPE}}}": {},
    f"{{kind: subset, {SHAPE}}}": {},
    f"{{kind: replacement, {SHAPE}}}": {"replacement": True},
    f"{{kind: sorted, column: length, {SHAPE}}}": {"sort_by": TRAIN.column("length")},
    f"{{kind: sorted, column: length, descending: true, {SHAPE}}}": {
        "sort_by": TRAIN.column("length"),
        "descending": True,
    },
    f"{{kind: staged, column: label, {SHAPE}}}": {"stages": [list(range(k, 30, 3)) for k in range(3)]},
    f"{{kind: staged, column: label, stages: [[2], [0, 1]], {SHAPE}}}": {
        "stages": [list(range(2, 30, 3)), [i for i in range(30) if i % 3 < 2]]
    },
}


@pytest.mark.parametrize("text", KINDS)
def test_every_kind_is_that_of_random_curricula(text):
    expected = sf.random_curricula(30, 3, 9, 4, subset=0.7, seed=2, **KINDS[text])
    assert curricula_of(text).build(TRAIN) == expected
    assert any(isinstance(curricula_of(text), kind) for kind in CURRICULA.values())


def test_explicit_batches():
    spec = curricula_of("{kind: explicit, curricula: [[[0, 1], [2]], [[29], []]]}")
    assert spec.build(TRAIN) == [sf.Curriculum([[0, 1], [2]], 30), sf.Curriculum([[29], []], 30)]


@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 29), max_size=4), min_size=1, max_size=5).filter(any), min_size=1, max_size=3
    )
)
def test_any_curriculum_survives_yaml_and_json(batches):
    curricula = [sf.Curriculum(each, n_train=30) for each in batches]
    spec = RecordingSpec(curricula=ExplicitCurricula.of(curricula), recipe=sf.Recipe(lr=0.25))
    again = RecordingSpec.parse(spec.dump())
    assert again == spec
    assert again.curricula.build(TRAIN) == curricula
    as_json = ExplicitCurricula.model_validate_json(spec.curricula.model_dump_json())
    assert as_json.build(TRAIN) == curricula


@pytest.mark.parametrize("text", KINDS)
def test_specifications_survive_yaml(text):
    spec = RecordingSpec.parse(
        GOOD.replace("curricula: {runs: 3, steps: 5, batch_size: 4, subset: 0.5, seed: 2}", f"curricula: {text}")
    )
    again = RecordingSpec.parse(spec.dump())
    assert again == spec
    assert again.curricula.build(TRAIN) == spec.curricula.build(TRAIN)


@pytest.mark.parametrize(("subset", "examples"), [("1", 1), ("1.0", 30), ("7", 7)])
def test_subset_is_a_number_or_a_fraction(subset, examples):
    made = curricula_of(f"{{runs: 1, steps: 99, batch_size: 4, subset: {subset}}}").build(TRAIN)
    assert len(set(made[0].indices.tolist())) == examples


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("runs: 3", "runs: 0", "curricula.runs"),
        ("runs: 3", "run: 3", "curricula.runs: .*curricula.run: unknown field, did you mean 'runs'"),
        ("runs: 3", "runs: 3, kind: stagd", "curricula.kind: unknown kind 'stagd', did you mean 'staged'"),
        ("runs: 3", "runs: 3, kind: sorted", "curricula.column: Field required"),
        ("runs: 3", "runs: 3, kind: explicit", "curricula.runs: unknown field"),
        ("lr: 0.01", "lr: fast", "recipe.lr"),
        ("optimizer: AdamW", "optimizer: adamx", "recipe.optimizer: .*did you mean"),
        ("every: 2", "every: 0", "observe.every"),
        ("task:", "tasks:", "tasks: unknown field, did you mean 'task'"),
        (GOOD, "- 1", "not a mapping with the keys"),
        (GOOD, "", "not a mapping with the keys"),
        (GOOD, "1: 2", "unknown field"),
        (GOOD, "a: [", "not plain YAML"),
        (GOOD, "[" * 3000, "not plain YAML"),
        ("name: digits", "name: !!python/name:os.system", "not plain YAML"),
        ("name: digits", "name: !!python/object/apply:os.getcwd []", "not plain YAML"),
        ("runs: 3", "runs: &many 3", "curricula"),
        ("seed: 2", "seed: *many", "not plain YAML"),
    ],
)
def test_bad_specifications_name_the_key(old, new, said):
    text = GOOD.replace(old, new)
    if said == "curricula":  # an anchor by itself says nothing and harms nothing
        assert RecordingSpec.parse(text) == RecordingSpec.parse(GOOD)
        return
    with pytest.raises(InvalidInput, match=said):
        RecordingSpec.parse(text)


def test_aliases_are_refused():
    bomb = "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]"
    assert yaml.safe_load(bomb)["c"]
    with pytest.raises(InvalidInput, match="aliases are not allowed"):
        RecordingSpec.parse(bomb)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{kind: sorted, column: lenght, runs: 1, steps: 3, batch_size: 2}", "did you mean 'length'"),
        ("{kind: staged, column: label, stages: [[0], [7]], runs: 1, steps: 3, batch_size: 2}", r"has label in \[7\]"),
        ("{kind: staged, column: label, runs: 1, steps: 2, batch_size: 2}", "3 stages for 2 steps"),
        (
            "{kind: staged, column: length, subset: 3, runs: 1, steps: 40, batch_size: 2}",
            "has no example in the subset",
        ),
        ("{kind: explicit, curricula: [[[30]]]}", "names training example 30"),
        ("{runs: 1, steps: 2, batch_size: 2, subset: 31}", "subset=31 of 30"),
    ],
)
def test_curricula_that_do_not_fit_the_examples(text, said):
    with pytest.raises(InvalidInput, match=said):
        curricula_of(text).build(TRAIN)


def test_files(tmp_path):
    with pytest.raises(InvalidInput, match=r"none\.yaml: "):
        RecordingSpec.read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match=r"binary\.yaml: "):
        RecordingSpec.read(tmp_path / "binary.yaml")


def test_the_shipped_specification_made_the_shipped_runs():
    root = Path(__file__).parent.parent
    spec = RecordingSpec.read(root / "curricula" / "digits.yaml")
    runs = sf.RunStore(root / "runs" / "digits").load()
    task = spec.task.build()
    wanted = spec.curricula.build(task.train)
    assert sorted(sf.recording.run_id(task, spec.recipe, curriculum) for curriculum in wanted) == runs.ids
    assert set(runs.curricula) == set(wanted)


SHIPPED = sorted((Path(__file__).parent.parent / "curricula").glob("*.yaml"))


def test_the_shipped_queries_can_be_asked():
    queries = WhatIfSpec.read(Path(__file__).parent.parent / "curricula" / "what_if.yaml").queries
    base = sf.RunStore("runs/digits").load()[0]
    for edits in queries.values():
        assert sf.edits.apply_all(edits, base.curriculum, base.train) != base.curriculum


#: Those of a pretrained language model take minutes; ``test_docstrings`` compares them with the recorded runs.
QUICK = [path for path in SHIPPED if path.stem != "what_if" and not path.stem.startswith("docstrings")]


@pytest.mark.parametrize("path", QUICK, ids=lambda p: p.stem)
def test_the_shipped_specifications_can_be_recorded(path, tmp_path):
    spec = RecordingSpec.read(path)
    task = spec.task.build()
    curricula = spec.curricula.build(task.train)[:2]
    found = sf.record(task, spec.recipe, curricula, tmp_path, observe=spec.observe)
    assert np.isfinite(found[0].losses[found[0].times]).all()


def test_queries():
    text = """
queries:
  no threes: {edit: remove, target: label == 3, fill: resample, seed: 4}
  two:
    - {edit: keep, target: [1, 2]}
    - {edit: truncate, steps: 5}
"""
    spec = WhatIfSpec.parse(text)
    assert spec.queries == {
        "no threes": (sf.Remove("label == 3", "resample", 4),),
        "two": (sf.Keep([1, 2]), sf.Truncate(5)),
    }
    assert WhatIfSpec.parse(spec.dump()) == spec
    assert WhatIfSpec(queries={"a": sf.Remove([1])}).queries["a"] == (sf.Remove([1]),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("queries: {}", "queries"),
        ("queries: [1]", "queries"),
        ("quries: {a: {edit: shuffle}}", "did you mean 'queries'"),
        ("queries: {a: []}", r"queries\.a: a query needs at least one edit"),
        ("queries: {a: 3}", r"queries\.a\.0: an edit is a mapping"),
        ("queries: {a: [{edit: shuffle}, {edit: remov}]}", r"queries\.a\.1: unknown edit 'remov', did you mean"),
        ("queries: {a: {edit: !!python/name:os.system }}", "not plain YAML"),
    ],
)
def test_bad_queries(text, said):
    with pytest.raises(InvalidInput, match=said):
        WhatIfSpec.parse(text)


UNREADABLE = [
    "2020-13-45", "0x" + "f" * 5000, "9" * 5000, "0b" + "1" * 20000, "{[1]: 2}", "!!bool x", "!!timestamp x",
    "!!int ''",
    "!!float x", "!!binary zzz", "[" * 3000, "{self: 3}", "&a [*a]", "{a: 1, a: 2}", "!!set {a}", "!!omap [a: 1]",
    ".nan",
    "!!python/object:os.system x", "1e400", "2001-01-01 99:99:99", "'\0'", "!!pairs [1]", "{name: {name: x}}",
]  # fmt: skip
PLACES = [
    "curricula: {{kind: {}, runs: 2, steps: 2, batch_size: 2}}", "curricula: {{runs: {}, steps: 2, batch_size: 2}}",
    "curricula: {}", "curricula: {{runs: 2, steps: 2, batch_size: 2}}\nrecipe: {}", "{}: 3", "{}",
    "curricula: {{runs: 2, steps: 2, batch_size: 2}}\ntask: {}",
]  # fmt: skip


@pytest.mark.parametrize("value", UNREADABLE)
def test_values_that_cannot_be_read_are_refused_with_file_and_place(tmp_path, value):
    file = tmp_path / "spec.yaml"
    for place in PLACES:
        file.write_text(place.format(value))
        with pytest.raises(InvalidInput, match=r"spec\.yaml: ") as refused:
            RecordingSpec.read(file)
        assert "\n" not in str(refused.value)[:200]
    for place in ("queries: {}", "queries: {{a: {}}}", "queries: {{a: {{edit: {}}}}}", "queries: {{a: [{}]}}"):
        with pytest.raises(InvalidInput):
            WhatIfSpec.parse(place.format(value))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: {lr: 0.1}\nrecipe: {lr: 0.2}", "a key appears twice in this mapping at line 1, column 1"),
        ("curricula:\n  day: 2020-13-45", r"cannot be read \(month must be .*\) at line 2, column 8"),
        ("curricula: {runs: 1000000, steps: 1, batch_size: 1}", "1000000 runs .* are too many"),
        ("curricula: {runs: 10000, steps: 10000, batch_size: 10}", "are too many"),
        ("curricula: {runs: 2, steps: 99999999999, batch_size: 1}", "are too many"),
        ("[" * 21 + "]" * 21, "nested more than 20 deep at line 1, column 21"),
        ("curricula: {kind: [a]}", r"curricula.kind: unknown kind \['a'\]"),
    ],
)
def test_what_a_file_asks_for_is_bounded(text, said):
    with pytest.raises(InvalidInput, match=said):
        RecordingSpec.parse(text)


def test_the_number_of_values_is_bounded(monkeypatch):
    assert specs.MOST_VALUES == 300_000
    monkeypatch.setattr(specs, "MOST_VALUES", 1000)
    with pytest.raises(InvalidInput, match="more than 1,000 values"):
        RecordingSpec.parse(f"curricula: [{'1,' * 1000}]")


def test_a_large_file_is_not_read(tmp_path):
    with open(tmp_path / "large.yaml", "wb") as file:
        file.truncate(2**33)
    with pytest.raises(InvalidInput, match=r"large.yaml: a file of 8.59 GB is too large"):
        RecordingSpec.read(tmp_path / "large.yaml")


def test_a_column_without_an_order_needs_its_stages():
    train = sf.Examples.numbered(3, pd.DataFrame({"label": ["a", None, "b"]}))
    spec = curricula_of("{kind: staged, column: label, runs: 1, steps: 2, batch_size: 1}")
    with pytest.raises(InvalidInput, match="'label' have no order"):
        spec.build(train)
