"""Teacher-Validated Disagreement Focusing: pure functions over arrays (ALGORITHM.md section 2)."""

import numpy as np


def reliable(teacher_iou: np.ndarray, threshold: float) -> np.ndarray:
    """bool[P]: TRPV keeps prompt i when tau_i, the mean IoU of the teacher's answers, is at least the threshold."""
    return teacher_iou >= threshold


def disagreement(teacher_iou: np.ndarray, student_iou: np.ndarray) -> np.ndarray:
    """delta_i = tau_i - sigma_i (DBTP), float64[P]."""
    return teacher_iou.astype(np.float64) - student_iou


def select_top_k(delta: np.ndarray, k: int) -> np.ndarray:
    """int64[min(k, P)]: the indices of the k largest delta, largest first; ties in the order of the pool."""
    return np.argsort(-delta, kind="stable")[:k]
