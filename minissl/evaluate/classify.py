"""Labels from frozen features: the nearest neighbours' vote, and a linear classifier.

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018 (arXiv:1805.01978), section
3.4, as DINO uses it; scikit-learn's logistic regression.
Shapes: N training features, M test features, D dimensions, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    k: int = 20,
    temperature: float = 0.07,
    classes: int | None = None,
) -> Tensor:
    """The k most similar training images vote, each with weight exp(cosine / temperature).

    Args:
        train_features: (N, D).
        train_labels: (N,) int64.
        test_features: (M, D).
        k: neighbours; at most N are taken.
        temperature: lower listens more to the nearest.
        classes: C; one more than the largest label if None.

    Returns:
        (M,) int64 labels.
    """
    train, test = F.normalize(train_features, dim=-1), F.normalize(test_features, dim=-1)
    classes = classes or int(train_labels.max()) + 1
    found = []
    for part in test.split(1024):
        similarity, nearest = (part @ train.mT).topk(min(k, len(train)), dim=-1)  # (m, k)
        votes = part.new_zeros(len(part), classes)
        votes.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp())
        found.append(votes.argmax(dim=-1))
    return torch.cat(found)


def linear_probe(train_features: Tensor, train_labels: Tensor, test_features: Tensor, strength: float = 1.0) -> Tensor:
    """Labels (M,) by a linear classifier on features standardised over the training images.

    Args:
        train_features: (N, D).
        train_labels: (N,) int64.
        test_features: (M, D).
        strength: scikit-learn's C, the inverse of the L2 penalty.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=500, tol=1e-3))
    probe.fit(train_features.cpu().numpy(), train_labels.cpu().numpy())
    return torch.from_numpy(probe.predict(test_features.cpu().numpy())).to(train_labels.device)
