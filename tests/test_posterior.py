"""Measures of a posterior against closed forms and brute force; the monitor's verdicts, files and what stops neither."""

import csv
import errno
import math

import numpy as np
import pytest
import torch

from common import posterior
from common.posterior import PosteriorMetricsMonitor, judge, measures


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussians(n, spreads, variances, seed=0):
    """Posteriors whose means are Gaussian over the data: of n texts, with known spread and variance of each dimension."""
    mean = torch.randn(n, len(spreads), generator=generator(seed), dtype=torch.float64)
    mean = (mean - mean.mean(0)) / mean.std(0)  # so that the spread is not itself an estimate
    return mean * torch.tensor(spreads), torch.tensor(variances, dtype=torch.float64).log().expand(n, -1)


# ------------------------------------------------------------------------------------------------------------- measures


def test_kl_is_torchs():
    mean, log_variance = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(torch.zeros(()), torch.ones(())))
    assert torch.allclose(posterior.kl_per_dimension(mean, log_variance), expected, rtol=1e-12)
    assert posterior.kl_per_dimension(torch.zeros(1, 2), torch.zeros(1, 2)).tolist() == [[0, 0]]


def test_log_normal_is_torchs():
    z, mean, log_variance = (torch.randn(4, 3, dtype=torch.float64) for _ in range(3))
    expected = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(z).sum(1)
    assert torch.allclose(posterior.log_normal(z, mean, log_variance), expected)
    assert torch.allclose(posterior.log_normal(z), torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1))


def test_log_mean_exp_where_exp_would_overflow():
    values = torch.tensor([[1000.0, -1000.0], [1001.0, -1001.0], [999.0, -1002.0]], dtype=torch.float64)
    by_hand = [1000 + math.log((1 + math.e + 1 / math.e) / 3), -1000 + math.log((1 + math.exp(-1) + math.exp(-2)) / 3)]
    assert posterior.log_mean_exp(values).tolist() == pytest.approx(by_hand, rel=1e-12)


def test_the_aggregated_density_is_the_mean_of_all_densities():
    z, mean, log_variance = (torch.randn(n, 3, generator=generator(n), dtype=torch.float64) for n in (7, 11, 11))
    log_variance = 4 * log_variance - 6  # some are narrow
    found = posterior.log_aggregated(z, mean, log_variance, chunk=3)
    for i, point in enumerate(z.numpy()):
        densities = [np.prod([math.exp(-((x - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
                              for x, m, v in zip(point, mu, np.exp(lv), strict=True)])
                     for mu, lv in zip(mean.numpy(), log_variance.numpy(), strict=True)]  # fmt: skip
        assert float(found[i]) == pytest.approx(math.log(np.mean(densities)), rel=1e-9)


@pytest.mark.parametrize(("spreads", "variances"), [
    ([1.0, 0.7, 0.3, 0.05], [0.3, 0.5, 1.0, 1.0]), ([2.0], [0.2]), ([0.9] * 6, [0.4] * 6), ([0.5, 0.0, 0.0], [0.5, 1.0, 1.0]),
])  # fmt: skip
def test_mutual_information_of_gaussians(spreads, variances):
    """x -> z ~ N(mean(x), variance), the means Gaussian: I = 1/2 sum ln(1 + spread^2 / variance)."""
    exact = 0.5 * sum(math.log1p(s * s / v) for s, v in zip(spreads, variances, strict=True))
    found = posterior.mutual_information(*gaussians(2048, spreads, variances), generator(9))  # other draws than the means
    assert found == pytest.approx(exact, rel=0.02)


def test_mutual_information_is_what_a_table_of_all_pairs_says():
    mean, log_variance = (torch.randn(40, 2, generator=generator(i), dtype=torch.float64) for i in (1, 2))
    found = posterior.mutual_information(mean, log_variance, generator(3), n_samples=1)
    z = mean + torch.randn(mean.shape, generator=generator(3), dtype=torch.float64) * (0.5 * log_variance).exp()
    density = torch.distributions.Normal(mean, (0.5 * log_variance).exp()).log_prob(z[:, None]).sum(2).exp()  # (z, x)
    assert found == pytest.approx(float((density.diagonal() / density.mean(1)).log().mean()), rel=1e-9)


def test_mutual_information_at_its_ends():
    same = torch.full((64, 3), 0.5), torch.full((64, 3), -0.7)
    assert posterior.mutual_information(*same, generator()) == pytest.approx(0, abs=1e-9)
    apart = torch.arange(64)[:, None] * 100.0, torch.zeros(64, 1)
    assert posterior.mutual_information(*apart, generator()) == pytest.approx(math.log(64), rel=1e-9)


def test_measures_by_hand():
    mean = torch.tensor([[1.0, 0.05, 0.0], [-1.0, 0.0, 0.0], [0.0, -0.05, 0.0]])
    log_variance = torch.tensor([[0.0, 0.0, math.log(2)]] * 3)
    found = measures(mean, log_variance, generator())
    assert found["n"] == 3 and found["ceiling"] == pytest.approx(math.log(3))
    assert found["variance_of"] == pytest.approx([1.0, 0.0025, 0.0]) and found["active_units"] == 1
    assert found["kl_of"] == pytest.approx([1 / 3, 0.005 / 6, 0.5 * (2 - math.log(2) - 1)], rel=1e-4)
    assert found["kl"] == pytest.approx(sum(found["kl_of"])) and found["mean"] == pytest.approx(0, abs=1e-8)
    assert found["mean_of_variances"] == pytest.approx(4 / 3) and found["variance_of_means"] == pytest.approx(1.0025 / 3)
    assert found["marginal_kl"] == pytest.approx(found["kl"] - found["mutual_information"])
    one = measures(mean[:1], log_variance[:1], generator())
    assert one["active_units"] == 0 and one["mutual_information"] == pytest.approx(0, abs=1e-9)


def test_a_look_is_the_same_whenever_it_is_repeated_and_draws_nothing_from_the_global_generator():
    state, look = torch.get_rng_state(), gaussians(64, [1.0, 0.5], [0.5, 0.5])
    found = [PosteriorMetricsMonitor(verbose=False, seed=5).update(300, *look)["mutual_information"] for _ in range(2)]
    assert found[0] == found[1] and torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------------- verdicts


def look(step, kl=5.0, information=3.0, active=4, n=8):
    return {"step": step, "kl": kl, "mutual_information": information, "active_units": active, "kl_of": [kl / n] * n}


@pytest.mark.parametrize(("looks", "verdict", "rule"), [
    ([look(100, 0, 0, 0)], "starting", "before step 200"),
    ([look(250), look(300)], "healthy", "no rule holds"),
    ([look(250), look(300, active=0)], "at risk", "no active unit, not yet 2 looks in a row"),
    ([look(250, active=0), look(300, active=0)], "collapsed", "no active unit"),
    ([look(250, kl=0.01), look(300, active=0)], "collapsed", "no active unit"),
    ([look(250, kl=0.19), look(300, kl=0.19, information=0.15)], "collapsed", "KL under 0.2 nats"),
    ([look(250, information=0.19), look(300, information=0.19)], "collapsed", "mutual information under 0.2 nats"),
    ([look(250, active=0, kl=0.01)], "at risk", "no active unit, not yet 2 looks in a row"),
    ([look(250, n=50), look(300, n=50)], "at risk", "under a tenth of the units active"),
    ([look(250, kl=10.1), look(300)], "at risk", "KL under half of what it was"),
    ([look(250, kl=9.9), look(300)], "healthy", "no rule holds"),
    ([look(150, kl=50), look(200), look(250)], "healthy", "no rule holds"),  # what was before is no trend
    ([look(250, 50, 4), look(300, 50, 4)], "at risk", "KL tenfold the mutual information"),
])  # fmt: skip
def test_verdicts(looks, verdict, rule):
    assert judge(looks) == (verdict, rule)


def drive(monitor, step, spread, variance=0.5, n=64, dimensions=4):
    return monitor.update(step, *gaussians(n, [spread] * dimensions, [variance] * dimensions), 12.5)


def test_a_posterior_that_collapses_is_told_within_two_looks(capsys):
    monitor = PosteriorMetricsMonitor(update_frequency=50, plot_frequency=500, window_size=100, verbose=False)
    for step in range(50, 1050, 50):
        if monitor.due(step):
            drive(monitor, step, 1.0 if step <= 600 else 0.001, 0.5 if step <= 600 else 1.0)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:2] for line in printed] == [
        ["step 50", "posterior starting (before step 200)"], ["step 200", "posterior healthy (no rule holds)"],
        ["step 650", "posterior at risk (no active unit, not yet 2 looks in a row)"],
        ["step 700", "posterior collapsed (no active unit)"],
    ]  # fmt: skip
    assert monitor.verdict == "collapsed" and monitor.rule == "no active unit"


def test_each_dimension_has_a_verdict():
    monitor = PosteriorMetricsMonitor(verbose=False)
    mean, log_variance = gaussians(256, [1.0, 1.0, 0.01], [0.5, 0.5, 1.0])
    monitor.update(250, mean, log_variance)
    found = monitor.update(300, mean * torch.tensor([1.0, 0.3, 1.0]), log_variance * torch.tensor([1.0, 0.0, 1.0]))
    assert found["verdict_of"] == ["healthy", "at risk", "collapsed"] and found["active_units"] == 2


def test_when_it_looks_and_what_verbose_says(capsys):
    monitor = PosteriorMetricsMonitor(update_frequency=20, plot_frequency=50, window_size=2, verbose=True)
    assert [step for step in range(1, 101) if monitor.due(step)] == [20, 40, 50, 60, 80, 100]
    for step in (220, 240, 260):
        drive(monitor, step, 1.0)
    assert capsys.readouterr().out.count("posterior healthy") == 3 and [look["step"] for look in monitor.looks] == [240, 260]


# ---------------------------------------------------------------------------------------------------------------- files


def test_csv_dashboards_and_going_on(tmp_path):
    monitor = PosteriorMetricsMonitor(50, 100, 10, False, tmp_path)
    for step in range(50, 350, 50):
        drive(monitor, step, 1.0)
    with open(tmp_path / "posterior.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [50, 100, 150, 200, 250, 300]
    assert {"kl_0", "kl_3", "variance_3", "verdict_3", "rule", "ceiling", "reconstruction"} <= rows[0].keys()
    assert float(rows[0]["kl"]) == pytest.approx(sum(float(rows[0][f"kl_{i}"]) for i in range(4)))
    dashboards = sorted(path.name for path in (tmp_path / "dashboards").iterdir())
    assert dashboards == ["posterior-000100.png", "posterior-000200.png", "posterior-000300.png"]
    assert (tmp_path / "dashboards" / dashboards[0]).read_bytes()[:4] == b"\x89PNG"

    whole = (tmp_path / "posterior.csv").read_bytes()
    later = PosteriorMetricsMonitor(50, 100, 10, False, tmp_path)
    with open(tmp_path / "posterior.csv", "a") as file:
        file.write("350,6")  # killed while writing
    early = PosteriorMetricsMonitor(50, 100, 10, False)
    for step in range(50, 250, 50):
        drive(early, step, 1.0)
    later.load_state_dict(early.state_dict())
    later.rewind(200)
    for step in (250, 300):
        drive(later, step, 1.0)
    assert (tmp_path / "posterior.csv").read_bytes() == whole
    assert [look["verdict"] for look in later.looks] == [look["verdict"] for look in monitor.looks]


@pytest.mark.parametrize("what", ["posterior.csv", "dashboards"])
def test_a_disk_that_is_full_stops_only_the_writing(what, tmp_path, monkeypatch, capsys):
    monitor = PosteriorMetricsMonitor(50, 50, 10, False, tmp_path)
    name = "_append" if what == "posterior.csv" else "plot"

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / what))

    monkeypatch.setattr(monitor, name, full)
    for step in (250, 300):
        assert drive(monitor, step, 1.0)["verdict"] == "healthy"
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 1 and "No space left on device; no more is written of the posterior" in printed


def test_no_display_is_needed(tmp_path, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setenv("MPLBACKEND", "nonsense")  # no backend is chosen, so that none is looked for
    monitor = PosteriorMetricsMonitor(50, 50, 10, False, tmp_path)
    drive(monitor, 50, 1.0)
    assert monitor.trouble is None and (tmp_path / "dashboards" / "posterior-000050.png").exists()
