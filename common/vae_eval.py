"""What a text VAE is worth: ELBO, importance-weighted likelihood, and texts that come out of it.

A model here has encode(ids, lengths) -> mean, log-variance; reconstruction(ids, lengths, z) -> nats; decode(ids, z) -> logits.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common import loading, posterior, processes, runs
from common.eval_utils import evaluating
from common.train_utils import autocast

TOKENS = 4096  # of a batch with its padding
QUICK, LARGE = 48, 512  # texts whose posteriors are looked at often, and seldom
WORDS = 60  # tokens that a text is decoded to at most


class HeldOut:
    """Texts that are held out of the training ones, as validations and monitors look at them, with the same noise every time.

    share: of the texts that a validation scores, the first ones; padded: what its batches are padded to, None: to their
    longest. Of several processes each scores its part.
    """

    def __init__(self, texts: loading.Documents, device: str, precision: str, share: float, padded: int | None):
        self.texts, self.device, self.precision, self.padded = texts, device, precision, padded
        n = max(1, round(share * len(texts)))
        self.judged = processes.part_of([*enumerate(loading.within(texts.lengths[:n], TOKENS, padded))])
        self.cached: dict[int, list[dict]] = {}

    def negative_elbo(self, model) -> dict[str, float]:
        """It and its two parts, reconstruction and KL, in nats a text."""
        sums = torch.zeros(3, device=self.device)
        with evaluating(model):
            for number, index in self.judged:
                batch = loading.on(self.device, self.texts.batch(index, self.padded))
                with autocast(batch["ids"].device, self.precision):
                    mean, log_variance = model.encode(**batch)
                    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(number)).to(mean.device)
                    nats = model.reconstruction(**batch, z=mean + noise * (0.5 * log_variance).exp())
                kl = posterior.kl_per_dimension(mean, log_variance)
                sums += torch.stack([nats.sum(), kl.sum(), nats.new_tensor(len(index))])
        reconstruction, kl, n = processes.sum_(sums).tolist()
        return {"negative_elbo": (reconstruction + kl) / n, "reconstruction": reconstruction / n, "kl": kl / n}

    def posteriors(self, model, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and log-variances of the first n texts, (n, D) each. Their batches stay on the device."""
        if n not in self.cached:
            batches = loading.within(self.texts.lengths[:n], TOKENS)
            self.cached[n] = [loading.on(self.device, self.texts.batch(index)) for index in batches]
        with evaluating(model), autocast(torch.device(self.device), self.precision):
            found = [model.encode(**batch) for batch in self.cached[n]]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def look(self, monitor: posterior.PosteriorMetricsMonitor, model, step: int, reconstruction: float) -> bool:
        """Shows the monitor QUICK posteriors, or LARGE where it plots; whether it calls them collapsed."""
        monitor.update(step, *self.posteriors(model, LARGE if monitor.plot_due(step) else QUICK), reconstruction)
        return monitor.verdict == "collapsed"

    def information(self, model) -> float:
        """Mutual information of z and LARGE texts, in nats."""
        return posterior.mutual_information(*self.posteriors(model, LARGE), torch.Generator().manual_seed(0))


def importance_weighted(reconstruction, mean, log_variance, n_samples: int, generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each text, (B,): the mean of -log p(x|z) over samples of q(z|x), and log 1/K sum_k p(x|z_k) p(z_k) / q(z_k|x), a lower
    bound of log p(x) that rises with K (arXiv 1509.00519, equation 8); float64, on the CPU.

    reconstruction: z, (B, D), to -log p(x|z), (B,).
    """
    nats, weights = [], []
    for _ in range(n_samples):
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        z = mean + noise * (0.5 * log_variance).exp()
        nats.append(reconstruction(z).cpu().double())
        of_q = posterior.log_normal(*(values.cpu().double() for values in (z, mean, log_variance)))
        weights.append(posterior.log_normal(z.cpu().double()) - of_q - nats[-1])
    return torch.stack(nats).mean(0), posterior.log_mean_exp(torch.stack(weights))


def evaluate(model, texts: loading.Documents, device: str, n_samples: int, seed: int) -> dict:
    """Held-out measures of a model in fp32; nats a text, and perplexities a token (the end of a text is one, what was cut is
    not)."""
    sums, means, log_variances = np.zeros(3), [], []
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        for index in tqdm(loading.within(texts.lengths, TOKENS), "judging", leave=False, disable=None):
            batch = loading.on(device, texts.batch(index))
            mean, log_variance = model.encode(**batch)
            nats, log_likelihood = importance_weighted(lambda z, b=batch: model.reconstruction(**b, z=z), mean, log_variance,
                                                       n_samples, generator)  # fmt: skip
            kl = posterior.kl_per_dimension(mean, log_variance)
            sums += [float(nats.sum()), float(kl.sum()), -float(log_likelihood.sum())]
            means.append(mean.cpu())
            log_variances.append(log_variance.cpu())
    n, tokens = len(texts), int(texts.lengths.sum())
    reconstruction, kl, nll = (sums / n).tolist()
    found = posterior.measures(torch.cat(means), torch.cat(log_variances), generator)
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "n": n, "tokens": tokens,
        "negative_elbo": reconstruction + kl, "reconstruction": reconstruction, "kl": kl,
        "importance_weighted_nll": nll, "iw_samples": n_samples, "perplexity": math.exp(sums[2] / tokens),
        "perplexity_by_elbo": math.exp((sums[0] + sums[1]) / tokens), "active_units": found["active_units"],
        "mutual_information": found["mutual_information"], "mutual_information_at_most": found["ceiling"],
        "variance_of_means": found["variance_of_means"], "mean_of_variances": found["mean_of_variances"],
        "kl_of": found["kl_of"],
    }  # fmt: skip


def rows(found: dict) -> list[list[str]]:
    """What `evaluate` found as the rows of a table."""
    lines = [[key.replace("_", " "), f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"]
             for key, value in found.items() if not isinstance(value, list)]  # fmt: skip
    return [["held out", "nats a text, or as named"], *lines]


def decode_texts(model, z: torch.Tensor, tokenizer, n: int = WORDS, generator: torch.Generator | None = None) -> list[str]:
    """A text for each z, (B, D), of at most n tokens: the most likely words, or with a generator words that are drawn."""
    ids = torch.zeros(len(z), 1, dtype=torch.int64, device=z.device)  # token 0 begins and ends a text
    done = torch.zeros(len(z), dtype=torch.bool, device=z.device)
    n = min(n, len(model.positions))
    with evaluating(model):
        while ids.shape[1] <= n and not done.all():
            logits = model.decode(ids, z)[:, -1].float()
            if generator is None:
                following = logits.argmax(1)
            else:
                following = torch.multinomial(logits.softmax(1).cpu(), 1, generator=generator)[:, 0].to(z.device)
            ids = torch.cat([ids, following.masked_fill(done, 0)[:, None]], 1)
            done |= following == 0
    return [" ".join(tokenizer.decode(row, skip_special_tokens=True).split()) for row in ids.tolist()]


def write_texts(folder: Path, model, texts: loading.Documents, tokenizer, device: str, seed: int, n: int = 10) -> None:
    """samples.txt (z from the prior, words drawn), reconstructions.txt (of n texts, from their posterior means) and
    interpolation.txt (on the line between the first two of these)."""
    generator = torch.Generator().manual_seed(seed)
    with evaluating(model):
        mean, _ = model.encode(**loading.on(device, texts.batch(np.arange(min(n, len(texts))))))
    samples = decode_texts(model, torch.randn(n, mean.shape[1], generator=generator).to(device), tokenizer, generator=generator)
    originals = [tokenizer.decode(texts.tokens(i), skip_special_tokens=True) for i in range(len(mean))]
    again = decode_texts(model, mean, tokenizer)
    shares = torch.linspace(0, 1, n, device=device)[:, None]
    between = decode_texts(model, mean[0] * (1 - shares) + mean[-1 if len(mean) < 2 else 1] * shares, tokenizer)
    pairs = [f"text   {original}\nagain  {text}\n" for original, text in zip(originals, again, strict=True)]
    path = [f"from   {originals[0]}", *between, f"to     {originals[-1 if len(mean) < 2 else 1]}"]
    for name, lines in (("samples", samples), ("reconstructions", pairs), ("interpolation", path)):
        runs.write_atomic(folder / f"{name}.txt", "\n".join(lines) + "\n")
