"""A whole fine-tuning document from a model and a dataset; what nobody said is looked up in these two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from olive.config.workflow import PreProcess
from olive.data.rows import Row
from olive.data.template import Text, render_all
from olive.data.tokens import LightTokenizer, load
from olive.errors import ConfigError, EnvironmentFault
from olive.hardware.probe import probe
from olive.models.artifact import Kind, ModelInfo
from olive.models.hf import describe
from olive.resources.resolve import locate
from olive.workflows import recipe_data as data_of
from olive.workflows.recipe_steps import METHODS, Request, steps
from olive.workflows.recipe_text import label_set, text_format

if TYPE_CHECKING:
    from olive.workflows.recipe_data import Parts, Source
    from olive.workflows.recipe_text import Format

__all__ = ["METHODS", "Recipe", "Request", "finetune"]


_FEWEST = 20  # rows; of fewer none are held out
_SHORTEST, _LONGEST = 512, 2048  # tokens of a block, when nobody says
_MEASURED = 2000  # rows, the longest by letters, whose tokens are counted


@dataclass(frozen=True, slots=True)
class Recipe:
    """A document, and why each choice in it that nobody made was made so: (choice, reason)."""

    document: dict[str, Any]
    reasons: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Data:
    """What is known of the data while the document grows."""

    train: dict[str, Any]
    held_out: dict[str, Any] | None = None
    split_off: int = 0
    texts: list[Text] = field(default_factory=list)
    rejected: list[Text] = field(default_factory=list)
    labels: list[str] | None = None
    longest: int = 0


def finetune(request: Request) -> Recipe:
    """The document that fine-tunes ``request.model`` on ``request.data``.

    Args:
        request: what the user says; relative paths are looked up from the working folder.

    Raises:
        OliveError: the model or the data is not there, or the data does not tell how to train on it.
    """
    return _Builder(request, Path.cwd()).build()


class _Builder:
    def __init__(self, request: Request, base_dir: Path) -> None:
        self.request = request
        self.base_dir = base_dir
        self.reasons: list[tuple[str, str]] = []
        self.pairs = METHODS[request.method].pairs
        self.info = self._model()
        self.tokenizer: LightTokenizer = load(self.info.path)
        config = self.info.config
        self.context = int(config.get("max_position_embeddings") or config.get("n_positions") or 0)
        self.device = self._device()

    def build(self) -> Recipe:
        request = self.request
        source = data_of.find(request.data, request.split, self.base_dir, download=request.download)
        self._because(f"data_name {source.load['data_name']}", f"{request.data} is {source.kind}")
        form = text_format(
            source.rows,
            template=request.template,
            text_cols=request.text_cols,
            chat=self.tokenizer.chat is not None,
            pairs=self.pairs,
        )
        if form.reason != "as given":
            self._because(", ".join(form.settings), form.reason)
        data = self._parts(source, form)
        strategy = {} if self.pairs else {"strategy": "pack"}
        pre = form.settings | strategy | {"max_seq_len": self._length(data)}
        document: dict[str, Any] = {"input_model": {"type": "HfModel", "model_path": request.model}}
        system: dict[str, Any] = {"type": "LocalSystem"}
        if self.device == "gpu":
            system["accelerators"] = [{"device": "gpu"}]
        if request.devices is not None:
            system["devices"] = request.devices
        if len(system) > 1:
            document["systems"] = {"local_system": system}
        document["data_configs"] = [
            {"name": name, "load_dataset_config": found, "pre_process_data_config": pre}
            for name, found in (("train", data.train), ("held_out", data.held_out))
            if found is not None
        ]
        evaluator = self._evaluator(data)
        if evaluator is not None:
            document["evaluators"] = {"quality": {"metrics": [evaluator]}}
        evaluation: dict[str, Any] = {}
        if data.held_out is not None:
            evaluation = {"eval_data_config": "held_out"}
        elif data.split_off:
            evaluation = {"eval_dataset_size": data.split_off}
        document["passes"] = steps(request, self.info, self.device, evaluation, self._because)
        if evaluator is not None:
            document["evaluator"] = "quality"
        for name in ("cache_dir", "output_dir"):
            if getattr(request, name) is not None:
                document[name] = getattr(request, name)
        return Recipe(document, tuple(self.reasons))

    def _because(self, choice: str, reason: str) -> None:
        self.reasons.append((choice, reason))

    def _model(self) -> ModelInfo:
        name = self.request.model
        try:
            info = describe(locate(name, self.base_dir))
        except EnvironmentFault as error:
            raise EnvironmentFault(
                error.problems[0].message,
                where="--model",
                fix="If it is a folder, check the spelling and the working folder. If it is a model of the "
                f"hub, --download fetches it first, and so does `hf download {name}`.",
            ) from error
        if info.kind is not Kind.HF:
            what = "an adapter" if info.kind is Kind.ADAPTER else "an exported model"
            raise ConfigError(
                f"{name} holds {what}, which cannot be fine-tuned",
                where="--model",
                fix="Name the folder of a whole model: config.json and *.safetensors.",
            )
        return info

    def _device(self) -> str:
        if self.request.device is not None:
            return self.request.device
        machine = probe()
        if not machine.gpus:
            self._because("device cpu", "this machine has no GPU with a working driver")
            return "cpu"
        if self.request.precision != "none" and "CUDAExecutionProvider" not in machine.execution_providers:
            self._because("device cpu", "the installed ONNX Runtime does not run on the GPU here")
            return "cpu"
        self._because("device gpu", f"there is a {machine.gpus[0].name}")
        return "gpu"

    def _parts(self, source: Source, form: Format) -> _Data:
        """Training and held-out part, rendered once to see labels, repeated rows and lengths."""
        request, data = self.request, _Data(train=source.load)
        data.texts = self._rendered(source.rows, form, "--data")
        more: list[Row] | None = None
        if request.eval_data is not None:
            local = (self.base_dir / request.eval_data).exists()
            found = data_of.find(
                request.eval_data,
                "train" if local else "validation",
                self.base_dir,
                option="--eval-data",
                download=request.download,
            )
            data.held_out, more = found.load, found.rows
        elif source.validation is not None and request.eval_size is None:
            data.held_out, more = (
                source.validation,
                data_of.rows_of(source.validation, self.base_dir, "--data"),
            )
            self._because("held_out", "the folder brings a part for validation")
        elif request.eval_size != 0:
            self._split(source, data)
        data.texts = [*data.texts, *self._rendered(more, form, "--eval-data")]
        if self.pairs:
            turned = [{**row, "chosen": row.get("rejected")} for row in [*(source.rows or []), *(more or [])]]
            data.rejected = self._rendered(turned, form, "--data")
        data.labels = None if self.pairs else label_set(data.texts, form.settings)
        return data

    def _rendered(self, rows: Sequence[Row] | None, form: Format, option: str) -> list[Text]:
        try:
            return render_all(PreProcess.model_validate(form.settings), rows or [], self.tokenizer.chat)
        except ConfigError as error:
            raise ConfigError(
                problems=[
                    replace(problem, where=f"{option}: {problem.where}" if problem.where else option)
                    for problem in error.problems
                ]
            ) from error

    def _split(self, source: Source, data: _Data) -> None:
        """Hold rows out, by name where the document can say it, so that metrics can use them too."""
        size, split, rows = self.request.eval_size, self.request.split, len(data.texts)
        whole = "+" not in split and "[" not in split
        if source.rows is None:
            if whole:
                parts = data_of.hold_out_unread(split, 0.1 if size is None else size)
                self._hold_out(source, data, parts, f"{parts.held_out}, never trained on; --eval-size")
            return
        if size is None and rows < _FEWEST:
            self._because("nothing held out", f"{rows} rows are too few to spare any")
            return
        count = data_of.held_out_rows(size, rows)
        named = data_of.hold_out(split, data.texts, count) if whole and not self.pairs else None
        if named is None:
            data.split_off = count
            why = (
                "some rows repeat, and equal ones stay on one side" if whole else f"{split} is a part itself"
            )
            if self.pairs:
                why = "the answers to one prompt stay on one side"
            self._because(f"eval_dataset_size {count}", f"{why}; --eval-data FILE brings metrics too")
            return
        spread = ", spread over the file, which is not in random order" if "+" in named.held_out else ""
        self._hold_out(source, data, named, f"{count} of {rows} rows, never trained on{spread}; --eval-size")

    def _hold_out(self, source: Source, data: _Data, parts: Parts, why: str) -> None:
        data.train = source.load | {"split": parts.train}
        data.held_out = source.load | {"split": parts.held_out}
        self._because("held_out", why)

    def _length(self, data: _Data) -> int:
        """Tokens of a block: the longest row, in steps of 64, within bounds."""
        pre = PreProcess(train_on="completion")
        texts = sorted([*data.texts, *data.rejected], key=lambda text: -len(text.full))[:_MEASURED]
        data.longest = max((len(row.ids) for row in self.tokenizer.encode_rows(texts, pre)), default=0)
        if self.request.max_seq_len is not None:
            return self.request.max_seq_len
        most = min(_LONGEST, self.context or _LONGEST)
        length = min(most, max(_SHORTEST, -(-data.longest // 64) * 64))
        why = f"the longest row has {data.longest} tokens" if data.texts else "the rows are not read yet"
        if length == most:
            limit = f"the model's context is {self.context}" if most == self.context else f"at most {most}"
            why += f"; {limit}"
        self._because(f"max_seq_len {length}", why)
        return length

    def _evaluator(self, data: _Data) -> dict[str, Any] | None:
        """Exact answers where the answers are labels, else perplexity, on rows that nothing trains on."""
        if data.held_out is None:
            return None
        if data.labels is not None:
            answers = {text.answer.strip(): text.completion for text in data.texts}
            longest = max(len(self.tokenizer.encode(text)) for text in answers.values()) + 1
            if not self.context or data.longest + longest <= self.context:
                self._because("accuracy", f"the answers are {len(data.labels)} labels")
                metric: dict[str, Any] = {"name": "accuracy", "type": "accuracy", "data_config": "held_out"}
                metric |= {"sub_types": [{"name": "exact_match", "priority": 1}], "labels": data.labels}
                return metric | ({"max_new_tokens": longest} if longest > 8 else {})
        self._because("perplexity", "the answers are no small set of labels")
        return {"name": "perplexity", "type": "perplexity", "data_config": "held_out"}
