"""Mix tables: YuLan-Mini's, what any table may look like, and names that become neo's."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.config import load
from neo.config.mixes import family, read_mix, source_names, total
from neo.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")   # as neo.config.checks has it
# "Total Tokens(B)" of each of the authors' files.
BILLIONS = (40.184145598, 40.227283333, 40.166801691, 40.178431169, 40.242850167, 40.200986328, 40.203012705, 40.169361778,
            40.153005587, 39.990087649, 40.199981236, 40.170935268, 40.180837776, 40.210897597, 40.143414775, 40.221881069,
            40.225694113, 40.196456684, 40.172631891, 40.174985369, 40.193158410, 40.184324227, 40.200225586, 40.205433063,
            40.163417847, 39.498107485, 40.291888634, 40.041854432)


@pytest.fixture(scope="module")
def yulan():
    return read_mix("yulan_mini")


def test_yulan_mini_is_whole(yulan):
    assert len(yulan) == 28 and len(total(yulan.values())) == 291
    assert [name[:2] for name in yulan] == [f"{i:02}" for i in range(1, 26)] + ["26", "26", "27"]
    for (name, mix), billions in zip(yulan.items(), BILLIONS, strict=True):
        # Their 19th file gives a sum that is 5.3M tokens more than its parts.
        off = 5_298_832 if name.startswith("19") else 0
        assert sum(mix.values()) + off == pytest.approx(billions * 1e9, abs=2), name
        assert all(NAME.fullmatch(source) for source in mix)
        assert 53 <= len(mix) <= 123


def test_yulan_mini_known_cells(yulan):
    first, last = yulan["01_20241017_013512"], yulan["27_20241213_051741"]
    assert first["chinese-fineweb-edu_use--cci2_use"] == 162_982_401
    assert "chinese-fineweb-edu_use--cci2_use" in last and "wiki-baike-cn--v5" not in last
    sums = total(mix for name, mix in yulan.items() if name != "26_20241127_205447")
    assert sums["fineweb-edu"] == 432_653_082_199
    assert sum(sums.values()) == pytest.approx(1084.89e9, rel=1e-5)
    math = sum(tokens for name, tokens in sums.items() if family(name) == "aa_math")
    assert math == pytest.approx(55.04e9, rel=1e-3)


@pytest.mark.parametrize("number", range(28))
def test_every_mix_loads_as_a_phase(yulan, number, tmp_path):
    """Also the 4K variant of the 26th, which the recipe leaves out."""
    name = list(yulan)[number]
    path = tmp_path / "one.py"
    path.write_text(f"""
from neo.config import new, phase
from neo.config.mixes import read_mix

def get_config():
    c = new()
    c.phases = [phase("one", mixture=read_mix("yulan_mini")[{name!r}], mixture_unit="tokens", seq_len=4096)]
    return c
""")
    config = load(path)
    assert config.phases[0].tokens == sum(yulan[name].values())
    assert config.sources == tuple(yulan[name])


@given(st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=30))
def test_any_names_become_different_names_of_neo(originals):
    names = source_names(originals)
    assert list(names) == originals
    assert all(NAME.fullmatch(name) for name in names.values())
    assert len({name.lower() for name in names.values()}) == len(originals)


def test_names_keep_what_they_may():
    assert source_names(["web/en.v2", "web/en_v2", "WEB/en v2", "_x", "/y/", "--"]) == {
        "web/en.v2": "web--en_v2", "web/en_v2": "web--en_v2_2", "WEB/en v2": "WEB--en_v2_3", "_x": "x", "/y/": "y",
        "--": "source"}
    assert (family("web--en--x"), family("web")) == ("web", "web")


def table(tmp_path, text):
    path = tmp_path / "mix.csv"
    path.write_text(text)
    return path


def test_a_table_of_ones_own(tmp_path):
    path = table(tmp_path, '# mine\n\nsource,first, second\nweb/en,1e6,5_0\n"code, clean",,2.5e5\n')
    assert read_mix(path) == {"first": {"web--en": 1_000_000}, "second": {"web--en": 50, "code__clean": 250_000}}
    assert read_mix(str(path)) == read_mix(path)


@pytest.mark.parametrize("text, complaint", [
    ("", "the first line must be source,MIX,..."),
    ("name,a\nweb,1\n", "the first line must be source,MIX,..."),
    ("source,a,a\nweb,1,2\n", "line 1: each mix needs a name of its own"),
    ("source,a\nweb,1,2\n", "line 2: 3 columns where the first line has 2"),
    ("#\nsource,a\nweb,1\nweb,2\n", "line 4: source 'web' is there twice"),
    ("source,a\nweb,many\n", "line 2: 'web' in mix 'a': 'many' is not a number of tokens"),
    ("source,a\nweb,-1\n", "'-1' is not a number of tokens"),
    ("source,a\nweb,nan\n", "'nan' is not a number of tokens"),
    ("source,a,b\nweb,1,\n", "mix 'b' has no tokens"),
])
def test_bad_tables_are_one_line(tmp_path, text, complaint):
    with pytest.raises(InputError, match=re.escape(complaint)) as caught:
        read_mix(table(tmp_path, text))
    assert "\n" not in str(caught.value) and "mix.csv" in str(caught.value)


def test_a_missing_table_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match=r"'yulan_min' does not exist \(did you mean 'yulan_mini'\?\)"):
        read_mix("yulan_min")
    with pytest.raises(InputError, match="does not exist"):
        read_mix(tmp_path / "yulan_mini.csv")
