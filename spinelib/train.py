"""One training loop for every model of this package, on Lightning Fabric.

A model brings `loss(batch) -> scalar` (its unit is what the log shows, mm for curves). The loop brings devices,
mixed precision, seeds, weight averaging, exact resume from the last epoch, early stop and a CSV log. The same
code runs on a CPU, one GPU, or several through `torchrun --nproc-per-node N -m spinelib train ...`.
"""

import hashlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
from lightning_fabric import Fabric
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm.auto import tqdm

from spinelib.errors import InputError, SpinelibError
from spinelib.record import package_sha256

RECIPES = ("paper", "modern")

FINE_TUNING = 1 / 3
"""Peak rate of a training that goes on from trained weights, over that of one from scratch: more undoes them first."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes
    ----------
    epochs : int
    batch_size : int
    learning_rate : float
        Peak rate.
    recipe : str
        'paper': Adam, constant rate, coupled L2 of 1e-4, no averaging (released code of Bourigault 2024).
        'modern': AdamW, linear warm-up over 5% of the steps then cosine to 1%, exponential weight averaging.
    patience : int
        Epochs without a better validation loss before stopping; 0 = never.
    max_seconds : float
        Wall-clock budget, checked after each epoch; 0 = none. The schedule still assumes `epochs`.
    precision : str
        Fabric's name; 'auto' = bf16-mixed where the hardware multiplies bf16, else 32-true.
    seed : int
    """

    epochs: int = 10
    batch_size: int = 16
    learning_rate: float = 1e-3
    recipe: str = "modern"
    patience: int = 0
    max_seconds: float = 0.0
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self):
        if self.recipe not in RECIPES:
            message = f"unknown recipe {self.recipe!r}. Expected one of: {', '.join(map(repr, RECIPES))}."
            raise InputError(message)
        if self.epochs < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            message = (
                "epochs and batch_size must be at least 1 and learning_rate above 0, given "
                f"{self.epochs}, {self.batch_size}, {self.learning_rate}."
            )
            raise InputError(message)


def fit(
    model: torch.nn.Module,
    train: Dataset,
    validation: Dataset,
    config: TrainConfig,
    folder: str | Path,
    *,
    workers: int = 0,
    log_tensorboard: bool = False,
) -> pd.DataFrame:
    """Train `model` in place, on a GPU if there is one, and return the log, one row an epoch.

    The trained model lies on the device that it came on.

    Parameters
    ----------
    model : Module
        Has `loss(batch) -> scalar`.
    train, validation : Dataset
        Items are dicts of tensors. If `train` has `set_epoch`, it is told each epoch's number, so that
        augmentation depends on (seed, epoch, item) alone and a resumed run repeats an unbroken one exactly.
    folder : path
        Gets log.csv and last.ckpt. A training found there is continued if configuration, data and code are the
        same; otherwise it is kept as last.old.ckpt and the new one starts over, with a warning.

    Raises
    ------
    SpinelibError
        If the loss stops being finite.
    """
    folder, home = Path(folder), next(model.parameters()).device
    folder.mkdir(parents=True, exist_ok=True)
    fabric = Fabric(accelerator="auto", devices=_devices(), precision=resolve_precision(config.precision))
    fabric.launch()
    state = _TrainingState(fabric, model, train, validation, config, workers)
    state.resume(folder / "last.ckpt")
    writer = _tensorboard(folder) if log_tensorboard and fabric.is_global_zero else None
    bar = tqdm(
        total=config.epochs,
        initial=state.epoch,
        desc="training",
        unit="epoch",
        disable=not sys.stderr.isatty(),
    )
    while not state.finished():
        row = state.run_epoch()
        bar.update()
        bar.set_postfix(train=f"{row['train_loss']:.3f}", validation=f"{row['validation_loss']:.3f}")
        if fabric.is_global_zero:
            pd.DataFrame(state.log).to_csv(folder / "log.csv", index=False, float_format="%.6g")
        state.save(folder / "last.ckpt")
        for name in ("train_loss", "validation_loss") if writer else ():
            writer.add_scalar(name, row[name], row["epoch"])
    bar.close()
    state.load_best_into(model)
    model.to(home)
    return pd.DataFrame(state.log)


def fastest_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_precision(name: str = "auto") -> str:
    """Return Fabric's precision name: 'auto' picks bf16-mixed where the processor has bf16 arithmetic."""
    if name != "auto":
        return name
    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16-mixed" if has_bf16 else "32-true"


class _TrainingState:
    """Everything that a checkpoint must hold, and the work of one epoch."""

    def __init__(self, fabric, model, train, validation, config, workers):
        self.fabric, self.config, self.train_set = fabric, config, train
        fabric.seed_everything(config.seed, verbose=False)
        self.shuffle = torch.Generator()
        sampler = RandomSampler(train, generator=self.shuffle)
        loader = DataLoader(
            train,
            config.batch_size,
            sampler=sampler,
            num_workers=workers,
            drop_last=len(train) > config.batch_size,
        )
        self.loader = fabric.setup_dataloaders(loader)
        self.validation = fabric.setup_dataloaders(DataLoader(validation, config.batch_size, num_workers=workers))
        total = config.epochs * max(1, len(self.loader))
        optimiser, self.rate_of_step = _optimiser(model, config, total)
        self.average = _average(model) if config.recipe == "modern" else None
        self.model, self.optimiser = fabric.setup(model, optimiser)
        self.model.mark_forward_method("loss")
        if self.average is not None:
            self.average.to(fabric.device)
        self.epoch, self.step, self.log = 0, 0, []
        self.identity = {"config": asdict(config), "data": _fingerprint(train), "code": package_sha256()}
        self.best, self.best_weights, self.seconds = math.inf, None, 0.0

    def finished(self):
        stale = self.epoch - 1 - self._best_epoch()
        out_of_time = self.config.max_seconds and self.seconds >= self.config.max_seconds
        out_of_patience = self.config.patience and self.log and stale >= self.config.patience
        return self.epoch >= self.config.epochs or bool(out_of_time or out_of_patience)

    def run_epoch(self):
        start = time.perf_counter()
        self.shuffle.manual_seed(self.config.seed * 100_003 + self.epoch)
        if hasattr(self.train_set, "set_epoch"):
            self.train_set.set_epoch(self.epoch)
        train_loss = self._train_pass()
        validation_loss = self._validation_pass()
        if validation_loss < self.best:
            self.best = validation_loss
            self.best_weights = {k: v.detach().cpu().clone() for k, v in self._evaluated().state_dict().items()}
        self.seconds += time.perf_counter() - start
        row = {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "validation_loss": validation_loss,
            "learning_rate": self.optimiser.param_groups[0]["lr"],
            "seconds": round(self.seconds, 2),
        }
        self.log.append(row)
        self.epoch += 1
        return row

    def _train_pass(self):
        self.model.train()
        losses = []
        for batch in self.loader:
            rate = self.config.learning_rate * self.rate_of_step(self.step)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            with self.fabric.autocast():  # Fabric brings it to marked methods only where it wraps the model, as DDP
                loss = self.model.loss(batch)
            if not torch.isfinite(loss):
                message = f"the training loss became {loss.item()} in epoch {self.epoch}; lower learning_rate."
                raise SpinelibError(message)
            self.optimiser.zero_grad()
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.model, self.optimiser, max_norm=5.0)
            self.optimiser.step()
            if self.average is not None:
                self.average.update_parameters(self.model.module)
            losses.append(loss.detach())
            self.step += 1
        return self.fabric.all_reduce(torch.stack(losses).mean()).item()

    @torch.no_grad()
    def _validation_pass(self):
        model = self._evaluated().eval()
        with self.fabric.autocast():
            losses = [model.loss(batch).detach() * len(next(iter(batch.values()))) for batch in self.validation]
        return self.fabric.all_reduce(torch.stack(losses).sum() / len(self.validation.dataset)).item()

    def _evaluated(self):
        return self.average.module if self.average is not None else self.model.module

    def _best_epoch(self):
        return min(range(len(self.log)), key=lambda i: self.log[i]["validation_loss"]) if self.log else -1

    def save(self, path):
        if not self.fabric.is_global_zero:
            return
        part = path.with_suffix(".part")
        average = self.average.state_dict() if self.average is not None else None
        torch.save(
            {
                "identity": self.identity,
                "model": self.model.module.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "average": average,
                "counters": {
                    "epoch": self.epoch,
                    "step": self.step,
                    "best": self.best,
                    "seconds": self.seconds,
                },
                "best_weights": self.best_weights,
                "log": self.log,
                "random": torch.get_rng_state(),
            },
            part,
        )
        part.replace(path)

    def resume(self, path):
        if not path.is_file():
            return
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if saved.get("identity") != self.identity:
            path.replace(path.with_name("last.old.ckpt"))
            warnings.warn(
                f"{path} was made with another configuration, other data or other code; it is kept as last.old.ckpt "
                "and training starts over.",
                stacklevel=3,
            )
            return
        self.model.module.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.epoch, self.step, self.best, self.seconds = (
            saved["counters"][k] for k in ("epoch", "step", "best", "seconds")
        )
        self.best_weights, self.log = saved["best_weights"], saved["log"]
        torch.set_rng_state(saved["random"])

    def load_best_into(self, model):
        model.load_state_dict(self.best_weights)
        model.eval()


def _optimiser(model, config, total_steps) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    if config.recipe == "paper":
        adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate, weight_decay=1e-4)
        return adam, lambda step: 1.0
    warm_up = max(1, round(0.05 * total_steps))

    def rate(step):
        if step < warm_up:
            return (step + 1) / warm_up
        progress = (step - warm_up) / max(1, total_steps - warm_up)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.02), rate


def _average(model):
    # Batch-norm statistics are averaged too: the averaged network is the one that is validated and kept. The
    # memory grows with the steps, so that a short training is not held back by its random start.
    def follow(averaged, current, count):
        return current + (averaged - current) * min(0.99, (1 + count.item()) / (10 + count.item()))

    return AveragedModel(model, avg_fn=follow, use_buffers=True)


def _fingerprint(dataset):
    """Return a hash of a data set's size and of three of its items."""
    places = sorted({0, len(dataset) // 2, len(dataset) - 1})
    items = [value.numpy().tobytes() for i in places for value in dataset[i].values()]
    return hashlib.sha256(b"".join([str(len(dataset)).encode(), *items])).hexdigest()


def _devices():
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def _tensorboard(folder):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder)
