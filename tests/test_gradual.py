"""Gradual pruning against formulas and brute force: schedule, the k-th smallest of many tensors, which weights go, resuming."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.gradual import MASKS, Cubic, GradualTrainer, kth_smallest
from common.runs import UserError
from common.sparse_trainer import check_sparsity, last_checkpoint, prunable_weights
from tests.test_sparse_trainer import trainer_of
from tests.test_streaming import one_thread, random_lm  # noqa: F401


def test_the_schedule_of_zhu_and_gupta():
    schedule = Cubic(0.5, 0.9, 20, 5)
    for step in (0, 1, 7, 19, 20, 33):
        t = min(step, 20)
        assert schedule.sparsity(step) == pytest.approx(0.9 + (0.5 - 0.9) * (1 - t / 20) ** 3, abs=1e-15)
    assert schedule.sparsity(0) == 0.5 and schedule.sparsity(20) == schedule.sparsity(1000) == 0.9
    assert [step for step in range(1, 40) if schedule.prunes_at(step)] == [5, 10, 15, 20]
    assert [step for step in range(1, 40) if Cubic(0, 0.9, 7, 5).prunes_at(step)] == [5, 7]


@pytest.mark.parametrize("k", [1, 2, 17, 100, 641, 649, 650])
def test_the_kth_smallest(k):
    generator = torch.Generator().manual_seed(0)
    sizes = ((300, 1e-30), (250, 1.0), (99, 1e20), (1, 0.0))
    parts = [torch.rand(size, generator=generator) ** 8 * scale for size, scale in sizes]
    assert kth_smallest(parts, k) == torch.cat(parts).sort().values[k - 1]
    of_each = [min(k, len(part)) for part in parts]
    wanted = [part.kthvalue(n).values for part, n in zip(parts, of_each, strict=True)]
    assert torch.equal(kth_smallest(parts, of_each), torch.stack(wanted))


def test_the_kth_smallest_among_ties():
    parts = [torch.tensor([0.0, 0.0, 1.0]), torch.tensor([[1.0, 2.0], [2.0, 2.0]])]
    assert [float(kth_smallest(parts, k)) for k in range(1, 8)] == [0, 0, 1, 1, 2, 2, 2]


class Watched(GradualTrainer):
    """Keeps what was there before and after each pruning."""

    def prune_(self, sparsity):
        weights = prunable_weights(self.model)
        state = self.optimizer.optimizer.state if hasattr(self.optimizer, "optimizer") else self.optimizer.state
        before = {name: (w.detach().clone(), state[w]["exp_avg_sq"].clone()) for name, w in weights.items()}
        super().prune_(sparsity)
        self.seen = [*getattr(self, "seen", []), (sparsity, before, {name: w.detach().clone() for name, w in weights.items()})]


SCHEDULE = Cubic(0.0, 0.8, 6, 2)


def gradual(folder, kind=Watched, **settings):
    torch.manual_seed(0)
    return trainer_of(random_lm("llama"), folder, kind, more={"max_steps": 9} | settings, schedule=SCHEDULE)


def test_the_weights_that_go_are_those_of_least_cost(tmp_path):
    """By brute force in float64: w^2 v, over all projections together; and none comes back."""
    trainer = gradual(tmp_path)
    trainer.train()
    assert [sparsity for sparsity, _, _ in trainer.seen] == [SCHEDULE.sparsity(step) for step in (2, 4, 6)]
    gone = {}
    for sparsity, before, after in trainer.seen:
        costs = [(w.double() ** 2 * v.double()).flatten() for w, v in before.values()]
        for cost in costs:  # a tenth of its even share stays in every projection
            cost[cost.sort().indices[round(len(cost) * (1 - 0.1 * (1 - sparsity))) :]] = torch.inf
        costs = torch.cat(costs)
        least = costs.sort().indices[: round(len(costs) * sparsity)]
        wanted = torch.zeros(len(costs), dtype=torch.bool).index_fill_(0, least, True)
        zero = torch.cat([w.flatten() == 0 for w in after.values()])
        assert torch.equal(zero, wanted)
        for name, weight in after.items():
            assert torch.equal(weight[weight != 0], before[name][0][weight != 0])  # what stays is not touched
            assert not bool(weight[gone.get(name, torch.zeros_like(weight, dtype=torch.bool))].any())
            gone[name] = weight == 0
    assert check_sparsity(trainer.model) == pytest.approx(0.8, abs=1e-4)
    for name, weight in prunable_weights(trainer.model).items():  # and training after the last pruning moved the others only
        assert torch.equal(weight == 0, gone[name])
        assert not torch.equal(weight, trainer.seen[-1][2][name])
    state = trainer.optimizer.state
    for weight in prunable_weights(trainer.model).values():
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not bool(state[weight][moment][weight == 0].any())


def test_zeros_of_the_start_stay(tmp_path):
    torch.manual_seed(0)
    model = random_lm("llama")
    first = prunable_weights(model)["model.layers.0.self_attn.q_proj.weight"]
    with torch.no_grad():
        first[:3] = 0
    trainer = trainer_of(model, tmp_path, GradualTrainer, more={"max_steps": 9}, schedule=SCHEDULE)
    trainer.train()
    assert not bool(first[:3].any()) and check_sparsity(model) == pytest.approx(0.8, abs=1e-4)


@pytest.mark.parametrize("step", [3, 5, 7])
def test_resumed_exactly_with_its_masks(step, tmp_path):
    whole = gradual(tmp_path / "whole", GradualTrainer)
    whole.train()
    first = gradual(tmp_path / "parts", GradualTrainer, max_steps=step, save_strategy="steps", save_steps=step)
    first.train()
    checkpoint = last_checkpoint(tmp_path / "parts")
    stored = load_file(checkpoint / MASKS)
    assert stored.keys() == prunable_weights(first.model).keys()
    again = gradual(tmp_path / "parts", GradualTrainer)
    again.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight), name


def test_a_free_weight_that_is_zero_stays_free(tmp_path):
    """Masks are stored, not taken anew from the zeros of the checkpoint."""
    first = gradual(tmp_path, GradualTrainer, max_steps=7, save_strategy="steps", save_steps=7)
    name, weight = next(iter(prunable_weights(first.model).items()))
    first.train()
    free = weight.detach() != 0
    place = tuple(free.nonzero()[0].tolist())
    found = last_checkpoint(tmp_path)
    tensors = load_file(found / "model.safetensors")
    tensors[name][place] = 0.0
    save_file(tensors, found / "model.safetensors", metadata={"format": "pt"})
    again = gradual(tmp_path, GradualTrainer)
    again.train(resume_from_checkpoint=str(found))
    ended = prunable_weights(again.model)[name].detach()
    assert ended[place] != 0 and torch.equal(ended != 0, free)


def test_masks_that_are_damaged_are_told(tmp_path):
    first = gradual(tmp_path, GradualTrainer, save_strategy="steps", save_steps=4)
    first.train()
    found = last_checkpoint(tmp_path)
    (found / MASKS).write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"masks\.safetensors: not readable"):
        gradual(tmp_path, GradualTrainer).train(resume_from_checkpoint=str(found))


def test_no_checkpoint_is_the_best_before_the_schedule_ends(tmp_path):
    trainer = gradual(tmp_path, GradualTrainer, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
                      load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False)  # fmt: skip
    trainer.eval_dataset = copy.copy(trainer.train_dataset)
    trainer.train()
    assert trainer.state.best_global_step >= SCHEDULE.n_steps
    assert check_sparsity(trainer.model) == pytest.approx(0.8, abs=1e-4)
