"""The workflow document in today's spelling: one name a setting, closed at every depth.

Setting names and defaults follow Olive 0.13 where it has the concept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    PrivateAttr,
    SerializeAsAny,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from olive.config.base import Dtype, Frozen, PassParams
from olive.config.gates import Gates

Device = Literal["cpu", "gpu", "npu"]
ExecutionProvider = Literal[
    "CPUExecutionProvider",
    "CUDAExecutionProvider",
    "DmlExecutionProvider",
    "OpenVINOExecutionProvider",
    "TensorrtExecutionProvider",
    "NvTensorRTRTXExecutionProvider",
    "ROCMExecutionProvider",
    "MIGraphXExecutionProvider",
    "QNNExecutionProvider",
    "VitisAIExecutionProvider",
    "WebGpuExecutionProvider",
    "JsExecutionProvider",
]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class LoadKwargs(Frozen):
    """How the model is loaded."""

    trust_remote_code: bool = Field(
        False, description="Run code that the model's repository brings. Needs `revision`."
    )
    revision: str | None = Field(None, description="Revision of a hub model; 40 hex digits pin it.")
    torch_dtype: Dtype | None = Field(
        None, description="Dtype to load weights in; default: what the device does natively."
    )
    attn_implementation: str | None = Field(None, description="Attention back end of transformers.")


class HfModel(Frozen):
    """A Hugging Face model: a local folder or a hub id."""

    type: Literal["HfModel"] = Field("HfModel", description="A model in the Hugging Face form.")
    model_path: str = Field(description="Local folder or hub id.")
    task: str = Field("text-generation", description="What the model does.")
    adapter_path: str | None = Field(None, description="Folder of a PEFT adapter for this base.")
    load_kwargs: LoadKwargs = Field(LoadKwargs(), description="How it is loaded.")


class OnnxModel(Frozen):
    """An ONNX graph, or a folder that ONNX Runtime GenAI reads."""

    type: Literal["OnnxModel"] = Field("OnnxModel", description="A model in the ONNX form.")
    model_path: str = Field(description="The `.onnx` file, or the folder that holds it.")
    onnx_file_name: str | None = Field(None, description="Of a folder with several graphs: which one.")

    @property
    def load_kwargs(self) -> LoadKwargs:
        """As of a Hugging Face model that is loaded in no special way."""
        return LoadKwargs()

    @property
    def adapter_path(self) -> str | None:
        """No adapter applies to a graph."""
        return None


def _form(given: Any) -> str:
    """The ``type`` of an input model: HfModel where the document names none."""
    found = given.get("type") if isinstance(given, Mapping) else getattr(given, "type", None)
    return "OnnxModel" if found == "OnnxModel" else "HfModel"


InputModel = Annotated[
    Annotated[HfModel, Tag("HfModel")] | Annotated[OnnxModel, Tag("OnnxModel")], Discriminator(_form)
]


class Accelerator(Frozen):
    """One device and the execution providers to use on it."""

    device: Device = Field("cpu", description="Default: what the first execution provider runs on.")
    execution_providers: tuple[ExecutionProvider, ...] = Field(
        (), description="The first is used. Default: CUDA on gpu, else CPU."
    )

    @property
    def execution_provider(self) -> ExecutionProvider:
        """The provider in use: the first named, else the device's own."""
        if self.execution_providers:
            return self.execution_providers[0]
        return "CUDAExecutionProvider" if self.device == "gpu" else "CPUExecutionProvider"


class Devices(Frozen):
    """Processes that train one model together, each with a device of its own."""

    count: int | Literal["auto"] = Field(
        "auto", description="Devices of this machine; auto: every GPU that a step has a row for, or one CPU."
    )
    strategy: Literal["auto", "ddp", "fsdp"] = Field(
        "auto",
        description="`ddp`: the whole model on each. `fsdp`: a part of every weight on each. auto: `ddp` "
        "where the model fits.",
    )
    hosts: int = Field(
        1,
        ge=1,
        le=4096,
        description="Machines that train together. Start the same command on each, with its number from 0 in "
        "OLIVE_HOST (SLURM_NODEID, NODE_RANK and GROUP_RANK are looked at too), in the same shared folder.",
    )
    address: str | None = Field(
        None,
        pattern=r"^[^:\s]+:\d{1,5}$",
        description="`name:port` of the first host, where the others meet it.",
    )

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if self.hosts > 1 and self.address is None:
            raise ValueError("several hosts need the `address` of the first, for example node0:29500")
        return self

    @field_validator("count")
    @classmethod
    def _some(cls, count: int | str) -> int | str:
        if isinstance(count, int) and not 1 <= count <= 1024:
            raise ValueError("between 1 and 1024 devices, or auto")
        return count


class LocalSystem(Frozen):
    """This machine."""

    type: Literal["LocalSystem"] = Field("LocalSystem", description="This machine.")
    accelerators: tuple[Accelerator, ...] = Field((Accelerator(),), description="The first is used.")
    devices: Devices = Field(
        Devices(),
        description="How many devices train at once: a number, `auto`, or an object. A step has as many rows "
        "as on one device, so the model is the same.",
    )

    @field_validator("devices", mode="before")
    @classmethod
    def _counted(cls, devices: object) -> object:
        return {"count": devices} if isinstance(devices, int | str) else devices


class LoadDataset(Frozen):
    """Which rows. `data_name` is `json`, `csv`, `parquet`, a hub name or a local folder."""

    data_name: str = Field(description="`json`, `csv`, `parquet`, a hub name or a local folder.")
    subset: str | None = Field(None, description="Configuration of a hub dataset.")
    split: str = Field("validation", description="Which split; slices such as `train[:10%]` work.")
    data_dir: str | None = Field(None, description="Folder inside the dataset.")
    data_files: str | tuple[str, ...] | dict[str, str | tuple[str, ...]] | None = Field(
        None, description="File or files to read; with an object, by split."
    )
    max_rows: int | None = Field(
        None,
        ge=1,
        description="Rows to keep: a random choice of the split's rows, always the same one, in their order. "
        "The first rows instead: `train[:100]` as `split`.",
    )
    streaming: bool | None = Field(
        None,
        description="Fine-tuning reads the rows some at a time and keeps their tokens on disk, for data "
        "larger than memory; what is learnt is the same. Default: where the data would take half of the "
        "free memory.",
    )
    revision: str | None = Field(None, description="Revision of a hub dataset.")
    trust_remote_code: bool = Field(False, description="Run code that the dataset brings.")


Format = Literal["auto", "messages", "sharegpt", "alpaca", "prompt-completion", "preference"]
Strategy = Literal[
    "line-by-line", "line-by-line-random", "join", "join-random", "join-sliding-window", "pack"
]


class PreProcess(Frozen):
    """Rows to text to token blocks."""

    text_cols: tuple[str, ...] = Field(
        ("text",), description="Columns joined by a space when there is no template."
    )
    text_template: str | None = Field(None, description="Python format string over the columns.")
    chat_template: bool | str = Field(
        False, description="Render `message_col` with the model's chat template, or with this one."
    )
    message_col: str = Field("messages", description="Column that holds the chat turns.")
    format: Format | None = Field(
        None,
        description="Form of chat data, rendered with the model's chat template, or as `### User:` and "
        "`### Assistant:` paragraphs where it has none. `messages`: `message_col` holds turns with role and "
        "content; `sharegpt`: `conversations` holds turns with from and value; `alpaca`: `instruction`, "
        "`input`, `output`; `prompt-completion`: `prompt`, `completion`; `preference`: `prompt`, `chosen`, "
        "`rejected`, or `chosen` and `rejected` as whole conversations that begin alike. `auto` finds it "
        "out. Default: found out where there is no template and the data has no column `text`.",
    )
    strategy: Strategy = Field("join", description="How rows become blocks of tokens.")
    max_seq_len: int = Field(1024, ge=2, le=1 << 24, description="Tokens in a block.")
    stride: int | None = Field(None, ge=1, description="Step of join-sliding-window, in tokens.")
    joiner: str = Field("\n\n", description="Text between joined rows.")
    max_samples: int | None = Field(None, ge=1, description="Blocks to keep; draws of the random strategies.")
    drop_short_sequences: bool = Field(False, description="line-by-line: drop rows shorter than max_seq_len.")
    random_seed: int | None = Field(None, ge=0, description="Seed of the random strategies.")
    random_retries: int = Field(10, ge=0, description="Draws repeated when a row is too short.")
    add_special_tokens: bool = Field(
        True, description="BOS where the tokenizer itself puts one, and EOS after each row."
    )
    pad_to_max_len: bool = Field(
        False, description="Accepted; padding is never computed, the result is the same."
    )
    padding_side: Literal["left", "right"] = Field(
        "right", description="Accepted; padding is never computed."
    )
    use_attention_mask: bool = Field(True, description="Accepted; padding never takes part in attention.")
    train_on: Literal["all", "completion", "assistant"] | None = Field(
        None,
        description="`completion` masks everything before the template's last field, `assistant` everything "
        "but the assistant's turns and the token that ends each. Default: `assistant` for data of a chat "
        "`format`, else `all`.",
    )


class Dataloader(Frozen):
    """Batching for evaluation."""

    batch_size: int = Field(1, ge=1, description="Rows evaluated at once.")


class MixPart(Frozen):
    """One dataset of a mix."""

    name: str = Field(
        description="Data config to take rows from.", json_schema_extra={"reference": "data_configs"}
    )
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="How often each of its rows is taken: 1 once, 2 twice, 0.5 every other, chosen by seed.",
    )


class DataConfig(Frozen):
    """A named dataset."""

    name: Name = Field(description="What passes and metrics call it.")
    type: Literal["HuggingfaceContainer"] = Field(
        "HuggingfaceContainer", description="Rows with named columns."
    )
    mix: tuple[MixPart, ...] = Field(
        (),
        description="Other data configs to take the rows from, instead of `load_dataset_config`. Each row "
        "becomes text as its own config says; the rows are shuffled by `random_seed` (0 where there is none) "
        "and become blocks as this config says.",
    )
    load_dataset_config: LoadDataset = Field(
        LoadDataset(data_name="mix"), validate_default=True, description="Which rows. Required without `mix`."
    )
    pre_process_data_config: PreProcess = Field(PreProcess(), description="Rows to text to token blocks.")
    dataloader_config: Dataloader = Field(Dataloader(), description="Batching for evaluation.")
    _members: tuple[DataConfig, ...] = PrivateAttr(())

    @field_validator("load_dataset_config")
    @classmethod
    def _from_one_place(cls, load: LoadDataset, info: ValidationInfo) -> LoadDataset:
        given = load != cls.model_fields["load_dataset_config"].default
        if not given and not info.data.get("mix"):
            raise PydanticCustomError("missing", "Field required")
        if given and info.data.get("mix"):
            raise ValueError("a config with `mix` has its rows from there: remove `load_dataset_config`")
        return load

    @property
    def members(self) -> tuple[DataConfig, ...]:
        """The data configs of ``mix``, in order; empty until the document's configs are linked."""
        return self._members


def link(configs: Sequence[DataConfig]) -> None:
    """Let each mix among ``configs`` know the configs it names; not where a name is wrong or its own."""
    named = {config.name: config for config in configs}
    for config in configs:
        parts = [named.get(part.name) for part in config.mix]
        if all(part is not None for part in parts) and not mix_cycle(configs, config.name):
            config._members = tuple(part for part in parts if part is not None)


def mix_cycle(configs: Sequence[DataConfig], name: str) -> tuple[str, ...]:
    """The names from ``name`` back to itself through mixes; empty when there is no such way."""
    named = {config.name: config for config in configs}
    ways: list[tuple[str, ...]] = [(name,)]
    seen: set[str] = set()
    while ways:
        way = ways.pop()
        for part in named[way[-1]].mix if way[-1] in named else ():
            if part.name == name:
                return (*way, name)
            if part.name not in seen:
                seen.add(part.name)
                ways.append((*way, part.name))
    return ()


class Goal(Frozen):
    """What a metric must reach; relative goals compare with the input model."""

    type: Literal[
        "threshold",
        "max-degradation",
        "min-improvement",
        "percent-max-degradation",
        "percent-min-improvement",
    ] = Field(description="What is compared.")
    value: float = Field(description="The bound; percent where the type says so.")


class SubMetric(Frozen):
    """One number of a metric."""

    name: str = Field(description="Which number of the metric.")
    priority: int = Field(-1, description="1 is the most important; -1 is reported only.")
    higher_is_better: bool | None = Field(None, description="Default: what the number's name implies.")
    goal: Goal | None = Field(None, description="What it must reach.")


class Metric(Frozen):
    """A group of numbers measured together."""

    name: Name = Field(description="What the report calls it.")
    type: Literal["accuracy", "perplexity", "latency", "throughput", "size_on_disk"] = Field(
        description="What is measured."
    )
    data_config: str | None = Field(
        None, description="Data to measure on.", json_schema_extra={"reference": "data_configs"}
    )
    sub_types: tuple[SubMetric, ...] = Field((), description="Empty: every number the metric has.")
    labels: tuple[str, ...] = Field(
        (), description="accuracy: the label set; default: the completions in the data."
    )
    max_new_tokens: int = Field(8, ge=1, description="accuracy: longest answer generated.")
    max_samples: int | None = Field(None, ge=1, description="Rows to use; default: all.")
    batch_size: int = Field(16, ge=1, description="Rows at once.")
    warmup: int = Field(2, ge=0, description="latency, throughput: runs not counted.")
    repeat: int = Field(5, ge=1, description="latency, throughput: runs counted.")
    prompt_tokens: int = Field(64, ge=1, description="latency, throughput: tokens in the prompt.")
    new_tokens: int = Field(32, ge=1, description="latency, throughput: tokens generated.")


class Evaluator(Frozen):
    """A named set of metrics."""

    metrics: tuple[Metric, ...] = Field(min_length=1, description="What to measure.")


class PassEntry(Frozen):
    """One step: which pass, where, with which parameters."""

    type: str
    host: str | None = None
    evaluator: str | None = Field(None, description="Evaluator to run on this step's result.")
    params: SerializeAsAny[PassParams]


class Workflow(Frozen):
    """The whole document."""

    input_model: InputModel = Field(description="The model to start from.")
    systems: Mapping[str, LocalSystem] = Field(
        default_factory=lambda: {"local_system": LocalSystem()}, description="Machines, by name."
    )
    data_configs: tuple[DataConfig, ...] = Field((), description="Datasets.")
    evaluators: Mapping[str, Evaluator] = Field({}, description="Sets of metrics, by name.")
    passes: Mapping[str, PassEntry] = Field({}, description="The steps, by name, in the order they run.")
    host: str = Field("local_system", description="System that passes run on.")
    target: str = Field("local_system", description="System that the result is for; evaluation runs on it.")
    evaluator: str | None = Field(None, description="Evaluator to run on the final model.")
    evaluate_input_model: bool = Field(True, description="Run the evaluator on the input model too.")
    search_strategy: Literal[False] | None = Field(None, description="There is no search in this version.")
    gates: Gates = Field(Gates(), description="Checks between stages.")
    cache_dir: str = Field(".olive-cache", description="Folder of the store.")
    output_dir: str = Field("olive-output", description="Folder the result is written to.")
    log_severity_level: int = Field(
        1, ge=0, le=4, description="0 debug, 1 info, 2 warning, 3 error, 4 critical."
    )

    @model_validator(mode="after")
    def _link(self) -> Self:
        link(self.data_configs)
        return self

    def data_config(self, name: str) -> DataConfig:
        """The data config called ``name``; the loader has checked that it exists."""
        return next(config for config in self.data_configs if config.name == name)
