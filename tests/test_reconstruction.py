"""Block reconstruction: errors and first step against float64, groups that stay away, what does not help is not kept."""

import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM

from common import reconstruction, structured
from common.blocks import KINDS, blocks_of, layers_of
from common.checkpoint import load_tensors
from common.importance import l2_scores
from common.pruning import zero_groups_
from common.reconstruction import in_passes, n_held_out, reconstruct_
from common.runs import UserError
from common.streaming import StreamedLM
from tests.test_streaming import one_thread, save_random  # noqa: F401
from tests.test_structured import CPU, states_of

IDS, BATCH = torch.randint(3, 50, (250, 9), generator=torch.Generator().manual_seed(3)), 16  # 15 batches and one of 10
LAST = IDS[224:]  # of 16 batches the last two are held out
CASES = ("llama-biased", "mistral", "qwen3", "opt", "opt-350m")


@pytest.fixture(params=CASES)
def pruned(request, tmp_path):
    """A model's directory, and what is to stay: block 1 loses groups, block 0 does not."""
    folder = save_random(tmp_path / "model", request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    keep = structured.choose(l2_scores(blocks_of(model)), blocks_of(model), 0.15, range(1, 2), KINDS, "global", 0.1)
    return folder, model, keep


def refitted(folder, keep, parts, passes, seed=0, **how):
    lm = StreamedLM(folder, CPU)
    return structured.refit_blocks(lm, lm.blocks, IDS, BATCH, keep, parts, reconstruct=in_passes(passes, seed), **how)


def error_of(dense, cut, i, ids):
    """The mean over tokens of the squared error of block `i`'s outputs over their squared norm."""
    wanted, found = (states_of(model, i, ids)["block"][1] for model in (dense, cut))
    of_tokens = (found - wanted).square().sum(-1) / wanted.square().sum(-1)
    return statistics.mean(float(batch.mean()) for batch in of_tokens.view(len(ids), -1).split(BATCH))


def test_errors_are_those_of_the_stored_blocks(pruned, tmp_path):
    folder, dense, keep = pruned
    _, found = refitted(folder, keep, tmp_path / "parts", 3)
    assert len(found) == len(blocks_of(dense)) - 1 and not (tmp_path / "parts" / "block-0.safetensors").exists()
    refitted(folder, keep, tmp_path / "plain", 0)
    cut, first = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval() for _ in range(2))
    first.load_state_dict(load_tensors(tmp_path / "plain" / "block-1.safetensors"), strict=False)
    assert found[0][0] == pytest.approx(error_of(dense, first, 1, LAST), rel=1e-3)
    for i, (before, after) in enumerate(found, 1):
        cut.load_state_dict(load_tensors(tmp_path / "parts" / f"block-{i}.safetensors"), strict=False)
        assert after == pytest.approx(error_of(dense, cut, i, LAST), rel=1e-3)
        assert after <= before
    assert found[0][1] < 0.9 * found[0][0], found


def test_removed_groups_stay_at_zero(pruned, tmp_path):
    folder, _, keep = pruned
    refitted(folder, keep, tmp_path / "parts", 3)
    refitted(folder, keep, tmp_path / "plain", 0)
    zeros = 0
    for path in sorted((tmp_path / "plain").glob("*.safetensors")):
        for name, plain in load_tensors(path).items():
            trained = load_tensors(tmp_path / "parts" / path.name)[name]
            assert torch.equal(trained == 0, plain == 0), name
            zeros += int((plain == 0).sum())
    assert zeros
    other, left = structured.pruned_model(folder, keep, tmp_path / "parts")
    zeroed = AutoModelForCausalLM.from_pretrained(folder).eval()
    for path in (tmp_path / "parts").glob("*.safetensors"):
        zeroed.load_state_dict(load_tensors(path), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(IDS).logits, zeroed(IDS).logits, rtol=1e-5, atol=1e-5)
    assert left[1] != left[0]


@pytest.fixture
def block(pruned):
    """Block 1 of a streamed model, with its groups at zero, what it is given and shall give."""
    folder, dense, keep = pruned
    lm = StreamedLM(folder, CPU)
    hidden, aims = lm.embed(IDS, BATCH), lm.embed(IDS, BATCH)
    for states, last in ((hidden, 1), (aims, 2)):
        for i in range(last):
            with lm.loaded(i):
                lm.advance(i, states)
    with lm.loaded(1):
        zero_groups_([lm.blocks[1]], {kind: [keep[kind][1]] for kind in KINDS})
        yield lm, hidden, aims, dense, keep


def test_the_first_step_is_a_share_of_each_tensor_along_the_gradients_signs(block, monkeypatch):
    """AdamW's first step is its rate in every weight; the gradient is float64's, by the model itself."""
    lm, hidden, aims, dense, keep = block
    monkeypatch.setattr(reconstruction, "_error", lambda *_: next(errors))  # one batch is enough for a step that is kept
    errors = iter((2.0, 1.0))
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n)[:1])
    before = {name: value.clone() for name, value in lm.tensors(1).items()}
    assert reconstruct_(lm, 1, hidden, aims, 1, seed=0) == (2.0, 1.0)
    wanted, layer = states_of(dense, 1, IDS[:BATCH])["block"][1], layers_of(dense)[1]
    zero_groups_([blocks_of(dense)[1]], {kind: [keep[kind][1]] for kind in KINDS})
    seen = []
    handle = layer.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    dense(input_ids=IDS[:BATCH], use_cache=False)
    handle.remove()
    loss = ((seen[0].flatten(0, -2) - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()
    names = dict(zip(before, layer.parameters(), strict=True))
    gradients = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    rate, compared = reconstruction.RATE / reconstruction.RISING, 0
    for (name, old), gradient in zip(before.items(), gradients, strict=True):
        moved = lm.tensors(1)[name] - old
        clear = gradient.abs() > 1e-5  # else the epsilon of Adam, and rounding, count
        step = -rate * old.double().square().mean().sqrt() * gradient.sign()
        torch.testing.assert_close(moved.double()[clear], step[clear], rtol=1e-2, atol=1e-6, msg=name)
        compared += int(clear.sum())
        assert torch.equal(moved[gradient == 0], torch.zeros_like(moved[gradient == 0]))
    assert compared > 1000


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_what_makes_a_block_worse_is_not_kept(block, monkeypatch, rate):
    """With 1e30 it is not even finite."""
    lm, hidden, aims, *_ = block
    monkeypatch.setattr(reconstruction, "RATE", rate)
    before = {name: value.clone() for name, value in lm.tensors(1).items()}
    first, last = reconstruct_(lm, 1, hidden, aims, 2, seed=0)
    assert first == last > 0
    assert all(torch.equal(value, before[name]) for name, value in lm.tensors(1).items())
    assert not any(parameter.requires_grad for parameter in lm.layers[1].parameters())


def test_a_seed_and_nothing_else_decides(pruned, tmp_path):
    folder, _, keep = pruned
    runs = {"a": {}, "again": {}, "on disk": {"on_disk": True}, "seed": {"seed": 1}}
    found = {name: refitted(folder, keep, tmp_path / name, 2, **how) for name, how in runs.items()}
    assert found["a"] == found["again"] == found["on disk"] != found["seed"]
    (tmp_path / "a" / "block-2.safetensors").unlink()  # killed before it was written
    assert refitted(folder, keep, tmp_path / "a", 2) == found["a"]
    stored = [load_tensors(tmp_path / name / "block-2.safetensors") for name in ("a", "again", "on disk")]
    assert all(torch.equal(value, other[name]) for other in stored for name, value in stored[0].items())


def test_held_out_batches():
    assert [n_held_out(n) for n in (2, 7, 8, 16, 30)] == [1, 1, 1, 2, 3]
    with pytest.raises(UserError, match=r"the calibration text is one batch.*Raise --importance_samples"):
        n_held_out(1)
