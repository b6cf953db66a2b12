"Layouts: what goes out and comes back is the same crosscoder, or is refused in one sentence; the hub is a server of this file."
import base64, json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest, torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors.torch import load_file, save_file

from llmdiff.core import UserError
from llmdiff.crosscoder import Crosscoder, Planted, calibrate, delta_norm, read_config, save, set_normalisation
from llmdiff.formats import (card, from_dictionary_learning, fve, guess_others, jumprelu, jumprelu_apply, load_any, load_hub, push_to_hub,
                             recognise, to_dictionary_learning, to_saelens)

CODE = ["CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED"]


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def acts(n=400, M=2, d=12, seed=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, M, d, generator=g)*(1 + torch.arange(M))[:, None] + 3


def make(M=2, score="sum", d=12, D=60, k=5):
    "A crosscoder as training leaves it: uneven rows, biases, a normaliser that differs between models, a threshold."
    cc = Crosscoder(d, D, k, "ABC"[:M], score); g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in cc.parameters(): p += .2*torch.randn(p.shape, generator=g)
        cc.W_dec *= torch.rand(D, M, 1, generator=g)*2
    x = acts(2000, M, d, 0).double(); set_normalisation(cc, x.mean(0), x.var(0).sum(1))
    calibrate(cc, [cc.normalise(acts(M=M, d=d))])
    return cc


def ours(cc, x):
    "Codes and reconstruction in residual units."
    z = cc.normalise(x)
    return cc.dense_codes(z), cc.denormalise(cc.decode(*cc.encode(z), len(z)))


def same(a, b, tol=1e-4):
    for u, v in zip(a, b): v = v.reshape(u.shape); assert ((u != 0) == (v != 0)).all() and torch.allclose(u, v, atol=tol*float(u.abs().max()))


# ---- dictionary_learning: a module of these tensors, saved and loaded by the mixin of huggingface_hub that their classes use

class Theirs(torch.nn.Module, PyTorchModelHubMixin):
    "The published crosscoders' tensors and arithmetic, written down from their description."
    def __init__(self, activation_dim, dict_size, num_layers, code_normalization="CROSSCODER", k=None, normaliser=True, encoder_layers=None):
        super().__init__()
        M, d, D, g = num_layers, activation_dim, dict_size, torch.Generator().manual_seed(7)
        P = lambda *s: torch.nn.Parameter(torch.randn(s, generator=g)*.4)
        self.at, self.how = encoder_layers or list(range(M)), code_normalization
        self.encoder, self.decoder = torch.nn.Module(), torch.nn.Module()
        self.encoder.weight, self.encoder.bias, self.decoder.weight, self.decoder.bias = P(len(self.at), d, D), P(D), P(M, D, d), P(M, d)
        if normaliser:
            self.register_buffer("target_rms", torch.tensor(100.)); self.register_buffer("activation_mean", P(M, d).detach() + 3)
            self.register_buffer("activation_std", P(M, d).detach().abs() + .5)
            self.register_buffer("activation_global_scale", self.target_rms/self.activation_std.pow(2).sum(1).add(1e-8).sqrt())
        if k: self.register_buffer("k", torch.tensor(k, dtype=torch.int32)); self.register_buffer("threshold", torch.tensor(9. if normaliser else 2.))
        if k or normaliser: self.register_buffer("code_normalization_id", torch.tensor(CODE.index(self.how)+1))

    @torch.no_grad()
    def forward(self, x):
        b = dict(self.named_buffers()); norm = self.decoder.weight.norm(dim=2)
        on = "activation_mean" in b and not b["activation_mean"].isnan().any()
        z = (x-b["activation_mean"])*b["activation_global_scale"][:, None] if on else x
        f = torch.relu(torch.einsum("nmd,mdj->nj", z[:, self.at], self.encoder.weight) + self.encoder.bias)
        n = {"CROSSCODER": norm.sum(0), "SAE": norm.pow(2).sum(0).sqrt(), "MIXED": norm.pow(2).sum(0).sqrt() + .1*norm.sum(0), "NONE": 1.}[self.how]
        if "threshold" in b: f = f*(f*n > self.threshold)
        y = torch.einsum("nj,mjd->nmd", f, self.decoder.weight) + self.decoder.bias
        return f, y/(b["activation_global_scale"][:, None] + 1e-8) + b["activation_mean"] if on else y


@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("kw", [dict(k=6), dict(k=6, code_normalization="SAE"), dict(k=6, normaliser=False), dict(), dict(normaliser=False),
                                dict(code_normalization="MIXED"), dict(code_normalization="NONE")], ids=str)
def test_loads_what_their_mixin_wrote(tmp_path, kw, M):
    th = Theirs(12, 60, M, **kw); th.save_pretrained(tmp_path)
    cc = from_dictionary_learning(tmp_path, "XYZ"[:M]); x = acts(M=M)
    same(th(x), ours(cc, x))
    assert cc.names == list("XYZ"[:M]) and cc.k == kw.get("k", 60) and (cc.theta > 0) == ("k" in kw)
    f = ours(cc, x)[0]
    assert 0 < (f > 0).float().mean() < 1


@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("score", ["sum", "l2"])
def test_their_module_reads_what_we_write(tmp_path, score, M):
    cc, x = make(M, score), acts(M=M); to_dictionary_learning(cc, tmp_path)
    th = Theirs.from_pretrained(tmp_path)
    assert set(th.state_dict()) == set(load_file(tmp_path/"model.safetensors")) and th.how == {"sum": "CROSSCODER", "l2": "SAE"}[score]
    same(ours(cc, x), th(x))


@pytest.mark.parametrize("score", ["sum", "l2"])
def test_there_and_back(tmp_path, score):
    cc, x = make(2, score), acts(); to_dictionary_learning(cc, tmp_path)
    back = load_any(tmp_path)
    assert back.config() == cc.config() and float(back.theta) == float(cc.theta)
    for n, p in cc.named_parameters(): assert torch.equal(p, back.get_parameter(n))
    same(ours(cc, x), ours(back, x)); assert torch.allclose(back.scale, cc.scale, rtol=1e-6)


@pytest.mark.parametrize("normaliser", [True, False])
def test_l1_crosscoders_are_batchtopk_with_every_place(tmp_path, normaliser):
    Theirs(12, 60, 2, normaliser=normaliser).save_pretrained(tmp_path/"a"); cc = load_any(tmp_path/"a", ["base", "chat"]); x = acts()
    assert (cc.k, float(cc.theta)) == (60, 0) and calibrate(cc, [cc.normalise(x)]) == 0
    to_dictionary_learning(cc, tmp_path/"b"); t = load_file(tmp_path/"b"/"model.safetensors")
    assert not {"k", "threshold"} & set(t) and "k" not in read_config(tmp_path/"b") and t["activation_mean"].isnan().all() != normaliser
    same(ours(cc, x), ours(load_any(tmp_path/"b"), x))


def test_a_threshold_that_was_never_set(tmp_path):
    th = Theirs(12, 60, 2, k=6, code_normalization="MIXED"); th.threshold.fill_(-1.); th.save_pretrained(tmp_path)
    cc = from_dictionary_learning(tmp_path, "AB"); same(th(acts()), ours(cc, acts()))
    assert float(cc.theta) == 0 and cc.k == 6


@pytest.mark.parametrize("file", ["ae.pt", "model_final.pt", "step_9.pt"])
def test_state_dicts_of_their_trainer(tmp_path, file):
    th = Theirs(12, 60, 2, k=6); (tmp_path/"config.json").write_text(json.dumps({"trainer": {"dict_class": "BatchTopKCrossCoder", "k": 6}}))
    torch.save({f"_orig_mod.{k}": v for k, v in th.state_dict().items()}, tmp_path/file)
    same(th(acts()), ours(from_dictionary_learning(tmp_path/file if file[0] == "s" else tmp_path, "AB"), acts()))


def test_an_encoder_that_reads_one_model(tmp_path):
    th = Theirs(12, 60, 2, k=6, encoder_layers=[1]); th.save_pretrained(tmp_path); cc = from_dictionary_learning(tmp_path, "AB")
    same(th(acts()), ours(cc, acts())); assert (cc.W_enc[:, 0] == 0).all()
    (tmp_path/"config.json").unlink()
    with pytest.raises(UserError, match="the encoder reads 1 models of 2"): from_dictionary_learning(tmp_path, "AB")


def test_which_model_is_which(tmp_path):
    th = Theirs(12, 60, 2, k=6); th.decoder.weight.data[1, 0] = 0; th.decoder.weight.data[0, 1] = 0; th.save_pretrained(tmp_path)
    cc = from_dictionary_learning(tmp_path, ["base", "chat"])
    assert delta_norm(cc)[:2].tolist() == [0, 1]                                        # base only, chat only
    a, b = th.decoder.weight.detach().norm(dim=2)
    assert torch.allclose(torch.from_numpy(delta_norm(cc)).float(), 1 - .5*((a-b)/torch.maximum(a, b) + 1), atol=1e-6)   # they store one minus ours
    for names in (None, ["base"]):
        with pytest.raises(UserError, match="in the order of its layers, the base model first"): from_dictionary_learning(tmp_path, names)


def test_the_same_score_up_to_a_factor(tmp_path):
    "One model: MIXED is 1.1 times the norm. Rows of one norm: NONE is a constant times it."
    th = Theirs(12, 60, 1, k=6, code_normalization="MIXED"); th.save_pretrained(tmp_path); cc = from_dictionary_learning(tmp_path, "A")
    same(th(acts(M=1)), ours(cc, acts(M=1))); assert float(cc.theta) == pytest.approx(9/1.1)
    (tmp_path/"config.json").write_text(json.dumps(read_config(tmp_path) | dict(code_normalization_alpha_sae=0., code_normalization_alpha_cc=.5)))
    assert float(from_dictionary_learning(tmp_path, "A").theta) == pytest.approx(18)
    th = Theirs(12, 60, 2, k=6, code_normalization="NONE"); th.decoder.weight.data /= th.decoder.weight.norm(dim=2, keepdim=True)/3; th.save_pretrained(tmp_path)
    cc = from_dictionary_learning(tmp_path, "AB"); same(th(acts()), ours(cc, acts())); assert float(cc.theta) == pytest.approx(9*6)


@pytest.mark.parametrize("change,why", [
    (dict(code_normalization_id=torch.tensor(3)), "weighs latents as neither score"), (dict(code_normalization_id=torch.tensor(4)), "weighs latents as neither score"),
    (dict(code_normalization_id=torch.tensor(5)), "for each model .DECOUPLED."), ({"activation_normalizer.mean": torch.zeros(2)}, "activation_normalizer.mean that this loader does not know"),
    (dict(activation_global_scale=torch.ones(2)), "its normaliser is not one number a model")])
def test_refuses_what_it_cannot_equal(tmp_path, change, why):
    save_file({k: v.contiguous() for k, v in (Theirs(12, 60, 2, k=6).state_dict() | change).items()}, tmp_path/"model.safetensors")
    with pytest.raises(UserError, match=why): from_dictionary_learning(tmp_path, "AB")


def test_names_what_is_wrong_with_a_folder(tmp_path):
    with pytest.raises(UserError, match="holds no crosscoder"): recognise(tmp_path)
    (tmp_path/"model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="cannot be read"): recognise(tmp_path)
    torch.save([1, 2], tmp_path/"x.pt")
    with pytest.raises(UserError, match="cannot be read"): recognise(tmp_path/"x.pt")
    torch.save({"layer": torch.zeros(2)}, tmp_path/"x.pt")
    with pytest.raises(UserError, match=r"is in no layout known here \(it holds layer\)"): recognise(tmp_path/"x.pt")
    cc = make(); cc.theta.fill_(torch.nan)
    for f in (to_dictionary_learning, to_saelens):
        with pytest.raises(UserError, match="no threshold yet"): f(cc, tmp_path/"y")


def test_recognises_each_layout(tmp_path):
    cc = make(); save(cc, tmp_path/"a"); to_dictionary_learning(cc, tmp_path/"b"); to_saelens(cc, tmp_path/"c")
    assert [recognise(tmp_path/f) for f in "abc"] == ["llmdiff", "dictionary_learning", "saelens"]
    assert [load_any(tmp_path/f).config() for f in "ab"] == [cc.config()]*2
    with pytest.raises(UserError, match="load it with sae_lens"): load_any(tmp_path/"c")
    with pytest.raises(UserError, match="a crosscoder of A, B"): load_any(tmp_path/"a", ["B", "A"])


# ---- JumpReLU

@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("score", ["sum", "l2"])
def test_concatenated_export_is_exact(M, score):
    cc, x = make(M, score), acts(M=M); cc.W_dec.data[3] = 0       # a latent without a decoder is never active
    f, y = ours(cc, x); same((f, y), jumprelu_apply(jumprelu(cc), x.flatten(1))); assert (f > 0).any() and not f[:, 3].any()
    if M == 1: same((f, y), jumprelu_apply(jumprelu(cc, "A", guess_others(cc, x, "A")), x[:, 0]))
    cc.theta.fill_(0.); same(ours(cc, x), jumprelu_apply(jumprelu(cc), x.flatten(1))); assert not jumprelu(cc)["threshold"].isnan().any()


@pytest.mark.parametrize("side", [0, 1, 2])
def test_one_side_is_exact_if_the_guess_is(side):
    "Where the other models' activations are a linear function of the side's, the fit finds it and nothing is lost."
    cc, z = make(3), torch.randn(900, 12, generator=torch.Generator().manual_seed(5)); R = torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(6))*.3; R[side] = torch.eye(12)
    x = cc.denormalise(torch.einsum("nd,mde->nme", z, R)); found = guess_others(cc, x, cc.names[side], ridge=1e-9)
    assert torch.allclose(found.float(), R, atol=1e-3)
    f, y = ours(cc, x); g, u = jumprelu_apply(jumprelu(cc, cc.names[side], found), x[:, side])
    assert ((f > 0) != (g > 0)).float().mean() < 1e-4 and torch.allclose(u, y[:, side], atol=1e-2)
    g, u = jumprelu_apply(jumprelu(cc, cc.names[side], torch.zeros(3, 12, 12)), x[:, side]); assert (u-y[:, side]).abs().max() > .1


def test_one_side_comes_with_its_loss(tmp_path):
    world = Planted(d_model=48, n_concepts=24, exclusive=6, active=2); x = world(3000); cc = Crosscoder(48, 24, 2, ["A", "B"])
    with torch.no_grad(): cc.W_dec.copy_(world.W); cc.W_enc.copy_(world.W/world.W.pow(2).sum((1, 2), keepdim=True))   # the planted concepts themselves
    set_normalisation(cc, x.double().mean(0), x.double().var(0).sum(1)); calibrate(cc, [cc.normalise(x)])
    note = to_saelens(cc, tmp_path, "B", x); h = x[1500:]; t = load_file(tmp_path/"sae_weights.safetensors")
    seen = lambda t: fve(h[:, 1], jumprelu_apply(t, h[:, 1])[1])
    assert note["fve"] == pytest.approx(seen(t)) and note["fve_crosscoder"] == pytest.approx(fve(h[:, 1], ours(cc, h)[1][:, 1]))
    assert note["fve"] > seen(jumprelu(cc, "B", torch.zeros(2, 48, 48))) + .05     # what a guess of the other model is good for
    assert json.loads((tmp_path/"cfg.json").read_text())["metadata"] == note and not note["exact"] and note["input"] == ["B"]
    with pytest.raises(UserError, match="give `x`"): to_saelens(cc, tmp_path, "B")
    with pytest.raises(UserError, match="'C' is no model of this crosscoder: choose A or B"): to_saelens(cc, tmp_path, "C", x)


# ---- the libraries themselves, where they are installed

@pytest.mark.parametrize("M", [1, 2])
def test_sae_lens_loads_the_export(tmp_path, M):
    SAE = pytest.importorskip("sae_lens", exc_type=ImportError).SAE
    cc, x = make(M), acts(M=M); to_saelens(cc, tmp_path, hook_name="blocks.3.hook_resid_post")
    sae = SAE.load_from_disk(tmp_path); assert sae.cfg.architecture() == "jumprelu" and sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    with torch.no_grad(): f = sae.encode(x.flatten(1)); same(ours(cc, x), (f, sae.decode(f)))


@pytest.mark.parametrize("name", ["BatchTopKSAE", "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK"])
def test_dictionary_learning_wrote_it(tmp_path, name):
    "Trained for some steps, or made, and saved by the library on the package index; it has SAEs only."
    pytest.importorskip("dictionary_learning", exc_type=ImportError)
    from dictionary_learning import dictionary, training, trainers
    from dictionary_learning.trainers.top_k import TopKTrainer
    x = acts(M=1)[:, 0]; torch.manual_seed(0)
    if "TopK" in name:
        args = dict(trainer=trainers.BatchTopKTrainer if name[0] == "B" else TopKTrainer, activation_dim=12, dict_size=60, k=5, layer=1, lm_name="none", device="cpu", warmup_steps=2, threshold_start_step=2, steps=30)
        training.trainSAE([acts(M=1, seed=i)[:, 0] for i in range(30)], [args], steps=30, save_dir=str(tmp_path), device="cpu"); folder = tmp_path/"trainer_0"
        if name == "AutoEncoderTopK":
            with pytest.raises(UserError, match="AutoEncoderTopK with codes"): load_any(folder, ["A"])
            return
        ae = trainers.BatchTopKSAE.from_pretrained(folder/"ae.pt"); assert ae.threshold > 0
    else:
        ae, folder = getattr(dictionary, name)(12, 60), tmp_path
        for p in ae.parameters(): p.data += .1*torch.randn(p.shape)
        torch.save(ae.state_dict(), folder/"ae.pt")
    cc = load_any(folder, ["A"]); f, y = ours(cc, x[:, None])
    with torch.no_grad(): g = ae.encode(x); same((g, ae.decode(g)), (f, y))
    assert 0 < (f > 0).float().mean() < 1


# ---- the hub

class Hub(BaseHTTPRequestHandler):
    "As much of a hub as an upload and a download need."
    def answer(self, body=b"", code=200, **head):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for k, v in {"Content-Length": len(body), **head}.items(): self.send_header(k.replace("_", "-"), str(v))
        self.end_headers(); self.wfile.write(b"" if self.command == "HEAD" else body)
    def do_POST(self):
        s, data = self.server, self.rfile.read(int(self.headers.get("Content-Length", 0))); s.seen.append((self.path, self.headers.get("Authorization")))
        if self.path == "/api/repos/create": s.public = s.public or json.loads(data)["visibility"] == "public"; return self.answer({"url": f"{s.url}/o/n"})
        if "preupload" in self.path: return self.answer({"files": [dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(data)["files"]]})
        if "commit" in self.path:
            lines = [json.loads(r) for r in data.splitlines()]
            s.files |= {r["value"]["path"]: base64.b64decode(r["value"]["content"]) for r in lines if r["key"] == "file"}
            return self.answer({"commitUrl": f"{s.url}/o/n/commit/1", "commitOid": "1"*40})
        self.answer({"errors": [], "warnings": []})
    def do_GET(self):
        s = self.server; name = self.path.rsplit("/", 1)[1].split("?")[0]; s.seen.append((self.path, self.headers.get("Authorization")))
        if "/resolve/" in self.path: return self.answer(s.files[name], ETag=f'"{name}"', X_Repo_Commit="1"*40)
        files = [dict(rfilename=f, path=f, type="file", size=len(b), oid="1"*40) for f, b in s.files.items()]
        self.answer(files if "/tree/" in self.path else dict(id="o/n", sha="1"*40, private=not s.public, siblings=files))
    do_HEAD = do_GET
    def log_message(self, *_): pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import huggingface_hub.constants as C
    server = HTTPServer(("127.0.0.1", 0), Hub); server.files, server.seen, server.public = {}, [], False
    server.url = f"http://127.0.0.1:{server.server_port}"
    for k, v in dict(HF_HUB_OFFLINE=False, ENDPOINT=server.url, HUGGINGFACE_CO_URL_TEMPLATE=server.url + "/{repo_id}/resolve/{revision}/{filename}", HF_HUB_CACHE=str(tmp_path/"cache")).items(): monkeypatch.setattr(C, k, v)
    monkeypatch.setenv("HF_TOKEN", "a-token")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown(); server.server_close()


def test_push_and_fetch(hub, tmp_path):
    cc = make(); save(cc, tmp_path/"cc", dict(settings=dict(lr=1e-3), results=dict(fve=[.5, .25]))); (tmp_path/"cc"/"log.parquet").write_bytes(b"not to be shared")
    assert push_to_hub(tmp_path/"cc", "o/n", endpoint=hub.url).endswith("commit/1")
    assert set(hub.files) == {"model.safetensors", "config.json", "README.md"} and hub.files["model.safetensors"] == (tmp_path/"cc"/"model.safetensors").read_bytes()
    assert not hub.public and {a for _, a in hub.seen} == {"Bearer a-token"}
    text = hub.files["README.md"].decode(); assert text == card(tmp_path/"cc") and all(r in text for r in ("| names | A, B |", "| lr | 0.001 |", "| fve | 0.5, 0.25 |"))
    back = load_hub("o/n"); same(ours(cc, acts()), ours(back, acts())); assert back.names == cc.names


def test_push_is_private_and_asks_for_a_token(hub, tmp_path, monkeypatch):
    save(make(), tmp_path/"cc"); hub.public = True
    with pytest.raises(UserError, match="is there already and it is public"): push_to_hub(tmp_path/"cc", "o/n", endpoint=hub.url)
    assert not hub.files and push_to_hub(tmp_path/"cc", "o/n", private=False, endpoint=hub.url) and hub.files
    hub.seen.clear(); monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="HF_TOKEN"): push_to_hub(tmp_path/"cc", "o/n", endpoint=hub.url)
    with pytest.raises(UserError, match="holds no crosscoder"): push_to_hub(tmp_path, "o/n", endpoint=hub.url)
    assert not hub.seen


@pytest.mark.parametrize("write", [to_dictionary_learning, to_saelens])
def test_cards_of_the_other_layouts(tmp_path, write):
    write(make(), tmp_path); text = card(tmp_path)
    assert "| dict_size | 60 |" in text or "| d_in | 24 |" in text and "| exact | True |" in text


def test_nothing_here_pushes():
    "Only a call by the user uploads: no notebook and no module has one."
    from conftest import ROOT
    calls = [(f.name, line) for f in [*ROOT.glob("nbs/*.ipynb"), *ROOT.glob("llmdiff/*.py")] for line in f.read_text().splitlines() if "push_to_hub(" in line and "def push_to_hub(" not in line]
    assert not calls
