"The gold set: kappa and agreement, the sheet to be read, the table filled in by hand and what is refused."
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import cohen_kappa_score

from llmdiff.annotation import load_taxonomy
from llmdiff.closer.gold import (
    against_gold, annotator_agreement, gold_choice, gold_sheet, kappa, kappa_interval, load_gold)
from llmdiff.core import save_latents, UserError
from llmdiff.examples import FIELDS


# ---- agreement

def test_kappa_and_its_interval():
    r = np.random.default_rng(0)
    a = r.choice(["A.1", "B.7", ""], 80)
    b = np.where(r.random(80) < .6, a, r.choice(["A.1", "B.7", ""], 80))
    k, lo, hi = kappa_interval(a, b)
    assert np.isclose(k, cohen_kappa_score(a, b)) and lo < k < hi
    assert kappa_interval(a, a)[0] == 1 and np.isnan(kappa_interval(["x"], ["x"])[0])
    assert np.isnan(kappa([], []))
    t = lambda s: pd.DataFrame(dict(latent=range(80), category=s, **{"class": [x[:1] for x in s]}))
    g = annotator_agreement(t(a), t(b).sample(frac=1, random_state=1)).set_index("level")
    assert g.kappa["category"] == k and g.agree["category"] == (a == b).mean()
    assert g.latents["class, both assigned"] == ((a != "") & (b != "")).sum()
    with pytest.raises(UserError, match="no latent in common"):
        annotator_agreement(t(a), t(b).assign(latent=range(100, 180)))


# ---- the sheet and the table

def toy_rows(pair, n):
    "Rows of an examples table: latents 0 to n - 1, three contexts with and three without activation."
    rows = []
    for j in range(n):
        for kind in ("top", "zero"):
            for i in range(3):
                act = 9. - i if kind == "top" else 0.
                rows.append(dict(latent=j, kind=kind, rank=i, doc=100*j + i + 50*(kind == "zero"), source="x", pos=1,
                                 act=act, tokens=["the ", f"<b>{pair}{j}</b> ", f"{i}\n"], acts=[0., act, 0.],
                                 text=f"the {pair}{j} {i}"))
    return rows


def write_examples(run, pair, n):
    "The examples table of a pair."
    (run/"examples").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(toy_rows(pair, n), FIELDS), run/"examples"/f"{pair}.parquet")


@pytest.fixture
def a_run(tmp_path):
    "Two pairs with contexts of six and four latents, two of each unique."
    for pair, n in (("a-b", 6), ("a-c", 4)):
        write_examples(tmp_path, pair, n)
        verdict = ["shared"]*(n - 2) + ["unique-A", "unique-B"] + ["undecided"]*2
        save_latents(pd.DataFrame(dict(latent=range(n + 2), verdict=verdict)), pair, "scaling", tmp_path)
    return tmp_path


def test_the_sheet_has_all_unique_latents_first_and_repeats(a_run):
    c = gold_choice(a_run, 7)
    assert len(c) == 7 and c.unique.tolist() == [True]*4 + [False]*3 and len(gold_choice(a_run, 1)) == 4
    sheet, table = gold_sheet(a_run, 7)
    before = sheet.read_bytes(), table.read_bytes()
    gold_sheet(a_run, 7)
    assert before == (sheet.read_bytes(), table.read_bytes())
    t = sheet.read_text()
    assert "«<b>a-b4</b> »" in t and t.count("active:") == 7 and "unique" not in t.split("# Latents")[1]
    assert t.count("G.30") == 1


def test_a_dictionary_of_many_models_can_be_left_out(a_run):
    "A joint dictionary has contexts too, and no verdicts."
    before = gold_choice(a_run, 10)
    write_examples(a_run, "a-b-c", 2)
    pd.testing.assert_frame_equal(gold_choice(a_run, 10, pairs=["a-c", "a-b"]), before)
    assert len(pd.read_csv(gold_sheet(a_run, 10, pairs=["a-b", "a-c"])[1])) == 10


def filled(a_run, **kw):
    t = pd.read_csv(gold_sheet(a_run, 10)[1], keep_default_na=False)
    t["category"] = ["A.1", "A.1", "B.7", ""]*2 + ["A.2"]*2
    t.loc[0, "second"] = "C.13"
    t.assign(**kw).to_csv(a_run/"gold.csv", index=False)
    return t, a_run/"gold.csv"


def test_accuracy_and_kappa_against_gold(a_run):
    t, f = filled(a_run)
    g = load_gold(a_run, f)
    tax = load_taxonomy().set_index("code")["class"]
    said = t[["pair", "latent", "category"]].copy()
    said.loc[0, "category"], said.loc[8:, "category"] = "C.13", "A.3"
    said["class"] = said.category.map(tax).fillna("")
    r = against_gold(said.sample(frac=1, random_state=0), g).set_index("level")
    assert r.accuracy.tolist() == [.7, .8, .9, 1.] and r.always["category"] == .4
    assert np.isclose(r.kappa["category"], cohen_kappa_score(t.category, said.category))
    assert r.kappa["class, or the second"] == 1


@pytest.mark.parametrize("change, says", [
    (dict(category="?"), "category '\\?'"), (dict(category="Z.9"), "category 'Z.9'"),
    (dict(run="other"), "no latent of the run"),
    (dict(contexts="0"), "belongs to another run: the contexts of 10 of its 10"),
    (dict(latent=5, pair="a-b"), "names a latent twice"), (dict(pair="x-y"), "twice|belongs to another run")])
def test_a_gold_table_that_does_not_fit_is_one_sentence(a_run, change, says):
    _, f = filled(a_run, **change)
    with pytest.raises(UserError, match=says) as e:
        load_gold(a_run, f)
    assert "\n" not in str(e.value)


def test_no_gold_table_and_a_missing_column(a_run):
    with pytest.raises(UserError, match="gold_sheet"):
        load_gold(a_run, a_run/"none.csv")
    t, f = filled(a_run)
    t.drop(columns="contexts").to_csv(f, index=False)
    with pytest.raises(UserError, match="lacks the column contexts"):
        load_gold(a_run, f)
