"""Classify images by frozen features: weighted k nearest neighbors and a linear probe.

Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018 (arXiv:1805.01978), section
3.4, as in DINO's evaluation; scikit-learn's logistic regression.

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
    """Classify by the votes of the k most similar training images, each weighted by exp(cosine / temperature).

    Args:
        train_features: (N, D) float; they are L2-normalized here.
        train_labels: (N,) int64.
        test_features: (M, D) float, likewise.
        k: number of neighbors; at most N are used.
        temperature: a lower one gives more weight to the nearest neighbors.
        classes: C; one more than the largest training label if None.

    Returns:
        (M,) int64 labels, 0 to C - 1.
    """
    train, test = F.normalize(train_features, dim=-1), F.normalize(test_features, dim=-1)
    classes = classes or int(train_labels.max()) + 1
    predictions = []
    for part in test.split(1024):  # the similarities of all M at once may not fit in memory
        similarity, nearest = (part @ train.mT).topk(min(k, len(train)), dim=-1)  # (m, k)
        votes = part.new_zeros(len(part), classes)
        votes.scatter_add_(1, train_labels[nearest], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=-1))
    return torch.cat(predictions)


def linear_probe(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, inverse_regularization: float = 1.0
) -> Tensor:
    """Classify by logistic regression on features standardized with the training set's mean and standard deviation.

    Args:
        train_features: (N, D) float.
        train_labels: (N,) int64, of at least two classes.
        test_features: (M, D) float.
        inverse_regularization: scikit-learn's C, the inverse of the L2 penalty's weight.

    Returns:
        (M,) int64 labels, on the device of `train_labels`.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_regularization, max_iter=500, tol=1e-3))
    probe.fit(train_features.cpu().numpy(), train_labels.cpu().numpy())
    return torch.from_numpy(probe.predict(test_features.cpu().numpy())).to(train_labels.device)
