"Texts: chats in one form, shipped sources, ShareGPT, hub schemas, files of one's own, languages. Nothing is fetched."
import gzip
import json

import huggingface_hub
import pandas as pd
import pytest

from llmdiff.core import UserError, path
from llmdiff.engine import texts as T


# ---- chats in one form

def test_alternate():
    log = [{"role": "assistant", "content": "late"}, {"from": "human", "value": "a"},
           {"role": "user", "content": " "}, {"from": "human", "value": "b\ud83d\r\n"},
           {"role": "tool", "content": "?"}, {"from": "gpt", "value": "c"}]
    assert T.alternate(log) == [dict(role="user", content="a\nb"), dict(role="assistant", content="c")]
    assert T.alternate([{"role": "assistant", "content": "x"}]) == []


def test_a_system_message_goes_to_the_user_after_it():
    log = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
           {"role": "model", "content": "Yes?"}, {"role": "system", "content": "Be kind."},
           {"role": "user", "content": None}, {"role": "user", "content": "Bye"}]
    assert [m["content"] for m in T.alternate(log)] == ["Be brief.\n\nHi", "Yes?", "Be kind.\n\nBye"]


# ---- sources

@pytest.mark.parametrize("source", list(T.SHIPPED))
def test_shipped_sources(source):
    docs = list(T.documents(source, 20))
    assert len(docs) == 20 and len({d["id"] for d in docs}) == 20
    for d in docs:
        assert d["source"] == source and d["kind"] == T.SHIPPED[source]
        assert d["lang"] and d["id"].startswith(source + "/")
        assert ("messages" in d) == (d["kind"] == "chat")
    if source == "safety": assert all(isinstance(d["harm"], bool) for d in docs)


def test_shipped_texts_have_terms_and_are_small():
    folder = path("data/corpus")
    terms = (folder/"LICENSES.md").read_text()
    assert all(f.name in terms for f in folder.glob("*.gz"))
    assert sum(f.stat().st_size for f in folder.glob("*.gz")) < 6e6


def test_a_missing_shipped_file_says_how_to_get_it_back(monkeypatch, tmp_path):
    monkeypatch.setattr(T, "_shipped_file", lambda source: tmp_path/"brown.jsonl.gz")
    with pytest.raises(UserError, match="brown.jsonl.gz is missing: restore it, or make it with data/corpus/make.py"):
        T.check_source("brown")


def test_a_seed_shuffles_all_documents():
    plain, shuffled = list(T.documents("udhr")), list(T.documents("udhr", seed=1))
    ids = [[d["id"] for d in docs] for docs in (plain, shuffled)]
    assert ids[0] != ids[1] and sorted(ids[0]) == sorted(ids[1])
    assert [d["id"] for d in T.documents("udhr", 5, seed=1)] == ids[1][:5]


def test_brown_reads_like_english():
    text = " ".join(d["text"] for d in T.documents("brown", 40))
    assert not any(x in text for x in ("/nn", "``", "''/", " ,", " .\n"))
    assert text.count('"') > 100


def test_records_of_a_cut_off_list():
    whole = json.dumps([dict(id=i, conversations=[dict(value="]},{ \"")]) for i in range(5)], indent=1)
    for cut in range(len(whole)):
        got = list(T.read_records(whole[:cut])) if "[" in whole[:cut] else []
        assert [r["id"] for r in got] == list(range(len(got)))
    assert len(list(T.read_records(whole))) == 5


def test_sharegpt_reader(tmp_path, monkeypatch):
    (tmp_path/"p"/"data").mkdir(parents=True)
    first = [{"from": "gpt", "value": "..."}, {"from": "human", "value": "2 / 2\nHi"},
             {"from": "gpt", "value": "Copy code\nx = 1"}]
    german = [{"from": "human", "value": "Was ist das? Ich weiß es nicht."}]
    records = [dict(id="a_0", conversations=first), dict(id="a_0", conversations=[]),
               dict(id="b_0", conversations=[]), dict(id="c_0", conversations=german)]
    (tmp_path/"p"/"data"/"x.json").write_text(json.dumps(records)[:-1] + ', {"id": "d_0", "conv')
    monkeypatch.setattr(T, "fetch_package", lambda *a: tmp_path)
    docs = list(T.documents("sharegpt"))
    assert [d["id"] for d in docs] == ["sharegpt/a_0", "sharegpt/c_0"]
    assert [d["lang"] for d in docs] == ["und", "de"]
    assert [m["content"] for m in docs[0]["messages"]] == ["Hi", "x = 1"]


# ---- the hub's datasets

def parquet_copies(folder):
    "Copies of the two hub datasets in small: source -> share."
    (folder/"fineweb").mkdir()
    (folder/"lmsys").mkdir()
    for part in range(2):
        numbers = range(part*40, part*40 + 40)
        web = dict(text=[f"the house {i} is in the house of the model, again and again" for i in numbers],
                   id=[f"<urn:{i}>" for i in numbers], dump="CC", url="http://x", language="en",
                   language_score=.9, token_count=9)
        pd.DataFrame(web).to_parquet(folder/"fineweb"/f"00{part}_00000.parquet")
        said = [[dict(role="user", content=f"the house {i}?"),
                 dict(role="assistant", content="again and again in the house")] for i in numbers]
        chat = dict(conversation_id=[str(i) for i in numbers], model="m", turn=1, language="English", redacted=False,
                    conversation=said)
        pd.DataFrame(chat).to_parquet(folder/"lmsys"/f"train-{part}.parquet")
    return {f"hub:fineweb@{folder/'fineweb'}": .5, f"hub:lmsys-chat@{folder/'lmsys'}": .5}


def test_hub_schemas_from_local_parquet(tmp_path):
    web, chat = parquet_copies(tmp_path)
    docs = list(T.documents(web))
    assert [d["id"] for d in docs] == [f"fineweb/<urn:{i}>" for i in range(80)]
    assert docs[3]["kind"] == "prose" and docs[3]["source"] == "hub:fineweb"
    docs = list(T.documents(chat, limit=3))
    assert [d["id"] for d in docs] == [f"lmsys-chat/{i}" for i in range(3)]
    assert docs[0]["lang"] == "english" and docs[0]["messages"][1]["role"] == "assistant"
    one = T.documents(web.replace("fineweb@", "fineweb@", 1) + "/000_00000.parquet")
    assert len(list(one)) == 40


@pytest.mark.parametrize("error, said", [
    ("ConnectError", "cannot be reached"), ("GatedRepoError", "accept the terms"),
    ("RepositoryNotFoundError", "no dataset")])
def test_hub_out_of_reach_is_one_quick_sentence(monkeypatch, error, said):
    class Api:
        def auth_check(self, *a, **k): raise type(error, (Exception,), {})("x")
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(UserError, match=said) as e: T.documents("hub:fineweb")
    assert "\n" not in str(e.value)


def test_broken_parquet_is_one_sentence(tmp_path):
    (tmp_path/"x.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError, match="hub:fineweb: reading stopped after 0 documents"):
        list(T.documents(f"hub:fineweb@{tmp_path}/x.parquet"))


# ---- files of one's own

def test_files_of_ones_own(tmp_path):
    prose = dict(text="the house is in the house")
    chat = dict(id="me", messages=[dict(role="user", content="Hi there, house")], lang="EN")
    (tmp_path/"a.jsonl").write_text("\n".join(map(json.dumps, [prose, chat])) + "\n\n")
    with gzip.open(tmp_path/"b.jsonl.gz", "wt") as f: f.write(json.dumps(prose))
    pd.DataFrame([dict(messages=chat["messages"])]).to_parquet(tmp_path/"c.parquet")
    docs = list(T.documents(f"file:{tmp_path}/a.jsonl"))
    assert [(d["id"], d["kind"], d["lang"], d["source"]) for d in docs] == [
        ("a.jsonl/0", "prose", docs[0]["lang"], "file:a.jsonl"), ("a.jsonl/me", "chat", "en", "file:a.jsonl")]
    assert [d["kind"] for d in T.documents(f"file:{tmp_path}")] == ["prose", "chat", "prose", "chat"]


# ---- languages

def test_a_language_is_a_known_one_or_undecided():
    said = ["Der Hund schläft unter dem Tisch.", "The dog sleeps under the table.", "Hm.", ""]
    assert list(map(T.language, said)) == ["de", "en", "und", "und"]
    assert {T.language(d["text"]) for d in T.documents("udhr")} <= T.LANGUAGES | {"und"}


def test_identifiers_are_made_once_and_answer_what_they_may():
    few = T.language_identifier(["en", "fr"])
    assert few is T.language_identifier(("en", "fr")) and few is not T.language_identifier()
    assert few.classify("Der Hund schläft unter dem Tisch.")[0] in ("en", "fr")
    assert T.language_identifier().classify("Der Hund schläft unter dem Tisch.")[0] == "de"
    assert 0 < T.language_identifier(probabilities=True).classify("Der Hund schläft.")[1] <= 1
