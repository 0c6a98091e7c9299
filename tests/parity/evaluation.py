"""Evaluation of features: k-NN, linear probe, zero-shot, geometry and retrieval, compared with libraries and loops.

One is added to labels and fractions, which may all be 0: a tensor of zeros proves nothing.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import functional

from minissl import evaluation
from tests.parity.ledger import RandomInputs, Sides, comparison
from tests.parity.losses import lightly


def random_features(rng: RandomInputs, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Sample features (n, d) and labels (n,) of two to four classes that overlap."""
    labels = torch.arange(n) % rng.integer(2, 4)
    return rng.normal(5, d, scale=1.5)[labels] + rng.normal(n, d), labels


@comparison("weighted k-NN", "sklearn", evaluation.knn, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    from sklearn.neighbors import KNeighborsClassifier

    n, m, d, k = rng.integer(8, 60), rng.integer(5, 40), rng.integer(2, 12), rng.integer(1, 30)
    t = rng.number(0.05, 1)
    (x, labels), test_x = random_features(rng, n, d), rng.normal(m, d)

    def expected() -> Tensor:
        classifier = KNeighborsClassifier(
            min(k, n), weights=lambda distance: np.exp((1 - distance) / t), metric="cosine"
        )
        return 1 + torch.from_numpy(classifier.fit(x.numpy(), labels.numpy()).predict(test_x.numpy()))

    return Sides(lambda: 1 + evaluation.knn(x, labels, test_x, k, t), expected)


@comparison("weighted k-NN", "lightly", evaluation.knn, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    n, m, d, t = rng.integer(8, 60), rng.integer(5, 40), rng.integer(2, 12), rng.number(0.05, 1)
    (x, labels), test_x, k = random_features(rng, n, d), rng.normal(m, d), rng.integer(1, n)
    knn_predict = lightly("utils.benchmarking.knn").knn_predict

    def expected() -> Tensor:
        queries, bank = F.normalize(test_x, dim=1), F.normalize(x, dim=1).T
        return 1 + knn_predict(queries, bank, labels, int(labels.max()) + 1, k, t)[:, 0]

    return Sides(lambda: 1 + evaluation.knn(x, labels, test_x, k, t), expected)


@comparison("linear probe, confident predictions", "torch", evaluation.linear_probe, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """Minimize the same regularized loss by Newton's method; compare where the best probability leads by 0.05."""
    n, d, c = rng.integer(30, 60), rng.integer(2, 6), rng.number(0.05, 1)
    (x, labels), test_x = random_features(rng, n, d), rng.normal(60, d, scale=1.5)
    classes = int(labels.max()) + 1
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    z, test_z = (x.double() - mean) / std, (test_x.double() - mean) / std

    penalty = 1.0 if classes == 2 else 0.5  # for two classes scikit-learn has one vector, their difference

    def loss(weights: Tensor) -> Tensor:
        w, b = weights[: classes * d].view(classes, d), weights[classes * d :]
        return penalty * w.square().sum() + c * F.cross_entropy(z @ w.T + b, labels, reduction="sum")

    weights = torch.zeros(classes * (d + 1), dtype=torch.float64)
    for _ in range(30):
        gradient, hessian = functional.jacobian(loss, weights), functional.hessian(loss, weights)
        weights = weights - torch.linalg.lstsq(hessian, gradient, driver="gelsd").solution
    probs = (test_z @ weights[: classes * d].view(classes, d).T + weights[classes * d :]).softmax(-1)
    best = probs.topk(2).values
    confident = best[:, 0] - best[:, 1] > 0.05

    def actual() -> Tensor:
        return 1 + evaluation.linear_probe(x, labels, test_x, c)[confident]

    return Sides(actual, lambda: 1 + probs.argmax(-1)[confident])


@comparison("RankMe", "numpy", evaluation.rank_me, fp64=None, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    rank = rng.integer(2, 9)
    x = rng.normal(rng.integer(10, 40), rank) @ rng.normal(rank, rng.integer(4, 20))

    def expected() -> float:
        values = np.linalg.svd(x.double().numpy(), compute_uv=False)
        p = values / values.sum() + 1e-7
        return float(np.exp(-(p * np.log(p)).sum()))

    return Sides(lambda: evaluation.rank_me(x), expected)


@comparison("alignment, uniformity, feature standard deviation", "scipy", evaluation.alignment, evaluation.uniformity,
            evaluation.feature_std, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    from scipy.spatial.distance import cdist, pdist

    b, d, t = rng.integer(3, 30), rng.integer(2, 20), rng.number(0.5, 3)
    a, c = rng.normal(b, d), rng.normal(b, d)

    def actual() -> list[float]:
        return [evaluation.alignment(a, c), evaluation.uniformity(a, t), evaluation.feature_std(a)]

    def expected() -> list[float]:
        x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a.double().numpy(), c.double().numpy()))
        pairs = [np.diag(cdist(x, y, "sqeuclidean")).mean(), np.log(np.exp(-t * pdist(x, "sqeuclidean")).mean())]
        return [*map(float, pairs), float(np.sqrt((x**2).mean(0) - x.mean(0) ** 2).mean())]

    return Sides(actual, expected)


@comparison("collapse: entropies of target distributions, and geometry of features", "scipy",
            evaluation.measure_collapse, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    from scipy.spatial.distance import pdist
    from scipy.stats import entropy

    n, d, k = rng.integer(4, 20), rng.integer(2, 9), rng.integer(3, 9)
    features, flipped, probs = rng.normal(n, d), rng.normal(n, d), rng.normal(n, k, scale=2).softmax(dim=-1)
    labels = torch.arange(n) % 2
    names = ("entropy", "entropy_of_mean", "feature_std", "alignment", "uniformity", "embed_dim")

    def actual() -> list[float]:
        metrics = evaluation.measure_collapse(features, flipped, probs, labels, features, labels)
        return [float(metrics[name]) for name in names]

    def expected() -> list[float]:
        p = probs.double().numpy()
        x, y = (
            z / np.linalg.norm(z, axis=1, keepdims=True) for z in (features.double().numpy(), flipped.double().numpy())
        )
        uniformity = np.log(np.exp(-2 * pdist(x, "sqeuclidean")).mean())
        numbers = entropy(p, axis=1).mean(), entropy(p.mean(0)), x.std(0).mean(), ((x - y) ** 2).sum(1).mean()
        return [*map(float, numbers), float(uniformity), float(d)]

    return Sides(actual, expected)


@comparison("zero-shot: class embeddings, and predictions in two ways", "scipy", evaluation.prompt_embeddings,
            evaluation.class_embeddings, evaluation.zero_shot_classify, evaluation.zero_shot_classify_sum,
            evaluation.fill_templates, fp64=None, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    from scipy.special import softmax

    names = ["cat", "dog", "bird"][: rng.integer(2, 3)]
    templates = ["a {}", "{} here", "this {}"][: rng.integer(1, 3)]
    sentences = [[template.replace("{}", name) for template in templates] for name in names]
    sentences[0] += ["it purrs", "it sleeps"]  # classes differ in the number of their prompts
    embeddings = {text: rng.normal(6) for texts in sentences for text in texts}
    images, scale = rng.normal(rng.integer(3, 20), 6), rng.number(1, 20)

    def embed_text(texts: list[str]) -> Tensor:
        return torch.stack([embeddings[text] for text in texts])

    def actual() -> list[Tensor]:
        prompts = evaluation.fill_templates(names, templates)
        prompts[0] += sentences[0][-2:]
        by_class = evaluation.class_embeddings(embed_text, prompts)
        by_prompt = evaluation.prompt_embeddings(embed_text, prompts)
        predictions = evaluation.zero_shot_classify(images, by_class)
        return [by_class, 1 + predictions, 1 + evaluation.zero_shot_classify_sum(images, by_prompt, scale)]

    def expected() -> list[Tensor]:
        unit = {text: (v / v.norm()).double().numpy() for text, v in embeddings.items()}
        means = np.stack([sum(unit[text] for text in texts) for texts in sentences])
        means = means / np.linalg.norm(means, axis=1, keepdims=True)
        x = F.normalize(images.double(), dim=1).numpy()
        probs = softmax(scale * x @ np.stack(list(unit.values())).T, axis=1)
        by_class = np.split(probs, np.cumsum([len(texts) for texts in sentences])[:-1], axis=1)
        predictions = [(x @ means.T).argmax(1), np.stack([part.mean(1) for part in by_class], axis=1).argmax(1)]
        return [torch.from_numpy(means), *(1 + torch.from_numpy(labels) for labels in predictions)]

    return Sides(actual, expected)


@comparison("retrieval recall within groups", "explicit loop", evaluation.retrieval_recall, fp64=1e-6, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    n, d, group = rng.integer(8, 30), rng.integer(2, 5), rng.integer(2, 8)
    candidates, ids = rng.normal(n, d), rng.integers(n, below=12)
    queries = candidates + rng.normal(n, d, scale=0.7)

    def expected() -> float:
        correct, total = 0, n // group * group
        for i in range(total):
            start = i // group * group
            cosines = [
                float(F.cosine_similarity(queries[i], candidates[j], dim=0)) for j in range(start, start + group)
            ]
            correct += bool(ids[start + cosines.index(max(cosines))] == ids[i])
        return 1 + correct / total

    return Sides(lambda: 1 + evaluation.retrieval_recall(queries, candidates, ids, group), expected)


@comparison("half-clip retrieval", "sklearn", evaluation.half_clip_retrieval, fp64=1e-6, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    from sklearn.neighbors import NearestNeighbors

    d, n = rng.integer(3, 9), rng.integer(3, 9)
    clips = [rng.normal(d) + rng.normal(rng.integer(2, 7), 2, 2, d, scale=2) for _ in range(n)]

    def nearest(features: np.ndarray, queries: np.ndarray) -> np.ndarray:
        return NearestNeighbors(n_neighbors=1, metric="cosine").fit(features).kneighbors(queries)[1][:, 0]

    def expected() -> float:
        halves = [[clip[: (len(clip) + 1) // 2], clip[(len(clip) + 1) // 2 :]] for clip in clips]
        first, second = (np.stack([half[i].numpy().mean((0, 1, 2)) for half in halves]) for i in range(2))
        forward, backward = nearest(second, first), nearest(first, second)
        return 1 + float(((forward == np.arange(n)).mean() + (backward == np.arange(n)).mean()) / 2)

    return Sides(lambda: 1 + evaluation.half_clip_retrieval(clips), expected)


@comparison("mutual nearest neighbors of patches", "skimage", evaluation.mutual_nearest_neighbors, fp32=1e-5)
def _(rng: RandomInputs) -> Sides:
    """Pairs are sorted by their cosine, which scikit-image does not return."""
    from skimage.feature import match_descriptors

    a, b = rng.normal(rng.integer(4, 20), 5), rng.normal(rng.integer(4, 20), 5)

    def expected() -> Tensor:
        pairs = match_descriptors(a.numpy(), b.numpy(), metric="cosine", cross_check=True).tolist()
        return 1 + torch.tensor(sorted(pairs, key=lambda p: -float(F.cosine_similarity(a[p[0]], b[p[1]], dim=0))))

    return Sides(lambda: 1 + evaluation.mutual_nearest_neighbors(a, b), expected)


@comparison("correspondence accuracy, and patches classified by text", "explicit loop",
            evaluation.correspondence_accuracy, evaluation.classify_patches_by_text, fp64=1e-6, fp32=1e-5)  # fmt: skip
def _(rng: RandomInputs) -> Sides:
    n, h, w, d = rng.integer(1, 3), rng.integer(2, 4), rng.integer(2, 4), rng.integer(3, 6)
    num_texts = rng.integer(2, 5)
    a, b, texts = rng.normal(n, h, w, d), rng.normal(n, h, w, d), rng.normal(num_texts, d)
    parts_a, parts_b = rng.integers(n, h, w, below=3), rng.integers(n, h, w, below=3)
    parts_a[0, 0, 0] = parts_b[0, 0, 0] = 1

    def nearest(x: Tensor, candidates: Tensor) -> int:
        cosines = [float(F.cosine_similarity(x, candidate, dim=0)) for candidate in candidates]
        return cosines.index(max(cosines))

    def actual() -> list[Tensor]:
        accuracy = torch.tensor(evaluation.correspondence_accuracy(a, b, parts_a, parts_b)).double()
        return [1 + accuracy, 1 + evaluation.classify_patches_by_text(a, texts)]

    def expected() -> list[Tensor]:
        correct = []
        for i in range(n):
            parts = parts_b[i].flatten().tolist()
            for x, part in zip(a[i].flatten(0, 1), parts_a[i].flatten().tolist()):
                correct += [parts[nearest(x, b[i].flatten(0, 1))] == part] if part and part in parts else []
        labels = torch.tensor([nearest(x, texts) for x in a.flatten(0, 2)]).view(n, h, w)
        return [torch.tensor(1 + sum(correct) / len(correct), dtype=torch.float64), 1 + labels]

    return Sides(actual, expected)
