"Core: sentences for users, paths, presets, seeds, hashes, atomic writes, tables, the latents table, settings, pairs."
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llmdiff import core
from llmdiff.core import UserError


# ---- sentences

def says(call, *args, **kw):
    "The sentence with which a call is refused."
    with pytest.raises(UserError) as e: call(*args, **kw)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_check_is_silent_or_says_one_sentence():
    assert core.check(True, "never shown") is None
    assert says(core.check, 0, "layer 99 is out of range") == "layer 99 is out of range"
    assert issubclass(UserError, ValueError)


def test_a_missing_result_names_the_step_to_run(tmp_path):
    assert core.rerun("caching") == "`llmdiff run --from caching`"
    sentence = says(core.need, tmp_path/"corpus"/"docs.parquet", "corpus")
    file = tmp_path/"corpus"/"docs.parquet"
    assert sentence == f"{file} is missing: run step corpus first, `llmdiff run --from corpus`"
    (tmp_path/"there").write_text("x")
    assert core.need(tmp_path/"there", "corpus") == tmp_path/"there"


def test_a_missing_file_of_the_project_says_how_to_get_it_back(tmp_path):
    ours, other = says(core.project_file, "data/no.csv"), says(core.project_file, tmp_path/"no.csv")
    assert ours == "data/no.csv is missing: restore it with `git checkout -- data/no.csv`"
    assert other == f"{tmp_path}/no.csv is missing: give the path of a file that exists"
    assert core.project_file("data/taxonomy.csv") == core.root()/"data"/"taxonomy.csv"


# ---- paths

def test_paths_start_at_the_project(tmp_path):
    assert core.path("runs/tiny") == core.root()/"runs"/"tiny"
    assert core.path(tmp_path) == tmp_path
    assert core.path("~/x") == Path.home()/"x"
    assert core.rel("runs/tiny") == core.rel(core.root()/"runs"/"tiny") == "runs/tiny"
    assert core.rel(tmp_path) == str(tmp_path)


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMDIFF_CACHE", str(tmp_path/"a"/"cache"))
    assert core.cache_dir() == tmp_path/"a"/"cache"
    assert core.cache_dir().is_dir()
    with core.tempfile_dir() as d:
        assert d.parent == core.cache_dir() and d.is_dir()
    assert not d.exists()


# ---- presets

SETTINGS = """[DEFAULT]
seed = 0
dtype = auto
[small]
models = {"pt": "data/tiny/pt"}
lr = 1e-3
[large]
seed = 7
note = 100 % of it
"""


def test_presets_are_typed_and_share_defaults(tmp_path):
    file = tmp_path/"settings.ini"
    file.write_text(SETTINGS)
    assert core.preset_names(file) == ["small", "large"]
    small, large = core.load_preset("small", file), core.load_preset("large", file)
    assert small == dict(models={"pt": "data/tiny/pt"}, lr=1e-3, seed=0, dtype="auto")
    assert large == dict(seed=7, note="100 % of it", dtype="auto")
    assert says(core.load_preset, "huge", file) == "unknown preset 'huge': settings.ini defines small, large"


def test_the_projects_presets_can_be_read():
    assert {"tiny", "small", "gemma-2-9b"} <= set(core.preset_names())
    assert core.load_preset("tiny")["n_tokens"] == 60000


# ---- seeds and hashes

def test_a_seed_repeats_all_three_generators():
    import torch
    was = torch.are_deterministic_algorithms_enabled()
    draws = []
    for _ in range(2):
        core.set_seed(5)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))   # noqa: NPY002
    torch.use_deterministic_algorithms(was)
    assert draws[0] == draws[1]


def test_a_digest_sees_every_border_and_the_content_of_files(tmp_path):
    file = tmp_path/"x"
    file.write_bytes(b"abc")
    assert core.digest("ab") != core.digest("a", "b") != core.digest("b", "a")
    assert core.digest({"a": 1, "b": 2}) == core.digest({"b": 2, "a": 1})
    assert core.digest(file) == core.digest(b"abc") == core.digest("abc") != core.digest(str(file))
    assert len(core.digest()) == 16
    assert core.digest("a", b"b", {"x": [2]}) == hashlib.sha256(b'a\0b\0{"x": [2]}\0').hexdigest()[:16]
    assert core.sha256(file) == hashlib.sha256(b"abc").hexdigest()


def test_mix_gives_the_numbers_it_always_gave():
    "Choices of every run hang on these numbers."
    assert core.mix(0, [3], [5]).tolist() == [12505881530342205894]
    assert core.mix(3, np.arange(3), 7).tolist() == [
        12765582726280512729, 8679083942781605623, 4213446005483434661]


def test_mix_depends_on_the_row_alone_and_on_the_order_of_keys():
    rows = core.mix(1, np.arange(10), 4)
    assert (rows[[7, 2]] == core.mix(1, [7, 2], 4)).all()
    assert (rows != core.mix(2, np.arange(10), 4)).all()
    assert core.mix(0, [3], [5])[0] != core.mix(0, [5], [3])[0]
    share = np.mean(core.mix(0, np.arange(20000)) < np.uint64(2**62))
    assert abs(share - .25) < .02


# ---- writing

def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path/"new"/"x.json"
    core.write_json(file, {"b": 1, "a": tmp_path})
    assert file.read_text() == json.dumps({"a": str(tmp_path), "b": 1}, indent=1) + "\n"
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), core.atomic(file) as t:
            t.write_text("half")
            raise error
    assert json.loads(file.read_text())["b"] == 1
    assert [f.name for f in file.parent.iterdir()] == ["x.json"]


def test_a_first_write_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), core.atomic(tmp_path/"x.bin") as t:
        t.write_text("half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_the_temporary_file_keeps_the_ending(tmp_path):
    with core.atomic(tmp_path/"x.parquet") as t:
        assert t.suffix == ".parquet" and t.parent == tmp_path
        t.write_text("whole")
    assert (tmp_path/"x.parquet").read_text() == "whole"


def test_a_full_disk_is_said_before_anything_is_written(tmp_path):
    assert core.check_disk(tmp_path/"store", 10, "the store") is None
    sentence = says(core.check_disk, tmp_path/"store", 1e18, "the store")
    assert sentence.startswith("the store needs 1000000000.0 GB under") and "make room" in sentence


# ---- tables and figures

def test_a_table_is_csv_and_latex(tmp_path):
    df = pd.DataFrame({"class": ["A & B", "C"], "share": [1/3, 20000.]})
    assert core.save_table(df, "t", tmp_path, caption="Shares.") is df
    assert (tmp_path/"tables"/"t.csv").read_text() == "class,share\nA & B,0.3333\nC,2e+04\n"
    tex = (tmp_path/"tables"/"t.tex").read_text()
    assert r"A \& B & 0.3333 \\" in tex and r"\caption{Shares.}" in tex and r"\label{tab:t}" in tex
    core.save_table(df, "u", tmp_path, floats="%.1f")
    assert (tmp_path/"tables"/"u.csv").read_text().endswith("C,20000.0\n")


def test_figures_repeat_byte_for_byte(tmp_path):
    import matplotlib.pyplot as plt
    core.style()
    fig, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1])
    plt.close(fig)
    for folder in ("a", "b"): assert core.savefig(fig, "x", tmp_path/folder) is fig
    for ending in ("png", "pdf"):
        one, other = (tmp_path/folder/"figures"/f"x.{ending}" for folder in "ab")
        assert one.read_bytes() == other.read_bytes()


# ---- the latents table

@pytest.fixture
def run(tmp_path):
    "A run whose pair A-B has three latents."
    core.save_latents(pd.DataFrame({"latent": [0, 1, 2], "nu": [.1, .5, .9]}), "A-B", "scaling", tmp_path)
    return tmp_path


def test_a_partial_file_that_sorts_first_drops_no_row(run):
    core.save_latents(pd.DataFrame({"latent": [2], "label": ["lists"]}), "A-B", "annotation", run)
    core.save_latents(pd.DataFrame({"latent": [1, 0], "verdict": ["shared", "unique-B"]}), "A-B", "verdicts", run)
    table = core.latents("A-B", run)
    assert table.latent.tolist() == [0, 1, 2] and list(table) == ["latent", "nu", "label", "verdict"]
    assert table.label.isna().tolist() == [True, True, False]
    assert table.verdict.tolist()[:2] == ["unique-B", "shared"]


def test_the_columns_of_one_step_can_be_read_alone(run):
    core.save_latents(pd.DataFrame({"latent": [2], "label": ["lists"]}), "A-B", "annotation", run)
    assert list(core.latents("A-B", run, only="scaling")) == ["latent", "nu"]
    assert core.latents("A-B", run, only="annotation").latent.tolist() == [2]
    assert "run step causal first" in says(core.latents, "A-B", run, only="causal")


def test_the_base_file_must_be_there(tmp_path):
    core.save_latents(pd.DataFrame({"latent": [1]}), "A-B", "annotation", tmp_path)
    sentence = says(core.latents, "A-B", tmp_path)
    assert f"A-B/{core.BASE}.parquet is missing" in sentence and "run step scaling first" in sentence
    assert "run step scaling first" in says(core.latents, "no-pair", tmp_path)


@pytest.mark.parametrize("old", ["06_scaling", "09_annotation"])
def test_a_folder_of_an_old_version_is_refused(run, old):
    pd.DataFrame({"latent": [0]}).to_parquet(run/"latents"/"A-B"/f"{old}.parquet")
    for only in (None, "scaling"):
        sentence = says(core.latents, "A-B", run, only=only)
        assert f"A-B holds {old}.parquet of an older version of llmdiff" in sentence and "--runs" in sentence


@pytest.mark.parametrize("table", [pd.DataFrame({"latent": [1, 1]}), pd.DataFrame({"nu": [1, 2]})])
def test_a_table_without_unique_latents_is_not_saved(tmp_path, table):
    assert "needs a unique column `latent`" in says(core.save_latents, table, "A-B", "causal", tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_step_writes_its_own_file_only(run):
    before = (run/"latents"/"A-B"/"scaling.parquet").read_bytes()
    core.save_latents(pd.DataFrame({"latent": [0], "x": [1]}), "A-B", "causal", run)
    assert (run/"latents"/"A-B"/"scaling.parquet").read_bytes() == before


# ---- settings and pairs

def test_settings_keep_their_order(tmp_path):
    models = {"pt": "a", "it": "b", "DPO": "c"}        # the first is the reference
    core.save_settings("training", tmp_path, models=models, k=16, lr=1e-3)
    back = core.settings_of("training", tmp_path)
    assert back == dict(models=models, k=16, lr=1e-3)
    assert list(back) == ["models", "k", "lr"] and list(back["models"]) == ["pt", "it", "DPO"]
    assert "run step causal first" in says(core.settings_of, "causal", tmp_path)


def test_pairs_name_models_of_the_run():
    models = {"pt": "", "it": ""}
    assert core.pair_name(["pt", "SimPO"]) == "pt-SimPO"
    assert core.check_pairs([["pt", "it"], ["it", "pt"]], models) is None
    unknown = says(core.check_pairs, [["pt", "DPO"]], models)
    assert unknown == "pair pt-DPO names 'DPO', and the preset's models are pt, it"
    assert says(core.check_pairs, [["it", "it"]], models) == "pair it-it compares a model with itself"


def test_versions_name_what_can_change_a_number():
    known = core.versions()
    assert known["numpy"] == np.__version__ and {"python", "machine", "torch", "llmdiff"} <= set(known)
    assert all(isinstance(v, str) for v in known.values())
