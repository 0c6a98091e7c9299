"""Hyperparameters of the training loop."""

from dataclasses import asdict, dataclass
from typing import Literal

from minissl.errors import InputError

Precision = Literal["auto", "fp32", "bf16"]
POSITIVE = ("batch_size", "adam_eps", "grad_accum_steps", "schedule_fraction")  # something is divided by these


@dataclass(frozen=True)
class TrainConfig:
    """Hyperparameters of the training loop; those of a method are arguments of its constructor.

    Args:
        epochs: number of passes over the images; used when minutes is 0.
        minutes: duration, used instead of epochs unless 0. At the start the time of a step is measured and the number
            of steps planned; it is revised if the machine becomes slower or faster, see `training.plan`.
        batch_size: images per step, over all processes.
        optimizer: "adamw", or "lars" for very large batches of a convolutional network.
        beta2: AdamW's decay of the second moment.
        adam_eps: added to the root of AdamW's second moment.
        lr: peak learning rate, reached at the end of the warmup.
        final_lr: learning rate at the end of the schedule, reached along a cosine.
        warmup_fraction: fraction of the schedule over which the learning rate rises linearly from 0.
        weight_decay: weight decay at the start of the run; biases, norms and other vectors are never decayed.
        final_weight_decay: weight decay at the end of the schedule, reached along a cosine.
        freeze_encoder_fraction: fraction of the run, at its start, in which only the heads are trained: the gradients
            of new heads would damage a pretrained encoder.
        schedule_fraction: fraction of training over which the learning rate and weight decay are scheduled; 1 schedules
            the whole run, and after a smaller fraction both are constant at lr and weight_decay.
        clip_grad: maximum L2 norm of each parameter's gradient on its own, as in DINO; 0 disables clipping.
        precision: number format of the forward pass; "auto" takes bf16 where the hardware supports it, else fp32.
        shard: shard parameters, gradients and optimizer state across the processes of torchrun (FSDP2).
        compile: compile the encoders with torch.compile (on a CPU, a ViT's blocks); the first steps then take about
            a minute.
        grad_accum_steps: number of parts in which each batch is processed, to save memory; only for losses that are a
            mean over images.
        activation_checkpointing: recompute the activations of each ViT block in the backward pass, to save memory;
            costs one more forward pass.
        threads: of PyTorch on a CPU; 0 takes the number that is fastest in the first steps, and changes it when another
            one becomes faster; results are the same bit for bit only with a fixed number.
        seed: seed of all random numbers: initial weights, order of the images, augmentations.
        eval_minutes: minutes between two evaluations of the encoder by k-NN.
        save_minutes: minutes between two checkpoints.
    """

    epochs: float = 100.0
    minutes: float = 0.0
    batch_size: int = 64
    optimizer: Literal["adamw", "lars"] = "adamw"
    beta2: float = 0.999
    adam_eps: float = 1e-8
    lr: float = 5e-4
    final_lr: float = 1e-6
    warmup_fraction: float = 0.1
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    freeze_encoder_fraction: float = 0.0
    schedule_fraction: float = 1.0
    clip_grad: float = 3.0
    precision: Precision = "auto"
    shard: bool = False
    compile: bool = False
    grad_accum_steps: int = 1
    activation_checkpointing: bool = False
    threads: int = 0
    seed: int = 0
    eval_minutes: float = 2.0
    save_minutes: float = 1.0


def check_train_config(config: TrainConfig) -> None:
    """Raise InputError if a number is negative or NaN, or is 0 where something is divided by it."""
    for name, value in asdict(config).items():
        positive = name in POSITIVE
        if isinstance(value, int | float) and not (value > 0 if positive else value >= 0):
            raise InputError(f"--{name} is {value}; give a number {'above 0' if positive else 'of at least 0'}.")
