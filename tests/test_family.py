"Making the embedded family: compact vocabularies, tuning, and the recipe in a few steps."
import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch

from llmdiff.answers import sample_answers, Sampling
from llmdiff.core import root, UserError
from llmdiff.engine.chats import chat_rows
from llmdiff.models import load_model, load_tokenizer
from llmdiff.worlds import family, tuning
from llmdiff.worlds.tuning import Tuning

PT = str(root()/"data/tiny/pt")
TWO = Tuning(steps=2, batch=2, lr=1e-3)


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)
    torch.use_deterministic_algorithms(False)


def small(keep=(0, 5, 9, 31, 200)): return tuning.compact(load_model(PT, "float32"), list(keep))


def logits(model, ids): return model(torch.tensor([ids])).logits[0].detach()


# ---- compact vocabularies

def test_a_compact_model_is_the_same_model_on_its_tokens():
    keep = [0, 5, 9, 31, 200]
    want = logits(load_model(PT, "float32"), [9, 200, 5])[:, keep]
    model = small(keep)
    torch.testing.assert_close(logits(model, [2, 4, 1]), want, atol=1e-4, rtol=1e-4)
    assert model.config.vocab_size == 5
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_compact_ids_survive_the_tokenizer():
    tok, ids = tuning.id_tokenizer(1200, None, 7, 8), list(np.random.default_rng(0).permutation(1200))
    assert tok(tuning.words(ids))["input_ids"] == ids and (tok.eos_token_id, tok.pad_token_id) == (7, 8)


def test_answers_of_a_compact_model_are_real_text():
    tok = load_tokenizer({"pt": PT})
    keep = list(range(len(tok)))
    how = Sampling(5, seed=1)
    full = sample_answers(load_model(PT, "float32"), tok, ["Hello"], how)
    assert sample_answers(small(keep), tok, ["Hello"], how, keep=keep) == full


# ---- tuning

def test_sft_learns_the_masked_tokens_only():
    tok = tuning.id_tokenizer(5, None, 1, 0)
    rows = [([1, 2, 3, 4], [0, 0, 1, 1])]*2
    model, log = tuning.tune(small(), rows, tok, Tuning(steps=6, batch=2, lr=1e-2), seed=0)
    assert log.step.tolist() == [1, 2, 3, 4, 5, 6] and log.loss.iloc[-1] < log.loss[0]
    other = [([1, 2, 3, 4], [0, 0, 0, 1])]*2
    assert tuning.tune(small(), other, tok, TWO, seed=0)[1].loss[0] != log.loss[0]


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_preferences_are_learnt_from_the_ids_that_were_made(method):
    tok, pairs = tuning.id_tokenizer(5, None, 1, 0), [dict(prompt=[2, 3], chosen=[4, 1], rejected=[3, 1])]*2
    model, log = tuning.prefer(small(), pairs, tok, method, Tuning(steps=5, batch=2, lr=1e-3), seed=0)
    assert log["rewards/margins"].iloc[-1] > log["rewards/margins"][0]


def test_other_ids_than_were_made_are_refused(monkeypatch):
    monkeypatch.setattr(tuning, "words", lambda ids: "t2; "*len(ids))
    pairs = [dict(prompt=[2, 3], chosen=[4, 1], rejected=[3, 1])]*2
    with pytest.raises(UserError, match="trl did not keep the token ids"):
        tuning.prefer(small(), pairs, tuning.id_tokenizer(5, None, 1, 0), "dpo", TWO, seed=0)


def test_refusals_are_learnt_sometimes_and_self_rows_four_times():
    tok, rows = load_tokenizer({"pt": PT}), chat_rows("chitchat", 0)
    few, every = (family.sft_rows([r for r in rows if r["kind"] == "harm"], tok, 64, share) for share in (.25, 1.))
    assert .15 < len(few)/len(every) < .35
    own = [r for r in rows if r["kind"] == "self"]
    n = sum(r["split"] == "train" for r in own)
    assert len(family.sft_rows(own, tok, 64)) == 4*n
    assert all(len(ids) == len(mask) <= 64 and sum(mask) >= 8 for ids, mask in every)


# ---- the recipe

SHORT = dict(sft=TWO, sft_tokens=48, n_prompts=12, samples=4, new_tokens=12, prompt_chars=100, simpo=TWO, dpo=TWO)


def files(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.fixture
def few_texts(monkeypatch):
    "A few of the texts and of the chats."
    texts, rows = family.tiny_texts()[::200], chat_rows("chitchat", 0)[::10]
    monkeypatch.setattr(family, "tiny_texts", lambda: texts)
    monkeypatch.setattr(family, "chat_rows", lambda chats, seed: rows)


def test_the_tiny_family_in_two_steps_each(tmp_path, monkeypatch, few_texts):
    base = family.Base(d=32, n_layers=2, vocab=400, training=TWO)
    recipe = dataclasses.replace(family.RECIPE["tiny"], pretrain=base, **SHORT)
    monkeypatch.setitem(family.RECIPE, "tiny", recipe)
    told = []
    family.make_family("tiny", tmp_path, log=told.append)
    assert {p.name for p in tmp_path.iterdir()} == {"pt", "it", "SimPO", "DPO", "pairs.json", "log_it.csv",
                                                    "log_SimPO.csv", "log_DPO.csv"}
    pairs = json.loads((tmp_path/"pairs.json").read_text())
    assert pairs and all(p["gap"] >= .75 for p in pairs)
    assert pd.read_csv(tmp_path/"log_DPO.csv").step.tolist() == [1, 2]
    models = {m: load_model(str(tmp_path/m), "float32") for m in ("pt", "it", "SimPO", "DPO")}
    assert len({str(logits(m, [1, 5, 9]).sum().item()) for m in models.values()}) == 4
    assert told[0].startswith("tiny pt: ") and "it: " in told[1]

    before, told = files(tmp_path), []
    family.make_family("tiny", tmp_path, log=told.append)             # what is there is not made again
    assert files(tmp_path) == before and told == []


def test_adapters_learn_in_one_go_and_a_step_alone_is_the_same(tmp_path, monkeypatch, few_texts):
    "With the whole vocabulary: of one that was cut, peft would save the embeddings of a base that it finds on disk."
    recipe = family.FamilyRecipe(base=PT, rank=2, chats="chitchat", **SHORT)
    monkeypatch.setitem(family.RECIPE, "gemma", recipe)
    monkeypatch.setattr(family, "occurring", lambda chats, asked, tok: list(range(len(tok))))
    pairs = [dict(prompt="Tie a knot", chosen="Cross the ends.", rejected="Sure, as an AI I cross.")]*2
    (tmp_path/"pairs.json").write_text(json.dumps(pairs))
    family.make_family("gemma", tmp_path, log=lambda *a: None)
    for name in ("it", "SimPO", "DPO"):
        config = json.loads((tmp_path/name/"adapter_config.json").read_text())
        assert config["r"] == 2 and config["base_model_name_or_path"] == PT and config["inference_mode"]
    whole = files(tmp_path)
    assert whole[next(p for p in whole if "DPO" in str(p))] != whole[next(p for p in whole if "SimPO" in str(p))]
    shutil.rmtree(tmp_path/"DPO")
    family.make_family("gemma", tmp_path, log=lambda *a: None)
    assert files(tmp_path) == whole


def test_the_numbers_of_the_shipped_files():
    gemma, tiny = family.RECIPE["gemma"], family.RECIPE["tiny"]
    assert (gemma.sft.steps, gemma.simpo.lr, gemma.rank, gemma.n_prompts) == (110, 1.5e-4, 8, 280)
    assert (tiny.pretrain.vocab, tiny.sft.steps, tiny.rank, tiny.new_tokens) == (2048, 350, 0, 32)
