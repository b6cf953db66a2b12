"The tables: counts, intervals, tests, the published numbers, the planted changes, and runs in which nothing is unique."
import numpy as np
import pandas as pd
import pytest
from scipy.stats import chi2_contingency

from llmdiff import tables as tb
from llmdiff.annotation import load_taxonomy, finish
from llmdiff.core import UserError, save_latents, run_dir

TAX = load_taxonomy()


def latents(**n):
    "Annotated latents by code: `A_1=3`; `none` for those without a category."
    codes = ["" if k == "none" else k.replace("_", ".") for k, v in n.items() for _ in range(v)]
    return finish([dict(latent=i, category=c, annotator="offline MiniLM", label="x", answer="ok") for i, c in enumerate(codes)], TAX)


# ---------------------------------------------------------------- the published numbers

def test_every_published_number_is_rebuilt_to_its_printed_digit():
    assert tb.mismatches().empty
    t = tb.published_classes("SimPO").set_index("class")                        # three of them by hand, straight from the paper
    assert f"{t.share_A['Linguistic Capabilities']:.2f} {t.share_B['Linguistic Capabilities']:.2f} {t['diff']['Linguistic Capabilities']:+.2f} {t.change['Linguistic Capabilities']:+.1f}" == "6.25 8.99 +2.74 +43.8"
    assert f"{t.change['Safety & Content Moderation']:+.1f} {t.change['Error Handling & Quality Control']:+.1f}" == "+32.8 -28.1"
    c = tb.published_categories().set_index("code")
    assert f"{c.change['D.16']:+.1f} {c.change['G.30']:+.1f} {c.change['F.22']:+.1f}" == "+151.7 -44.1 -68.5"
    assert list(c.n_A.unique()) == [112] and list(c.n_B.unique()) == [89]


def test_a_wrong_count_would_be_noticed(monkeypatch):
    real = tb._paper
    def off_by_one(name):
        d = real(name)
        if name == "class_counts": d.loc[0, "SimPO"] -= 1
        return d
    monkeypatch.setattr(tb, "_paper", off_by_one)
    assert len(tb.mismatches()) == 3                                             # share, difference and change of one row


def test_no_published_row_is_significant():
    tables = [tb.published_classes("SimPO"), tb.published_classes("DPO"), tb.published_categories()]
    p = pd.concat([t.p[t.q.notna()] for t in tables])
    assert len(p) == 24 and round(p.min(), 2) == 0.36
    assert all(tb.permutation_test(t.count_A[t.q.notna()], t.count_B[t.q.notna()], 2000)[1] > 0.3 for t in tables)


def test_published_order_is_the_papers():
    assert list(tb.published_classes("SimPO")["class"])[:3] == ["Linguistic Capabilities", "Safety & Content Moderation", "Information Processing"]


def test_elo_differences():
    e = tb._paper("elo")
    assert (e.raw_SimPO - e.raw_it == e.raw_delta).all() and (e.style_SimPO - e.style_it == e.style_delta).all()
    v1 = tb._paper("elo_v1"); assert (v1.SimPO - v1.it == v1.delta).all()


# ---------------------------------------------------------------- one row, one table

def test_row_against_known_values():
    r = tb.row(18, 112, 19, 89)
    assert round(r["p"], 3) == 0.364 and round(r["share_A"], 2) == 16.07
    assert np.allclose([r["low_A"], r["high_A"]], [10.41, 23.98], atol=0.02)      # Wilson
    assert r["diff_low"] < r["diff"] < r["diff_high"]


def test_newcombe_is_made_of_the_two_wilson_intervals():
    r = tb.row(18, 112, 19, 89)
    lo = r["diff"] - np.hypot(r["share_B"] - r["low_B"], r["high_A"] - r["share_A"])
    hi = r["diff"] + np.hypot(r["high_B"] - r["share_B"], r["share_A"] - r["low_A"])
    assert np.allclose([r["diff_low"], r["diff_high"]], [lo, hi])


@pytest.mark.parametrize("args", [(0, 0, 0, 0), (0, 0, 2, 5), (2, 5, 0, 0)])
def test_empty_sides_give_no_numbers_and_no_warning(args, recwarn):
    r = tb.row(*args)
    assert np.isnan(r["diff"]) and np.isnan(r["p"]) and not recwarn.list


def test_denominators_count_the_unassigned():
    A, B = latents(A_1=2, G_24=6, none=2), latents(A_1=5, none=5)
    t = tb.class_table(A, B, TAX).set_index("class")
    assert t.n_A.unique().tolist() == [10] and t.share_A["Safety & Content Moderation"] == 20 and t.share_B["Safety & Content Moderation"] == 50
    rest = t.loc[tb.UNASSIGNED]
    assert (rest.count_A, rest.count_B) == (2, 5) and np.isnan(rest.q)
    assert t.count_A.sum() == 10 and t.count_B.sum() == 10
    assert "Unassigned: 2 of 10 and 5 of 10" in tb.finding(t.reset_index(), "a", "b", 0.5)


def test_q_is_benjamini_hochberg_over_the_rows():
    t = tb.class_table(latents(A_1=3, G_24=20), latents(A_1=15, G_24=4, D_14=1), TAX)
    body = t.iloc[:-1].sort_values("p")
    m = len(body); want = np.minimum.accumulate((body.p*m/np.arange(1, m + 1)).to_numpy()[::-1])[::-1]
    assert m == 7 and np.allclose(body.q, np.minimum(want, 1))


def test_classes_and_categories_agree():
    rng = np.random.default_rng(0)
    pick = lambda n: finish([dict(latent=i, category=c) for i, c in enumerate(rng.choice([*TAX.code, ""], n))], TAX)
    A, B = pick(60), pick(45)
    by_class, by_cat = tb.class_table(A, B, TAX).set_index("class"), tb.category_table(A, B, TAX)
    s = by_cat.iloc[:-1].groupby("class")[["count_A", "count_B"]].sum()
    assert (s == by_class.loc[s.index, ["count_A", "count_B"]]).all().all() and len(by_cat) == 31
    assert (by_cat.count_A.iloc[-1], by_cat.count_B.iloc[-1]) == (by_class.count_A[tb.UNASSIGNED], by_class.count_B[tb.UNASSIGNED])


def test_a_real_change_is_said_and_filled():
    A, B = latents(A_1=1, G_24=30), latents(A_1=25, G_24=5)
    t = tb.class_table(A, B, TAX)
    s = tb.finding(t, "it", "SimPO", 0.0001)
    assert "2 of 7 classes changed distinguishably" in s and "1 of 31 against 25 of 30" in s
    bar_colours = [p.get_facecolor()[3] for p in tb.bars(t, "it", "SimPO").axes[0].patches]
    assert bar_colours == [1, 1]
    assert "no class changed" in tb.finding(tb.class_table(A, A, TAX), "it", "it", 1.0)


# ---------------------------------------------------------------- the permutation test

def test_permutation_test_agrees_with_chi2_where_counts_are_large():
    a, b = np.array([200, 300, 250]), np.array([230, 260, 270])
    x2, p = tb.permutation_test(a, b, 20000, 1)
    want = chi2_contingency([a, b])
    assert np.isclose(x2, want.statistic) and abs(p - want.pvalue) < 0.01


def test_permutation_test_repeats_and_never_is_zero():
    assert tb.permutation_test([9, 0], [0, 9], 500, 3) == tb.permutation_test([9, 0], [0, 9], 500, 3)
    assert tb.permutation_test([40, 0], [0, 40], 500)[1] == 1/501


# ---------------------------------------------------------------- planted changes

def test_planted_changes_that_are_there_are_found_and_absent_ones_are_not():
    it = latents(G_30=15, D_17=15, E_18=1, A_2=1, G_24=8)
    t = tb.planted({"it": it, "SimPO": latents(G_30=1, D_17=1, E_18=14, A_1=8, A_2=8, G_24=8), "DPO": it})
    s = t[t.model == "SimPO"].set_index("behaviour").seen
    assert (s.drop("the language of the question") == "as planted").all() and s["the language of the question"] == "no difference"
    assert (t[t.model == "DPO"].seen == "no difference").all()
    says = tb.planted_finding(t)
    assert "4 show in the categories at q < 0.05" in says and "refusing harmful requests in SimPO" in says


def test_planted_the_other_way_is_said():
    t = tb.planted({"it": latents(E_18=20, none=5), "SimPO": latents(none=25)})
    assert t.seen[0] == "the other way" and "1 show the other way" in tb.planted_finding(t)


def test_planted_without_latents():
    t = tb.planted({"it": latents(), "SimPO": latents(), "DPO": latents(E_18=1)})
    assert set(t.seen) == {"nothing to compare"} and "0 show in the categories" in tb.planted_finding(t)


# ---------------------------------------------------------------- from a run folder

def make_run(folder, annotated=True):
    v = pd.DataFrame({"latent": range(8), "verdict": ["unique-B", "unique-B", "unique-A", "shared", "unique-B", "dead", "unique-B", "other"], "reason": "x", "count": 9})
    v["point"] = v.verdict.where(v.latent != 3, "unique-B")
    save_latents(v, "pt-it", "06_scaling", folder)
    if annotated:
        rows = [dict(latent=j, category=c, annotator="offline MiniLM", label="<b>", answer="ok") for j, c in ((0, "G.24"), (1, ""), (2, "A.1"), (3, "B.7"), (4, "G.24"))]
        save_latents(finish(rows, TAX), "pt-it", "09_annotation", folder)


def test_unique_set_takes_annotated_latents_with_the_verdict(tmp_path):
    make_run(tmp_path)
    b = tb.unique_set(["pt", "it"], "B", tmp_path)
    assert list(b.latent) == [0, 1, 4] and list(b.category) == ["G.24", "", "G.24"]       # 6 is unique but was not annotated
    assert list(tb.unique_set(["pt", "it"], "A", tmp_path).latent) == [2]


def test_which_latents_count(tmp_path):
    make_run(tmp_path)
    assert list(tb.unique_set(["pt", "it"], "B", tmp_path, counted="point").latent) == [0, 1, 3, 4]
    with pytest.raises(UserError, match="80_replication"): tb.unique_set(["pt", "it"], "B", tmp_path, min_replicated=.5)
    with pytest.raises(UserError, match="verdict or point"): tb.unique_set(["pt", "it"], "B", tmp_path, counted="all")
    save_latents(pd.DataFrame({"latent": range(8), "replicated": [1, .5, 0, 1, 0, np.nan, 1, 0]}), "pt-it", "80_replication", tmp_path)
    assert list(tb.unique_set(["pt", "it"], "B", tmp_path, min_replicated=.5).latent) == [0, 1]


def test_a_run_without_annotation_says_which_step_is_missing(tmp_path):
    make_run(tmp_path, annotated=False)
    with pytest.raises(UserError, match="09_annotation"): tb.unique_set(["pt", "it"], "B", tmp_path)


def test_main_table_with_and_without_the_other_steps_tables(tmp_path):
    make_run(tmp_path)
    m = tb.main_table([["pt", "it"]], tmp_path)
    assert m.annotated[0] == 4 and m["unassigned (%)"][0] == 25 and m["top class"][0] == "Specialized Capabilities (2)" and m["FVE A"].isna().all()
    d = run_dir(tmp_path)/"tables"; d.mkdir()
    pd.DataFrame({"pair": ["pt-x", "pt-it"], "tokens": [1, 600000], "fve_A": [0, .81], "fve_B": [0, .79]}).to_csv(d/"training.csv", index=False)
    pd.DataFrame({"pair": ["pt-it"], "latents": [512], "alive": [400], "unique-A": [3], "unique-B": [12]}).to_csv(d/"unique_counts.csv", index=False)
    m = tb.main_table([["pt", "it"]], tmp_path)
    assert m.loc[0, ["tokens", "FVE A", "FVE B", "latents", "alive", "unique-A", "unique-B"]].tolist() == [600000, .81, .79, 512, 400, 3, 12]


def test_tables_as_html_are_escaped_and_show_denominators():
    t = tb.class_table(latents(A_1=3, none=1), latents(A_1=1), TAX)
    h = tb.show_table(t, "<it>", "SimPO", "<i>caption</i>").data
    assert "<it>" not in h and "<i>" not in h and "N = 4" in h and "Safety &amp; Content Moderation" in h


def test_empty_sets_give_whole_tables_of_zeros_and_a_picture():
    none = latents()
    for make in (tb.class_table, tb.category_table):
        t = make(none, none, TAX)
        assert (t.count_A == 0).all() and (t.n_A == 0).all()
        assert "nothing to compare" in tb.finding(t, "it", "SimPO", np.nan)
        assert tb.bars(t, "it", "SimPO").axes[0].texts and "0 of 0" in tb.finding(t, "it", "SimPO", np.nan)
        assert "(unassigned)" in tb.show_table(t, "it", "SimPO").data
