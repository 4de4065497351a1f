"""Scores against gates that are really multiplied in, in float64, one example at a time and without its padding."""

import gc
import itertools
import weakref

import pytest
import torch

from common import importance
from common.blocks import KINDS, blocks_of, group_costs
from common.distill import kd_loss
from common.importance import GateRecorder, combine, l2_scores, parse_importance, random_scores, split_groups
from common.runs import UserError
from tests.test_families import batch, random_model

FAMILIES = ["bert", "llama", "opt"]  # plain heads; grouped queries; an FFN that sees (tokens, width) instead of (B, T, width)


def double_model(family):
    return random_model(family)[0].double()


def readers_of(model):
    """The projections behind the gates and their number of groups, in the order of the flat vector."""
    blocks = blocks_of(model)
    return [(b.attention.o, b.attention.n_kv_heads) for b in blocks] + [(b.ffn.out, b.ffn.n_neurons) for b in blocks]


def examples_of(inputs):
    """Each example alone, its padding cut off."""
    lengths = inputs["attention_mask"].sum(1).tolist()
    return [{name: tensor[i : i + 1, :n] for name, tensor in inputs.items()} for i, n in enumerate(lengths)]


def gate_gradients(model, value):
    """Gradients of value(i, logits of example i alone) by a gate on every group: (B, n_groups) float64."""
    rows = []
    for i, example in enumerate(examples_of(batch())):
        gates = [torch.ones(n, dtype=torch.float64, requires_grad=True) for _, n in readers_of(model)]

        def multiply(reader, args, of):
            return (args[0] * of[reader].repeat_interleave(reader.in_features // len(of[reader])),)

        of = {reader: gate for (reader, _), gate in zip(readers_of(model), gates, strict=True)}
        handles = [reader.register_forward_pre_hook(lambda *args, of=of: multiply(*args, of)) for reader in of]
        rows.append(torch.cat(torch.autograd.grad(value(i, model(**example).logits), gates)))
        for handle in handles:
            handle.remove()
    return torch.stack(rows)


def some_loss(i, logits):
    """A weighted log-likelihood of what the model says of example i."""
    weights = torch.randn(9, logits.shape[-1], generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    return -(logits.log_softmax(-1) * weights[: logits.shape[1] if logits.ndim == 3 else 1]).sum()


def mean_loss(logits):
    """The mean over the examples of a padded batch of `some_loss`."""
    parts = zip(logits.split(1), batch()["attention_mask"].sum(1).tolist(), strict=True)
    return sum(some_loss(i, part[:, :n] if part.ndim == 3 else part) for i, (part, n) in enumerate(parts)) / len(logits)


def recorded(model, wanted, loss=mean_loss, **settings):
    recorder = GateRecorder(model, blocks_of(model), wanted)
    for name, value in settings.items():
        setattr(recorder, name, value)
    with recorder.recording():
        loss(model(**batch()).logits).backward()
    return dict(zip(wanted, recorder.statistics(), strict=True))


def assert_same(found, expected):
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4 * float(expected.abs().mean()))


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_and_fisher_are_of_gates_multiplied_in(family):
    model = double_model(family)
    gradients = gate_gradients(model, some_loss)
    found = recorded(model, ("taylor", "fisher"))
    assert_same(found["taylor"], gradients.abs().mean(0))
    assert_same(found["fisher"], gradients.square().mean(0))


@pytest.mark.parametrize("family", FAMILIES)
def test_activation_is_the_energy_that_each_group_adds(family):
    """The squared norm of every activation column by itself, carried by its weight column, summed over the group."""
    model = double_model(family)
    seen = {reader: [] for reader, _ in readers_of(model)}

    def note(reader, args):
        seen[reader].append(args[0].flatten(0, -2))

    handles = [reader.register_forward_pre_hook(note) for reader in seen]
    with torch.no_grad():
        for example in examples_of(batch()):
            model(**example)
    for handle in handles:
        handle.remove()
    energies = []
    for reader, n in readers_of(model):
        x = torch.cat(seen[reader])  # (tokens, in)
        for columns in torch.arange(reader.in_features).chunk(n):
            added = [(x[:, [c]] @ reader.weight[:, [c]].T).square().sum(1).mean() for c in columns]  # (tokens, out) each
            energies.append(sum(added))
    assert_same(recorded(model, ("activation",))["activation"], torch.stack(energies).detach())


def test_the_loss_scale_is_divided_out():
    model = double_model("bert")
    plain = recorded(model, ("taylor", "fisher"))
    scaled = recorded(model, ("taylor", "fisher"), lambda logits: mean_loss(logits) * 1024, loss_scale=torch.tensor(1024.0))
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)


def classifier(n_classes):
    model = double_model("bert")
    model.classifier = torch.nn.Linear(32, n_classes).double()
    return model


def mean_curvature(model, teacher_logits, temperature, monkeypatch):
    """The mean of `kd_gradient` over all sign vectors, which is its expectation over random ones."""
    n_classes, total = teacher_logits.shape[1], 0
    for signs in itertools.product([0, 1], repeat=n_classes):
        recorder = GateRecorder(model, blocks_of(model), ("kd_gradient",))
        with recorder.recording(), monkeypatch.context() as patch:
            logits = model(**batch()).logits
            patch.setattr(torch, "randint", lambda *_, signs=signs, **__: torch.tensor(signs).expand(3, -1))
            recorder.curvature(logits, teacher_logits, temperature, torch.Generator())
        total = total + recorder.statistics()[0]
    return total / 2**n_classes


@pytest.mark.parametrize("n_classes", [2, 3])
def test_kd_gradient_expects_the_curvature_class_by_class(n_classes, monkeypatch):
    """sum_c t_c (d CE(c) / d gate)^2, each class by a backward of its own through its own log-probability."""
    model, temperature = classifier(n_classes), 2.0
    teacher_logits = torch.randn(3, n_classes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = 0
    for c in range(n_classes):
        gradients = gate_gradients(model, lambda i, z, c=c: temperature * (z[0] / temperature).log_softmax(-1)[c])
        expected = expected + (teacher_logits / temperature).softmax(1)[:, [c]] * gradients.square()
    assert_same(mean_curvature(model, teacher_logits, temperature, monkeypatch), expected.mean(0))


def test_the_curvature_of_two_classes_draws_nothing():
    logits, teacher = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    seed = importance.curvature_seed(logits, teacher, 2.0, generator)
    assert torch.equal(generator.get_state(), state)
    p, t = (logits / 2).softmax(1), (teacher / 2).softmax(1)
    matrix = sum(t[:, c, None, None] * (d := p - torch.eye(2)[c])[:, :, None] * d[:, None, :] for c in range(2))
    torch.testing.assert_close(seed[:, :, None] * seed[:, None, :], matrix, rtol=1e-4, atol=1e-6)


def test_kd_gradient_is_the_gauss_newton_diagonal_where_the_student_is_the_teacher(monkeypatch):
    """J^T H J with the Hessian H of the loss by the logits. The gradient of that loss is zero there; the scores are not."""
    model, temperature = classifier(3), 2.0
    logits = model(**batch()).logits.detach()
    jacobian = torch.stack([gate_gradients(model, lambda i, z, c=c: z[0, c]) for c in range(3)], 1)  # (B, C, n)
    hessians = torch.stack([
        torch.autograd.functional.hessian(lambda z, t=t: kd_loss(z[None], t[None], temperature), t) for t in logits
    ])  # (B, C, C)
    expected = torch.einsum("bcn,bcd,bdn->bn", jacobian, hessians, jacobian).mean(0)
    found = mean_curvature(model, logits, temperature, monkeypatch)
    assert_same(found, expected)
    assert (found > 0).all()
    zero = recorded(model, ("fisher",), lambda z: kd_loss(z, logits, temperature))["fisher"]
    assert zero.max() < 1e-8 * found.mean()


def test_curvature_leaves_the_other_statistics_and_gradients_alone():
    model = classifier(3)
    alone = recorded(model, ("taylor", "fisher"))
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    recorder = GateRecorder(model, blocks_of(model), ("kd_gradient", "taylor", "fisher"))

    def once(seed):
        with recorder.recording():
            logits = model(**batch()).logits
            recorder.curvature(logits, logits.detach() + 1, 2.0, torch.Generator().manual_seed(seed))
            mean_loss(logits).backward()
        return recorder.statistics()

    found = once(0)
    assert torch.equal(found[1], alone["taylor"]) and torch.equal(found[2], alone["fisher"])
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    assert torch.equal(once(0)[0], found[0]) and not torch.equal(once(1)[0], found[0])  # a function of the generator


def test_hooks_are_gone_after_an_exception():
    model = double_model("bert")
    recorder = GateRecorder(model, blocks_of(model), ("taylor", "activation", "kd_gradient"))
    with pytest.raises(ZeroDivisionError), recorder.recording():
        logits = model(**batch()).logits
        _ = 1 / 0
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(RuntimeError), recorder.recording():
        recorder.curvature(logits, logits, 2.0, torch.Generator())  # without a forward inside
    assert recorder._watch


def test_a_scored_step_leaves_no_tensor_behind():
    """A hook that holds the tensor it hangs on is never collected, and neither is the tensor."""
    model = double_model("bert")
    recorder = GateRecorder(model, blocks_of(model), ("taylor", "fisher", "activation"))
    seen = []
    for reader, _ in readers_of(model):
        reader.register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    with recorder.recording():
        mean_loss(model(**batch()).logits).backward()
    gc.collect()
    assert len(seen) == 6 and not any(ref() is not None for ref in seen)


def test_a_model_called_without_a_mask_has_no_padding():
    model = double_model("llama")
    ids, found = batch()["input_ids"], []
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        recorder = GateRecorder(model, blocks_of(model), ("fisher", "activation"))
        with recorder.recording():
            model(**inputs).logits.square().mean().backward()
        found.append(recorder.statistics())
    torch.testing.assert_close(*found)


def test_the_window_holds_the_last_steps_and_an_overflow_counts_as_zero():
    model = double_model("bert")
    recorder = GateRecorder(model, blocks_of(model), ("taylor", "fisher"), window=2)
    steps = [torch.full((2, 12 + 144), value) for value in (1.0, 3.0, 5.0)]
    steps[2][1, 0] = torch.inf  # the first head's Fisher score overflowed

    def averages():
        return [torch.cat([part for kind in KINDS for part in scores[kind]]) for scores in recorder.averages()]

    for seen, expected in enumerate([1.0, 2.0, 4.0]):
        recorder.statistics = lambda seen=seen: steps[seen]
        recorder.keep_statistics()
        assert torch.equal(averages()[0], torch.full((156,), expected))
    assert averages()[1][:2].tolist() == [1.5, 4.0]

    other = GateRecorder(model, blocks_of(model), ("taylor", "fisher"), window=2)
    other.load_state_dict(recorder.state_dict())
    recorder, before = other, averages()
    recorder.statistics = lambda: torch.zeros(2, 156)
    recorder.keep_statistics()  # takes the place of the oldest, the 3
    assert averages()[0].unique().tolist() == [2.5] and before[0].unique().tolist() == [4.0]


# ------------------------------------------------------------------------------------------------------ from the weights


def test_split_groups_is_heads_of_all_layers_then_neurons():
    scores = split_groups(torch.arange(156), blocks_of(random_model("bert")[0]))
    assert [part.tolist() for part in scores["heads"]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [(part[0].item(), len(part)) for part in scores["neurons"]] == [(12, 48), (60, 48), (108, 48)]


def test_l2_by_hand():
    """Llama: KV head g of two serves query heads 2g and 2g + 1, each 16 wide; a neuron has two rows and a column."""
    blocks = blocks_of(random_model("llama")[0])
    scores = l2_scores(blocks)

    def norm(*parts):
        return pytest.approx(sum(float(part.detach().double().square().sum()) for part in parts), rel=1e-5)

    for i, block in enumerate(blocks):
        a, gate, up, down = block.attention, *block.ffn.ins, block.ffn.out
        for g in range(2):
            queries, keys = slice(32 * g, 32 * g + 32), slice(16 * g, 16 * g + 16)
            expected = norm(a.q.weight[queries], a.k.weight[keys], a.v.weight[keys], a.o.weight[:, queries])
            assert scores["heads"][i][g].item() == expected
        for n in (0, 17, 47):
            assert scores["neurons"][i][n].item() == norm(gate.weight[n], up.weight[n], down.weight[:, n])


def test_random_scores_favour_no_kind():
    blocks = blocks_of(random_model("bert")[0])
    scores, again = (random_scores(blocks, torch.Generator().manual_seed(3)) for _ in range(2))
    costs = group_costs(blocks)
    for kind in KINDS:
        per_parameter = torch.cat([s / cost for s, cost in zip(scores[kind], costs[kind], strict=True)])
        assert per_parameter.min() >= 0 and per_parameter.max() < 1 and len(per_parameter.unique()) > len(per_parameter) * 0.9
        assert all(torch.equal(a, b) for a, b in zip(scores[kind], again[kind], strict=True))


def test_scores_are_where_the_weights_are():
    blocks = blocks_of(random_model("bert")[0].to("meta"))
    for scores in (l2_scores(blocks), random_scores(blocks, torch.Generator())):
        assert {part.device.type for kind in KINDS for part in scores[kind]} == {"meta"}


# ---------------------------------------------------------------------------------------------------------- combinations


def scores_of(heads, neurons):
    return {"heads": [torch.tensor(part) for part in heads], "neurons": [torch.tensor(part) for part in neurons]}


def test_combine_weighs_every_part_by_its_mean():
    first = scores_of([[1.0], [3.0]], [[2.0], [2.0]])  # mean 2
    second = scores_of([[0.0], [10.0]], [[20.0], [10.0]])  # mean 10
    total = combine([first, second])
    assert [part.tolist() for part in total["heads"] + total["neurons"]] == [[0.5], [2.5], [3.0], [2.0]]
    assert combine([first]) is first
    nothing = scores_of([[0.0], [0.0]], [[0.0], [0.0]])
    assert [part.tolist() for part in combine([first, nothing])["heads"]] == [[0.5], [1.5]]


def test_parse_importance():
    known = ("l2", "fisher", "kd_gradient")
    assert parse_importance("l2+kd_gradient", known) == ("l2", "kd_gradient")
    assert parse_importance("fisher", known) == ("fisher",)
    for text in ("l1", "l2+", "", "l2+l2", "l2 + fisher"):
        with pytest.raises(UserError, match="expected one or several of l2, fisher, kd_gradient"):
            parse_importance(text, known)
