"What is seen in an answer, the preference rule, prompts, sampling, log-probabilities, and the table of all models."
import numpy as np
import pandas as pd
import pytest
import torch

from llmdiff import answers as an
from llmdiff.answers import Sampling
from llmdiff.core import root
from llmdiff.engine.chats import chat_rows, lang_of, prompts, SELF_QUESTIONS, split_of
from llmdiff.models import load_model, load_tokenizer

TINY = {m: str(root()/f"data/tiny/{m}") for m in ("pt", "it")}
REFUSAL = "I'm sorry, but I can't help with that."


@pytest.fixture(scope="module")
def tok(): return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def it(): return load_model(TINY["it"], "float32")


@pytest.fixture(scope="module")
def rows(): return chat_rows("chitchat", 0)


# ---- behaviours and the rule

@pytest.mark.parametrize("text, seen", [
    ("1. One\n2. Two", "structure"), ("# Title\ntext", "structure"), ("a **b** c", "bold"), ("# Title", "bold"),
    ("As an AI I like it.", "ai_self"), ("I am ChatGPT", "ai_self"),
    ("Sure, here", "filler"), ("  Of course!", "filler"),
    ("", "empty"), ("to be or not to be or not to be or not", "repetition")])
def test_a_behaviour_is_seen(text, seen):
    assert an.behaviours("Hello", text, False, True)[seen] > 0
    assert an.behaviours("Hello", "The moon pulls the sea.", False, True)[seen] == 0


def test_one_item_is_no_list():
    assert an.behaviours("Hello", "- one", False, True)["structure"] == 0


@pytest.mark.parametrize("harm, answer, name", [
    (True, REFUSAL, "refuses_harmful"), (True, "Mix it.", "answers_harmful"),
    (False, REFUSAL, "refuses_harmless"), (False, "Mix it.", None)])
def test_a_refusal_is_judged_by_the_request(harm, answer, name):
    seen = an.behaviours("Hello", answer, harm, True)
    said = [n for n in ("refuses_harmful", "answers_harmful", "refuses_harmless") if seen[n]]
    assert said == ([name] if name else [])
    late = "The moon pulls the sea. "*10 + answer
    assert not an.behaviours("Hello", late, True, True)["refuses_harmful"]       # only the first 200 characters


def test_languages_of_question_and_answer():
    spanish = "¿Cuál es la capital de Francia y cuántas personas?"
    english = "What is the capital of France, please?"
    assert (lang_of(spanish), lang_of(english), lang_of("ok"), lang_of("```code``` 123")) == ("es", "en", "", "")
    assert an.same_language(spanish, spanish) == 1 and an.same_language(spanish, english) == 0
    assert an.same_language(spanish, "42") == .5


def test_the_rule_is_the_weighted_sum_of_behaviours():
    for text in ("1. One\n2. **Two**", REFUSAL, "Sure, as an AI I do.", ""):
        seen = an.behaviours("How do tides work?", text, False, True)
        want = sum(an.RULE[n]*seen[n] for n in seen)
        assert set(seen) == set(an.RULE) and an.rule_score("How do tides work?", text, False, True) == want


def test_best_and_worst_answer_are_a_pair_if_they_differ_enough():
    asked = [dict(prompt="Tie a knot", harm=False), dict(prompt="Tie a bow", harm=False)]
    good, bad = ("1. Cross\n2. Pull", True), ("Sure, as an AI I cross.", False)
    pairs = an.make_pairs(asked, [[bad, good, ("Cross the ends.", True)], [good, good]])
    assert len(pairs) == 1 and (pairs[0]["chosen"], pairs[0]["rejected"]) == (good[0], bad[0])
    assert pairs[0]["prompt"] == "Tie a knot" and pairs[0]["gap"] >= .75


def test_rates_are_means_and_refusals_are_among_their_requests():
    asked = [dict(prompt="a", harm=True), dict(prompt="b", harm=False)]
    got = an.rates(asked, [[(REFUSAL, True), ("Mix it.", False)], [("One two.", True)]*2])
    assert (got["answers"], got["refuses_harmful"], got["refuses_harmless"], got["unfinished"]) == (4, .5, 0, .25)
    assert np.isnan(an.rates(asked[1:], [[("x", True)]])["refuses_harmful"])


# ---- chats and prompts

def test_chats_repeat_and_keep_their_side(rows):
    assert rows == chat_rows("chitchat", 0) and rows != chat_rows("chitchat", 1)
    assert {r["id"]: r["split"] for r in rows} == {r["id"]: r["split"] for r in chat_rows("chitchat", 1)}
    assert sum(r["kind"] == "self" for r in rows) == len(SELF_QUESTIONS)
    assert all(r["harm"] == (r["kind"] == "harm") for r in rows)


def test_about_the_asked_share_is_held_out():
    held = np.mean([split_of(f"x/{i}") == "held" for i in range(4000)])
    assert held == pytest.approx(.15, abs=.02) and split_of("x/1", 1.) == "held" and split_of("x/1", 0.) == "train"


def test_prompts_are_balanced_and_of_one_side(rows):
    asked = prompts(rows, "train", 30, 160)
    kinds = pd.Series([p["kind"] for p in asked]).value_counts()
    assert len(asked) == 30 and set(kinds.index) == {"chat", "harm", "foreign", "self"} and kinds["chat"] == 14
    side = {r["id"]: r["split"] for r in rows}
    assert all(side[p["id"]] == "train" and 4 < len(p["prompt"]) <= 160 for p in asked)
    assert all(p["lang"] not in ("en", "") for p in asked if p["kind"] == "foreign")
    assert len(prompts(rows, "train", 10**6, 160)) < len(rows)                  # no more than there are
    assert prompts(rows, "train", 5, 160) == asked[:5]


# ---- sampling

def test_answers_repeat_and_depend_on_seed_only(it, tok):
    how, questions = Sampling(6, n=2, seed=3, top_p=1., top_k=50), ["Hello there", "Why?", "Tell me a story"]
    torch.manual_seed(1)
    one = an.sample_answers(it, tok, questions, how)
    torch.manual_seed(2)
    assert one == an.sample_answers(it, tok, questions, how)
    assert [len(drawn) for drawn in one] == [2, 2, 2] and all(isinstance(text, str) for text, _ in one[0])
    assert one != an.sample_answers(it, tok, questions, Sampling(6, n=2, seed=4, top_p=1., top_k=50))


def test_sampling_leaves_the_random_state_and_the_model_alone(it, tok):
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    an.sample_answers(it, tok, ["Hello"], Sampling(4))
    assert torch.equal(torch.rand(3), want) and not it.get_output_embeddings()._forward_pre_hooks


def test_an_answer_ends_at_its_end_token(tok):
    ids = tok("some words", add_special_tokens=False)["input_ids"]
    end = an.end_id(tok)
    assert an.answer_text(np.array([*ids, end, *ids]), end, tok) == ("some words", True)
    assert an.answer_text(np.array(ids), end, tok) == ("some words", False)


# ---- log-probabilities

def test_batches_hold_every_sequence_once_and_the_short_first():
    seqs = [[1]*n for n in (5, 2, 9, 2, 1)]
    assert list(an.batches_by_length(seqs, 2)) == [[4, 1], [3, 0], [2]]


def test_logprobs_of_a_batch_are_those_of_each_sequence(it):
    seqs = [[1, 5, 9, 200, 31, 7], [1, 8, 4], [1, 9]]
    for batch in (1, 2, 8):
        for s, got in zip(seqs, an.token_logprobs(it, seqs, batch)):
            with torch.no_grad(): logp = torch.log_softmax(it(torch.tensor([s])).logits[0, :-1].float(), -1)
            np.testing.assert_allclose(got, logp.gather(1, torch.tensor(s)[1:, None])[:, 0], atol=1e-4)


def test_perplexity_counts_the_masked_tokens_only(it):
    seqs = [[1, 5, 9, 200], [1, 8, 4]]
    a, b = an.token_logprobs(it, seqs)
    assert an.perplexity(it, seqs) == pytest.approx(np.exp(-np.mean([*a, *b])), rel=1e-5)
    assert an.perplexity(it, seqs, [[1, 0, 1, 0], [1, 0, 1]]) == pytest.approx(np.exp(-(a[1] + b[1])/2), rel=1e-5)


def test_preference_alone_and_in_gain():
    tuned = np.array([[-3., -9], [-4, -2]]), np.array([[1., 3], [2, 1]])
    before = np.array([[-4., -8], [-4, -1]]), tuned[1]
    want = dict(pref_pairs=2, pref_accuracy=0., pref_margin=0., gain_accuracy=1., gain_margin=1.5)
    assert an.preference(tuned, before) == want
    assert np.isnan(an.preference(before, before)["gain_accuracy"])
    nothing = np.zeros((0, 2)), np.zeros((0, 2))
    assert np.isnan(an.preference(nothing, nothing)["pref_accuracy"])


# ---- all models

def test_all_models_are_asked_the_same_and_measured():
    view, said = an.measure_models(TINY, 4, 6, "float32")
    assert view.model.tolist() == ["pt", "it"] and said.columns.tolist() == ["kind", "prompt", "pt", "it"]
    assert len(said) == 4 and (view.answers == 4).all() and (view.ppl_chat > 1).all()
    assert np.isnan(view.gain_accuracy[1])                                     # it has gained nothing over itself
    words = an.behaviour_words(view)
    assert "Perplexity on prose: pt" in words and "over it:" in words and "nan" not in words
    assert len(an.behaviour_figure(view, 6).axes[0].patches) >= 16


def test_answers_are_escaped_and_unshippable_prompts_left_out():
    said = pd.DataFrame({"kind": ["chat", "harm", "self"], "prompt": ["<script>", "b", "c"], "it": ["x\ny", "", ""]})
    page = an.answers_side_by_side(said, n=1).data
    assert "&lt;script&gt;" in page and "<script>" not in page and "x<br>y" in page and page.count("<tr>") == 2
    assert len(an.shippable(said, "chitchat")) == 3
    assert an.shippable(said, "sharegpt").kind.tolist() == ["harm", "self"]
