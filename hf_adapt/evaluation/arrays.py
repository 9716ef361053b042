"""Arrays as the functions of this package take them: NumPy's or torch's, checked."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Array = ArrayLike | torch.Tensor
"""An array, or a tensor on any device."""

Floats = NDArray[np.float64]


def extra(module: str) -> Any:
    """A module of scikit-learn or SciPy, which the plain installation lacks.

    Raises:
        ImportError: With the line that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"This part of hf_adapt.evaluation needs {module.partition('.')[0]}. Install it with "
            '`pip install "hf-adapt[evaluation]"`.'
        ) from error


def as_array(values: Array, name: str, ndim: int) -> NDArray[Any]:
    """A NumPy array of finite values with so many dimensions and at least one row.

    Args:
        values: An array or tensor.
        name: What an error calls it.
        ndim: Number of dimensions.

    Raises:
        ValueError: If it has another shape, no rows, or values that are not finite.
    """
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    array = np.asarray(values)
    if array.ndim != ndim or not len(array):
        shape = ("(N,)", "(N, D)")[ndim - 1]
        raise ValueError(
            f"Expected {name} of shape {shape} with at least one row, got {array.shape}."
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        rows = int((~np.isfinite(array).reshape(len(array), -1).all(1)).sum())
        raise ValueError(
            f"Expected finite {name}, got NaN or infinity in {rows} of {len(array)} rows. Find "
            "where the model diverged."
        )
    return array


def as_logits(logits: Array, name: str = "logits") -> Floats:
    """Scores of at least two classes, (N, C) in float64.

    Raises:
        ValueError: If they have another shape or are not finite.
    """
    array = as_array(logits, name, 2).astype(np.float64)
    if array.shape[1] < 2:
        raise ValueError(
            f"Expected {name} of at least two classes, got {array.shape}. A single score of a "
            "binary classifier becomes two with np.stack([-x / 2, x / 2], -1)."
        )
    return array


def as_features(
    features: Array, name: str = "features", count: int | None = None
) -> NDArray[np.float32]:
    """Features, (N, D) in float32; of so many items N, where that is known."""
    array = as_array(features, name, 2).astype(np.float32)
    if count is not None and len(array) != count:
        raise ValueError(f"Expected {name} of {count} items, got {len(array)}.")
    return array


def as_classes(labels: Array, name: str, count: int, classes: int | None = None) -> NDArray[Any]:
    """Whole numbers from 0, (N,).

    Args:
        labels: An array or tensor.
        name: What an error calls it.
        count: Number N of items that they belong to.
        classes: Number of classes, where it is known.

    Raises:
        ValueError: If their number or range is wrong.
    """
    array = as_array(labels, name, 1)
    if len(array) != count:
        raise ValueError(f"Expected {count} {name}, one for each item, got {len(array)}.")
    if array.dtype.kind == "f" and (array == array.round()).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "iub" or array.min() < 0:
        raise ValueError(
            f"Expected {name} as numbers of classes from 0, got {array[:3].tolist()} … as "
            f"{array.dtype}. Leave out the items without a label (-100)."
        )
    if classes is not None and array.max() >= classes:
        raise ValueError(
            f"Expected {name} below {classes}, the number of classes; got {array.max()}."
        )
    return array.astype(np.int64)


def as_prior(prior: Array | None, classes: int) -> Floats:
    """Class frequencies, (C,); uniform where nothing is given.

    Raises:
        ValueError: If there are not as many as classes, one is negative, or their sum is not 1.
    """
    if prior is None:
        return np.full(classes, 1 / classes)
    array = as_array(prior, "prior", 1).astype(np.float64)
    if len(array) != classes or (array < 0).any() or abs(array.sum() - 1) > 1e-3:
        raise ValueError(
            f"Expected a prior of {classes} class frequencies of 0 or more that add up to 1, got "
            f"{array.tolist()}."
        )
    return np.asarray(array / array.sum(), dtype=np.float64)


def log_softmax(logits: Floats) -> Floats:
    """The logarithms of the predicted probabilities."""
    shifted: Floats = logits - logits.max(-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(-1, keepdims=True))
    return shifted


def softmax(logits: Floats) -> Floats:
    """The predicted probabilities."""
    return np.asarray(np.exp(log_softmax(logits)))
