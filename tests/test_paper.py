"The published tables: every printed number from counts or scores, what tests say of them, and the command."
import json
import re

import numpy as np
import pandas as pd
import pytest

from llmdiff import tables as tb
from llmdiff.closer import paper as pp
from llmdiff.core import path
from llmdiff.driver.commands import main
from llmdiff.engine.show import gt_html


# ---- the command

def test_every_printed_number_is_rebuilt(capsys):
    assert main(["paper"]) == 0
    out = capsys.readouterr().out
    assert "130 printed numbers checked, 0 mismatches" in out and "0 are distinguishable" in out
    for printed in ("43.8", "151.69", "23.60", "Chinese", "Model Self-Reference"): assert printed in out


def test_json_is_one_object(capsys):
    assert main(["paper", "--json"]) == 0
    d = json.loads(capsys.readouterr().out)
    assert d["mismatches"] == 0 and len(d["taxonomy"]) == 30 and d["tests"][0]["distinguishable"] == 0


def test_a_wrong_number_is_found(monkeypatch, capsys):
    "Any printed number changed is a mismatch, named, and the command says so by its exit status."
    real = pd.read_csv

    def off(f, *a, **k):
        t = real(f, *a, **k)
        if str(f).endswith("elo.csv"): t.loc[0, "style_delta"] += 1
        if str(f).endswith("class_percent.csv"): t.loc[3, "change"] += .1
        return t

    monkeypatch.setattr(pd, "read_csv", off)
    assert main(["paper"]) == 1
    out = capsys.readouterr().out
    assert "2 mismatches" in out and "Math, style_delta" in out and "Format & Structure Control" in out


# ---- classes and categories

def test_every_published_number_is_rebuilt_to_its_printed_digit():
    "Three of them by hand, straight from the paper."
    assert pp.mismatches().empty
    t = pp.published_classes("SimPO").set_index("class")
    r = t.loc["Linguistic Capabilities"]
    assert f"{r.share_A:.2f} {r.share_B:.2f} {r['diff']:+.2f} {r.change:+.1f}" == "6.25 8.99 +2.74 +43.8"
    safety, errors = t.change["Safety & Content Moderation"], t.change["Error Handling & Quality Control"]
    assert f"{safety:+.1f} {errors:+.1f}" == "+32.8 -28.1"
    c = pp.published_categories().set_index("code")
    assert f"{c.change['D.16']:+.1f} {c.change['G.30']:+.1f} {c.change['F.22']:+.1f}" == "+151.7 -44.1 -68.5"
    assert list(c.n_A.unique()) == [112] and list(c.n_B.unique()) == [89]


def test_a_wrong_count_would_be_noticed(monkeypatch):
    real = pp.paper_csv

    def off_by_one(name):
        d = real(name)
        if name == "class_counts": d.loc[0, "SimPO"] -= 1
        return d

    monkeypatch.setattr(pp, "paper_csv", off_by_one)
    assert len(pp.mismatches()) == 3                               # share, difference and change of one row


def test_no_published_row_is_significant():
    tables = [pp.published_classes("SimPO"), pp.published_classes("DPO"), pp.published_categories()]
    p = pd.concat([t.p[t.q.notna()] for t in tables])
    assert len(p) == 24 and round(p.min(), 2) == 0.36
    for t in tables:
        body = t[t.q.notna()]
        assert tb.permutation_test(body.count_A, body.count_B, 2000)[1] > 0.3


def test_published_order_is_the_papers():
    first = ["Linguistic Capabilities", "Safety & Content Moderation", "Information Processing"]
    assert list(pp.published_classes("SimPO")["class"])[:3] == first


def test_a_published_table_is_drawn_whole():
    "It has no line of unassigned latents: all ten rows are bars."
    t = pp.published_categories()
    assert len(tb.bars(t, "it", "SimPO").axes[0].patches) == len(t) == 10


# ---- Elo

def test_elo_differences():
    e, v1 = pp.paper_csv("elo"), pp.paper_csv("elo_v1")
    assert (e.raw_SimPO - e.raw_it == e.raw_delta).all() and (e.style_SimPO - e.style_it == e.style_delta).all()
    assert (v1.SimPO - v1.it == v1.delta).all()


def texts_by_category(fig):
    "What stands on each category's line, panel by panel."
    rows = [x.get_text() for x in fig.axes[0].get_yticklabels()]
    at = {c: set() for c in rows}
    for k, ax in enumerate(fig.axes):
        for x in ax.texts: at[rows[int(x.xy[1])]].add((k, x.get_text()))
    return at


SCORES = {2: ["raw_it", "raw_SimPO", "style_it", "style_SimPO"], 1: ["it", "SimPO"]}


@pytest.mark.parametrize("version", SCORES)
def test_elo_pictures_and_tables_carry_each_printed_number(version):
    columns = SCORES[version]
    printed = pd.read_csv(path("data/paper")/("elo.csv" if version == 2 else "elo_v1.csv")).set_index("category")
    signed = [c for c in printed if "delta" in c or c == "diff"]
    fig, page = pp.elo_picture(version), gt_html(pp.elo_table(version)).replace("−", "-")
    at = texts_by_category(fig)
    assert sorted(at) == sorted(printed.index)
    for c, r in printed.iterrows():
        scores = {(i//2, str(r[x])) for i, x in enumerate(columns)}
        assert at[c] == scores | {(k, f"{r[x]:+d}") for k, x in enumerate(signed)}, c
        line = re.findall(r"<td[^>]*>([^<]*)</td>", re.search(rf"<td>{c}</td>.*?</tr>", page, re.S)[0])
        assert sorted(line[1:]) == sorted([*(str(r[x]) for x in columns), *(f"{r[x]:+d}" for x in signed)]), c
    assert "no intervals" in page and "no intervals" in fig.get_suptitle()


# ---- beside a run

def test_differences_of_the_same_sign_are_counted():
    t = pd.DataFrame({"diff": [1., -2, 0, np.nan], "paper_diff": [3., 1, 1, 1]})
    assert pp.beside_words(t).startswith("1 of 2 class differences that are not zero point the same way")
    assert pp.beside_words(pd.DataFrame(columns=pp.BESIDE)).startswith("0 of 0 class differences")
