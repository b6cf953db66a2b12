"The tables: counts, intervals, tests, power, and runs in which nothing is unique."
import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency, fisher_exact

from llmdiff import tables as tb
from llmdiff.annotation import annotation_frame, load_taxonomy
from llmdiff.core import run_dir, save_latents, UserError

TAX = load_taxonomy()
SAFETY = "Safety & Content Moderation"


def latents(**n):
    "Annotated latents by code: `A_1=3`; `none` for those without a category."
    codes = ["" if k == "none" else k.replace("_", ".") for k, v in n.items() for _ in range(v)]
    same = dict(annotator="offline MiniLM", label="x", answer="ok")
    rows = [dict(latent=i, category=c, **same) for i, c in enumerate(codes)]
    return annotation_frame(rows, TAX)


# ---- one row, one table

def test_row_against_known_values():
    r = tb.share_row(18, 112, 19, 89)
    assert round(r["p"], 3) == 0.364 and round(r["share_A"], 2) == 16.07
    assert np.allclose([r["low_A"], r["high_A"]], [10.41, 23.98], atol=0.02)      # Wilson
    assert r["diff_low"] < r["diff"] < r["diff_high"]


def test_newcombe_is_made_of_the_two_wilson_intervals():
    r = tb.share_row(18, 112, 19, 89)
    lo = r["diff"] - np.hypot(r["share_B"] - r["low_B"], r["high_A"] - r["share_A"])
    hi = r["diff"] + np.hypot(r["high_B"] - r["share_B"], r["share_A"] - r["low_A"])
    assert np.allclose([r["diff_low"], r["diff_high"]], [lo, hi])


@pytest.mark.parametrize("args", [(0, 0, 0, 0), (0, 0, 2, 5), (2, 5, 0, 0)])
def test_empty_sides_give_no_numbers_and_no_warning(args, recwarn):
    r = tb.share_row(*args)
    assert np.isnan(r["diff"]) and np.isnan(r["p"]) and not recwarn.list


def test_denominators_count_the_unassigned():
    A, B = latents(A_1=2, G_24=6, none=2), latents(A_1=5, none=5)
    t = tb.class_table(A, B, TAX).set_index("class")
    assert t.n_A.unique().tolist() == [10] and t.share_A[SAFETY] == 20 and t.share_B[SAFETY] == 50
    rest = t.loc[tb.UNASSIGNED]
    assert (rest.count_A, rest.count_B) == (2, 5) and np.isnan(rest.q)
    assert t.count_A.sum() == 10 and t.count_B.sum() == 10
    assert "Unassigned: 2 of 10 and 5 of 10" in tb.table_finding(t.reset_index(), "a", "b", 0.5)


def test_q_is_benjamini_hochberg_over_the_rows():
    t = tb.class_table(latents(A_1=3, G_24=20), latents(A_1=15, G_24=4, D_14=1), TAX)
    body = t.iloc[:-1].sort_values("p")
    m = len(body)
    want = np.minimum.accumulate((body.p*m/np.arange(1, m + 1)).to_numpy()[::-1])[::-1]
    assert m == 7 and np.allclose(body.q, np.minimum(want, 1))


def test_classes_and_categories_agree():
    rng = np.random.default_rng(0)

    def pick(n):
        codes = rng.choice([*TAX.code, ""], n)
        return annotation_frame([dict(latent=i, category=c) for i, c in enumerate(codes)], TAX)

    A, B = pick(60), pick(45)
    by_class, by_cat = tb.class_table(A, B, TAX).set_index("class"), tb.category_table(A, B, TAX)
    s = by_cat.iloc[:-1].groupby("class")[["count_A", "count_B"]].sum()
    assert (s == by_class.loc[s.index, ["count_A", "count_B"]]).all().all() and len(by_cat) == 31
    rest = by_class.loc[tb.UNASSIGNED]
    assert (by_cat.count_A.iloc[-1], by_cat.count_B.iloc[-1]) == (rest.count_A, rest.count_B)


def test_a_real_change_is_said_and_filled():
    A, B = latents(A_1=1, G_24=30), latents(A_1=25, G_24=5)
    t = tb.class_table(A, B, TAX)
    s = tb.table_finding(t, "it", "SimPO", 0.0001)
    assert "2 of 7 classes changed distinguishably" in s and "1 of 31 against 25 of 30" in s
    bar_colours = [p.get_facecolor()[3] for p in tb.bars(t, "it", "SimPO").axes[0].patches]
    assert bar_colours == [1, 1]
    assert "no class changed" in tb.table_finding(tb.class_table(A, A, TAX), "it", "it", 1.0)


# ---- the permutation test

def test_permutation_test_agrees_with_chi2_where_counts_are_large():
    a, b = np.array([200, 300, 250]), np.array([230, 260, 270])
    x2, p = tb.permutation_test(a, b, 20000, 1)
    want = chi2_contingency([a, b])
    assert np.isclose(x2, want.statistic) and abs(p - want.pvalue) < 0.01


def test_permutation_test_repeats_and_never_is_zero():
    assert tb.permutation_test([9, 0], [0, 9], 500, 3) == tb.permutation_test([9, 0], [0, 9], 500, 3)
    assert tb.permutation_test([40, 0], [0, 40], 500)[1] == 1/501


# ---- power

@pytest.mark.parametrize("n_a, n_b", [(9, 7), (30, 12)])
def test_rejections_are_those_of_fishers_test(n_a, n_b):
    want = [[fisher_exact([[a, n_a - a], [b, n_b - b]]).pvalue < .05 for b in range(n_b + 1)] for a in range(n_a + 1)]
    np.testing.assert_array_equal(tb.rejects(n_a, n_b), want)


def test_power_against_simulation():
    g, rejected = np.random.default_rng(0), tb.rejects(40, 30)
    a, b = g.binomial(40, .2, 4000), g.binomial(30, .5, 4000)
    assert tb.exact_power(.2, .5, 40, 30) == pytest.approx(rejected[a, b].mean(), abs=.03)


def test_more_latents_see_smaller_changes():
    def table(n): return tb.compare_counts(pd.Series({"x": n//5}), pd.Series({"x": n//4}), n, n)
    few, many = tb.power_table(table(40)), tb.power_table(table(400))
    assert many.seen_above[0] < few.seen_above[0] and many.power[0] > few.power[0]
    need = int(tb.latents_needed(.2, .25))
    assert tb.exact_power(.2, .25, need, need) == pytest.approx(.8, abs=.03)


def test_power_of_empty_sets():
    t = tb.compare_counts(pd.Series({"x": 0}), pd.Series({"x": 0}), 0, 3)
    assert tb.power_table(t).empty


# ---- from a run folder

def make_run(folder, annotated=True):
    verdicts = ["unique-B", "unique-B", "unique-A", "shared", "unique-B", "dead", "unique-B", "other"]
    v = pd.DataFrame({"latent": range(8), "verdict": verdicts, "reason": "x", "count": 9})
    v["verdict_point"] = v.verdict.where(v.latent != 3, "unique-B")
    save_latents(v, "pt-it", "scaling", folder)
    if annotated:
        codes = ((0, "G.24"), (1, ""), (2, "A.1"), (3, "B.7"), (4, "G.24"))
        rows = [dict(latent=j, category=c, annotator="offline MiniLM", label="<b>", answer="ok") for j, c in codes]
        save_latents(annotation_frame(rows, TAX), "pt-it", "annotation", folder)


def test_unique_set_takes_annotated_latents_with_the_verdict(tmp_path):
    make_run(tmp_path)
    b = tb.unique_set(["pt", "it"], "B", tmp_path)
    assert list(b.latent) == [0, 1, 4] and list(b.category) == ["G.24", "", "G.24"]   # 6 is not annotated
    assert list(tb.unique_set(["pt", "it"], "A", tmp_path).latent) == [2]


def test_which_latents_count(tmp_path):
    make_run(tmp_path)
    B = lambda **how: list(tb.unique_set(["pt", "it"], "B", tmp_path, **how).latent)
    assert B(counted="verdict_point") == [0, 1, 3, 4]
    with pytest.raises(UserError, match="step seeds"): B(min_replicated=.5)
    with pytest.raises(UserError, match="verdict or verdict_point"): B(counted="all")
    replicated = pd.DataFrame({"latent": range(8), "replicated": [1, .5, 0, 1, 0, np.nan, 1, 0]})
    save_latents(replicated, "pt-it", "seeds", tmp_path)
    assert B(min_replicated=.5) == [0, 1]


def test_a_run_without_annotation_says_which_step_is_missing(tmp_path):
    make_run(tmp_path, annotated=False)
    with pytest.raises(UserError, match="annotation first"): tb.unique_set(["pt", "it"], "B", tmp_path)


def test_main_table_with_and_without_the_other_steps_tables(tmp_path):
    make_run(tmp_path)
    m = tb.main_table([["pt", "it"]], tmp_path)
    assert m.annotated[0] == 4 and m["unassigned (%)"][0] == 25
    assert m["top class"][0] == "Specialized Capabilities (2)" and m["FVE A"].isna().all()

    d = run_dir(tmp_path)/"tables"
    d.mkdir()
    training = pd.DataFrame({"pair": ["pt-x", "pt-it"], "tokens": [1, 600000], "fve_A": [0, .81], "fve_B": [0, .79]})
    training.to_csv(d/"training.csv", index=False)
    counts = pd.DataFrame({"pair": ["pt-it"], "latents": [512], "alive": [400], "unique-A": [3], "unique-B": [12]})
    counts.to_csv(d/"unique_counts.csv", index=False)
    m = tb.main_table([["pt", "it"]], tmp_path)
    columns = ["tokens", "FVE A", "FVE B", "latents", "alive", "unique-A", "unique-B"]
    assert m.loc[0, columns].tolist() == [600000, .81, .79, 512, 400, 3, 12]


def test_tables_as_html_are_escaped_and_show_denominators():
    t = tb.class_table(latents(A_1=3, none=1), latents(A_1=1), TAX)
    h = tb.show_table(t, "<it>", "SimPO", "<i>caption</i>").data
    assert "<it>" not in h and "<i>" not in h and "N = 4" in h and "Safety &amp; Content Moderation" in h


def test_empty_sets_give_whole_tables_of_zeros_and_a_picture():
    none = latents()
    for make in (tb.class_table, tb.category_table):
        t = make(none, none, TAX)
        said = tb.table_finding(t, "it", "SimPO", np.nan)
        assert (t.count_A == 0).all() and (t.n_A == 0).all()
        assert "nothing to compare" in said and "0 of 0" in said
        assert tb.bars(t, "it", "SimPO").axes[0].texts
        assert "(unassigned)" in tb.show_table(t, "it", "SimPO").data
