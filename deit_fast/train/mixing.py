"""What timm's Mixup draws for a batch, for images that are mixed where they are normalised."""

from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import cutmix_bbox_and_lam, mixup_target
from torch import Tensor


class Mix(NamedTuple):
    """How images are mixed with those from the batch's other end, as `ops.normalise_pixels` takes it.

    shares: [B, 2], float32; boxes: [B, 4], int32; None where none is mixed so.
    """

    shares: Tensor | None = None
    boxes: Tensor | None = None


UNMIXED = Mix()


def draw(mixup: Mixup, shape: torch.Size, labels: Tensor) -> tuple[Tensor, Mix]:
    """The targets that `mixup(images, labels)` returns for images of `shape` [B, C, H, W], and how it mixes these."""
    batch = shape[0]
    lams: Any
    if mixup.mode == "batch":
        lam, cut = mixup._params_per_batch()
        lams, cuts = [lam], [cut]
    else:
        lams, cuts = mixup._params_per_elem(batch if mixup.mode == "elem" else batch // 2)
    # 1 - lam rounds as timm's does: in float32 where each image has its own, else in float64 first.
    shares, boxes = [(lam, 1 - lam) for lam in lams], [(0, 0, 0, 0)] * len(lams)
    for i, (lam, cut) in enumerate(zip(lams, cuts, strict=True)):
        if cut and lam != 1:
            (top, bottom, left, right), lams[i] = cutmix_bbox_and_lam(
                shape, lam, mixup.cutmix_minmax, mixup.correct_lam
            )
            shares[i], boxes[i] = (1, 0), (top, left, bottom - top, right - left)
    if mixup.mode == "batch":
        of_targets, shares, boxes = lams[0], shares * batch, boxes * batch
    else:
        if mixup.mode == "pair":
            lams, shares, boxes = [*lams, *lams[::-1]], shares + shares[::-1], boxes + boxes[::-1]
        of_targets = torch.tensor(np.array(lams), dtype=torch.float32, device=labels.device).unsqueeze(1)
    mixes, cuts_out = any(own != 1 for own, _ in shares), any(height * width for _, _, height, width in boxes)
    return mixup_target(labels, mixup.num_classes, of_targets, mixup.label_smoothing), Mix(
        torch.tensor(np.array(shares, dtype=np.float32)) if mixes else None,
        torch.tensor(np.array(boxes, dtype=np.int32)) if cuts_out else None,
    )
