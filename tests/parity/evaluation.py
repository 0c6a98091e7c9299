"""What features are worth: neighbours, classifiers, sentences, spread and matches, beside libraries and loops.

One is added to labels and shares: all of them may be 0, and a tensor that is 0 throughout shows nothing.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import functional

from minissl import evaluate
from tests.parity.ledger import Draw, Sides, compared
from tests.parity.losses import lightly


def rows(draw: Draw, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Features (n, d) and labels, of a few kinds that overlap."""
    labels = torch.arange(n) % draw.whole(2, 4)
    return draw.normal(5, d, scale=1.5)[labels] + draw.normal(n, d), labels


@compared("nearest neighbours, weighted", "sklearn", evaluate.knn, fp32=1e-5)
def _(draw: Draw) -> Sides:
    from sklearn.neighbors import KNeighborsClassifier

    n, m, d, k, t = draw.whole(8, 60), draw.whole(5, 40), draw.whole(2, 12), draw.whole(1, 30), draw.real(0.05, 1)
    (x, labels), asked = rows(draw, n, d), draw.normal(m, d)

    def theirs() -> Tensor:
        vote = KNeighborsClassifier(min(k, n), weights=lambda away: np.exp((1 - away) / t), metric="cosine")
        return 1 + torch.from_numpy(vote.fit(x.numpy(), labels.numpy()).predict(asked.numpy()))

    return Sides(lambda: 1 + evaluate.knn(x, labels, asked, k, t), theirs)


@compared("nearest neighbours, weighted", "lightly", evaluate.knn, fp32=1e-5)
def _(draw: Draw) -> Sides:
    n, m, d, t = draw.whole(8, 60), draw.whole(5, 40), draw.whole(2, 12), draw.real(0.05, 1)
    (x, labels), asked, k = rows(draw, n, d), draw.normal(m, d), draw.whole(1, n)
    predict = lightly("utils.benchmarking.knn").knn_predict

    def theirs() -> Tensor:
        said = predict(F.normalize(asked, dim=1), F.normalize(x, dim=1).T, labels, int(labels.max()) + 1, k, t)
        return 1 + said[:, 0]

    return Sides(lambda: 1 + evaluate.knn(x, labels, asked, k, t), theirs)


@compared("the linear probe, where it is sure", "torch", evaluate.linear_probe, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """The same penalised softmax by Newton's steps, to the end; asked where the best share leads by 0.05."""
    n, d, strength = draw.whole(30, 60), draw.whole(2, 6), draw.real(0.05, 1)
    (x, labels), asked = rows(draw, n, d), draw.normal(60, d, scale=1.5)
    classes = int(labels.max()) + 1
    mean, deviation = x.double().mean(0), x.double().std(0, correction=0)
    z, questions = (x.double() - mean) / deviation, (asked.double() - mean) / deviation

    penalty = 1.0 if classes == 2 else 0.5  # of two, scikit-learn has one vector, of what sets them apart

    def loss(weights: Tensor) -> Tensor:
        w, b = weights[: classes * d].view(classes, d), weights[classes * d :]
        return penalty * w.square().sum() + strength * F.cross_entropy(z @ w.T + b, labels, reduction="sum")

    weights = torch.zeros(classes * (d + 1), dtype=torch.float64)
    for _ in range(30):
        steep, curve = functional.jacobian(loss, weights), functional.hessian(loss, weights)
        weights = weights - torch.linalg.lstsq(curve, steep, driver="gelsd").solution
    shares = (questions @ weights[: classes * d].view(classes, d).T + weights[classes * d :]).softmax(-1)
    best = shares.topk(2).values
    sure = best[:, 0] - best[:, 1] > 0.05
    return Sides(
        lambda: 1 + evaluate.linear_probe(x, labels, asked, strength)[sure], lambda: 1 + shares.argmax(-1)[sure]
    )


@compared("RankMe", "numpy", evaluate.rank_me, fp64=None, fp32=1e-5)
def _(draw: Draw) -> Sides:
    few = draw.whole(2, 9)
    x = draw.normal(draw.whole(10, 40), few) @ draw.normal(few, draw.whole(4, 20))

    def theirs() -> float:
        values = np.linalg.svd(x.double().numpy(), compute_uv=False)
        share = values / values.sum() + 1e-7
        return float(np.exp(-(share * np.log(share)).sum()))

    return Sides(lambda: evaluate.rank_me(x), theirs)


@compared("alignment, uniformity, spread", "scipy", evaluate.alignment, evaluate.uniformity, evaluate.spread,
          fp32=1e-5)  # fmt: skip
def _(draw: Draw) -> Sides:
    from scipy.spatial.distance import cdist, pdist

    b, d, t = draw.whole(3, 30), draw.whole(2, 20), draw.real(0.5, 3)
    a, c = draw.normal(b, d), draw.normal(b, d)

    def theirs() -> list[float]:
        x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (a.double().numpy(), c.double().numpy()))
        pairs = [np.diag(cdist(x, y, "sqeuclidean")).mean(), np.log(np.exp(-t * pdist(x, "sqeuclidean")).mean())]
        return [*map(float, pairs), float(np.sqrt((x**2).mean(0) - x.mean(0) ** 2).mean())]

    return Sides(lambda: [evaluate.alignment(a, c), evaluate.uniformity(a, t), evaluate.spread(a)], theirs)


@compared("zero-shot: vectors of classes, answers both ways", "scipy", evaluate.sentence_vectors,
          evaluate.class_vectors, evaluate.zero_shot, evaluate.zero_shot_sum, evaluate.in_templates,
          fp64=None, fp32=1e-5)  # fmt: skip
def _(draw: Draw) -> Sides:
    from scipy.special import softmax

    names, templates = ["cat", "dog", "bird"][: draw.whole(2, 3)], ["a {}", "{} here", "this {}"][: draw.whole(1, 3)]
    sentences = [[template.replace("{}", name) for template in templates] for name in names]
    sentences[0] += ["it purrs", "it sleeps"]  # not every class has as many
    known = {text: draw.normal(6) for texts in sentences for text in texts}
    images, scale = draw.normal(draw.whole(3, 20), 6), draw.real(1, 20)

    def embed(texts: list[str]) -> Tensor:
        return torch.stack([known[text] for text in texts])

    def ours() -> list[Tensor]:
        prompts = evaluate.in_templates(names, templates)
        prompts[0] += sentences[0][-2:]
        vectors, each = evaluate.class_vectors(embed, prompts), evaluate.sentence_vectors(embed, prompts)
        return [vectors, 1 + evaluate.zero_shot(images, vectors), 1 + evaluate.zero_shot_sum(images, each, scale)]

    def theirs() -> list[Tensor]:
        unit = {text: (v / v.norm()).double().numpy() for text, v in known.items()}
        means = np.stack([sum(unit[text] for text in texts) for texts in sentences])
        means = means / np.linalg.norm(means, axis=1, keepdims=True)
        x = F.normalize(images.double(), dim=1).numpy()
        shares = softmax(scale * x @ np.stack(list(unit.values())).T, axis=1)
        parts = np.split(shares, np.cumsum([len(texts) for texts in sentences])[:-1], axis=1)
        answers = [(x @ means.T).argmax(1), np.stack([part.mean(1) for part in parts], axis=1).argmax(1)]
        return [torch.from_numpy(means), *(1 + torch.from_numpy(answer) for answer in answers)]

    return Sides(ours, theirs)


@compared("the right one found among a group", "a loop", evaluate.retrieval, fp64=1e-6, fp32=1e-5)
def _(draw: Draw) -> Sides:
    n, d, group = draw.whole(8, 30), draw.whole(2, 5), draw.whole(2, 8)
    found, numbers = draw.normal(n, d), draw.numbers(n, below=12)
    queries = found + draw.normal(n, d, scale=0.7)

    def theirs() -> float:
        right, whole = 0, n // group * group
        for i in range(whole):
            start = i // group * group
            cosines = [float(F.cosine_similarity(queries[i], found[j], dim=0)) for j in range(start, start + group)]
            right += bool(numbers[start + cosines.index(max(cosines))] == numbers[i])
        return 1 + right / whole

    return Sides(lambda: 1 + evaluate.retrieval(queries, found, numbers, group), theirs)


@compared("halves of clips that find each other", "sklearn", evaluate.halves, fp64=1e-6, fp32=1e-5)
def _(draw: Draw) -> Sides:
    from sklearn.neighbors import NearestNeighbors

    d, n = draw.whole(3, 9), draw.whole(3, 9)
    clips = [draw.normal(d) + draw.normal(draw.whole(2, 7), 2, 2, d, scale=2) for _ in range(n)]

    def theirs() -> float:
        parts = [[clip[: (len(clip) + 1) // 2], clip[(len(clip) + 1) // 2 :]] for clip in clips]
        first, second = (np.stack([part[i].numpy().mean((0, 1, 2)) for part in parts]) for i in range(2))
        there, back = (
            NearestNeighbors(n_neighbors=1, metric="cosine").fit(x).kneighbors(y)[1][:, 0]
            for x, y in ((second, first), (first, second))
        )
        return 1 + float(((there == np.arange(n)).mean() + (back == np.arange(n)).mean()) / 2)

    return Sides(lambda: 1 + evaluate.halves(clips), theirs)


@compared("patches that are each other's nearest", "skimage", evaluate.mutual, fp32=1e-5)
def _(draw: Draw) -> Sides:
    """Best first, by the cosine that scikit-image does not tell."""
    from skimage.feature import match_descriptors

    a, b = draw.normal(draw.whole(4, 20), 5), draw.normal(draw.whole(4, 20), 5)

    def theirs() -> Tensor:
        pairs = match_descriptors(a.numpy(), b.numpy(), metric="cosine", cross_check=True)
        return 1 + torch.tensor(
            sorted(pairs.tolist(), key=lambda p: -float(F.cosine_similarity(a[p[0]], b[p[1]], dim=0)))
        )

    return Sides(lambda: 1 + evaluate.mutual(a, b), theirs)


@compared(
    "parts found again, and patches named",
    "a loop",
    evaluate.correspondence,
    evaluate.name_patches,
    fp64=1e-6,
    fp32=1e-5,
)
def _(draw: Draw) -> Sides:
    n, h, w, d, texts = draw.whole(1, 3), draw.whole(2, 4), draw.whole(2, 4), draw.whole(3, 6), draw.whole(2, 5)
    a, b, words = draw.normal(n, h, w, d), draw.normal(n, h, w, d), draw.normal(texts, d)
    parts_a, parts_b = draw.numbers(n, h, w, below=3), draw.numbers(n, h, w, below=3)
    parts_a[0, 0, 0] = parts_b[0, 0, 0] = 1

    def nearest(x: Tensor, others: Tensor) -> int:
        cosines = [float(F.cosine_similarity(x, other, dim=0)) for other in others]
        return cosines.index(max(cosines))

    def theirs() -> list[Tensor]:
        right = []
        for i in range(n):
            there = parts_b[i].flatten().tolist()
            for x, part in zip(a[i].flatten(0, 1), parts_a[i].flatten().tolist()):
                right += [there[nearest(x, b[i].flatten(0, 1))] == part] if part and part in there else []
        said = torch.tensor([nearest(x, words) for x in a.flatten(0, 2)]).view(n, h, w)
        return [torch.tensor(1 + sum(right) / len(right), dtype=torch.float64), 1 + said]

    def ours() -> list[Tensor]:
        return [
            1 + torch.tensor(evaluate.correspondence(a, b, parts_a, parts_b)).double(),
            1 + evaluate.name_patches(a, words),
        ]

    return Sides(ours, theirs)
