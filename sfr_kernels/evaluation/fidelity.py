"""Whether answers keep to their persona and to their prompt."""

from collections.abc import Sequence

import numpy as np
from sklearn.linear_model import LogisticRegression


class StyleProbe:
    """Which persona an answer sounds like: multinomial logistic regression on sentence embeddings, fitted to answers of
    the data. ValueError for fewer than two personas."""

    def __init__(
        self,
        embeddings: np.ndarray,  # (n, d), unit vectors
        personas: Sequence[str],  # n
    ):
        if len(set(personas)) < 2:
            raise ValueError(f"personas must be at least two different ones, got {sorted(set(personas))}")
        # unit vectors of some hundred coordinates: C = 1 holds the weights too near to zero
        self.model = LogisticRegression(C=10.0, max_iter=2000).fit(embeddings, list(personas))

    @property
    def personas(self) -> set[str]:
        return set(self.model.classes_)

    def recognised(
        self,
        embeddings: np.ndarray,  # (n, d)
        personas: Sequence[str],  # n: who is meant to speak
    ) -> np.ndarray:
        """(n,) booleans: taken for that persona, and not for another."""
        return self.model.predict(embeddings) == np.asarray(personas)


def relevance(
    answers: np.ndarray,  # (n, d), unit vectors
    prompts: np.ndarray,  # (n, d)
) -> np.ndarray:
    """(n,): the cosine of each answer with its prompt."""
    return np.einsum("nd,nd->n", answers, prompts)
