"""Ellipsoids and their parallel projections, in the tensors that biplanar networks read: quick to make and to learn."""

import torch
from torch.utils.data import Dataset

from spinelib.imaging.radiograph_pairs import BEHIND_MM, CUBE, CUBE_MM

BEHIND = round(BEHIND_MM / CUBE_MM)
LAST = CUBE - 1.0

# Rows run down; columns run from the patient's right to the left, and from anterior to posterior. The lateral patch
# is centred on the body, the cube behind it.
TO_FRONTAL = torch.tensor([[0, 0, -1, LAST], [-1, 0, 0, LAST], [0, 0, 0, 1]])
TO_LATERAL = torch.tensor([[0, 0, -1, LAST], [0, -1, 0, LAST + BEHIND], [0, 0, 0, 1]])


class Ellipsoids(Dataset):
    """`count` ellipsoids of random half axes and places; the level follows the size."""

    def __init__(self, count: int, seed: int = 0):
        random = torch.Generator().manual_seed(seed)
        self.items = [drawn_item(torch.rand(2, 3, generator=random)) for _ in range(count)]

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def batches(self, size: int):
        """Return all items in batches."""
        starts = range(0, len(self.items), size)
        return [torch.utils.data.default_collate(self.items[start : start + size]) for start in starts]


def drawn_item(random):
    """Return an item; `random` (2, 3) in 0..1 tells half axes and place."""
    half, centre = 10 + 12 * random[0], LAST / 2 + 8 * (random[1] - 0.5)
    index = torch.stack(torch.meshgrid(*[torch.arange(CUBE)] * 3, indexing="ij"), -1)
    mask = (((index - centre) / half) ** 2).sum(-1) < 1
    thick = mask.float()
    lateral = torch.nn.functional.pad(thick.sum(0), (0, 0, -BEHIND, BEHIND))
    return {
        "frontal": patch(thick.sum(1)),
        "lateral": patch(lateral),
        "target": mask[None].to(torch.uint8),
        "level": ((half.mean() - 10) / 12 * 17).long(),
        "cube_to_frontal": TO_FRONTAL,
        "cube_to_lateral": TO_LATERAL,
    }


def patch(shadow):
    """Return image and annotation (2, 64, 64) of a shadow (right or anterior, superior)."""
    image = shadow.T.flip(0, 1)
    disc = torch.zeros_like(image)
    disc[31:33, 31:33] = 1
    return torch.stack([(image - image.mean()) / image.std(), disc])


def random_batch(count: int = 1, seed: int = 0):
    """Return tensors of the right shapes that mean nothing."""
    random = torch.Generator().manual_seed(seed)
    return {
        "frontal": torch.randn(count, 2, CUBE, CUBE, generator=random),
        "lateral": torch.randn(count, 2, CUBE, CUBE, generator=random),
        "target": (torch.rand(count, 1, CUBE, CUBE, CUBE, generator=random) < 0.1).to(torch.uint8),
        "level": torch.randint(0, 17, (count,), generator=random),
        "cube_to_frontal": TO_FRONTAL.expand(count, 3, 4),
        "cube_to_lateral": TO_LATERAL.expand(count, 3, 4),
    }


def trained(network, batches: list, steps: int, rate: float):
    """Train on batches in turn as `spinelib.train` does, warm-up and clipping included; return the losses."""
    optimiser, losses = torch.optim.AdamW(network.parameters(), rate), []
    network.train()
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * min(1, (step + 1) / 5)
        with torch.autocast("cpu", torch.bfloat16):
            loss = network.loss(batches[step % len(batches)])
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    network.eval()
    return losses
