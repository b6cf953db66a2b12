"Corpus: token policy, parts, what is refused, determinism. Tokenizers are built here; nothing is fetched."
import numpy as np
import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llmdiff import corpus as C
from llmdiff.core import UserError
from llmdiff.engine.texts import alternate
from test_texts import parquet_copies

GEMMA = ("{{ bos_token }}{% for m in messages %}"
         "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
         "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SHOUT = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}"
PROSE = "Wir sehen die Häuser.\n\nAnd then <b>bold</b> things happen, again and again."
TEXTS = ["user said: the model is in the house", PROSE, "日本語の文 😀"]


def tokenizer(template, bos):
    special = ["<bos>", "<start_of_turn>", "<end_of_turn>"] if bos else ["<|im_start|>", "<|im_end|>"]
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    if not bos: t.post_processor = processors.ByteLevel(trim_offsets=True)    # offsets without the leading space
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet,
                                  show_progress=False)
    t.train_from_iterator(TEXTS, trainer)
    out = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<bos>" if bos else None, eos_token=special[-1],
                                  additional_special_tokens=special[1:-1])
    out.chat_template = template
    return out


@pytest.fixture(scope="module", params=["gemma", "chatml"])
def tok(request): return tokenizer(*dict(gemma=(GEMMA, True), chatml=(CHATML, False))[request.param])


@pytest.fixture(scope="module")
def bostok(): return tokenizer(GEMMA, True)


def kept_text(tok, ids, keep): return tok.decode([int(i) for i, k in zip(ids, keep) if k])


# ---- the token policy

CHATS = [
    [dict(role="user", content="user"), dict(role="assistant", content="model assistant")],   # words of the template
    [dict(role="user", content="Häuser 😀 日本語"), dict(role="assistant", content="a"),
     dict(role="user", content="a")],
    [dict(role="user", content="the house\n\n<b>is</b> in the house")],
]


@pytest.mark.parametrize("chat", CHATS)
def test_policy_keeps_what_was_said_and_nothing_else(tok, chat):
    text, spans = C.render_chat(chat, tok)
    last_is_user = chat[-1]["role"] == "user"
    assert text == tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=last_is_user)
    assert [text[a:b] for a, b in spans] == [m["content"] for m in chat]
    ids, keep, off = C.tokenise(text, spans, tok)
    assert list(ids) == tok(text, add_special_tokens=False)["input_ids"]
    assert kept_text(tok, ids, keep) == "".join(m["content"] for m in chat)
    assert not keep[0]
    assert not set(ids[keep].tolist()) & set(tok.all_special_ids)


def test_policy_on_prose(tok):
    (text, ids, keep), = C.prose_parts(PROSE, tok, 500)
    bos = tok.bos_token is not None
    assert (ids[0] == tok.bos_token_id) == bos
    assert text == (tok.bos_token or "") + PROSE
    assert not keep[0] and keep[1:].all()
    assert kept_text(tok, ids, keep) == (PROSE if bos else tok.decode(ids[1:].tolist()))


def test_a_control_token_inside_a_text_is_not_kept(bostok):
    (text, ids, keep), = C.prose_parts("the house <end_of_turn> the model", bostok, 500)
    assert not keep[list(ids).index(bostok.convert_tokens_to_ids("<end_of_turn>"))]
    assert keep.sum() == len(ids) - 2


def test_bos_is_never_doubled(bostok):
    for text, ids, _ in C.prose_parts("the house " * 300, bostok, 64) + [C.chat_part(CHATS[0], bostok, 64)]:
        assert (ids == bostok.bos_token_id).sum() == 1
        assert ids[0] == bostok.bos_token_id


def test_a_template_without_bos_gets_one():
    t = tokenizer("{% for m in messages %}{{ m['content'] }}<end_of_turn>{% endfor %}", True)
    text, spans = C.render_chat(CHATS[0], t)
    assert text.startswith("<bos>")
    assert [text[a:b] for a, b in spans] == ["user", "model assistant"]


def test_a_template_that_rewrites_messages_is_seen():
    assert C.render_chat(CHATS[0], tokenizer(SHOUT, False)) == (None, [])


def test_a_token_overlaps_a_span_from_its_first_character():
    offsets = np.array([[0, 2], [2, 2], [2, 5], [5, 6], [6, 9], [9, 9]])
    spans = [(2, 3), (6, 8)]
    assert C.overlaps(offsets, spans).tolist() == [False, True, True, False, True, False]


# ---- parts of documents

@pytest.mark.parametrize("text", [
    "the house is in the model " * 200, "日本語の文 😀"*100, "x"*1000, "a\n\n\nb " * 150])
def test_parts_lose_nothing_and_fit(tok, text):
    parts = C.prose_parts(text, tok, 50)
    assert max(len(i) for _, i, _ in parts) <= 50
    assert len(parts) > 1
    assert "".join(t.removeprefix(tok.bos_token or "") for t, _, _ in parts) == text
    whole = tok(text, add_special_tokens=False)["input_ids"]
    assert np.concatenate([i[1 if tok.bos_token else 0:] for _, i, _ in parts]).tolist() == whole


def test_windows_are_whole_exchanges(tok):
    turns = [dict(role="user" if i % 2 == 0 else "assistant", content="the house " * (1 + i % 5)) for i in range(31)]
    chat = alternate(turns)
    windows = C.chat_windows(chat, tok, 80)
    assert sum(windows, []) == chat and len(windows) > 3
    assert all(x[0]["role"] == "user" for x in windows)
    for x in windows:
        _, ids, keep = C.chat_part(x, tok, 80)
        assert len(ids) <= 80 and len(ids) == len(keep)


def test_first_parts_come_before_second_parts():
    opened = []

    def parts(name, n):
        opened.append(name)
        yield from (f"{name}{i}" for i in range(n))
    taken = C.in_turn(parts(name, n) for name, n in (("a", 2), ("b", 0), ("c", 3)))
    assert next(taken) == "a0" and opened == ["a"]            # a document is opened when it is needed
    assert list(taken) == ["c0", "a1", "c1", "c2"]


# ---- what is refused, in one sentence each

@pytest.fixture
def files(tmp_path):
    (tmp_path/"bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path/"no.jsonl").write_text('{"title": "no text"}\n')
    (tmp_path/"empty.jsonl").write_text("")
    (tmp_path/"notes.txt").write_text("x")
    return tmp_path


KNOWN = "brown, sotu, udhr, code, chitchat, safety, sharegpt, hub:fineweb, hub:lmsys-chat and file:PATH"


@pytest.mark.parametrize("sources, n, ctx, said", [
    ({"wikipedia": 1.}, 100, 64, f"unknown source 'wikipedia': there are {KNOWN}"),
    ({"hub:pile": 1.}, 100, 64, "unknown source 'hub:pile'"),
    ({"brown": .5, "sotu": .4}, 100, 64, "sum to 0.9, not 1"),
    ({"brown": 1.5, "sotu": -.5}, 100, 64, "positive"),
    ({"brown": "much"}, 100, 64, "positive"),
    ({}, 100, 64, "sources is empty"),
    ({"brown": 1.}, 0, 64, "n_tokens"),
    ({"brown": 1.}, 100, 4, "ctx"),
    ({"code": 1.}, 10**7, 64, "lower n_tokens or its share"),
    ({"file:{}/gone.jsonl": 1.}, 100, 64, "there is no"),
    ({"hub:fineweb@{}/gone": 1.}, 100, 64, "there is no"),
    ({"file:{}/notes.txt": 1.}, 100, 64, "neither .jsonl, .jsonl.gz nor .parquet"),
    ({"file:{}/bad.jsonl": 1.}, 100, 64, "bad.jsonl line 2 is not JSON"),
    ({"file:{}/no.jsonl": 1.}, 100, 64, "no.jsonl record 1 has neither"),
    ({"file:{}/empty.jsonl": 1.}, 100, 64, "is empty"),
])
def test_errors(files, bostok, sources, n, ctx, said):
    sources = {k.replace("{}", str(files)): v for k, v in sources.items()}
    with pytest.raises(UserError) as e: C.build_corpus(sources, n, ctx, bostok)
    assert said in str(e.value)
    assert "\n" not in str(e.value)


def test_no_chat_template():
    t = tokenizer(None, True)
    with pytest.raises(UserError, match="'chitchat' is chat and the tokenizer has no chat template"):
        C.build_corpus({"chitchat": 1.}, 100, 64, t)
    assert len(C.build_corpus({"brown": 1.}, 100, 64, t))


# ---- the corpus

SHARES = {"brown": .3, "udhr": .2, "chitchat": .3, "safety": .2}


@pytest.fixture(scope="module")
def corpus(bostok): return C.build_corpus(SHARES, 3000, 64, bostok, seed=1)


def test_shares_order_and_limits(corpus):
    kept = corpus.keep.map(np.sum)
    assert corpus.doc.tolist() == list(range(len(corpus))) and corpus.id.is_unique
    assert kept.min() >= 8 and corpus.ids.map(len).max() <= 64
    assert (corpus.ids.map(len) == corpus.keep.map(len)).all()
    share = kept.groupby(corpus.source).sum()/3000
    assert (share >= [.3, .3, .2, .2]).all()                                # brown, chitchat, safety, udhr
    assert share.sum() < 1.1
    assert corpus.source.head(len(corpus)//3).nunique() == 4                # mixed
    brown = corpus[corpus.source == "brown"].id.str.partition("#")[0]
    assert brown.is_unique                                                  # other documents before further parts


def test_further_parts_when_documents_run_out(bostok):
    df = C.build_corpus({"udhr": 1.}, 60*62, 64, bostok)
    base = df.id.str.partition("#")[0]
    assert base.nunique() == 54 and base.value_counts().max() == 2


def test_hub_sources_make_a_corpus(tmp_path, bostok):
    df = C.build_corpus(parquet_copies(tmp_path), 600, 64, bostok)
    assert set(df.source) == {"hub:fineweb", "hub:lmsys-chat"}
    assert set(df.kind) == {"prose", "chat"}


def test_determinism(corpus, bostok, tmp_path):
    again, other = (C.build_corpus(SHARES, 3000, 64, bostok, seed=seed) for seed in (1, 2))
    assert C.corpus_hash(again) == C.corpus_hash(corpus) != C.corpus_hash(other)
    for d, df in (("a", corpus), ("b", again)): C.save_corpus(df, tmp_path/d, bostok, SHARES, 64, 1)
    for f in ("docs.parquet", "manifest.json"):
        assert (tmp_path/"a"/"corpus"/f).read_bytes() == (tmp_path/"b"/"corpus"/f).read_bytes()


def test_load_refuses_what_is_not_whole(corpus, bostok, tmp_path):
    with pytest.raises(UserError, match="run step corpus first"): C.load_corpus(tmp_path)
    m = C.save_corpus(corpus, tmp_path, bostok, {"brown": 1.}, 64, 1)
    back = C.load_corpus(tmp_path)
    assert back.ids[0].dtype == np.int32 and back.keep[0].dtype == bool
    assert m["n_kept"] == sum(map(sum, back.keep)) == C.corpus_manifest(tmp_path)["n_kept"]
    changed = corpus.copy()
    changed.at[0, "keep"] = ~corpus.keep[0]
    changed.to_parquet(tmp_path/"corpus"/"docs.parquet")
    with pytest.raises(UserError, match="not whole"): C.load_corpus(tmp_path)
    (tmp_path/"corpus"/"manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json is missing"): C.load_corpus(tmp_path)


def test_tokenizer_hash_sees_the_template(bostok):
    assert C.tokenizer_hash(bostok) != C.tokenizer_hash(tokenizer(CHATML, True))


def test_composition(corpus):
    t = C.composition(corpus)
    assert abs(t.share.sum() - 1) < 1e-12
    assert t.documents.sum() == len(corpus) and set(t.kind) == {"prose", "chat"}


def test_the_composition_is_a_sentence(corpus, bostok, tmp_path):
    said = C.composition_words(C.save_corpus(corpus, tmp_path, bostok, SHARES, 64, 1), corpus)
    assert said.startswith(f"{len(corpus):,} documents with ") and "% prose and " in said
    assert f"in {corpus.lang.nunique()} languages" in said


# ---- looking at it

def test_text_is_escaped(bostok):
    text = "<script>alert('the house')</script> & <img src=x onerror=alert(1)>"
    t, ids, keep = C.prose_parts(text, bostok, 200)[0]
    df = pd.DataFrame([dict(doc=0, id="<i>x", source="s", kind="prose", lang="en", text=t, ids=ids, keep=keep)])
    shown = [C.show_docs(df), C.show_docs(df, tokenizer=bostok), C.show_docs(df, tokenizer=bostok, chars=5)]
    for page in (html.data for html in shown):
        assert not any(x in page for x in ("<script", "<img", "<i>", "<bos>"))
    assert "&lt;script&gt;" in C.show_docs(df, tokenizer=bostok).data


# ---- copies of a text

def test_copies_are_found_but_for_case_and_space():
    texts = ["The house.", " the  HOUSE.\n", "a wood"]
    df = pd.DataFrame({"doc": [3, 5, 9], "id": ["a#0", "a#1", "b"], "text": texts})
    assert C.first_of_text(df).tolist() == [3, 9]
    assert C.original(df).to_dict() == {3: "a", 5: "a", 9: "b"}
    assert C.original(df[["doc", "text"]]).to_dict() == {3: 3, 5: 5, 9: 9}
    a, b, c = map(C.shingles, ("the house is in the wood", "The house is in the  woods!", "another thing"))
    assert C.near(a, b) and not C.near(a, c)
