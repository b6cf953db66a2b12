"Layouts: what goes out and comes back is the same crosscoder, or refused in a sentence; the hub is a local server."
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file

from llmdiff.core import UserError
from llmdiff.crosscoder import calibrate, Crosscoder, delta_norm, read_config, save, set_normalisation
from llmdiff.scale.formats import (
    from_dictionary_learning, fve, guess_others, jumprelu, jumprelu_apply, load_any, load_hub, model_card,
    push_to_hub, recognise, to_dictionary_learning, to_saelens)
from llmdiff.worlds.synthetic import easy_world

CODE = ["CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED"]


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def acts(n=400, M=2, d=12, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, M, d, generator=g)*(1 + torch.arange(M))[:, None] + 3


def make(M=2, score="sum", d=12, D=60, k=5):
    "A crosscoder as training leaves it: uneven rows, biases, a normaliser that differs between models, a threshold."
    cc = Crosscoder(d, D, k, "ABC"[:M], score)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in cc.parameters(): p += .2*torch.randn(p.shape, generator=g)
        cc.W_dec *= torch.rand(D, M, 1, generator=g)*2
    x = acts(2000, M, d, 0).double()
    set_normalisation(cc, x.mean(0), x.var(0).sum(1))
    calibrate(cc, [cc.normalise(acts(M=M, d=d))])
    return cc


def ours(cc, x):
    "Codes and reconstruction in residual units."
    xn = cc.normalise(x)
    return cc.dense_codes(xn), cc.denormalise(cc.decode(*cc.encode(xn), len(xn)))


def assert_same(a, b, tol=1e-4):
    "The same entries are active, and all are equal up to rounding."
    for u, v in zip(a, b):
        v = v.reshape(u.shape)
        assert ((u != 0) == (v != 0)).all()
        assert torch.allclose(u, v, atol=tol*float(u.abs().max()))


# ---- dictionary_learning: a module of these tensors, saved and loaded by the mixin that their classes use

class Theirs(torch.nn.Module, PyTorchModelHubMixin):
    "The published crosscoders' tensors and arithmetic, written down from their description."
    def __init__(self, activation_dim, dict_size, num_layers, code_normalization="CROSSCODER", k=None,
                 normaliser=True, encoder_layers=None):
        super().__init__()
        M, d, D = num_layers, activation_dim, dict_size
        g = torch.Generator().manual_seed(7)

        def parameter(*shape): return torch.nn.Parameter(torch.randn(shape, generator=g)*.4)

        self.at, self.how = encoder_layers or list(range(M)), code_normalization
        self.encoder, self.decoder = torch.nn.Module(), torch.nn.Module()
        self.encoder.weight, self.encoder.bias = parameter(len(self.at), d, D), parameter(D)
        self.decoder.weight, self.decoder.bias = parameter(M, D, d), parameter(M, d)
        if normaliser:
            self.register_buffer("target_rms", torch.tensor(100.))
            self.register_buffer("activation_mean", parameter(M, d).detach() + 3)
            self.register_buffer("activation_std", parameter(M, d).detach().abs() + .5)
            rms = self.activation_std.pow(2).sum(1).add(1e-8).sqrt()
            self.register_buffer("activation_global_scale", self.target_rms/rms)
        if k:
            self.register_buffer("k", torch.tensor(k, dtype=torch.int32))
            self.register_buffer("threshold", torch.tensor(9. if normaliser else 2.))
        if k or normaliser:
            self.register_buffer("code_normalization_id", torch.tensor(CODE.index(self.how) + 1))

    @torch.no_grad()
    def forward(self, x):
        b, norm = dict(self.named_buffers()), self.decoder.weight.norm(dim=2)
        on = "activation_mean" in b and not b["activation_mean"].isnan().any()
        z = (x - b["activation_mean"])*b["activation_global_scale"][:, None] if on else x
        pre = torch.einsum("nmd,mdj->nj", z[:, self.at], self.encoder.weight) + self.encoder.bias
        f = torch.relu(pre)
        total, joint = norm.sum(0), norm.pow(2).sum(0).sqrt()
        n = {"CROSSCODER": total, "SAE": joint, "MIXED": joint + .1*total, "NONE": 1.}[self.how]
        if "threshold" in b: f = f*(f*n > self.threshold)
        y = torch.einsum("nj,mjd->nmd", f, self.decoder.weight) + self.decoder.bias
        if not on: return f, y
        return f, y/(b["activation_global_scale"][:, None] + 1e-8) + b["activation_mean"]


THEIR_KINDS = [dict(k=6), dict(k=6, code_normalization="SAE"), dict(k=6, normaliser=False), dict(),
               dict(normaliser=False), dict(code_normalization="MIXED"), dict(code_normalization="NONE")]


@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("kw", THEIR_KINDS, ids=str)
def test_loads_what_their_mixin_wrote(tmp_path, kw, M):
    theirs, x = Theirs(12, 60, M, **kw), acts(M=M)
    theirs.save_pretrained(tmp_path)
    cc = from_dictionary_learning(tmp_path, "XYZ"[:M])
    assert_same(theirs(x), ours(cc, x))
    assert cc.names == list("XYZ"[:M]) and cc.k == kw.get("k", 60) and (cc.theta > 0) == ("k" in kw)
    f = ours(cc, x)[0]
    assert 0 < (f > 0).float().mean() < 1


@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("score", ["sum", "l2"])
def test_their_module_reads_what_we_write(tmp_path, score, M):
    cc, x = make(M, score), acts(M=M)
    to_dictionary_learning(cc, tmp_path)
    theirs = Theirs.from_pretrained(tmp_path)
    assert set(theirs.state_dict()) == set(load_file(tmp_path/"model.safetensors"))
    assert theirs.how == {"sum": "CROSSCODER", "l2": "SAE"}[score]
    assert_same(ours(cc, x), theirs(x))


@pytest.mark.parametrize("score", ["sum", "l2"])
def test_there_and_back(tmp_path, score):
    cc, x = make(2, score), acts()
    to_dictionary_learning(cc, tmp_path)
    back = load_any(tmp_path)
    assert back.config() == cc.config() and float(back.theta) == float(cc.theta)
    for name, p in cc.named_parameters(): assert torch.equal(p, back.get_parameter(name))
    assert_same(ours(cc, x), ours(back, x))
    assert torch.allclose(back.scale, cc.scale, rtol=1e-6)


@pytest.mark.parametrize("normaliser", [True, False])
def test_l1_crosscoders_are_batchtopk_with_all_latents(tmp_path, normaliser):
    Theirs(12, 60, 2, normaliser=normaliser).save_pretrained(tmp_path/"a")
    cc, x = load_any(tmp_path/"a", ["base", "chat"]), acts()
    assert (cc.k, float(cc.theta)) == (60, 0) and calibrate(cc, [cc.normalise(x)]) == 0
    to_dictionary_learning(cc, tmp_path/"b")
    t = load_file(tmp_path/"b"/"model.safetensors")
    assert not {"k", "threshold"} & set(t) and "k" not in read_config(tmp_path/"b")
    assert t["activation_mean"].isnan().all() != normaliser
    assert_same(ours(cc, x), ours(load_any(tmp_path/"b"), x))


def test_a_threshold_that_was_never_set(tmp_path):
    theirs = Theirs(12, 60, 2, k=6, code_normalization="MIXED")
    theirs.threshold.fill_(-1.)
    theirs.save_pretrained(tmp_path)
    cc = from_dictionary_learning(tmp_path, "AB")
    assert_same(theirs(acts()), ours(cc, acts()))
    assert float(cc.theta) == 0 and cc.k == 6


@pytest.mark.parametrize("file", ["ae.pt", "model_final.pt", "step_9.pt"])
def test_state_dicts_of_their_trainer(tmp_path, file):
    theirs = Theirs(12, 60, 2, k=6)
    config = {"trainer": {"dict_class": "BatchTopKCrossCoder", "k": 6}}
    (tmp_path/"config.json").write_text(json.dumps(config))
    torch.save({f"_orig_mod.{k}": v for k, v in theirs.state_dict().items()}, tmp_path/file)
    place = tmp_path/file if file[0] == "s" else tmp_path
    assert_same(theirs(acts()), ours(from_dictionary_learning(place, "AB"), acts()))


def test_an_encoder_that_reads_one_model(tmp_path):
    theirs = Theirs(12, 60, 2, k=6, encoder_layers=[1])
    theirs.save_pretrained(tmp_path)
    cc = from_dictionary_learning(tmp_path, "AB")
    assert_same(theirs(acts()), ours(cc, acts()))
    assert (cc.W_enc[:, 0] == 0).all()
    (tmp_path/"config.json").unlink()
    with pytest.raises(UserError, match="the encoder reads 1 models of 2"): from_dictionary_learning(tmp_path, "AB")


def test_which_model_is_which(tmp_path):
    theirs = Theirs(12, 60, 2, k=6)
    theirs.decoder.weight.data[1, 0] = 0      # base only
    theirs.decoder.weight.data[0, 1] = 0      # chat only
    theirs.save_pretrained(tmp_path)
    cc = from_dictionary_learning(tmp_path, ["base", "chat"])
    delta = torch.from_numpy(delta_norm(cc)).float()
    assert delta[:2].tolist() == [0, 1]
    a, b = theirs.decoder.weight.detach().norm(dim=2)
    dec_norm_diff = .5*((a - b)/torch.maximum(a, b) + 1)
    assert torch.allclose(delta, 1 - dec_norm_diff, atol=1e-6)   # they store one minus ours
    order = "in the order of its layers, the base model first"
    for names in (None, ["base"]):
        with pytest.raises(UserError, match=order): from_dictionary_learning(tmp_path, names)


def test_the_same_score_up_to_a_factor(tmp_path):
    "One model: MIXED is 1.1 times the norm. Rows of one norm: NONE is a constant times it."
    theirs = Theirs(12, 60, 1, k=6, code_normalization="MIXED")
    theirs.save_pretrained(tmp_path)
    cc = from_dictionary_learning(tmp_path, "A")
    assert_same(theirs(acts(M=1)), ours(cc, acts(M=1)))
    assert float(cc.theta) == pytest.approx(9/1.1)
    weights = dict(code_normalization_alpha_sae=0., code_normalization_alpha_cc=.5)
    (tmp_path/"config.json").write_text(json.dumps(read_config(tmp_path) | weights))
    assert float(from_dictionary_learning(tmp_path, "A").theta) == pytest.approx(18)

    theirs = Theirs(12, 60, 2, k=6, code_normalization="NONE")
    theirs.decoder.weight.data /= theirs.decoder.weight.norm(dim=2, keepdim=True)/3
    theirs.save_pretrained(tmp_path)
    cc = from_dictionary_learning(tmp_path, "AB")
    assert_same(theirs(acts()), ours(cc, acts()))
    assert float(cc.theta) == pytest.approx(9*6)


REFUSED = [
    (dict(code_normalization_id=torch.tensor(3)), "weighs latents as neither score"),
    (dict(code_normalization_id=torch.tensor(4)), "weighs latents as neither score"),
    (dict(code_normalization_id=torch.tensor(5)), "for each model .DECOUPLED."),
    ({"activation_normalizer.mean": torch.zeros(2)}, "activation_normalizer.mean that this loader does not know"),
    (dict(activation_global_scale=torch.ones(2)), "its normaliser is not one number a model")]


@pytest.mark.parametrize("change,why", REFUSED)
def test_refuses_what_it_cannot_equal(tmp_path, change, why):
    t = Theirs(12, 60, 2, k=6).state_dict() | change
    save_file({k: v.contiguous() for k, v in t.items()}, tmp_path/"model.safetensors")
    with pytest.raises(UserError, match=why): from_dictionary_learning(tmp_path, "AB")


def test_names_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(UserError, match="holds no crosscoder"): recognise(tmp_path)
    (tmp_path/"model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="cannot be read"): recognise(tmp_path)
    torch.save([1, 2], tmp_path/"x.pt")
    with pytest.raises(UserError, match="cannot be read"): recognise(tmp_path/"x.pt")
    torch.save({"layer": torch.zeros(2)}, tmp_path/"x.pt")
    with pytest.raises(UserError, match=r"is in no layout known here \(it holds layer\)"): recognise(tmp_path/"x.pt")


@pytest.mark.parametrize("write", [to_dictionary_learning, to_saelens])
def test_writing_needs_a_threshold(tmp_path, write):
    cc = make()
    cc.theta.fill_(torch.nan)
    with pytest.raises(UserError, match="no threshold yet"): write(cc, tmp_path/"y")


def test_recognises_each_layout(tmp_path):
    cc = make()
    save(cc, tmp_path/"a")
    to_dictionary_learning(cc, tmp_path/"b")
    to_saelens(cc, tmp_path/"c")
    assert [recognise(tmp_path/f) for f in "abc"] == ["llmdiff", "dictionary_learning", "saelens"]
    assert [load_any(tmp_path/f).config() for f in "ab"] == [cc.config()]*2
    with pytest.raises(UserError, match="load it with sae_lens"): load_any(tmp_path/"c")
    with pytest.raises(UserError, match="a crosscoder of A, B"): load_any(tmp_path/"a", ["B", "A"])


# ---- JumpReLU

@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("score", ["sum", "l2"])
def test_concatenated_export_is_exact(M, score):
    cc, x = make(M, score), acts(M=M)
    cc.W_dec.data[3] = 0       # a latent without a decoder is never active
    f, y = ours(cc, x)
    assert_same((f, y), jumprelu_apply(jumprelu(cc), x.flatten(1)))
    assert (f > 0).any() and not f[:, 3].any()
    if M == 1:
        alone = jumprelu(cc, "A", guess_others(cc, x, "A"))
        assert_same((f, y), jumprelu_apply(alone, x[:, 0]))
    cc.theta.fill_(0.)
    assert_same(ours(cc, x), jumprelu_apply(jumprelu(cc), x.flatten(1)))
    assert not jumprelu(cc)["threshold"].isnan().any()


@pytest.mark.parametrize("side", [0, 1, 2])
def test_one_side_is_exact_if_the_guess_is(side):
    "Where the other models' activations are a linear function of the side's, the fit finds it and nothing is lost."
    cc, name = make(3), "ABC"[side]
    z = torch.randn(900, 12, generator=torch.Generator().manual_seed(5))
    R = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(6))*.3
    R[side] = torch.eye(12)
    x = cc.denormalise(torch.einsum("nd,mde->nme", z, R))
    found = guess_others(cc, x, name, ridge=1e-9)
    assert torch.allclose(found.float(), R, atol=1e-3)
    f, y = ours(cc, x)
    g, u = jumprelu_apply(jumprelu(cc, name, found), x[:, side])
    assert ((f > 0) != (g > 0)).float().mean() < 1e-4 and torch.allclose(u, y[:, side], atol=1e-2)
    g, u = jumprelu_apply(jumprelu(cc, name, torch.zeros(3, 12, 12)), x[:, side])
    assert (u - y[:, side]).abs().max() > .1


def test_one_side_comes_with_its_loss(tmp_path):
    world = easy_world(48, 24)
    x, rows = world(3000), world.decoder
    cc = Crosscoder(48, 24, 2, ["A", "B"])
    set_normalisation(cc, x.double().mean(0), x.double().var(0).sum(1))
    with torch.no_grad():                        # the planted concepts themselves
        cc.W_dec.copy_(rows*cc.scale[:, None])
        cc.W_enc.copy_(cc.W_dec/cc.W_dec.pow(2).sum((1, 2), keepdim=True))
    calibrate(cc, [cc.normalise(x)])
    note, held = to_saelens(cc, tmp_path, "B", x), x[1500:]

    def seen(t): return fve(held[:, 1], jumprelu_apply(t, held[:, 1])[1])

    assert note["fve"] == pytest.approx(seen(load_file(tmp_path/"sae_weights.safetensors")))
    assert note["fve_crosscoder"] == pytest.approx(fve(held[:, 1], ours(cc, held)[1][:, 1]))
    mean_of_the_other = jumprelu(cc, "B", torch.zeros(2, 48, 48))
    assert note["fve"] > seen(mean_of_the_other) + .05     # what a guess of the other model is good for
    assert json.loads((tmp_path/"cfg.json").read_text())["metadata"] == note
    assert not note["exact"] and note["input"] == ["B"]
    with pytest.raises(UserError, match="give `x`"): to_saelens(cc, tmp_path, "B")
    unknown = "'C' is no model of this crosscoder: choose A or B"
    with pytest.raises(UserError, match=unknown): to_saelens(cc, tmp_path, "C", x)


# ---- the libraries themselves, where they are installed

@pytest.mark.parametrize("M", [1, 2])
def test_sae_lens_loads_the_export(tmp_path, M):
    SAE = pytest.importorskip("sae_lens", exc_type=ImportError).SAE
    cc, x = make(M), acts(M=M)
    to_saelens(cc, tmp_path, hook_name="blocks.3.hook_resid_post")
    sae = SAE.load_from_disk(tmp_path)
    assert sae.cfg.architecture() == "jumprelu" and sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    with torch.no_grad():
        f = sae.encode(x.flatten(1))
        assert_same(ours(cc, x), (f, sae.decode(f)))


def trained_by_them(kind, folder):
    "Their trainer, for some steps; the folder that it leaves."
    from dictionary_learning import training
    args = dict(trainer=kind, activation_dim=12, dict_size=60, k=5, layer=1, lm_name="none", device="cpu",
                warmup_steps=2, threshold_start_step=2, steps=30)
    batches = [acts(M=1, seed=i)[:, 0] for i in range(30)]
    training.trainSAE(batches, [args], steps=30, save_dir=str(folder), device="cpu")
    return folder/"trainer_0"


def assert_reads(folder, ae):
    "Our codes and reconstruction are those of their dictionary."
    x = acts(M=1)
    cc = load_any(folder, ["A"])
    f, y = ours(cc, x)
    with torch.no_grad():
        g = ae.encode(x[:, 0])
        assert_same((g, ae.decode(g)), (f, y))
    assert 0 < (f > 0).float().mean() < 1


@pytest.fixture
def their_library():
    pytest.importorskip("dictionary_learning", exc_type=ImportError)
    torch.manual_seed(0)


def test_dictionary_learning_trained_it(their_library, tmp_path):
    from dictionary_learning import trainers
    folder = trained_by_them(trainers.BatchTopKTrainer, tmp_path)
    ae = trainers.BatchTopKSAE.from_pretrained(folder/"ae.pt")
    assert ae.threshold > 0
    assert_reads(folder, ae)


def test_dictionary_learning_trained_a_topk(their_library, tmp_path):
    from dictionary_learning.trainers.top_k import TopKTrainer
    folder = trained_by_them(TopKTrainer, tmp_path)
    with pytest.raises(UserError, match="AutoEncoderTopK with codes"): load_any(folder, ["A"])


@pytest.mark.parametrize("name", ["AutoEncoder", "AutoEncoderNew"])
def test_dictionary_learning_wrote_it(their_library, tmp_path, name):
    from dictionary_learning import dictionary
    ae = getattr(dictionary, name)(12, 60)
    for p in ae.parameters(): p.data += .1*torch.randn(p.shape)
    torch.save(ae.state_dict(), tmp_path/"ae.pt")
    assert_reads(tmp_path, ae)


# ---- the hub

class Hub(BaseHTTPRequestHandler):
    "As much of a hub as an upload and a download need."
    def answer(self, body=b"", **head):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        for k, v in {"Content-Length": len(body), **head}.items(): self.send_header(k.replace("_", "-"), str(v))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def note(self): self.server.seen.append((self.path, self.headers.get("Authorization")))

    def do_POST(self):
        hub, data = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.note()
        if self.path == "/api/repos/create":
            hub.public = hub.public or json.loads(data)["visibility"] == "public"
            self.answer({"url": f"{hub.url}/o/n"})
        elif "preupload" in self.path:
            names = [f["path"] for f in json.loads(data)["files"]]
            self.answer({"files": [dict(path=n, uploadMode="regular", shouldIgnore=False) for n in names]})
        elif "commit" in self.path:
            lines = [json.loads(line) for line in data.splitlines()]
            for file in [line["value"] for line in lines if line["key"] == "file"]:
                hub.files[file["path"]] = base64.b64decode(file["content"])
            self.answer({"commitUrl": f"{hub.url}/o/n/commit/1", "commitOid": "1"*40})
        else: self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        hub, name = self.server, self.path.rsplit("/", 1)[1].split("?")[0]
        self.note()
        if "/resolve/" in self.path: return self.answer(hub.files[name], ETag=f'"{name}"', X_Repo_Commit="1"*40)
        sizes = {file: len(content) for file, content in hub.files.items()}
        files = [dict(rfilename=f, path=f, type="file", size=n, oid="1"*40) for f, n in sizes.items()]
        about = dict(id="o/n", sha="1"*40, private=not hub.public, siblings=files)
        self.answer(files if "/tree/" in self.path else about)

    do_HEAD = do_GET

    def log_message(self, *_): pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub.constants as C
    server = HTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.seen, server.public = {}, [], False
    server.url = f"http://127.0.0.1:{server.server_port}"
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    changed = dict(HF_HUB_OFFLINE=False, ENDPOINT=server.url, HUGGINGFACE_CO_URL_TEMPLATE=template,
                   HF_HUB_CACHE=str(tmp_path/"cache"))
    for k, v in changed.items(): monkeypatch.setattr(C, k, v)
    monkeypatch.setenv("HF_TOKEN", "a-token")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_push_and_fetch(hub, tmp_path):
    cc, folder = make(), tmp_path/"cc"
    save(cc, folder, dict(settings=dict(lr=1e-3), results=dict(fve=[.5, .25])))
    (folder/"log.parquet").write_bytes(b"not to be shared")
    assert push_to_hub(folder, "o/n", endpoint=hub.url).endswith("commit/1")
    assert set(hub.files) == {"model.safetensors", "config.json", "README.md"}
    assert hub.files["model.safetensors"] == (folder/"model.safetensors").read_bytes()
    assert not hub.public and {token for _, token in hub.seen} == {"Bearer a-token"}
    text = hub.files["README.md"].decode()
    assert text == model_card(folder)
    for row in ("| names | A, B |", "| lr | 0.001 |", "| fve | 0.5, 0.25 |"): assert row in text
    back = load_hub("o/n")
    assert_same(ours(cc, acts()), ours(back, acts()))
    assert back.names == cc.names


def test_push_is_private_and_asks_for_a_token(hub, tmp_path, monkeypatch):
    folder = tmp_path/"cc"
    save(make(), folder)
    hub.public = True
    with pytest.raises(UserError, match="is there already and it is public"):
        push_to_hub(folder, "o/n", endpoint=hub.url)
    assert not hub.files and push_to_hub(folder, "o/n", private=False, endpoint=hub.url) and hub.files
    hub.seen.clear()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN"): push_to_hub(folder, "o/n", endpoint=hub.url)
    with pytest.raises(UserError, match="holds no crosscoder"): push_to_hub(tmp_path, "o/n", endpoint=hub.url)
    assert not hub.seen


@pytest.mark.parametrize("write", [to_dictionary_learning, to_saelens])
def test_cards_of_the_other_layouts(tmp_path, write):
    write(make(), tmp_path)
    text = model_card(tmp_path)
    assert "| dict_size | 60 |" in text or "| d_in | 24 |" in text and "| exact | True |" in text


def test_a_card_names_a_function_that_exists(tmp_path):
    save(make(), tmp_path)
    assert f"`{load_hub.__module__}.load_hub`" in model_card(tmp_path)


def test_nothing_here_pushes():
    "Only a call by the user uploads: no notebook and no module has one."
    from conftest import ROOT
    files = [*(ROOT/"nbs").rglob("*.ipynb"), *(ROOT/"llmdiff").rglob("*.py")]
    lines = [(f.name, line) for f in files for line in f.read_text().splitlines() if "push_to_hub(" in line]
    assert any("def push_to_hub(" in line for _, line in lines)     # the search sees the notebooks and the modules
    assert not [(name, line) for name, line in lines if "def push_to_hub(" not in line]
