"""The engine on a GPU: the same test bodies on CPU and on CUDA, held against dense float64 on the CPU.

Without a GPU the CUDA half is skipped.
"""
import itertools

import pytest
import torch
import torch.nn.functional as F

from llmdiff import crosscoder
from llmdiff.crosscoder import (
    aux_grads, calibrate, Crosscoder, dense_aux, dense_code, dense_loss, folded_encoder, load, save, scan_dtype,
    scan_scores, score_norm, select, set_normalisation, sparse_grads)
from llmdiff.engine.checkpoints import load_checkpoint
from llmdiff.training import dead_latents, evaluate, Kit, new_state, Options, train, train_step
from llmdiff.worlds.synthetic import easy_world

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(),
                            reason="no GPU is at hand: torch.cuda.is_available() is False")
DTYPES = [torch.float32, torch.bfloat16]
N, D, K = 300, 200, 6


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def dev(request):
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield request.param
    torch.set_num_threads(n)


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch):
    "A GPU's tiles are so large that a small batch would never be cut."
    if request.param == "many tiles": monkeypatch.setattr(crosscoder, "tile_rows", lambda *a: 37)


def make(d=24, M=2, seed=0):
    "A crosscoder away from its symmetric start, in float32 on the CPU."
    cc = Crosscoder(d, D, K, "ABC"[:M], seed=seed)
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in cc.parameters(): p += .03*torch.randn(p.shape, generator=g)
        cc.W_dec *= 2*torch.rand(D, M, 1, generator=g)
    return cc


def acts(d=24, M=2, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(N, M, d, generator=g)*torch.rand(N, 1, 1, generator=g).pow(-.5)


def exact(**kw): return make(**kw).double()


def close(got, want, tol=1e-5): assert (got.cpu().double() - want).abs().max() <= tol*want.abs().max()


def grads(cc): return {n: p.grad.clone() for n, p in cc.named_parameters()}


def pairs(codes): return torch.stack(codes[:2], 1).cpu()


# ---- one batch

def test_scan_finds_all_above_a_bound(dev, tiles):
    ref, x = exact(), acts()
    norm = score_norm(ref)
    score = x.double().flatten(1) @ (ref.W_enc.flatten(1)*norm[:, None]).T + ref.b_enc*norm
    W, b, _ = folded_encoder(make().to(dev), torch.float32)
    at, _ = scan_scores(x.flatten(1).to(dev), W, b, 1.5)
    assert at.device.type == dev and torch.equal(at.cpu(), (score.flatten() > 1.5).nonzero().squeeze(1))


@pytest.mark.parametrize("guess", [0., 1., 3.])
@pytest.mark.parametrize("dtype", DTYPES)
def test_selection_is_flat_topk(dev, tiles, dtype, guess):
    "In bfloat16 too, where the scan only proposes: no pair of this batch is that near the threshold."
    want = dense_code(exact(), acts().double()).detach()
    t = float((want*score_norm(exact()))[want > 0].min())
    codes, last = select(make().to(dev), acts().to(dev), guess*t, dtype)
    assert {c.device.type for c in codes} == {dev}
    assert [c.dtype for c in codes] == [torch.int64, torch.int64, torch.float32]
    assert torch.equal(pairs(codes), want.nonzero())            # in this order: token, then latent
    assert last == pytest.approx(t, rel=1e-5)
    close(codes.value, want[want > 0])


@pytest.mark.parametrize("M", [1, 2, 3])
def test_gradients_are_those_of_autograd(dev, tiles, M):
    cc, x, ref = make(M=M).to(dev), acts(M=M), exact(M=M)
    dead = torch.arange(1, D, 9)
    loss, e = dense_loss(ref, x.double())
    loss.backward()
    want = grads(ref)
    got = sparse_grads(cc, x.to(dev), select(cc, x.to(dev))[0])
    close(got, e)
    for n, g in grads(cc).items(): close(g, want[n])

    aux = dense_aux(ref, x.double(), e, dead, 8, 1/32)
    aux.backward()
    close(aux_grads(cc, x.to(dev), got, dead.to(dev), 8, 1/32), aux.detach())
    for n, g in grads(cc).items(): close(g, ref.get_parameter(n).grad)
    assert not torch.equal(want["W_dec"], ref.W_dec.grad)


def test_no_active_latent(dev):
    cc, x = make().to(dev), acts().to(dev)
    cc.b_enc.data -= 1e3
    codes, t = select(cc, x)
    assert len(codes.row) == 0 and t == 0
    sparse_grads(cc, x, codes)
    assert cc.W_dec.grad.abs().max() == 0 and cc.W_enc.grad.abs().max() == 0 and cc.b_dec.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_calibrated_codes(dev, dtype):
    cc, x, ref = make().to(dev), acts(), exact()
    calibrate(cc, x.to(dev).split(70), dtype)
    f = F.relu(x.double().flatten(1) @ ref.W_enc.flatten(1).T + ref.b_enc).detach()
    score = f*score_norm(ref)
    top = score.flatten().topk(K*N + 1).values
    assert cc.theta.device.type == dev and float(top[-1]) < float(cc.theta) < float(top[-2])
    codes = crosscoder.encode(cc, x.to(dev), dtype)
    want = f*(score > cc.theta.cpu().double())
    assert torch.equal(pairs(codes), want.nonzero())
    close(codes.value, want[want > 0])
    close(cc.decode(*codes, N), (torch.einsum("nj,jmd->nmd", want, ref.W_dec) + ref.b_dec).detach())


# ---- training

def dense_step(ref, opt, x): # -> residual
    "The specification, in float64 by autograd."
    opt.zero_grad()
    loss, e = dense_loss(ref, x.double())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(ref.parameters(), 1.)
    opt.step()
    return e


@pytest.mark.parametrize("select", ["float32", "bfloat16"])
def test_steps_follow_the_dense_ones(dev, select):
    cc, ref, steps = make().to(dev), exact(), 8
    opt = torch.optim.Adam(cc.parameters(), lr=1e-3, fused=True)
    dense = torch.optim.Adam(ref.parameters(), lr=1e-3)
    state, options = new_state(cc), Options(select=select)
    for i in range(steps):
        x = acts(seed=i)
        e = dense_step(ref, dense, x)
        sums = train_step(cc, opt, x.to(dev), state, options)
        assert sums.device.type == dev and sums.dtype == torch.float64
        rel = 1e-5 if select == "float32" else 1e-3
        assert float(sums[:2].sum()) == pytest.approx(float(e.pow(2).sum()), rel=rel)
        assert int(sums[4]) == K*N
    if select == "float32":
        for p, q in zip(cc.parameters(), ref.parameters()):
            torch.testing.assert_close(p.detach().cpu().double(), q.detach(), rtol=1e-4, atol=5e-6)
    assert state.since.device.type == dev and int(state.since.max()) <= steps*N


def test_the_latents_that_are_helped_are_the_same_everywhere(dev):
    "Many are dead equally long: the first of them."
    since = torch.tensor([7, 3, 9, 7, 7, 2, 7]).repeat(500).to(dev)
    want = sorted(range(len(since)), key=lambda i: (-int(since[i]), i))[:600]
    got = dead_latents(since, 3, 600)
    assert got.device.type == dev and got.tolist() == sorted(want)
    assert dead_latents(since, 8, 600).tolist() == list(range(2, 3500, 7))
    assert dead_latents(since, 10, 600).tolist() == []


def world(): return easy_world(32, 64)


def fresh(dev):
    x = world()(8000, seed=10**6).double()
    return set_normalisation(Crosscoder(32, 96, 4, "AB"), x.mean(0), x.var(0, unbiased=False).sum(1)).to(dev)


def stream(start):
    w = world()
    return (w(256, seed=i) for i in itertools.count(start))


ARGS = dict(lr=3e-3, dead_after=3000, k_aux=8, aux_latents=16)


@pytest.mark.parametrize("select", ["float32", "bfloat16"])
def test_training_learns_as_on_the_cpu(dev, select, tmp_path):
    "AuxK included; then calibrated, measured, saved, loaded."
    cc = fresh(dev)
    want = train(stream, fresh("cpu"), 120, Options(**ARGS, select="float32"), n_log=10)
    log = train(stream, cc, 120, Options(**ARGS, select=select), n_log=10)
    assert (log.loss/want.loss - 1).abs().max() < (1e-3 if select == "float32" else 1e-2)
    assert (log.aux > 0).any() and log.fve_A.iloc[-1] > .7
    held = [world()(1000, seed=10**6 + i) for i in range(1, 4)]
    calibrate(cc, [cc.normalise(held[0])], scan_dtype(select))
    r = evaluate(cc, iter(held[1:]), select)
    assert abs(r["l0"] - 4) < .4 and min(r["fve"]) > .7
    save(cc, tmp_path)
    again = load(tmp_path, dev)
    for a, b in zip(cc.state_dict().values(), again.state_dict().values()):
        assert a.device == b.device and torch.equal(a, b)


def test_an_interrupted_training_goes_on(dev, tmp_path):
    "On a CPU to the last bit; on a GPU, where sums are not always taken in one order, to rounding."
    def killed(start):
        for i, x in enumerate(stream(start)):
            if start + i == 33: raise KeyboardInterrupt
            yield x

    whole, cc, file, options = fresh(dev), fresh(dev), tmp_path/"checkpoint.safetensors", Options(**ARGS)
    log = train(stream, whole, 60, options, n_log=10)
    with pytest.raises(KeyboardInterrupt): train(killed, fresh(dev), 60, options, Kit(file, "a", every=0), n_log=10)
    opt = torch.optim.Adam(cc.parameters(), fused=True)
    found = load_checkpoint(file, "a", cc, opt)
    assert found["step"] == 30 and found["since"].device.type == dev
    assert {t.device.type for s in opt.state.values() for t in s.values()} == {dev}

    cc = fresh(dev)
    got = train(stream, cc, 60, options, Kit(file, "a"), n_log=10)
    for p, q in zip(whole.parameters(), cc.parameters()):
        assert torch.equal(p, q) if dev == "cpu" else (p - q).abs().max() < 1e-3*p.abs().max()
    assert (got.loss/log.loss - 1).abs().max() < 1e-3
