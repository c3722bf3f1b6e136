"""What may be done to a label map after the classes are chosen, by name in the recipe."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def keep_largest_components(label_map: np.ndarray) -> np.ndarray:
    """Keep the largest connected component of every foreground class; the rest becomes background.

    Args:
        label_map: uint8, (H, W) or (D, H, W), class indices.

    Returns:
        uint8, the same shape. Pixels that touch at a corner are connected; of components of equal size the
        first in reading order stays.
    """
    from skimage.measure import label

    kept = label_map.copy()
    for index in np.unique(label_map):
        if index == 0:
            continue
        components = label(label_map == index, connectivity=label_map.ndim)
        sizes = np.bincount(components.ravel())[1:]
        if len(sizes) > 1:
            kept[(components > 0) & (components != 1 + sizes.argmax())] = 0
    return kept


def keep_largest_in_stack(label_maps: Sequence[np.ndarray], slice_indices: Sequence[int]) -> list[np.ndarray]:
    """Keep the largest component of every class of a volume that is given slice by slice.

    Args:
        label_maps: uint8, (H, W) each, of one size.
        slice_indices: where each lies; slices that are not given are empty.

    Returns:
        The label maps, in the order given.
    """
    first = min(slice_indices)
    stack = np.zeros((max(slice_indices) - first + 1, *label_maps[0].shape), np.uint8)
    for label_map, index in zip(label_maps, slice_indices, strict=True):
        stack[index - first] = label_map
    stack = keep_largest_components(stack)
    return [stack[index - first] for index in slice_indices]
