"""Errors of predictions as a KL divergence, and the probes that estimate it.

Where an output gives the parameters of a distribution, what matters of an error is how far the predictions move:
KL(float || rounded), in nats. To second order it is e^T F e / 2 with the Fisher matrix F of the distribution
(Kullback, "Information Theory and Statistics", 1959, section 2.6; Martens, "New insights and perspectives on the
natural gradient method", arXiv:1412.1193, section 8). A probe v with E[v v^T] = F and the gradient g = J^T v at a
rounding with error e therefore satisfy E[<g, e>^2] = 2 KL, and rows add up over sites as they do for squared errors.

Draws from the distribution minus its mean have covariance F, but the unlikely ones are rare, and then drown all others.
Independent signs s times a square root of F have the same covariance at less spread. Where y is one-hot or Bernoulli:

Case 1. softmax of logits: F = diag(p) - p p^T, so v = sqrt(p) s - p <sqrt(p), s>.
Case 2. softmax, given as probabilities: v = s / sqrt(p); the softmax itself turns it into case 1.
Case 3. softmax, given as logarithms of probabilities: v = sqrt(p) s, likewise.
Case 4. sigmoid, given as probabilities, each its own Bernoulli variable: v = s / sqrt(p (1 - p)), which the sigmoid
        turns into sqrt(p (1 - p)) s at the logits.

Sigmoids in float32 have an absolute error of about `RESOLUTION` whatever their size, so that scores near zero are
mostly noise, and two models that differ at all differ by it. Scores below `LEAST_SCORE` are not counted, and
`Divergence.noise` says how much noise the others have.

Divergences of a softmax are a mean over positions (images, pixels, tokens), those of sigmoids the sum over a sample.
"""

from __future__ import annotations

import numpy as np

from bitalloy.core.records import Head

CATEGORICAL, BERNOULLI = "categorical", "bernoulli"
LOGITS, PROBABILITIES, LOGARITHMS = "logits", "probabilities", "logarithms"
LEAST_PROBABILITY = 1e-12
"""Smallest probability that is distinguished from zero."""
RESOLUTION = 2.0**-25
"""Root mean square error of ONNX Runtime's Sigmoid; its largest error is 1.4e-7, about four times as much."""
LEAST_SCORE = 32 * RESOLUTION
"""Smallest distance of a Sigmoid's score from zero and from one that is distinguished: 9.5e-7."""


class Divergence:
    """KL divergence of a head's predictions from the float ones.

    Args:
        head: the head, with `kind`, `given` and, if categorical, `classes`.
        value: float values of the head.
        weights: weights of the head's elements, broadcastable, with a mean of 1; None where all count alike.
    """

    def __init__(self, head: Head, value: np.ndarray, weights: np.ndarray | None) -> None:
        self._head = head
        self._weights = np.ones(()) if weights is None else weights
        self.energy = 2.0
        """Twice the number of positions: divided by it, errors are nats, for each position or the sample."""
        self.noise = 0.0
        """Expected `error` between two models that differ by the rounding of Sigmoids in float32 alone."""
        if head.kind == BERNOULLI:
            p = self._p = np.clip(value, LEAST_SCORE, 1 - LEAST_SCORE)
            self._told = (p > LEAST_SCORE) & (p < 1 - LEAST_SCORE)
            self.noise = float((self._weights * self._told * 2 * RESOLUTION**2 / (p * (1 - p))).sum())
        else:
            assert head.classes is not None, "a categorical head has an axis of classes"
            if weights is not None:
                self._weights = weights.mean(axis=head.classes, keepdims=True)
            self._logs = self._logarithms(value)
            self._p = np.exp(self._logs)
            self.energy = 2.0 * value.size / value.shape[head.classes]

    def error(self, found: np.ndarray) -> float:
        """Return twice the sum of the divergences in nats, never negative."""
        p = self._p
        if self._head.kind == BERNOULLI:
            q = np.clip(found, LEAST_SCORE, 1 - LEAST_SCORE)
            each = p * np.log(p / q) + (1 - p) * (np.log1p(-p) - np.log1p(-q))
        else:
            logs = self._logarithms(found)
            # given probabilities may not add up to one: the last terms keep every divergence above zero
            each = p * (self._logs - logs) - p + np.exp(logs)
        return 2 * float(np.maximum(self._weights * each, 0.0).sum())

    def cotangents(self, signs: np.ndarray) -> np.ndarray:
        """Turn independent signs (probes, *shape of the head) into probes v with E[<v, e>^2] = 2 KL of an error e."""
        p, given = self._p, self._head.given
        if self._head.kind == BERNOULLI:
            scale = self._told / np.sqrt(p * (1 - p))
        elif given == PROBABILITIES:
            scale = 1 / np.sqrt(p)
        else:
            scale = np.sqrt(p)
        v = signs * (np.sqrt(self._weights) * scale).astype(signs.dtype)
        if given == LOGITS:
            assert self._head.classes is not None
            v = v - p.astype(signs.dtype) * v.sum(axis=self._head.classes + 1, keepdims=True)
        return np.asarray(v)

    def _logarithms(self, value: np.ndarray) -> np.ndarray:
        if self._head.given == PROBABILITIES:
            return np.asarray(np.log(np.maximum(value, LEAST_PROBABILITY)))
        if self._head.given == LOGARITHMS:
            return value
        shifted = value - value.max(axis=self._head.classes, keepdims=True)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=self._head.classes, keepdims=True)))
