"""ELBO and importance-weighted likelihood against brute force and against a model whose likelihood is known."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import posterior, vae_eval

DIMENSIONS, NOISE = 2, 0.6  # of a linear Gaussian model: x = W z + NOISE e


class Texts:
    """Stands in for loading.Documents: a text is a row of numbers."""

    def __init__(self, rows):
        self.rows, self.lengths = rows, np.full(len(rows), rows.shape[1])

    def __len__(self):
        return len(self.rows)

    def batch(self, index, length=None):
        return {"ids": self.rows[index], "lengths": self.lengths[index]}

    def subset(self, index):
        return Texts(self.rows[index])


class Linear(torch.nn.Module):
    """x ~ N(W z, NOISE^2): all of p(x), q(z|x) in closed form. `off` moves q away from the true posterior."""

    def __init__(self, off=0.0):
        super().__init__()
        self.weight = torch.tensor([[1.0, 0.3], [-0.5, 0.8], [0.2, 0.1]], dtype=torch.float64)
        covariance = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + self.weight.T @ self.weight / NOISE**2)
        self.variance, self.off = covariance.diagonal(), off
        self.gain = covariance @ self.weight.T / NOISE**2

    def encode(self, ids, lengths):
        return ids.double() @ self.gain.T + self.off, self.variance.log().expand(len(ids), -1)

    def reconstruction(self, ids, lengths, z):
        return -torch.distributions.Normal(z.double() @ self.weight.T, NOISE).log_prob(ids.double()).sum(1)

    def log_likelihood(self, ids):
        covariance = self.weight @ self.weight.T + NOISE**2 * torch.eye(3, dtype=torch.float64)
        return torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance).log_prob(ids.double())


@pytest.fixture
def rows():
    return np.random.default_rng(0).normal(size=(50, 3))


def test_importance_weighted_is_the_log_of_a_mean_of_ratios(rows):
    model, ids = Linear(0.2), torch.from_numpy(rows[:4])
    mean, log_variance = model.encode(ids, None)
    noises = torch.Generator().manual_seed(3)
    nats, found = vae_eval.importance_weighted(lambda z: model.reconstruction(ids, None, z), mean, log_variance, 5, noises)
    again, likelihoods, ratios = torch.Generator().manual_seed(3), [], []
    for _ in range(5):
        z = mean + torch.randn(mean.shape, generator=again) * (0.5 * log_variance).exp()
        log_q = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(z).sum(1)
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
        likelihoods.append(-model.reconstruction(ids, None, z))
        ratios.append((likelihoods[-1] + log_p - log_q).exp())
    assert torch.allclose(found, (sum(ratios) / 5).log(), rtol=1e-9)
    assert torch.allclose(nats, -sum(likelihoods) / 5, rtol=1e-9)


def test_it_comes_near_the_likelihood_as_samples_are_added(rows):
    model, ids = Linear(0.3), torch.from_numpy(rows)
    exact = float(model.log_likelihood(ids).mean())
    mean, log_variance = model.encode(ids, None)

    def bound(n):
        generator = torch.Generator().manual_seed(0)
        found = vae_eval.importance_weighted(lambda z: model.reconstruction(ids, None, z), mean, log_variance, n, generator)
        return float(found[1].mean())

    bounds = [bound(n) for n in (1, 10, 1000)]
    assert bounds[0] < bounds[1] < bounds[2] < exact + 0.01 and bounds[2] == pytest.approx(exact, abs=0.02)


def test_evaluate_adds_up(rows):
    model, texts = Linear(), Texts(rows)
    found = vae_eval.evaluate(model, texts, "cpu", 200, 0)
    exact = -float(model.log_likelihood(torch.from_numpy(rows)).mean())
    mean, log_variance = model.encode(torch.from_numpy(rows), None)
    kl = float(posterior.kl_per_dimension(mean, log_variance).sum(1).mean())
    assert found["n"] == 50 and found["tokens"] == 150 and found["kl"] == pytest.approx(kl)
    assert found["negative_elbo"] == pytest.approx(found["reconstruction"] + kl)
    assert found["importance_weighted_nll"] == pytest.approx(exact, abs=0.05)
    assert found["importance_weighted_nll"] <= found["negative_elbo"]
    assert found["perplexity"] == pytest.approx(math.exp(found["importance_weighted_nll"] * 50 / 150))
    assert found["perplexity_by_elbo"] == pytest.approx(math.exp(found["negative_elbo"] * 50 / 150))
    assert found["active_units"] == 2 and 0 < found["mutual_information"] < found["mutual_information_at_most"]
    assert vae_eval.evaluate(model, texts, "cpu", 200, 0) == found
    table = vae_eval.rows(found)
    assert ["n", "50"] in table and not any(row[0] == "kl of" for row in table)


def test_held_out_texts_are_looked_at_with_the_same_noise(rows):
    model, texts = Linear(), Texts(rows)
    held = vae_eval.HeldOut(texts, "cpu", "32", 0.2, None)
    found = held.negative_elbo(model)
    assert sum(len(index) for _, index in held.judged) == 10 and held.negative_elbo(model) == found
    mean, log_variance = model.encode(torch.from_numpy(rows[:10]), None)
    assert found["kl"] == pytest.approx(float(posterior.kl_per_dimension(mean, log_variance).sum(1).mean()))
    assert found["negative_elbo"] == pytest.approx(found["reconstruction"] + found["kl"])
    assert [part.shape for part in held.posteriors(model, 7)] == [(7, 2), (7, 2)]
    assert torch.equal(held.posteriors(model, 7)[0], held.posteriors(model, 7)[0]) and list(held.cached) == [7]
    information = posterior.mutual_information(*held.posteriors(model, 50), torch.Generator().manual_seed(0))
    assert held.information(model) == pytest.approx(information)


def test_a_monitor_is_shown_few_texts_often_and_many_seldom(rows, monkeypatch):
    monkeypatch.setattr(vae_eval, "QUICK", 8)
    monkeypatch.setattr(vae_eval, "LARGE", 40)
    monitor = posterior.PosteriorMetricsMonitor(50, 100, 20, verbose=False)
    held = vae_eval.HeldOut(Texts(rows), "cpu", "32", 1.0, None)
    assert not held.look(monitor, Linear(), 250, 1.5) and not held.look(monitor, Linear(), 300, 1.5)
    assert [look["n"] for look in monitor.looks] == [8, 40] and monitor.looks[0]["reconstruction"] == 1.5


class Parrot(torch.nn.Module):
    """Says the tokens 1, 2, ... up to round(z), then the end; all else has little likelihood."""

    positions = torch.zeros(9, 1)

    def decode(self, ids, z):
        place = torch.full((len(ids),), ids.shape[1])
        following = torch.where(place <= z[:, 0].round(), place, 0)
        return 20 * torch.nn.functional.one_hot(following, 12).float()[:, None].expand(-1, ids.shape[1], -1)


def test_texts_end_where_the_model_ends_them():
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(str(i) for i in ids if i))
    z = torch.tensor([[3.0], [0.0], [20.0]])
    expected = ["1 2 3", "", "1 2 3 4 5 6 7 8 9"]  # and at the last position that the model has
    assert vae_eval.decode_texts(Parrot(), z, tokenizer) == expected
    drawn = vae_eval.decode_texts(Parrot(), z, tokenizer, generator=torch.Generator().manual_seed(0))
    assert drawn == expected and vae_eval.decode_texts(Parrot(), z, tokenizer, n=2) == ["1 2", "", "1 2"]
