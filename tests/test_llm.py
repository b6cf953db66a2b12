"""Requests on file, single requests, batches, caps and faults.

The official client talks to a server on this machine; `annotation` is the chapter that asks, two requests a latent.
"""
import json
import re

import pandas as pd
import pytest

import messages_server
import toy_contexts
from llmdiff import annotation
from llmdiff.core import digest, load_preset, UserError
from llmdiff.engine.ledger import answers_table, read_answers, read_lines, read_structured
from llmdiff.engine.llm import AskOptions, check_cap, claude_client, Hints, open_batches, pauses
from messages_server import error, GOOD, KEY, message, MODEL, paths, user_text, well_behaved
from toy_contexts import claude, TOPICS

server, examples, three = messages_server.server, toy_contexts.examples, toy_contexts.three


# ---- what is kept

def test_another_model_or_other_contexts_are_another_request(server, three, tmp_path):
    f = tmp_path/"r.jsonl"
    claude(three, f)
    n = len(server.log)
    annotation.annotate(three, "claude", file=f, model="claude-other")
    assert len(server.log) > n
    n = len(server.log)
    claude(three, f, n_top=2)
    assert len(server.log) == n + 6
    n = len(server.log)
    claude(three, f)
    assert len(server.log) == n             # what was asked before is still on file


def test_what_is_kept_is_the_request_and_its_hash(server, three, tmp_path):
    claude(three, tmp_path/"r.jsonl")
    for line in (tmp_path/"r.jsonl").read_text().splitlines():
        d = json.loads(line)
        assert d["key"] == digest(d["request"]) and set(d) == {"key", "request", "response"}


def test_a_killed_run_resumes_after_its_half_written_line(server, three, tmp_path):
    f = tmp_path/"r.jsonl"
    claude(three, f)
    lines = f.read_text().splitlines()
    f.write_text("\n".join(lines[:3]) + "\n" + lines[3][:80])
    server.log.clear()
    a = claude(three, f)
    # the three categories: one half-written, two never asked
    assert len(server.log) == 3 and (a.category == "G.30").all()
    assert len(read_answers(f)) == 6


def test_the_key_reaches_no_file_and_no_message(server, three, tmp_path, capsys, caplog):
    caplog.set_level("DEBUG", logger="llmdiff")
    claude(three, tmp_path/"r.jsonl")
    sent = server.log[0]["headers"]
    assert any(KEY in v for v in sent.values())             # it went out as a header
    assert not any(KEY in p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    assert KEY not in capsys.readouterr().out + caplog.text
    assert all(KEY not in json.dumps(r["body"]) for r in server.log)


def malformed_or_refused(n, body):
    "A category that does not exist, a truncated answer, a refusal, a good answer."
    text = user_text(body)
    if "<latent>" in text: return 200, {}, message(dict(category="Z.99", reason="no such code"))
    if "def add" in text: return 200, {}, message('{"label": "code", "descr', stop="max_tokens")
    if "Ann" in text: return 200, {}, message("", stop="refusal")
    return 200, {}, message(GOOD)


def test_malformed_answers_and_refusals_are_kept_and_counted(server, three, tmp_path):
    server.answer = malformed_or_refused
    a = claude(three, tmp_path/"r.jsonl")
    assert list(a.answer) == ["malformed (category)", "cut off", "refusal"]
    kinds = answers_table(tmp_path/"r.jsonl", annotation.says_something).groupby("answer").requests.sum()
    assert dict(kinds) == {"ok": 1, "malformed": 1, "cut off": 1, "refusal": 1}
    assert list(a.label) == [GOOD["label"], "", ""] and (a.category == "").all() and len(server.log) == 4
    assert a.annotator.str.startswith("claude:").all()
    pd.testing.assert_frame_equal(a, claude(three, tmp_path/"r.jsonl"))
    assert len(server.log) == 4                             # bad answers are not paid for twice


@pytest.mark.parametrize("label, status", [("one two three", "ok"), ("one "*9, "malformed"), (" ", "malformed")])
def test_the_rule_for_an_answer_is_the_callers(label, status):
    answer, schema = message({**GOOD, "label": label}), annotation.DESCRIBE
    assert read_structured(answer, schema)[1] == "ok"       # the schema has no such rule
    assert read_structured(answer, schema, annotation.says_something)[1] == status


# ---- the cap

def test_the_cap_comes_before_the_first_call(server, three, tmp_path):
    with pytest.raises(UserError, match="6 requests .* max_requests is 5.*nothing was sent"):
        claude(three, tmp_path/"r.jsonl", max_requests=5)
    assert server.log == []


def test_the_cap_in_dollars(server, three, tmp_path):
    with pytest.raises(UserError, match="max_usd is 0.001.*nothing was sent"):
        claude(three, tmp_path/"r.jsonl", max_usd=0.001)
    assert server.log == []


def test_advice_is_the_callers():
    few = AskOptions(max_requests=1, hints=Hints(fewer="annotate fewer latents"))
    with pytest.raises(UserError, match=r"max_requests is 1: raise it, or annotate fewer latents; nothing was sent$"):
        check_cap([{}, {}], MODEL, few)
    assert annotation.HINTS.or_other() == ", or choose annotator = offline" and Hints().or_other() == ""


# ---- faults of single requests

def test_wrong_key_stops_at_the_first_request(server, three, tmp_path):
    server.answer = lambda n, body: (401, {}, error("authentication_error", f"invalid key {KEY}"))
    with pytest.raises(UserError, match="refused the key in ANTHROPIC_API_KEY") as e:
        claude(three, tmp_path/"r.jsonl")
    assert len(server.log) == 1 and KEY not in str(e.value) and "\n" not in str(e.value)
    assert str(e.value).endswith("correct it, or choose annotator = offline; answers so far are kept")


def test_a_key_that_dies_midway_loses_nothing(server, three, tmp_path):
    dead = (401, {}, error("authentication_error"))
    server.answer = lambda n, body: well_behaved(n, body) if n < 2 else dead
    with pytest.raises(UserError, match="answers so far are kept"):
        claude(three, tmp_path/"r.jsonl")
    server.answer = well_behaved
    server.log.clear()
    a = claude(three, tmp_path/"r.jsonl")
    # one description and three categories were left
    assert len(server.log) == 4 and (a.category == "G.30").all()


def test_429_and_529_are_asked_again(server, three, tmp_path):
    busy = {0: (429, "rate_limit_error"), 2: (529, "overloaded_error"), 4: (500, "api_error")}

    def answer(n, body):
        if n not in busy: return well_behaved(n, body)
        status, kind = busy[n]
        return status, {"retry-after-ms": "1"}, error(kind)

    server.answer = answer
    a = claude(three, tmp_path/"r.jsonl")
    assert len(server.log) == 9 and (a.answer == "ok").all()


@pytest.mark.parametrize("status, kind, says", [
    (404, "not_found_error", r"there is no model claude-opus-5-5 \(404\): choose another claude_model"),
    (403, "permission_error", r"may not use claude-opus-5-5 \(403\): choose another claude_model"),
    (400, "invalid_request_error", "answered 400 to a request for claude-opus-5-5, also when asked again")])
def test_what_cannot_be_mended_is_one_sentence(server, three, tmp_path, status, kind, says):
    server.answer = lambda n, body: (status, {}, error(kind))
    with pytest.raises(UserError, match=says):
        claude(three, tmp_path/"r.jsonl")
    assert len(server.log) == 1


def test_a_dropped_connection_is_tried_again(server, three, tmp_path):
    server.answer = lambda n, body: ("drop", {}, None) if n in (0, 3) else well_behaved(n, body)
    a = claude(three, tmp_path/"r.jsonl")
    assert (a.answer == "ok").all() and len(server.log) == 8


def test_no_network(three, tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    def gone(): return claude_client("http://127.0.0.1:9").with_options(max_retries=0)
    said = r"could not be reached: is there a network\? \(annotator = offline needs none\)"
    with pytest.raises(UserError, match=said):
        claude(three, tmp_path/"r.jsonl", client=gone)


def test_claude_without_a_key_is_one_sentence(three, tmp_path, monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    said = "^annotator = claude needs a key .* ANTHROPIC_API_KEY: set it, or choose annotator = offline$"
    with pytest.raises(UserError, match=said):
        claude(three, tmp_path/"r.jsonl")


def test_default_model_is_one_the_client_knows_and_does_not_call_deprecated():
    from typing import get_args
    from anthropic.resources.messages.messages import DEPRECATED_MODELS
    from anthropic.types import Model
    assert load_preset("small")["claude_model"] == MODEL
    assert MODEL in get_args(get_args(Model)[0]) and MODEL not in DEPRECATED_MODELS


# ---- many at once: cache, threads

def test_what_is_the_same_in_all_requests_is_marked_for_the_cache(server, three, tmp_path):
    claude(three, tmp_path/"r.jsonl")
    assert len({json.dumps(r["body"]["system"]) for r in server.log}) == 2      # one system prompt a step
    assert all(r["body"]["system"][0]["cache_control"] == {"type": "ephemeral"} for r in server.log)


def test_threads_give_the_same_table_and_ask_each_once(server, examples, tmp_path):
    a = claude(examples, tmp_path/"a.jsonl", workers=8)
    b = claude(examples, tmp_path/"b.jsonl", workers=1)
    pd.testing.assert_frame_equal(a, b)
    assert len(server.log) == 2*2*len(TOPICS) and len(read_answers(tmp_path/"a.jsonl")) == 2*len(TOPICS)


# ---- batches

def quick(total=1.0):
    "Pauses of milliseconds, a second in all."
    return pauses(0.001, 0.002, total)


def batched(e, file, **kw):
    return claude(e, file, batch_from=1, waits=kw.pop("waits", quick), **kw)


def give_up(e, file):
    "A run whose batch does not end in time."
    with pytest.raises(UserError, match="still in progress: run the step again"):
        batched(e, file, waits=lambda: quick(0.01))


def test_a_batch_answers_like_single_requests_at_half_the_price(server, three, tmp_path, capsys):
    a = batched(three, tmp_path/"a.jsonl")
    half = capsys.readouterr().out
    assert paths(server, "/v1/messages") == 0 and paths(server, "/v1/messages/batches") == 2    # one batch a step
    sent = [r["body"]["requests"] for r in server.log if r["path"] == "/v1/messages/batches"]
    assert all(r["custom_id"] == digest(r["params"]) for requests in sent for r in requests)
    assert [len(x) for x in sent] == [3, 3]
    b = claude(three, tmp_path/"b.jsonl")
    full = capsys.readouterr().out
    pd.testing.assert_frame_equal(a, b)
    usd = [float(re.search(r"about ([\d.]+) US dollars", t)[1]) for t in (half, full)]
    assert abs(usd[0] - usd[1]/2) <= 0.011
    n = len(server.log)
    pd.testing.assert_frame_equal(a, batched(three, tmp_path/"a.jsonl"))
    assert len(server.log) == n


def test_a_batch_survives_busy_servers_and_dropped_connections(server, three, tmp_path):
    server.batches.events = [
        ("create", 429), ("create", 529), ("create", 500), ("poll", 529), ("poll", "drop"), ("poll", 500),
        ("results", "cut"), ("results", "short")]       # no more bytes; half a line
    a = batched(three, tmp_path/"r.jsonl")
    assert server.batches.events == [] and (a.answer == "ok").all()
    assert len(server.batches.all) == 2 and paths(server, "/v1/messages") == 0      # nothing was paid for twice
    keys = [d["key"] for d in read_lines(tmp_path/"r.jsonl") if "key" in d]
    assert len(keys) == len(set(keys)) == 6


def test_a_lost_receipt_is_found_in_the_list(server, three, tmp_path):
    server.batches.events = [("create", "lost receipt")]
    a = batched(three, tmp_path/"r.jsonl")
    assert len(server.batches.all) == 2 and (a.answer == "ok").all()


def test_an_interrupted_batch_is_waited_for_and_not_bought_again(server, three, tmp_path):
    f = tmp_path/"r.jsonl"
    server.batches.never = True
    give_up(three, f)
    server.batches.never = False
    a = batched(three, f)
    assert len(server.batches.all) == 2 and (a.answer == "ok").all() and open_batches(f) == []

    # killed between sending and noting the number: the intention alone is on file
    g = tmp_path/"g.jsonl"
    lines = f.read_text().splitlines()
    g.write_text(lines[0] + "\n")
    assert json.loads(lines[0])["batch"] == ""
    a2 = batched(three, g)
    # the first was found; this file has no trace of the second
    assert len(server.batches.all) == 3 and (a2.answer == "ok").all()
    assert any(d.get("batch") == "msgbatch_0" for d in read_lines(g))
    pd.testing.assert_frame_equal(a, a2)


def test_resuming_below_the_batch_limit_still_waits_for_the_batch(server, three, tmp_path):
    f = tmp_path/"r.jsonl"
    server.batches.never = True
    give_up(three, f)
    server.batches.never = False
    claude(three, f, waits=quick)                           # batch_from is 200 now
    assert len(server.batches.all) == 1 and paths(server, "/v1/messages") == 3      # the three categories


def test_what_a_batch_leaves_undone_is_sent_again_and_counted(server, three, tmp_path):
    undone = ["expired", "canceled", "overloaded_error"]
    server.batches.kinds = lambda i, body: "succeeded" if "<latent>" in user_text(body) else undone[i]
    a = batched(three, tmp_path/"r.jsonl")
    assert (a.answer == "ok").all() and paths(server, "/v1/messages") == 3
    t = answers_table(tmp_path/"r.jsonl").set_index("answer").requests
    assert t["ok"] == 6 and all(t[f"{k} in a batch, sent again"] == 1 for k in undone)


def truncated_or_refused(n, body):
    text = user_text(body)
    if "<latent>" in text: return well_behaved(n, body)
    if "def add" in text: return 200, {}, message('{"label": "code", "descr')       # truncated JSON
    if "Ann" in text: return 200, {}, message("", stop="refusal")
    return well_behaved(n, body)


def test_bad_answers_in_a_batch_are_kept_and_counted(server, three, tmp_path):
    server.answer = truncated_or_refused
    server.batches.kinds = lambda i, body: ("invalid_request_error" if "language model" in user_text(body)
                                            else "succeeded")
    a = batched(three, tmp_path/"r.jsonl")
    assert list(a.answer) == ["error", "malformed", "refusal"] and (a.label == "").all()
    n = len(server.log)
    pd.testing.assert_frame_equal(a, batched(three, tmp_path/"r.jsonl"))
    assert len(server.log) == n


def test_a_batch_that_the_server_forgot_is_given_up(server, three, tmp_path):
    f = tmp_path/"r.jsonl"
    server.batches.never = True
    give_up(three, f)
    server.batches.never = False
    server.batches.all.clear()
    assert (batched(three, f).answer == "ok").all()


def test_a_wrong_key_stops_a_batch_with_one_sentence(server, three, tmp_path):
    server.batches.events = [("create", 401)]
    with pytest.raises(UserError, match="refused the key") as e:
        batched(three, tmp_path/"r.jsonl")
    assert "\n" not in str(e.value) and server.batches.all == {}
    assert (batched(three, tmp_path/"r.jsonl").answer == "ok").all() and len(server.batches.all) == 2
