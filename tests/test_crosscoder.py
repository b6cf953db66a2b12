"The crosscoder: sparse gradients are the dense ones, codes stand alone, what is saved is loaded."

import pytest
import torch

from llmdiff import crosscoder
from llmdiff.core import UserError
from llmdiff.crosscoder import (
    aux_grads, batch_topk, calibrate, Crosscoder, delta_norm, dense_aux, dense_code, dense_loss, encode, load, save,
    scan_dtype, score_norm, select, set_normalisation, sparse_grads)

D = 200   # latents of `make`


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def make(d=24, D=D, k=6, M=2, score="sum", seed=0, noise=.03):
    "A crosscoder away from its symmetric start, as training leaves it."
    cc = Crosscoder(d, D, k, "ABC"[:M], score, seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in cc.parameters(): p += noise*torch.randn(p.shape, generator=g)
        cc.W_dec *= torch.rand(D, M, 1, generator=g)*2     # norms differ between models and latents
    return cc


def acts(n=300, M=2, d=24, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, M, d, generator=g)*torch.rand(n, 1, 1, generator=g).pow(-.5)   # heavy tails


def no_grads(cc):
    for p in cc.parameters(): p.grad = None


def dense_grads(cc, x, dead=None, k_aux=8, alpha=1/32):
    "Loss and gradients of the specification, by autograd."
    no_grads(cc)
    loss, e = dense_loss(cc, x)
    if dead is not None: loss = loss + dense_aux(cc, x, e, dead, k_aux, alpha)
    loss.backward()
    out = {name: p.grad.clone() for name, p in cc.named_parameters()}
    no_grads(cc)
    return loss.item(), out


def assert_same_grads(cc, want, tol=1e-5):
    for name, p in cc.named_parameters():
        assert (p.grad - want[name]).abs().max() <= tol*want[name].abs().max(), name


def pairs(codes):
    "Codes as rows (token, latent)."
    return torch.stack(codes[:2], 1)


# ---- the specification

@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("score", ["sum", "l2"])
def test_forward_is_the_equations(M, score):
    "pre, ReLU, the k*B largest scores of the batch, and one reconstruction a model, written out token by token."
    cc, x = make(M=M, score=score), acts(40, M)
    f, x_hat = cc(x)
    rows = cc.W_dec.norm(dim=2)
    n = rows.sum(1) if score == "sum" else rows.pow(2).sum(1).sqrt()
    pre = torch.stack([sum(cc.W_enc[:, m] @ t[m] for m in range(M)) + cc.b_enc for t in x]).clamp(min=0)
    cut = (pre*n).flatten().sort(descending=True).values[cc.k*len(x) - 1]
    want = torch.where(pre*n >= cut, pre, 0.)
    torch.testing.assert_close(f, want, rtol=1e-4, atol=1e-5)
    by_model = torch.stack([want @ cc.W_dec[:, m] + cc.b_dec[m] for m in range(M)], 1)
    torch.testing.assert_close(x_hat, by_model, rtol=1e-4, atol=1e-5)
    assert cc(x, per_token=2)[0].gt(0).sum() == 2*len(x)


def test_batch_topk_is_over_the_whole_batch():
    mask = batch_topk(torch.tensor([[5., 4., 3.], [1., 2., 0.]]), 3)
    assert mask.tolist() == [[True, True, True], [False, False, False]]


def test_scores():
    cc = Crosscoder(4, 3, 1, "AB")
    cc.W_dec.data.zero_()
    cc.W_dec.data[0, 0, 0] = 3
    cc.W_dec.data[0, 1, 0] = 4
    assert score_norm(cc)[0] == 7
    cc.score = "l2"
    assert score_norm(cc)[0] == 5


def test_start():
    cc = Crosscoder(16, 50, 4, "ABC")
    assert torch.equal(cc.W_enc, cc.W_dec)
    for m in (1, 2): assert torch.equal(cc.W_dec[:, 0], cc.W_dec[:, m])
    torch.testing.assert_close(cc.W_dec.detach().flatten(1).norm(dim=1), torch.ones(50))


def test_normalisation_has_one_scalar_a_model():
    cc, x = make(), acts(5000)*torch.tensor([1., 50.])[:, None] + 100
    set_normalisation(cc, x.double().mean(0), x.double().var(0, unbiased=False).sum(1))
    n = cc.normalise(x)
    torch.testing.assert_close(n.pow(2).sum(2).mean(0), torch.full((2,), 24.), rtol=1e-3, atol=0)
    ratio = n[:, 0]/(x - x.mean(0))[:, 0]
    assert (ratio.median() - ratio).abs().quantile(.9) < 1e-3*ratio.median()   # a vector's direction does not change
    torch.testing.assert_close(cc.denormalise(n), x, rtol=1e-3, atol=1e-2)
    with pytest.raises(UserError, match="do not vary"): set_normalisation(cc, torch.zeros(2, 24), torch.zeros(2))


# ---- the sparse step

@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("score", ["sum", "l2"])
def test_gradients_equal_autograd(M, score):
    cc, x = make(M=M, score=score), acts(M=M)
    loss, want = dense_grads(cc, x)
    e = sparse_grads(cc, x, select(cc, x)[0])
    assert float(e.pow(2).sum()/len(x)) == pytest.approx(loss, rel=1e-5)
    assert_same_grads(cc, want)


def test_gradients_without_mkl(monkeypatch):
    "The way taken on other processors and on GPUs gives the same."
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    cc, x = make(), acts()
    _, want = dense_grads(cc, x)
    sparse_grads(cc, x, select(cc, x)[0])
    assert_same_grads(cc, want)


@pytest.mark.parametrize("k_aux", [3, 8, 10**6])
def test_aux_gradients_equal_autograd(k_aux):
    cc, x, dead = make(), acts(), torch.arange(1, D, 9)
    loss, want = dense_grads(cc, x, dead, k_aux)
    plain, without = dense_grads(cc, x)
    e = sparse_grads(cc, x, select(cc, x)[0])
    aux = float(aux_grads(cc, x, e, dead, k_aux, 1/32))
    assert aux > 0 and plain + aux == pytest.approx(loss, rel=1e-5)
    assert_same_grads(cc, want)
    helped = (want["W_dec"] - without["W_dec"])[dead]
    assert helped.abs().max() > 1e-3   # it is in the gradient, not only computed
    alive = torch.ones(D, dtype=torch.bool)
    alive[dead] = False
    assert torch.equal(want["W_dec"][alive], without["W_dec"][alive])   # the residual is held fixed


def test_aux_tiles(monkeypatch):
    cc, x, dead = make(), acts(), torch.arange(0, D, 3)
    _, want = dense_grads(cc, x, dead)
    monkeypatch.setattr(crosscoder, "tile_rows", lambda *a: 37)
    e = sparse_grads(cc, x, select(cc, x)[0])
    aux_grads(cc, x, e, dead, 8, 1/32)
    assert_same_grads(cc, want)


@pytest.mark.parametrize("tile", [7, 64, 10**6])
@pytest.mark.parametrize("guess", [0., .5, 1., 1.04, 3., 1e9])
def test_selection_is_flat_topk(monkeypatch, tile, guess):
    monkeypatch.setattr(crosscoder, "tile_rows", lambda *a: tile)
    cc, x = make(), acts()
    want = dense_code(cc, x).detach()
    threshold = float((want*score_norm(cc))[want > 0].min())
    codes, last = select(cc, x, guess*threshold)
    assert torch.equal(pairs(codes), want.nonzero())      # and in this order: token, then latent
    assert len(codes.row) == 6*300 and last == pytest.approx(threshold, rel=1e-5)
    torch.testing.assert_close(codes.value, want[want > 0], rtol=1e-4, atol=1e-5)


def test_selection_takes_positive_scores_only():
    cc, x = make(), acts()
    cc.b_enc.data -= 1e3
    codes, _ = select(cc, x)
    assert len(codes.row) == 0
    sparse_grads(cc, x, codes)     # no active latent at all
    assert cc.W_dec.grad.abs().max() == 0 and cc.b_dec.grad.abs().max() > 0


def test_bfloat16_proposes_float32_decides():
    cc, x = make(d=256, D=1024, k=16), acts(400, d=256)
    exact, threshold = select(cc, x)
    scanned, _ = select(cc, x, threshold, torch.bfloat16)
    values = [dict(zip((c.row*1024 + c.latent).tolist(), c.value.tolist())) for c in (exact, scanned)]
    both = values[0].keys() & values[1].keys()
    assert len(both)/len(values[0]) > .999
    for i in both: assert values[1][i] == pytest.approx(values[0][i], rel=1e-4)   # not rounded to bfloat16


def test_no_array_of_tokens_by_latents(monkeypatch):
    monkeypatch.setattr(crosscoder, "tile_rows", lambda *a: 16)
    cc, x = make(), acts()
    real, seen = torch.addmm, []

    def addmm(*a, **k):
        seen.append(len(a[1]))
        return real(*a, **k)

    monkeypatch.setattr(torch, "addmm", addmm)
    e = sparse_grads(cc, x, select(cc, x)[0])
    aux_grads(cc, x, e, torch.arange(20), 4, 1/32)
    assert seen and max(seen) <= 16


# ---- inference

def test_theta_gives_k():
    cc, x = make(), acts(1000)
    calibrate(cc, x.split(170))
    assert len(cc.encode(x).row) == 6*1000
    assert abs(len(cc.encode(acts(1000, seed=8)).row)/1000 - 6) < .6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_stand_alone(dtype):
    cc, x = make(), acts()
    calibrate(cc, [x])
    every = encode(cc, x, dtype)
    assert ((every.row*D + every.latent).diff() > 0).all()      # sorted, each pair once
    for part in ([3], list(range(40, 90)), torch.randperm(300)[:20].tolist()):
        codes = encode(cc, x[part], dtype)
        for i, r in enumerate(part):
            here, there = codes.row == i, every.row == r
            assert torch.equal(codes.latent[here], every.latent[there])
            torch.testing.assert_close(codes.value[here], every.value[there], rtol=1e-5, atol=1e-6)
    loud = encode(cc, torch.cat([x[:1], 1000*x[1:]]), dtype)    # loud batch mates push nobody out
    assert torch.equal(loud.latent[loud.row == 0], every.latent[every.row == 0])


def test_encode_follows_the_threshold_exactly():
    cc, x = make(), acts()
    calibrate(cc, [x])
    pre = torch.relu(x.flatten(1) @ cc.W_enc.detach().flatten(1).T + cc.b_enc.detach())
    want = pre*(pre*score_norm(cc) > cc.theta)
    torch.testing.assert_close(cc.dense_codes(x), want, rtol=1e-4, atol=1e-5)
    x_hat = torch.einsum("nj,jmd->nmd", want, cc.W_dec.detach()) + cc.b_dec.detach()
    torch.testing.assert_close(cc.decode(*cc.encode(x), len(x)), x_hat, rtol=1e-4, atol=1e-5)


def test_encode_needs_a_threshold():
    with pytest.raises(UserError, match="no threshold yet"): make().encode(acts())


def test_delta_norm_orientation():
    cc = Crosscoder(8, 4, 1, ["pt", "it"])
    cc.W_dec.data[0, 1] = 0
    cc.W_dec.data[1, 0] = 0
    cc.W_dec.data[3, 0] *= .5
    assert delta_norm(cc).tolist() == pytest.approx([0, 1, .5, .75])     # A only, B only, both, twice as long in B
    with pytest.raises(UserError, match="compares two models"): delta_norm(Crosscoder(8, 4, 1, "ABC"))


# ---- files, settings

def test_save_and_load(tmp_path):
    cc, x, info = make(), acts(), {"settings": {"lr": .1}}
    set_normalisation(cc, torch.randn(2, 24).double(), torch.tensor([3.7, 41.3]))
    calibrate(cc, [x])
    save(cc, tmp_path, info)
    again = load(tmp_path)
    saved, loaded = cc.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    for name, a in saved.items(): assert torch.equal(a, loaded[name]) and a.dtype == loaded[name].dtype
    assert again.config() == cc.config()
    for a, b in zip(cc.encode(x), again.encode(x)): assert torch.equal(a, b)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    first = (tmp_path/"model.safetensors").read_bytes()
    save(cc, tmp_path, info)
    assert (tmp_path/"model.safetensors").read_bytes() == first


def test_files_that_do_not_make_a_crosscoder(tmp_path):
    save(make(), tmp_path, {"settings": {"lr": .1}})
    first = (tmp_path/"model.safetensors").read_bytes()
    save(make(), tmp_path/"other")
    (tmp_path/"other/config.json").rename(tmp_path/"config.json")
    with pytest.raises(UserError, match="does not belong"): load(tmp_path)
    (tmp_path/"model.safetensors").write_bytes(first[:500])
    with pytest.raises(UserError, match="cannot be read"): load(tmp_path)
    with pytest.raises(UserError, match="run step training"): load(tmp_path/"nowhere")


def test_settings_that_cannot_work():
    with pytest.raises(UserError, match="k = 9 does not fit a dictionary of 8"): Crosscoder(4, 8, 9, "AB")
    with pytest.raises(UserError, match="score 'max' is unknown"): Crosscoder(4, 8, 2, "AB", score="max")
    with pytest.raises(UserError, match="select 'fp8' is unknown"): scan_dtype("fp8")
