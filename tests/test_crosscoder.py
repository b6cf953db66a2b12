"The crosscoder: sparse gradients are the dense ones, codes stand alone, what is saved is loaded."
import pytest, torch

from llmdiff.core import UserError
from llmdiff.crosscoder import (Crosscoder, Planted, aux_grads, calibrate, delta_norm, dense_aux, dense_code,
                                dense_loss, encode, load, save, scan_dtype, score_norm, select, set_normalisation, sparse_grads)
from llmdiff import crosscoder


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def make(d=24, D=200, k=6, M=2, score="sum", seed=0, noise=.03):
    "A crosscoder away from its symmetric start, as training leaves it."
    cc = Crosscoder(d, D, k, "ABC"[:M], score, seed); g = torch.Generator().manual_seed(seed+1)
    with torch.no_grad():
        for p in cc.parameters(): p += noise*torch.randn(p.shape, generator=g)
        cc.W_dec *= torch.rand(D, M, 1, generator=g)*2     # norms differ between models and latents
    return cc


def acts(n=300, M=2, d=24, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, M, d, generator=g)*torch.rand(n, 1, 1, generator=g).pow(-.5)   # heavy tails


def dense_grads(cc, x, dead=None, k_aux=8, alpha=1/32):
    for p in cc.parameters(): p.grad = None
    loss, e = dense_loss(cc, x)
    if dead is not None: loss = loss + dense_aux(cc, x, e, dead, k_aux, alpha)
    loss.backward()
    out = {n: p.grad.clone() for n, p in cc.named_parameters()}
    for p in cc.parameters(): p.grad = None
    return loss.item(), out


def same(cc, want, tol=1e-5):
    for n, p in cc.named_parameters(): assert (p.grad-want[n]).abs().max() <= tol*want[n].abs().max(), n


@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("score", ["sum", "l2"])
def test_gradients_equal_autograd(M, score):
    cc, x = make(M=M, score=score), acts(M=M)
    loss, want = dense_grads(cc, x)
    e = sparse_grads(cc, x, select(cc, x)[0])
    assert float(e.pow(2).sum()/len(x)) == pytest.approx(loss, rel=1e-5)
    same(cc, want)


def test_gradients_without_mkl(monkeypatch):
    "The way taken on other processors and on GPUs gives the same."
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    cc, x = make(), acts()
    _, want = dense_grads(cc, x)
    sparse_grads(cc, x, select(cc, x)[0]); same(cc, want)


@pytest.mark.parametrize("k_aux", [3, 8, 10**6])
def test_aux_gradients_equal_autograd(k_aux):
    cc, x, dead = make(), acts(), torch.arange(1, 200, 9)
    loss, want = dense_grads(cc, x, dead, k_aux)
    plain, without = dense_grads(cc, x)
    e = sparse_grads(cc, x, select(cc, x)[0])
    aux = float(aux_grads(cc, x, e, dead, k_aux, 1/32))
    assert aux > 0 and plain + aux == pytest.approx(loss, rel=1e-5)
    same(cc, want)
    assert (want["W_dec"][dead]-without["W_dec"][dead]).abs().max() > 1e-3   # it is in the gradient, not only computed
    alive = torch.ones(200, dtype=torch.bool); alive[dead] = False
    assert torch.equal(want["W_dec"][alive], without["W_dec"][alive])        # the residual is held fixed


def test_aux_tiles(monkeypatch):
    cc, x, dead = make(), acts(), torch.arange(0, 200, 3)
    _, want = dense_grads(cc, x, dead)
    monkeypatch.setattr(crosscoder, "tile_rows", lambda *a: 37)
    e = sparse_grads(cc, x, select(cc, x)[0]); aux_grads(cc, x, e, dead, 8, 1/32); same(cc, want)


@pytest.mark.parametrize("tile", [7, 64, 10**6])
@pytest.mark.parametrize("guess", [0., .5, 1., 1.04, 3., 1e9])
def test_selection_is_flat_topk(monkeypatch, tile, guess):
    monkeypatch.setattr(crosscoder, "tile_rows", lambda *a: tile)
    cc, x = make(), acts()
    want = dense_code(cc, x).detach()
    t = (want*score_norm(cc))[want > 0].min()
    codes, last = select(cc, x, guess*float(t))
    assert torch.equal(torch.stack(codes[:2], 1), want.nonzero())      # and in this order: token, then latent
    assert len(codes.row) == 6*300 and last == pytest.approx(float(t), rel=1e-5)
    torch.testing.assert_close(codes.value, want[want > 0], rtol=1e-4, atol=1e-5)


def test_selection_takes_positive_scores_only():
    cc, x = make(), acts()
    cc.b_enc.data -= 1e3
    assert len(select(cc, x)[0].row) == 0
    sparse_grads(cc, x, select(cc, x)[0])     # no active latent at all
    assert cc.W_dec.grad.abs().max() == 0 and cc.b_dec.grad.abs().max() > 0


def test_bfloat16_proposes_float32_decides():
    cc, x = make(d=256, D=1024, k=16), acts(400, d=256)
    a, t = select(cc, x); b, _ = select(cc, x, t, torch.bfloat16)
    ids = [set((c.row*1024+c.latent).tolist()) for c in (a, b)]
    assert len(ids[0] & ids[1])/len(ids[0]) > .999
    both = {i: v for i, v in zip((a.row*1024+a.latent).tolist(), a.value.tolist())}
    for i, v in zip((b.row*1024+b.latent).tolist(), b.value.tolist()): assert v == pytest.approx(both.get(i, v), rel=1e-4)   # values are not rounded to bfloat16


def test_no_array_of_tokens_by_latents(monkeypatch):
    monkeypatch.setattr(crosscoder, "tile_rows", lambda *a: 16)
    cc, x, seen = make(), acts(), []
    real = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: seen.append(len(a[1])) or real(*a, **k))
    e = sparse_grads(cc, x, select(cc, x)[0]); aux_grads(cc, x, e, torch.arange(20), 4, 1/32)
    assert seen and max(seen) <= 16


def test_scores():
    cc = Crosscoder(4, 3, 1, "AB"); cc.W_dec.data.zero_(); cc.W_dec.data[0, 0, 0] = 3; cc.W_dec.data[0, 1, 0] = 4
    assert score_norm(cc)[0] == 7
    cc.score = "l2"; assert score_norm(cc)[0] == 5


def test_start():
    cc = Crosscoder(16, 50, 4, "ABC")
    assert torch.equal(cc.W_enc, cc.W_dec)
    for m in (1, 2): assert torch.equal(cc.W_dec[:, 0], cc.W_dec[:, m])
    torch.testing.assert_close(cc.W_dec.detach().flatten(1).norm(dim=1), torch.ones(50))


def test_normalisation_has_one_scalar_a_model():
    x = acts(5000)*torch.tensor([1., 50.])[:, None] + 100; cc = make()
    set_normalisation(cc, x.double().mean(0), x.double().var(0, unbiased=False).sum(1))
    n = cc.normalise(x)
    torch.testing.assert_close(n.pow(2).sum(2).mean(0), torch.full((2,), 24.), rtol=1e-3, atol=0)
    ratio = n[:, 0]/(x-x.mean(0))[:, 0]
    assert (ratio.median()-ratio).abs().quantile(.9) < 1e-3*ratio.median()       # the direction of a vector does not change
    torch.testing.assert_close(cc.denormalise(n), x, rtol=1e-3, atol=1e-2)
    with pytest.raises(UserError, match="do not vary"): set_normalisation(cc, torch.zeros(2, 24), torch.zeros(2))


def test_theta_gives_k():
    cc, x = make(), acts(1000)
    calibrate(cc, x.split(170))
    assert len(cc.encode(x).row) == 6*1000
    assert abs(len(cc.encode(acts(1000, seed=8)).row)/1000 - 6) < .6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_stand_alone(dtype):
    cc, x = make(), acts(); calibrate(cc, [x])
    every = encode(cc, x, dtype)
    key = every.row*200 + every.latent
    assert (key.diff() > 0).all()                              # sorted, each pair once
    for part in ([3], range(40, 90), torch.randperm(300)[:20].tolist()):
        for i, r in enumerate(part):
            c = encode(cc, x[list(part)], dtype); w = every.row == r; h = c.row == i
            assert torch.equal(c.latent[h], every.latent[w])
            torch.testing.assert_close(c.value[h], every.value[w], rtol=1e-5, atol=1e-6)
    loud = torch.cat([x[:1], 1000*x[1:]])                      # loud batch mates push nobody out
    assert torch.equal(encode(cc, loud, dtype).latent[encode(cc, loud, dtype).row == 0], every.latent[every.row == 0])


def test_encode_follows_the_threshold_exactly():
    cc, x = make(), acts(); calibrate(cc, [x])
    pre = torch.relu(x.flatten(1) @ cc.W_enc.detach().flatten(1).T + cc.b_enc.detach())
    want = pre*(pre*score_norm(cc) > cc.theta)
    torch.testing.assert_close(cc.dense_codes(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cc.decode(*cc.encode(x), len(x)), torch.einsum("nj,jmd->nmd", want, cc.W_dec.detach())+cc.b_dec.detach(), rtol=1e-4, atol=1e-5)


def test_encode_needs_a_threshold():
    with pytest.raises(UserError, match="no threshold yet"): make().encode(acts())


def test_delta_norm_orientation():
    cc = Crosscoder(8, 4, 1, ["pt", "it"])
    cc.W_dec.data[0, 1] = 0; cc.W_dec.data[1, 0] = 0; cc.W_dec.data[3, 0] *= .5
    assert delta_norm(cc).tolist() == pytest.approx([0, 1, .5, .75])     # A only, B only, both, twice as long in B
    with pytest.raises(UserError, match="compares two models"): delta_norm(Crosscoder(8, 4, 1, "ABC"))


def test_save_and_load(tmp_path):
    cc, x = make(M=2), acts(); set_normalisation(cc, torch.randn(2, 24).double(), torch.tensor([3.7, 41.3])); calibrate(cc, [x])
    save(cc, tmp_path, {"settings": {"lr": .1}}); again = load(tmp_path)
    for a, b in zip(cc.state_dict().items(), again.state_dict().items()): assert a[0] == b[0] and torch.equal(a[1], b[1]) and a[1].dtype == b[1].dtype
    assert again.config() == cc.config() and all(torch.equal(a, b) for a, b in zip(cc.encode(x), again.encode(x)))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    first = (tmp_path/"model.safetensors").read_bytes(); save(cc, tmp_path, {"settings": {"lr": .1}})
    assert (tmp_path/"model.safetensors").read_bytes() == first
    save(make(), tmp_path/"other")
    (tmp_path/"other/config.json").rename(tmp_path/"config.json")
    with pytest.raises(UserError, match="does not belong"): load(tmp_path)
    (tmp_path/"model.safetensors").write_bytes(first[:500])
    with pytest.raises(UserError, match="cannot be read"): load(tmp_path)
    with pytest.raises(UserError, match="run notebook 05_training"): load(tmp_path/"nowhere")


def test_settings_that_cannot_work():
    with pytest.raises(UserError, match="k = 9 does not fit a dictionary of 8"): Crosscoder(4, 8, 9, "AB")
    with pytest.raises(UserError, match="score 'max' is unknown"): Crosscoder(4, 8, 2, "AB", score="max")
    with pytest.raises(UserError, match="select 'fp8' is unknown"): scan_dtype("fp8")
