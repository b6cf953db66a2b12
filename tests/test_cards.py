"The card of a latent: every text escaped, the strip of the models, directions of writing, what is missing."
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from llmdiff.engine.cards import CARD_CSS, latent_card
from toy_documents import AB, row


class Strict(HTMLParser):
    "Collects tags and text; a page that is not well formed leaves tags open."
    def __init__(self, s):
        super().__init__()
        self.open, self.tags, self.words = [], [], ""
        self.feed(s)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, d):
        self.words += d


NASTY_NAMES = ["<script>A", "B\"><img src=x onerror=y>"]
NASTY = ["<script>alert(1)</script>", "</span></div>", "<img src=x onerror=y>", "&amp; \" '",
         "$x$ \x00\x1b[0m\n", "\u202eevil", "שלום"]
ACTIVE = r"https?:|url\(|@import|<script|<img|javascript"   # what a page must not hold


def contexts(tokens, kind="top"):
    return pd.DataFrame({"latent": 3, "kind": kind, "rank": [0], "doc": 7, "source": "<b>src</b>", "pos": 2,
                         "act": 2., "tokens": [tokens], "acts": [[2.]*len(tokens)], "text": "".join(tokens)})


def page(*args):
    "The HTML of a card."
    return latent_card(*args)._repr_html_()


def check_plain(s): # of `Strict`
    "The page is well formed and has harmless tags and attributes only."
    assert s.open == [] and {t for t, _ in s.tags} <= {"style", "div", "p", "span", "b"}
    assert all(set(a) <= {"class", "style", "title", "dir"} for _, a in s.tags)


def test_card_escapes_everything():
    c = latent_card(row(label="<b>label</b>", reason="<i>why</i>"), contexts(NASTY), ["<A>", "B"])
    h = c._repr_html_()
    s = Strict(h)
    check_plain(s)
    assert "<b>label</b>" in s.words and "<script>" in s.words and "<b>src</b>" in s.words
    assert "\x00" not in h and "\x1b" not in h
    assert not re.search(ACTIVE, h)
    assert "mathjax_ignore" in h and "script" not in repr(c)


def with_parts(e, share=(.25, .5)):
    return e.assign(parts=[[[v*a for a in x] for v in share] for x in e.acts])


def test_card_shows_each_models_part_escaped():
    h = page(row(), with_parts(contexts(NASTY)), NASTY_NAMES)
    s = Strict(h)
    check_plain(s)
    A, B = NASTY_NAMES
    said = [a["title"] for _, a in s.tags if "title" in a]
    assert len(said) == len(NASTY) and set(said) == {f"2: {A} 0.5, {B} 1, bias 0.5"}
    assert h.count("#029e73 33%") == len(NASTY) + 1
    assert not re.search(ACTIVE, h)
    over = f"(of its sum over the {len(NASTY)} shaded tokens)"
    assert f"share of the activation: {A} 25%, {B} 50%, bias 25% {over}" in s.words


@pytest.mark.parametrize("share, strip", [
    ((1.5, -.5), "100%"), ((-.5, 1.5), "0%"), ((.4, .4), "50%"), ((-1, -1), None)])
def test_the_strip_is_divided_by_the_parts_that_speak_for_the_latent(share, strip):
    h = page(row(), with_parts(contexts(["word"]), share), AB)
    assert h.count("linear-gradient") == (2 if strip else 0)
    assert not strip or f"#029e73 {strip}" in h
    assert f'title="2: A {2*share[0]:.3g}, B {2*share[1]:.3g}, bias {2 - 2*sum(share):.3g}"' in h


def test_silent_tokens_and_contexts_have_no_parts_on_the_card():
    e = with_parts(contexts([" a", " b"]))
    e.at[0, "acts"] = [2., 0.]
    e.at[0, "parts"] = [[1., 0.], [.5, 0.]]
    z = contexts([" c"], "zero").assign(act=0., acts=[[0.]], parts=[[[0.], [0.]]])
    h = page(row(), pd.concat([e, z], ignore_index=True), AB)
    assert h.count("title=") == 1 and "over the 1 shaded tokens" in h


@pytest.mark.parametrize("none", [None, np.nan])
def test_card_of_a_table_without_parts(none):
    for e in (contexts([" a"]), contexts([" a"]).assign(parts=[none])):
        h = page(row(), e, AB)
        assert 'title="2"' in h and "share of the activation" not in h and "gradient" not in h


def test_card_of_right_to_left_text_keeps_its_own_direction():
    s = Strict(page(row(), contexts(["שלום", " עולם"]), AB))
    assert any(t == "p" and a.get("dir") == "auto" for t, a in s.tags)
    assert "unicode-bidi:isolate" in CARD_CSS


@pytest.mark.parametrize("tokens", [["\u202eevil"], ["שלום", " hello", " 世界"], ["مرحبا", " x"]])
def test_text_of_mixed_scripts_does_not_turn_what_stands_beside_it(tokens):
    "Text and source stand in spans of their own, isolated from each other: an override never closed ends there."
    h = page(row(), contexts(tokens), AB)
    p = re.search(r"<p dir='auto'>(.*?)</p>", h)[1]
    assert re.fullmatch(r"<span class='ld-x'>.*</span> <span class='ld-s ld-x'>[^<]* 7, 2</span>", p)
    assert re.search(r"\.ld-x\{unicode-bidi:isolate\}", CARD_CSS)
    assert Strict(p).open == [] and "".join(tokens) in Strict(p).words


def test_card_without_label_ratio_or_contexts():
    h = page(row(label=np.nan, nu_eps_B=np.nan), contexts([]).iloc[:0], AB)
    assert "no label yet" in h and "undefined" in h and "no contexts" in h and "nan" not in h
