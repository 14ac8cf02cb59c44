"""The steps of a fine-tuning recipe: train, merge, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from olive.models.artifact import ModelInfo

Because = Callable[[str, str], None]


class Method(NamedTuple):
    """One way to fine-tune: its pass, whether it makes an adapter or reads pairs, its usual learning rate."""

    type: str
    adapter: bool = True
    learning_rate: float = 2e-4
    pairs: bool = False


METHODS = {
    "lora": Method("LoRA"),
    "qlora": Method("QLoRA"),
    "dora": Method("DoRA"),
    "loha": Method("LoHa"),
    "lokr": Method("LoKr"),
    "dpo": Method("DPO", learning_rate=1e-5, pairs=True),
    "orpo": Method("ORPO", learning_rate=1e-5, pairs=True),
    "full": Method("FullFinetune", adapter=False, learning_rate=2e-5),
}


@dataclass(frozen=True, slots=True)
class Request:
    """What the user says; None is left to the recipe.

    Attributes:
        model: folder or hub id.
        data: file, folder or hub name.
        method: one of ``METHODS``.
        eval_size: below 1 a share, from 1 on a number of rows, 0 for none.
        precision: of the exported model; ``none`` exports nothing.
        download: read a dataset of the hub that is not here.
    """

    model: str
    data: str
    method: str = "lora"
    output_dir: str | None = None
    cache_dir: str | None = None
    template: str | None = None
    text_cols: tuple[str, ...] = ()
    split: str = "train"
    eval_data: str | None = None
    eval_size: float | None = None
    epochs: float | None = None
    max_steps: int | None = None
    learning_rate: float | None = None
    r: int | None = None
    alpha: float | None = None
    max_seq_len: int | None = None
    precision: str = "int4"
    device: str | None = None
    devices: int | None = None
    seed: int | None = None
    download: bool = False


def steps(
    request: Request, info: ModelInfo, device: str, evaluation: dict[str, Any], because: Because
) -> dict[str, Any]:
    """The passes of the document.

    Args:
        request: what the user says.
        info: the model.
        device: where it runs.
        evaluation: the training step's settings that say what it is evaluated on; empty for nothing.
        because: told every choice with its reason.
    """
    method = METHODS[request.method]
    step: dict[str, Any] = {"type": method.type}
    if method.adapter:
        rank = 16 if request.r is None else request.r
        alpha = 2 * rank if request.alpha is None else request.alpha
        step |= {"r": rank, "alpha": alpha, "target_modules": ["all-linear"]}
        if request.r is None or request.alpha is None:
            because(f"r {rank}, alpha {alpha:g}", "usual; --r, --alpha")
        because("target_modules all-linear", "every linear layer but the head learns better than a few")
    step |= {"train_data_config": "train"} | evaluation
    step["training_args"] = _training(request, method, bool(evaluation), because)
    passes = {"finetune": step}
    if method.adapter:
        passes["merge"] = {"type": "MergeAdapterWeights"}
    if request.precision != "none":
        passes["export"] = {"type": "ModelBuilder", "precision": request.precision}
    if request.precision == "int4":
        passes["export"] |= _quantiser(device, because)
    return passes


def _training(request: Request, method: Method, evaluated: bool, because: Because) -> dict[str, Any]:
    args: dict[str, Any] = {}
    if request.seed is not None:
        args["seed"] = request.seed
    if request.max_steps is not None:
        args["max_steps"] = request.max_steps
    else:
        epochs = 3 if request.epochs is None else request.epochs
        args["num_train_epochs"] = int(epochs) if epochs == int(epochs) else epochs
        if request.epochs is None:
            because("num_train_epochs 3", "usual; --epochs, --max-steps")
    args["learning_rate"] = request.learning_rate or method.learning_rate
    if request.learning_rate is None:
        because(f"learning_rate {method.learning_rate:g}", f"usual for {request.method}; --lr")
    args["logging_steps"] = 0.05  # of all steps: 20 points of the curve
    if evaluated:
        args["eval_strategy"] = "epoch"
    return args


def _quantiser(device: str, because: Because) -> dict[str, Any]:
    """The most exact int4 that runs fast on the device."""
    size = 16 if device == "cpu" else 32
    because(f"algo_config k_quant_mixed, block_size {size}", "the most exact int4 that the builder makes")
    return {"algo_config": "k_quant_mixed", "block_size": size}
