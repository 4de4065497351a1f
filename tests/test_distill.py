"""Distillation losses in float64 and by finite differences; teachers that are asked once."""

import pytest
import torch

from common.distill import TOKENS_AT_ONCE, Teacher, feature_loss, kd_loss, token_kd_loss


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return torch.randn(5, 3, dtype=torch.float64) * 3, torch.randn(5, 3, dtype=torch.float64) * 3


def divergence(student, teacher, temperature):
    """T^2 sum_c t_c log(t_c / p_c), mean over the examples, written out."""
    p, t = ((z / temperature).exp() / (z / temperature).exp().sum(1, keepdim=True) for z in (student, teacher))
    return temperature**2 * (t * (t / p).log()).sum(1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 8.0])
def test_kd_loss_is_the_divergence_written_out(logits, temperature):
    student, teacher = logits
    expected = divergence(student, teacher, temperature).item()
    assert kd_loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert kd_loss(teacher, teacher + 7, temperature).item() == pytest.approx(0, abs=1e-6)  # a shift of the logits says nothing


def test_kd_loss_by_hand():
    """Teacher 3/4 and 1/4, student a half each, at temperature 1: 3/4 log(3/2) + 1/4 log(1/2)."""
    assert kd_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log(), 1.0).item() == pytest.approx(0.130812, abs=1e-6)


def test_kd_gradient_by_finite_differences(logits):
    """Also T (p - t) / B, the scale that makes hard and soft losses comparable at any temperature."""
    student, teacher = logits
    z = student.float().requires_grad_()
    kd_loss(z, teacher, 2.0).backward()
    found = torch.zeros_like(student)
    for i in range(student.numel()):
        offset = torch.zeros(15, dtype=torch.float64).index_fill_(0, torch.tensor(i), 1e-5).view(5, 3)
        rise = divergence(student + offset, teacher, 2.0) - divergence(student - offset, teacher, 2.0)
        found.view(-1)[i] = rise / 2e-5
    torch.testing.assert_close(z.grad.double(), found, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, 2.0 * ((student / 2).softmax(1) - (teacher / 2).softmax(1)) / 5, rtol=1e-5, atol=1e-8)


def test_kd_loss_of_half_precision_is_computed_in_fp32(logits):
    student, teacher = (z.bfloat16() for z in logits)
    loss = kd_loss(student, teacher)
    assert loss.dtype == torch.float32 and torch.equal(loss, kd_loss(student.float(), teacher.float()))
    huge = torch.tensor([[3e4, -3e4]], dtype=torch.float16)
    assert kd_loss(huge, -huge).item() == pytest.approx(4 * 3e4)  # T^2 times a difference of 6e4 / T in the log-odds


@pytest.mark.parametrize("n", [1, TOKENS_AT_ONCE, 2 * TOKENS_AT_ONCE + 3])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd_loss_of_tokens_is_the_same_in_pieces(n, temperature):
    generator = torch.Generator().manual_seed(n)
    student, teacher = (torch.randn(n, 50, generator=generator) * 3 for _ in range(2))
    found, ends = [], []
    for loss in (kd_loss, token_kd_loss):
        z = student.clone().requires_grad_()
        value = loss(z, teacher, temperature)
        (3 * value).backward()
        found.append(value.detach())
        ends.append(z.grad)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-7)


def test_feature_loss_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    assert feature_loss(student, teacher, torch.tensor(2.0)).item() == (0 + 4 + 9 + 0) / 4 / 2


def test_the_features_of_a_teacher_are_one_away_from_their_mean():
    """The unit: a student that always says the teacher's mean loses one."""
    features = torch.randn(4000, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3, 4, 5, 6]) + 3
    teacher = Teacher(torch.zeros(4000, 2), features, torch.device("cpu"))
    assert feature_loss(features.mean(0).expand(4000, -1), features, teacher.scale).item() == pytest.approx(1, rel=1e-3)


def test_a_teacher_is_asked_once(tmp_path):
    path, device, asked = tmp_path / "teacher.safetensors", torch.device("cpu"), []

    def compute():
        asked.append(len(asked))
        return torch.full((4, 2), float(len(asked))), torch.arange(12.0).view(4, 3).T.contiguous().T  # not contiguous

    first = Teacher.cached(path, "a", compute, device)
    again = Teacher.cached(path, "a", compute, device)
    assert asked == [0] and torch.equal(again.logits, first.logits) and torch.equal(again.features, first.features)
    assert again.features.tolist() == torch.arange(12.0).view(4, 3).tolist() and torch.equal(again.scale, first.scale)

    changed = Teacher.cached(path, "b", compute, device)  # another teacher, or other data
    assert asked == [0, 1] and changed.logits.unique().item() == 2
    path.write_bytes(path.read_bytes()[:-8])
    assert Teacher.cached(path, "b", compute, device).logits.unique().item() == 3  # damaged
    path.write_bytes(b"")
    Teacher.cached(path, "b", compute, device)
    assert asked == [0, 1, 2, 3] and [p.name for p in tmp_path.iterdir()] == [path.name]
    Teacher.cached(path, "b", compute, device)
    assert asked == [0, 1, 2, 3]
