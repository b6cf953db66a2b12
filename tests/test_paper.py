"The published tables, and the command that prints them."
import json
import numpy as np, pandas as pd, pytest
from scipy.stats import fisher_exact
from llmdiff import run as R, tables as tb


def test_every_printed_number_is_rebuilt(capsys):
    assert R.main(["paper"]) == 0
    out = capsys.readouterr().out
    assert "130 printed numbers checked, 0 mismatches" in out and "0 are distinguishable" in out
    for printed in ("43.8", "151.69", "23.60", "Chinese", "Model Self-Reference"): assert printed in out


def test_json_is_one_object(capsys):
    assert R.main(["paper", "--json"]) == 0
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
    assert R.main(["paper"]) == 1
    out = capsys.readouterr().out
    assert "2 mismatches" in out and "Math, style_delta" in out and "Format & Structure Control" in out


@pytest.mark.parametrize("n_a, n_b", [(9, 7), (30, 12)])
def test_rejections_are_those_of_fishers_test(n_a, n_b):
    want = [[fisher_exact([[a, n_a - a], [b, n_b - b]]).pvalue < .05 for b in range(n_b + 1)] for a in range(n_a + 1)]
    np.testing.assert_array_equal(tb.rejects(n_a, n_b), want)


def test_power_against_simulation():
    g = np.random.default_rng(0); R = tb.rejects(40, 30)
    a, b = g.binomial(40, .2, 4000), g.binomial(30, .5, 4000)
    assert tb.exact_power(.2, .5, 40, 30) == pytest.approx(R[a, b].mean(), abs=.03)


def test_more_latents_see_smaller_changes():
    few, many = (tb.power_table(tb.compare_counts(pd.Series({"x": n//5}), pd.Series({"x": n//4}), n, n)) for n in (40, 400))
    assert many.seen_above[0] < few.seen_above[0] and many.power[0] > few.power[0]
    need = tb.latents_needed(.2, .25); assert tb.exact_power(.2, .25, int(need), int(need)) == pytest.approx(.8, abs=.03)


def test_power_of_empty_sets():
    t = tb.compare_counts(pd.Series({"x": 0}), pd.Series({"x": 0}), 0, 3)
    assert tb.power_table(t).empty
