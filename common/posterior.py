"""Whether the posterior of a VAE says anything of the data: KL, active units, mutual information, and a monitor that judges."""

from __future__ import annotations

import csv
import math
from collections import deque
from contextlib import suppress
from pathlib import Path

import torch

from common.runs import write_atomic

ACTIVE = 0.01  # variance of the posterior mean over data above which a unit is active (arXiv 1509.00519, appendix C)
GRACE = 200  # steps before which nothing is judged: an encoder starts with a posterior that says nothing
CONFIRMED = 2  # looks in a row that have to agree before the posterior is called collapsed
TREND = 10  # what was: in the latest tenth of the window
LITTLE = 0.2  # nats
RULES = [  # verdict, rule, whether it holds: of the latest look, the highest KL that was, the number of dimensions
    ("collapsed", "no active unit", lambda look, top, n: look["active_units"] == 0),
    ("collapsed", f"KL under {LITTLE} nats", lambda look, top, n: look["kl"] < LITTLE),
    ("collapsed", f"mutual information under {LITTLE} nats", lambda look, top, n: look["mutual_information"] < LITTLE),
    ("at risk", "under a tenth of the units active", lambda look, top, n: look["active_units"] < 0.1 * n),
    ("at risk", "KL under half of what it was", lambda look, top, n: look["kl"] < 0.5 * top),
    ("at risk", "KL tenfold the mutual information", lambda look, top, n: look["kl"] > 10 * look["mutual_information"]),
]
OF_A_DIMENSION = [  # the same of one dimension: its variance of the mean, its KL, its highest KL that was
    ("collapsed", f"variance of the mean at most {ACTIVE}", lambda variance, kl, top: variance <= ACTIVE),
    ("at risk", "KL under half of what it was", lambda variance, kl, top: kl < 0.5 * top),
]
ADVICE = "Start anew with --kl_annealing, --free_bits, --word_dropout or --aggressive; --on_collapse warn goes on as it is"
COLORS = {"healthy": "tab:green", "at risk": "tab:orange", "collapsed": "tab:red", "starting": "tab:gray"}


# ------------------------------------------------------------------------------------------------------------- measures


def kl_per_dimension(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, each dimension apart, of the shape of both (arXiv 1312.6114, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - log_variance - 1)


def log_normal(z: torch.Tensor, mean: torch.Tensor | float = 0.0, log_variance: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Log-density of a diagonal Gaussian, summed over the last dimension."""
    log_variance = torch.as_tensor(log_variance, dtype=z.dtype, device=z.device)
    return -0.5 * ((z - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)).sum(-1)


def log_mean_exp(values: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Log of the mean of exp(values) along `dim`. Of importance weights it is the bound of arXiv 1509.00519, equation 8."""
    return values.logsumexp(dim) - math.log(values.shape[dim])


def log_aggregated(z: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor, chunk: int = 1024) -> torch.Tensor:
    """Log-density of the aggregated posterior 1/N sum_j N(mean_j, variance_j) at z: (M, D), (N, D), (N, D) -> (M,), float64.

    All pairs are two matrix products; `chunk` rows of z at a time bound the memory to chunk x N numbers.
    """
    z, mean, log_variance = z.double(), mean.double(), log_variance.double()
    precision = (-log_variance).exp()  # (N, D)
    constant = (mean.square() * precision + log_variance + math.log(2 * math.pi)).sum(1)  # (N,)
    found = []
    for part in z.split(chunk):
        squares = part.square() @ precision.T - 2 * part @ (mean * precision).T + constant  # (chunk, N)
        found.append(log_mean_exp(-0.5 * squares, 1))
    return torch.cat(found)


def mutual_information(mean: torch.Tensor, log_variance: torch.Tensor, generator: torch.Generator, n_samples: int = 4) -> float:
    """Nats that z tells of which of the N examples it came from: E log q(z|x) - log q(z), (N, D) each.

    q(z) is the aggregated posterior of all N, not of a batch (arXiv 1606.05908 and 1901.05534 use it so), so that the estimate
    ends at ln N. Exactly zero where all posteriors are one.
    """
    mean, log_variance = mean.double().cpu(), log_variance.double().cpu()
    total = 0.0
    for _ in range(n_samples):
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
        z = mean + noise * (0.5 * log_variance).exp()
        total += float((log_normal(z, mean, log_variance) - log_aggregated(z, mean, log_variance)).mean())
    return total / n_samples


def measures(mean: torch.Tensor, log_variance: torch.Tensor, generator: torch.Generator) -> dict:
    """What the posterior parameters of N examples say, (N, D) each. Nats, but for counts, means and variances.

    mean_of_variances: the posterior's own; variance_of_means: over the data. For q(z) = p(z) they add up to about one.
    """
    mean, log_variance = mean.detach().float().cpu(), log_variance.detach().float().cpu()
    kl = kl_per_dimension(mean, log_variance).mean(0)  # (D,)
    variance = mean.var(0, correction=1) if len(mean) > 1 else torch.zeros_like(kl)
    information = mutual_information(mean, log_variance, generator)
    return {
        "n": len(mean), "kl": float(kl.sum()), "active_units": int((variance > ACTIVE).sum()),
        "mutual_information": information, "ceiling": math.log(len(mean)), "marginal_kl": float(kl.sum()) - information,
        "mean": float(mean.mean()), "variance_of_means": float(variance.mean()),
        "mean_of_variances": float(log_variance.exp().mean()),
        "kl_of": kl.tolist(), "variance_of": variance.tolist(),
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- monitor


class PosteriorMetricsMonitor:
    """Judges the posterior of a VAE while it trains: healthy, at risk, collapsed, starting; as a whole and by dimension.

    update_frequency, plot_frequency: steps between two looks and two dashboards. window_size: looks that a trend and a
    dashboard go back. verbose: print every look, else only a verdict that changes. directory: for posterior.csv and
    dashboards/; None: nothing is written. A disk that is full stops the writing and nothing else.
    """

    def __init__(self, update_frequency: int = 50, plot_frequency: int = 500, window_size: int = 100, verbose: bool = True,
                 directory: Path | None = None, seed: int = 0):  # fmt: skip
        self.update_frequency, self.plot_frequency, self.verbose = update_frequency, plot_frequency, verbose
        self.looks: deque[dict] = deque(maxlen=window_size)
        self.directory, self.seed, self.told, self.trouble = directory, seed, "", None
        if directory is not None:  # now and not while training: it takes a second, and more where fonts are looked for first
            with suppress(OSError):  # no place for its cache: told where it is drawn
                import matplotlib.backends.backend_agg
                import matplotlib.figure  # noqa: F401

    @property
    def verdict(self) -> str:
        return self.looks[-1]["verdict"] if self.looks else "starting"

    @property
    def rule(self) -> str:
        return self.looks[-1]["rule"] if self.looks else "no look yet"

    def due(self, step: int) -> bool:
        return step % self.update_frequency == 0 or self.plot_due(step)

    def plot_due(self, step: int) -> bool:
        return step % self.plot_frequency == 0

    def update(self, step: int, mean: torch.Tensor, log_variance: torch.Tensor, reconstruction: float = math.nan) -> dict:
        """A look at the posterior parameters of N held-out examples, (N, D) each; reconstruction in nats an example.

        Returns measures(), and the verdict with the rule that gave it. A look draws the same numbers whenever it is repeated.
        """
        look = {"step": step, **measures(mean, log_variance, torch.Generator().manual_seed(self.seed)),
                "reconstruction": reconstruction}  # fmt: skip
        self.looks.append(look)
        recent = list(self.looks)[-max(2, self.looks.maxlen // TREND) :]
        look["verdict"], look["rule"] = judge(recent)
        was = [past["kl_of"] for past in settled(recent)]
        tops = [max(kl) for kl in zip(*was, strict=True)]
        of_each = zip(look["variance_of"], look["kl_of"], tops, strict=True)
        look["verdict_of"] = [next((v for v, _, holds in OF_A_DIMENSION if holds(*one)), "healthy") for one in of_each]
        if self.verbose or look["verdict"] != self.told:
            print(f"step {step:,}  posterior {look['verdict']} ({look['rule']})  KL {look['kl']:.3f}  mutual information "
                  f"{look['mutual_information']:.3f}  active units {look['active_units']}/{len(tops)}", flush=True)  # fmt: skip
        self.told = look["verdict"]
        self._write(self._append, look)
        if self.plot_due(step):
            self._write(self.plot, step)
        return look

    def _write(self, write, what) -> None:
        if self.directory is None or self.trouble:
            return
        try:
            write(what)
        except OSError as error:
            self.trouble = f"{error.filename or self.directory}: {error.strerror or error}"
            print(f"warning: {self.trouble}; no more is written of the posterior, training goes on", flush=True)

    def _append(self, look: dict) -> None:
        row = {key: value for key, value in look.items() if not isinstance(value, list)}
        for name in ("kl", "variance", "verdict"):
            row |= {f"{name}_{i}": value for i, value in enumerate(look[f"{name}_of"])}
        with open(self.directory / "posterior.csv", "a", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                rows.writerow(row)
            rows.writerow(row.values())

    def rewind(self, step: int) -> None:
        """Drop the rows after `step` from posterior.csv: a resumed run goes on from there."""
        path = self.directory and self.directory / "posterior.csv"
        if path and path.exists() and (lines := path.read_text(encoding="utf-8").splitlines()):
            width = lines[0].count(",")  # a killed process can leave a part of a row
            kept = [line for line in lines[1:] if line.count(",") == width and int(line.split(",")[0]) <= step]
            write_atomic(path, "".join(f"{line}\n" for line in (lines[0], *kept)))

    def plot(self, step: int) -> None:
        """dashboards/posterior-<step>.png of the window. Needs no display."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        steps, last = [look["step"] for look in self.looks], self.looks[-1]
        figure = Figure(figsize=(9, 6), dpi=80)
        canvas = FigureCanvasAgg(figure)
        figure.suptitle(f"step {step:,}: {last['verdict']} ({last['rule']})", color=COLORS[last["verdict"]])
        (nats, units), (spread, each) = figure.subplots(2, 2, gridspec_kw={"hspace": 0.35, "wspace": 0.3})
        for key in ("kl", "mutual_information", "marginal_kl"):
            nats.plot(steps, [look[key] for look in self.looks], label=key.replace("_", " "))
        nats.set_title("nats an example")
        units.plot(steps, [look["active_units"] for look in self.looks], label="active units", color="tab:green")
        units.set_title(f"active units of {len(last['kl_of'])}; reconstruction")
        units.twinx().plot(steps, [look["reconstruction"] for look in self.looks], color="tab:purple", label="reconstruction")
        for key in ("mean", "variance_of_means", "mean_of_variances"):
            spread.plot(steps, [look[key] for look in self.looks], label=key.replace("_", " "))
        spread.set_title("posterior means and variances")
        order = sorted(range(len(last["kl_of"])), key=lambda i: -last["kl_of"][i])
        each.bar(range(len(order)), [last["kl_of"][i] for i in order], color=[COLORS[last["verdict_of"][i]] for i in order])
        each.set_title("KL by dimension, sorted")
        for axes in (nats, spread):
            axes.legend(fontsize=7)
        folder = self.directory / "dashboards"
        folder.mkdir(parents=True, exist_ok=True)
        canvas.print_png(folder / f"posterior-{step:06d}.png")

    def state_dict(self) -> dict:
        return {"looks": list(self.looks), "told": self.told}

    def load_state_dict(self, state: dict) -> None:
        self.looks = deque(state["looks"], maxlen=self.looks.maxlen)
        self.told = state["told"]


def settled(looks: list[dict]) -> list[dict]:
    """Those that trends go back to: the KL of an encoder that has just begun can be high and say nothing; the latest always."""
    return [look for look in looks if look["step"] >= GRACE] or looks[-1:]


def judge(looks: list[dict]) -> tuple[str, str]:
    """The verdict of the latest look and the first of RULES that holds; collapsed only where CONFIRMED looks agree on that."""
    latest, top = looks[-1], max(look["kl"] for look in settled(looks))
    if latest["step"] < GRACE:
        return "starting", f"before step {GRACE}"
    for verdict, rule, holds in RULES:
        if holds(latest, top, len(latest["kl_of"])):
            if verdict != "collapsed":
                return verdict, rule
            before = looks[-CONFIRMED:]
            agree = [any(of(look, top, len(look["kl_of"])) for v, _, of in RULES if v == "collapsed") for look in before]
            sure = len(before) == CONFIRMED and all(agree)
            return ("collapsed", rule) if sure else ("at risk", f"{rule}, not yet {CONFIRMED} looks in a row")
    return "healthy", "no rule holds"
