"""Corpus: token policy, reading, errors, determinism. Tokenizers are built here; nothing is fetched."""
import gzip, json
import numpy as np, pandas as pd, pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from llmdiff import corpus as C
from llmdiff.core import UserError

GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n{{ m['content'] | trim }}<end_of_turn>\n"
         "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SHOUT = "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}"
TEXTS = ["user said: the model is in the house", "Wir sehen die Häuser.\n\nAnd then <b>bold</b> things happen, again and again.", "日本語の文 😀"]

def tokenizer(template, bos):
    special = ["<bos>", "<start_of_turn>", "<end_of_turn>"] if bos else ["<|im_start|>", "<|im_end|>"]
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if not bos: t.post_processor = processors.ByteLevel(trim_offsets=True)    # offsets without the leading space
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    out = PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<bos>" if bos else None, eos_token=special[-1], additional_special_tokens=special[1:-1])
    out.chat_template = template
    return out

@pytest.fixture(scope="module", params=["gemma", "chatml"])
def tok(request): return tokenizer(*dict(gemma=(GEMMA, True), chatml=(CHATML, False))[request.param])

@pytest.fixture(scope="module")
def bostok(): return tokenizer(GEMMA, True)

def kept_text(tok, ids, keep): return tok.decode([int(i) for i, k in zip(ids, keep) if k])

CHATS = [
    [dict(role="user", content="user"), dict(role="assistant", content="model assistant")],                       # words of the template
    [dict(role="user", content="Häuser 😀 日本語"), dict(role="assistant", content="a"), dict(role="user", content="a")],
    [dict(role="user", content="the house\n\n<b>is</b> in the house")],
]

@pytest.mark.parametrize("chat", CHATS)
def test_policy_keeps_what_was_said_and_nothing_else(tok, chat):
    text, spans = C.render_chat(chat, tok)
    last_is_user = chat[-1]["role"] == "user"
    assert text == tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=last_is_user)
    assert [text[a:b] for a, b in spans] == [m["content"] for m in chat]
    ids, keep, off = C.encode(text, spans, tok)
    assert list(ids) == tok(text, add_special_tokens=False)["input_ids"]
    assert kept_text(tok, ids, keep) == "".join(m["content"] for m in chat)
    assert not keep[0] and not set(ids[keep].tolist()) & set(tok.all_special_ids)

def test_policy_on_prose(tok):
    (text, ids, keep), = C.prose_parts(TEXTS[1], tok, 500)
    bos = tok.bos_token is not None
    assert (ids[0] == tok.bos_token_id) == bos and text == (tok.bos_token or "") + TEXTS[1]
    assert not keep[0] and keep[1:].all()
    assert kept_text(tok, ids, keep) == (TEXTS[1] if bos else tok.decode(ids[1:].tolist()))

def test_a_control_token_inside_a_text_is_not_kept(bostok):
    (text, ids, keep), = C.prose_parts("the house <end_of_turn> the model", bostok, 500)
    assert not keep[list(ids).index(bostok.convert_tokens_to_ids("<end_of_turn>"))] and keep.sum() == len(ids) - 2

def test_bos_is_never_doubled(bostok):
    for text, ids, _ in C.prose_parts("the house " * 300, bostok, 64) + [C.chat_part(CHATS[0], bostok, 64)]:
        assert (ids == bostok.bos_token_id).sum() == 1 and ids[0] == bostok.bos_token_id

def test_a_template_without_bos_gets_one():
    t = tokenizer("{% for m in messages %}{{ m['content'] }}<end_of_turn>{% endfor %}", True)
    text, spans = C.render_chat(CHATS[0], t)
    assert text.startswith("<bos>") and [text[a:b] for a, b in spans] == ["user", "model assistant"]

def test_a_template_that_rewrites_messages_is_seen():
    assert C.render_chat(CHATS[0], tokenizer(SHOUT, False)) == (None, [])

@pytest.mark.parametrize("text", ["the house is in the model " * 200, "日本語の文 😀"*100, "x"*1000, "a\n\n\nb " * 150])
def test_parts_lose_nothing_and_fit(tok, text):
    parts = C.prose_parts(text, tok, 50)
    assert max(len(i) for _, i, _ in parts) <= 50 and len(parts) > 1
    assert "".join(t.removeprefix(tok.bos_token or "") for t, _, _ in parts) == text
    whole = tok(text, add_special_tokens=False)["input_ids"]
    assert np.concatenate([i[1 if tok.bos_token else 0:] for _, i, _ in parts]).tolist() == whole

def test_windows_are_whole_exchanges(tok):
    chat = [dict(role="user" if i % 2 == 0 else "assistant", content="the house " * (1 + i % 5)) for i in range(31)]
    chat = C.alternate(chat)
    w = C.chat_windows(chat, tok, 80)
    assert sum(w, []) == chat and len(w) > 3 and all(x[0]["role"] == "user" for x in w)
    for x in w:
        _, ids, keep = C.chat_part(x, tok, 80)
        assert len(ids) <= 80 and len(ids) == len(keep)

def test_alternate():
    out = C.alternate([{"role": "assistant", "content": "late"}, {"from": "human", "value": "a"}, {"role": "user", "content": " "}, {"from": "human", "value": "b\ud83d\r\n"},
                       {"role": "tool", "content": "?"}, {"from": "gpt", "value": "c"}])
    assert out == [dict(role="user", content="a\nb"), dict(role="assistant", content="c")]
    assert C.alternate([{"role": "assistant", "content": "x"}]) == []

# ---- sources

@pytest.mark.parametrize("source", list(C.SHIPPED))
def test_shipped_sources(source):
    docs = list(C.documents(source, 20))
    assert len(docs) == 20 and len({d["id"] for d in docs}) == 20
    for d in docs:
        assert d["source"] == source and d["kind"] == C.SHIPPED[source] and d["lang"] and d["id"].startswith(source + "/")
        assert ("messages" in d) == (d["kind"] == "chat")
    if source == "safety": assert all(isinstance(d["harm"], bool) for d in docs)

def test_shipped_texts_have_terms_and_are_small():
    folder = C.path("data/corpus")
    terms = (folder/"LICENSES.md").read_text()
    assert all(f.name in terms for f in folder.glob("*.gz"))
    assert sum(f.stat().st_size for f in folder.glob("*.gz")) < 6e6

def test_brown_reads_like_english():
    text = " ".join(d["text"] for d in C.documents("brown", 40))
    assert not any(x in text for x in ("/nn", "``", "''/", " ,", " .\n")) and text.count('"') > 100

def test_records_of_a_cut_off_list():
    whole = json.dumps([dict(id=i, conversations=[dict(value="]},{ \"")]) for i in range(5)], indent=1)
    for cut in range(len(whole)):
        got = list(C.read_records(whole[:cut])) if "[" in whole[:cut] else []
        assert [r["id"] for r in got] == list(range(len(got)))
    assert len(list(C.read_records(whole))) == 5

def test_sharegpt_reader(tmp_path, monkeypatch):
    (tmp_path/"p"/"data").mkdir(parents=True)
    rec = [dict(id="a_0", conversations=[{"from": "gpt", "value": "..."}, {"from": "human", "value": "2 / 2\nHi"}, {"from": "gpt", "value": "Copy code\nx = 1"}]),
           dict(id="a_0", conversations=[]), dict(id="b_0", conversations=[]), dict(id="c_0", conversations=[{"from": "human", "value": "Was ist das? Ich weiß es nicht."}])]
    (tmp_path/"p"/"data"/"x.json").write_text(json.dumps(rec)[:-1] + ', {"id": "d_0", "conv')
    monkeypatch.setattr(C, "fetch_package", lambda *a: tmp_path)
    docs = list(C.documents("sharegpt"))
    assert [d["id"] for d in docs] == ["sharegpt/a_0", "sharegpt/c_0"] and [d["lang"] for d in docs] == ["und", "de"]
    assert [m["content"] for m in docs[0]["messages"]] == ["Hi", "x = 1"]

@pytest.fixture
def hub(tmp_path):
    (tmp_path/"fineweb").mkdir(); (tmp_path/"lmsys").mkdir()
    for part in range(2):
        n = range(part*40, part*40 + 40)
        pd.DataFrame(dict(text=[f"the house {i} is in the house of the model, again and again" for i in n], id=[f"<urn:{i}>" for i in n], dump="CC", url="http://x", language="en",
                          language_score=.9, token_count=9)).to_parquet(tmp_path/"fineweb"/f"00{part}_00000.parquet")
        pd.DataFrame(dict(conversation_id=[str(i) for i in n], model="m", turn=1, language="English", redacted=False,
                          conversation=[[dict(role="user", content=f"the house {i}?"), dict(role="assistant", content="again and again in the house")] for i in n])
                     ).to_parquet(tmp_path/"lmsys"/f"train-{part}.parquet")
    return {f"hub:fineweb@{tmp_path/'fineweb'}": .5, f"hub:lmsys-chat@{tmp_path/'lmsys'}": .5}

def test_hub_schemas_from_local_parquet(hub, bostok):
    web, chat = hub
    docs = list(C.documents(web))
    assert [d["id"] for d in docs] == [f"fineweb/<urn:{i}>" for i in range(80)] and docs[3]["kind"] == "prose" and docs[3]["source"] == "hub:fineweb"
    docs = list(C.documents(chat, limit=3))
    assert [d["id"] for d in docs] == [f"lmsys-chat/{i}" for i in range(3)] and docs[0]["lang"] == "english" and docs[0]["messages"][1]["role"] == "assistant"
    df = C.build_corpus(hub, 600, 64, bostok)
    assert set(df.source) == {"hub:fineweb", "hub:lmsys-chat"} and set(df.kind) == {"prose", "chat"}
    one = C.documents(web.replace("fineweb@", "fineweb@", 1) + "/000_00000.parquet")
    assert len(list(one)) == 40

def test_hub_out_of_reach_is_one_quick_sentence(monkeypatch):
    import huggingface_hub
    class Api:
        def auth_check(self, *a, **k): raise self.error
    for name, said in [("ConnectError", "cannot be reached"), ("GatedRepoError", "accept the terms"), ("RepositoryNotFoundError", "no dataset")]:
        Api.error = type(name, (Exception,), {})("x")
        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        with pytest.raises(UserError, match=said) as e: C.documents("hub:fineweb")
        assert "\n" not in str(e.value)

def test_broken_parquet_is_one_sentence(tmp_path):
    (tmp_path/"x.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="hub:fineweb: reading stopped after 0 documents"): list(C.documents(f"hub:fineweb@{tmp_path}/x.parquet"))

def test_files_of_ones_own(tmp_path):
    rows = [dict(text="the house is in the house"), dict(id="me", messages=[dict(role="user", content="Hi there, house")], lang="EN")]
    (tmp_path/"a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    with gzip.open(tmp_path/"b.jsonl.gz", "wt") as f: f.write(json.dumps(rows[0]))
    pd.DataFrame([dict(messages=rows[1]["messages"])]).to_parquet(tmp_path/"c.parquet")
    docs = list(C.documents(f"file:{tmp_path}/a.jsonl"))
    assert [(d["id"], d["kind"], d["lang"], d["source"]) for d in docs] == [("a.jsonl/0", "prose", docs[0]["lang"], "file:a.jsonl"), ("a.jsonl/me", "chat", "en", "file:a.jsonl")]
    assert [d["kind"] for d in C.documents(f"file:{tmp_path}")] == ["prose", "chat", "prose", "chat"]

# ---- errors: each one sentence

@pytest.fixture
def files(tmp_path):
    (tmp_path/"bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (tmp_path/"no.jsonl").write_text('{"title": "no text"}\n')
    (tmp_path/"empty.jsonl").write_text("")
    (tmp_path/"notes.txt").write_text("x")
    return tmp_path

@pytest.mark.parametrize("sources, n, ctx, said", [
    ({"wikipedia": 1.}, 100, 64, "unknown source 'wikipedia': there are brown, sotu, udhr, code, chitchat, safety, sharegpt, hub:fineweb, hub:lmsys-chat and file:PATH"),
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
    assert said in str(e.value) and "\n" not in str(e.value)

def test_no_chat_template():
    t = tokenizer(None, True)
    with pytest.raises(UserError, match="'chitchat' is chat and the tokenizer has no chat template"): C.build_corpus({"chitchat": 1.}, 100, 64, t)
    assert len(C.build_corpus({"brown": 1.}, 100, 64, t))

# ---- the corpus

@pytest.fixture(scope="module")
def corpus(bostok): return C.build_corpus({"brown": .3, "udhr": .2, "chitchat": .3, "safety": .2}, 3000, 64, bostok, seed=1)

def test_shares_order_and_limits(corpus):
    kept = corpus.keep.map(np.sum)
    assert corpus.doc.tolist() == list(range(len(corpus))) and corpus.id.is_unique
    assert kept.min() >= 8 and corpus.ids.map(len).max() <= 64 and (corpus.ids.map(len) == corpus.keep.map(len)).all()
    share = kept.groupby(corpus.source).sum()/3000
    assert (share >= [.3, .3, .2, .2]).all() and share.sum() < 1.1                       # brown, chitchat, safety, udhr
    assert corpus.source.head(len(corpus)//3).nunique() == 4                            # mixed
    assert corpus[corpus.source == "brown"].id.str.partition("#")[0].is_unique         # other documents before further parts

def test_further_parts_when_documents_run_out(bostok):
    df = C.build_corpus({"udhr": 1.}, 60*62, 64, bostok)
    base = df.id.str.partition("#")[0]
    assert base.nunique() == 54 and base.value_counts().max() == 2

def test_determinism(corpus, bostok, tmp_path):
    args = ({"brown": .3, "udhr": .2, "chitchat": .3, "safety": .2}, 3000, 64, bostok)
    again, other = C.build_corpus(*args, seed=1), C.build_corpus(*args, seed=2)
    assert C.corpus_hash(again) == C.corpus_hash(corpus) != C.corpus_hash(other)
    for d, df in (("a", corpus), ("b", again)): C.save_corpus(df, tmp_path/d, bostok, args[0], 64, 1)
    for f in ("docs.parquet", "manifest.json"): assert (tmp_path/"a"/"corpus"/f).read_bytes() == (tmp_path/"b"/"corpus"/f).read_bytes()

def test_load_refuses_what_is_not_whole(corpus, bostok, tmp_path):
    with pytest.raises(UserError, match="run notebook 02_corpus first"): C.load_corpus(tmp_path)
    m = C.save_corpus(corpus, tmp_path, bostok, {"brown": 1.}, 64, 1)
    back = C.load_corpus(tmp_path)
    assert back.ids[0].dtype == np.int32 and back.keep[0].dtype == bool and m["n_kept"] == sum(map(sum, back.keep)) == C.corpus_manifest(tmp_path)["n_kept"]
    changed = corpus.copy(); changed.at[0, "keep"] = ~corpus.keep[0]
    changed.to_parquet(tmp_path/"corpus"/"docs.parquet")
    with pytest.raises(UserError, match="not whole"): C.load_corpus(tmp_path)
    (tmp_path/"corpus"/"manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json is missing"): C.load_corpus(tmp_path)

def test_tokenizer_hash_sees_the_template(bostok): assert C.tokenizer_hash(bostok) != C.tokenizer_hash(tokenizer(CHATML, True))

def test_text_is_escaped(bostok):
    text = "<script>alert('the house')</script> & <img src=x onerror=alert(1)>"
    t, ids, keep = C.prose_parts(text, bostok, 200)[0]
    df = pd.DataFrame([dict(doc=0, id="<i>x", source="s", kind="prose", lang="en", text=t, ids=ids, keep=keep)])
    for page in (C.show_docs(df).data, C.show_docs(df, tokenizer=bostok).data, C.show_docs(df, tokenizer=bostok, chars=5).data):
        assert not any(x in page for x in ("<script", "<img", "<i>", "<bos>"))
    assert "&lt;script&gt;" in C.show_docs(df, tokenizer=bostok).data

def test_composition(corpus):
    t = C.composition(corpus)
    assert abs(t.share.sum() - 1) < 1e-12 and t.documents.sum() == len(corpus) and set(t.kind) == {"prose", "chat"}
