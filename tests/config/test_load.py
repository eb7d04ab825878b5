"""Config files, names and overrides: what is accepted, and the one line for what is not."""

from __future__ import annotations

import dataclasses
import textwrap

import hypothesis.strategies as st
import pytest
from hypothesis import given

from neo.config import Config, find, from_dict, known, load, to_dict
from neo.config.coerce import coerce
from neo.errors import InputError


def refusal(config, **overrides):
    with pytest.raises(InputError) as caught:
        load(config, {name.replace("__", "."): value for name, value in overrides.items()})
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_names_are_found_from_any_folder(tmp_path, monkeypatch):
    here = find("neo_7b")
    monkeypatch.chdir(tmp_path)
    assert find("neo_7b") == find("neo_7b.py") == find("configs/neo_7b.py") == here == known()["neo_7b"]
    assert load("neo_demo").name == "neo_demo"


def test_overrides_reach_groups_phases_and_mixtures(tiny):
    c = load(tiny, [("model.num_layers", "1e1"), ("model.windows", "64, 0"), ("phases.long.tokens", "2e9"),
                    ("phases.long.mixture.b", "3"), ("phases.short.mixture", "c=1,d=0.5"), ("data.synthetic", "true"),
                    ("optimizer.b1", "0.8"), ("data.store", "gs://x/y"), ("train.steps", 7), ("train.steps", "1_0"),
                    ("eval.sample_prompts", "'def ','The '")])
    assert (c.model.num_layers, c.model.windows, c.train.steps) == (10, (64, 0), 10)
    assert c.model.layer_windows == (64, None) * 5
    assert (c.phases[1].tokens, c.phases[0].tokens) == (2 * 10**9, 2048)
    assert c.phases[1].mixture == {"a": 0.5, "b": 3.0}
    assert c.phases[0].mixture == {"c": 1.0, "d": 0.5}
    assert (c.data.synthetic, c.optimizer.b1, c.data.store) == (True, 0.8, "gs://x/y")
    assert c.eval.sample_prompts == ("def ", "The ")


def test_text_and_objects_are_the_same(tiny):
    objects = {"model.windows": (8,), "train.scale_tokens": 0.5, "phases.long.mixture": {"a": 1}, "log.plot": True}
    texts = {"model.windows": "8", "train.scale_tokens": "5e-1", "phases.long.mixture": "a=1", "log.plot": "yes"}
    assert load(tiny, objects) == load(tiny, texts)


def test_scale_tokens_shrinks_phases_and_warm_ups_and_reads_back(tiny):
    whole, half = load(tiny), load(tiny, {"train.scale_tokens": 0.5})
    for a, b in zip(whole.phases, half.phases, strict=True):
        assert (b.tokens, b.warmup_tokens) == (a.tokens // 2, a.warmup_tokens // 2)
        assert dataclasses.replace(b, tokens=a.tokens, warmup_tokens=a.warmup_tokens) == a
    assert from_dict(to_dict(half)) == half
    assert half.train.scale_tokens == 1.0


# override -> parts of the one line: the field, the value, what would be right
WRONG = [
    (dict(model__num_layer=4), ["config.model.num_layer", "num_layers"]),
    (dict(modle__num_layers=4), ["config.modle", "'model'"]),
    (dict(train__steps="1.5"), ["config.train.steps='1.5'", "a whole number"]),
    (dict(train__steps="1e999999"), ["config.train.steps", "a whole number"]),
    (dict(train__steps="true"), ["config.train.steps='true'", "a whole number"]),
    (dict(train__steps=True), ["config.train.steps=True", "a whole number"]),
    (dict(train__steps="-1"), ["config.train.steps=-1", "0 or more"]),
    (dict(optimizer__b1="nan"), ["config.optimizer.b1='nan'", "a finite number"]),
    (dict(optimizer__b2=1.0), ["config.optimizer.b2=1.0", "below 1"]),
    (dict(phases__long__peak_lr="inf"), ["config.phases.long.peak_lr='inf'", "a finite number"]),
    (dict(phases__long__peak_lr="-1"), ["config.phases.long.peak_lr=-1.0", "0 or more"]),
    (dict(train__compute_dtype="bf16"), ["'bf16'", "'bfloat16'", "float32"]),
    (dict(log__progress="fancy"), ["'fancy'", "auto, live, plain, off"]),
    (dict(train="x"), ["config.train is a group", "steps"]),
    (dict(phases="x"), ["config.phases is a list", "config.phases.main.tokens=2e9"]),
    (dict(phases__long="1"), ["config.phases.long", "config.phases.long.tokens=2e9"]),
    (dict(phases__lnog__tokens="1"), ["no phase 'lnog'", "'long'", "short, long"]),
    (dict(phases__long__token="1"), ["config.phases.long.token", "'tokens'"]),
    (dict(phases__long__tokens="0"), ["config.phases.long.tokens=0", "1 or more"]),
    (dict(phases__long__seq_len="128"), ["config.phases.long.seq_len=128", "model.max_seq_len=64"]),
    (dict(phases__short__warmup_tokens="1e6"), ["config.phases.short.warmup_tokens=1000000", "2048"]),
    (dict(phases__long__lr_shape="cos"), ["'cos'", "'cosine'"]),
    (dict(phases__long__mixture="a"), ["config.phases.long.mixture='a'", "name=value"]),
    (dict(phases__long__mixture="a=0"), ["config.phases.long.mixture", "above 0"]),
    (dict(phases__long__mixture__a="x"), ["config.phases.long.mixture.a='x'", "a finite number"]),
    (dict(phases__long__mixture__a="-1"), ["config.phases.long.mixture.a=-1.0", "0 or more"]),
    (dict(phases__long__name="short"), ["names must differ", "short, short"]),
    (dict(phases__long__name="a.b"), ["'a.b'", "letters"]),
    (dict(model__windows="64,x"), ["config.model.windows[1]='x'", "a whole number"]),
    (dict(model__windows=""), ["config.model.windows=()", "one or more"]),
    (dict(model__windows="1,2,3"), ["3 entries", "model.num_layers=2"]),
    (dict(model__windows__x="1"), ["config.model.windows.x"]),
    (dict(model__num_heads="3"), ["config.model.num_heads=3", "model.num_kv_heads=2", "1, 3"]),
    (dict(model__d_model="30"), ["config.model.d_model=30", "model.num_heads=4", "model.head_dim"]),
    (dict(model__head_dim="7"), ["config.model.head_dim=7", "even"]),
    (dict(model__positions="rope,aliby"), ["config.model.positions='aliby'", "'alibi'", "local_rope"]),
    (dict(model__positions="rope,none,rope"), ["3 entries", "model.num_layers=2"]),
    (dict(model__norm="rmsnorm"), ["config.model.norm='rmsnorm'", "rms, layer"]),
    (dict(model__mlp="swiglu"), ["config.model.mlp='swiglu'", "gated, plain"]),
    (dict(model__residual_multiplier="0"), ["config.model.residual_multiplier=0.0", "more than 0"]),
    (dict(model__logit_softcap="-1"), ["config.model.logit_softcap=-1.0", "0 or more"]),
    (dict(model__rope_high_frequency="0.5"), ["config.model.rope_high_frequency=0.5", "model.rope_low_frequency=1.0"]),
    (dict(model__wesar=True, model__norm_placement="post"), ["config.model.wesar=True", "norm_placement=pre"]),
    (dict(init__checkpoint="a", init__from_hf="b"), ["config.init.checkpoint and config.init.from_hf", "one of them"]),
    (dict(init__depth="stack"), ["config.init.depth=stack", "--config.init.from_hf=FOLDER"]),
    (dict(init__extend_vocab=True), ["config.init.extend_vocab=True", "none is given"]),
    (dict(init__from_hf="b", init__new_blocks="identity"), ["config.init.new_blocks=identity", "--config.init.depth"]),
    (dict(data__synthetic="maybe"), ["config.data.synthetic='maybe'", "True or False"]),
    (dict(data__store=5), ["config.data.store=5", "text"]),
    (dict(optimizer__name="adam"), ["'adam'", "'adamw'"]),
    (dict(log__every_steps="0"), ["config.log.every_steps=0", "1 or more"]),
    (dict(name="../x"), ["config.name='../x'", "letters"]),
]


@pytest.mark.parametrize(("overrides", "parts"), WRONG, ids=[next(iter(o)) + str(i) for i, (o, _) in enumerate(WRONG)])
def test_one_line_names_field_value_and_cure(tiny, overrides, parts):
    text = refusal(tiny, **overrides)
    assert [part for part in parts if part not in text] == []


def test_unknown_configs_list_what_there_is(tmp_path):
    assert "'neo_7b'" in refusal("neo_7") and "neo_demo" in refusal("neo_7")
    assert "does not exist" in refusal(tmp_path / "x.py") and "neo_demo" in refusal(tmp_path / "x.py")


FILES = {
    "no_get_config": ("x = 1\n", ["has no get_config()"]),
    "syntax": ("def get_config(:\n", ["line 1", "SyntaxError"]),
    "field": ("from neo.config import new\n\n\ndef get_config():\n    c = new()\n    c.model.num_layer = 3\n    return c\n",
              ["line 6", "num_layer"]),
    "group": ("from neo.config import new\ndef get_config():\n    c = new()\n    c.modle.num_layers = 3\n    return c\n",
              ["line 4", "modle"]),
    "phase": ("from neo.config import new, phase\ndef get_config():\n    return phase('x', token=3)\n", ["token", "tokens"]),
    "import": ("import nothing_of_that_name\ndef get_config():\n    return 1\n", ["line 1", "nothing_of_that_name"]),
    "other": ("def get_config():\n    return {}\n", ["get_config() must return", "dict"]),
    "empty": ("from neo.config import new\ndef get_config():\n    return new()\n", ["config.phases is empty", "phase("]),
    "type": ("from neo.config import new\ndef get_config():\n    c = new()\n    c.model.num_layers = 'many'\n    return c\n",
             ["config.model.num_layers='many'", "a whole number"]),
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_files_name_file_and_line(tmp_path, name):
    text, parts = FILES[name]
    file = tmp_path / f"{name}.py"
    file.write_text(textwrap.dedent(text))
    told = refusal(file)
    assert [part for part in parts if part not in told] == []
    if "line 1" in parts or "line 6" in parts:
        assert str(file) in told


def test_later_versions_and_unknown_fields_of_a_saved_config_are_refused(tiny):
    tree = to_dict(load(tiny))
    for change, parts in (({"version": 99}, ["99", "1"]), ({"modell": {}}, ["config.modell", "model"])):
        with pytest.raises(InputError) as caught:
            from_dict({**tree, **change})
        assert all(part in str(caught.value) for part in parts)


@given(st.integers(-10**18, 10**18))
def test_integers_read_back_exactly(number):
    for text in (number, str(number), f"{number:_}", f"{number}.0", f" {number} "):
        assert coerce(text, int, "x") == number


@given(st.integers(1, 999), st.integers(0, 15))
def test_integers_in_exponent_form(digits, exponent):
    assert coerce(f"{digits}e{exponent}", int, "x") == digits * 10**exponent
    assert coerce(float(digits * 10**min(exponent, 12)), int, "x") == digits * 10**min(exponent, 12)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back_exactly(number):
    assert coerce(repr(number), float, "x") == coerce(number, float, "x") == number


NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,8}", fullmatch=True)


@given(st.dictionaries(NAMES, st.floats(0, 1e6), max_size=4), st.lists(st.integers(0, 10**6), max_size=5))
def test_tables_and_lists_as_text_or_objects(table, items):
    text = ",".join(f"{name}={value!r}" for name, value in table.items())
    assert coerce(text, dict[str, float], "x") == coerce(table, dict[str, float], "x") == table
    text = f"({', '.join(map(str, items))})"
    assert coerce(text, tuple[int, ...], "x") == coerce(items, tuple[int, ...], "x") == tuple(items)


@given(st.one_of(st.text(max_size=12), st.floats(), st.none(), st.booleans(), st.integers(), st.lists(st.text(max_size=3))),
       st.sampled_from([int, float, bool, str, tuple[int, ...], dict[str, float]]))
def test_anything_else_is_refused_with_the_field_or_has_the_type(value, kind):
    try:
        result = coerce(value, kind, "group.field")
    except InputError as error:
        assert "config.group.field" in str(error)
    else:
        assert isinstance(result, getattr(kind, "__origin__", kind))


def test_a_config_is_frozen(tiny):
    c = load(tiny)
    assert isinstance(c, Config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.model.num_layers = 3
