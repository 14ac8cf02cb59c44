"""What a run would do, found without doing it: steps, keys, requirements, estimates, problems."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olive.config.loader import Loaded
from olive.config.workflow import Accelerator, DataConfig, PassEntry, Workflow
from olive.data.plan import Preview, look, preview
from olive.data.rows import is_local
from olive.data.rows import where as place_of
from olive.data.split import split_seed
from olive.engine.bits import BitsByStep
from olive.engine.chain import check_passes, left
from olive.engine.defects import defect
from olive.engine.devices import (
    accelerator_of,
    check_devices,
    check_shares,
    devices_of,
    host_number,
)
from olive.engine.given import check_trust, given_model
from olive.engine.keys import data_names, step_parts
from olive.engine.output import check_output
from olive.engine.resources import check_resources, check_writable
from olive.errors import OliveError, Problem, Severity
from olive.evaluation.check import check_evaluator
from olive.hardware.machine import Machine
from olive.hardware.probe import disk_free, probe, training_dtype
from olive.hardware.tested import check as check_versions
from olive.models.artifact import Artifact, Kind, ModelInfo
from olive.models.graph import takes_tokens
from olive.passes.base import Cost
from olive.passes.bits import PlannedBits
from olive.passes.registry import resolve
from olive.store.keys import key as make_key
from olive.store.store import Store


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step as it would run.

    Attributes:
        name, type: as in the document.
        params: resolved, as JSON.
        host: name of the system it runs on.
        accelerator: the host's device and providers.
        dtype: the dtype it trains in; empty where the step trains nothing.
        processes, strategy: how many processes run it together, and how they share the model.
        hosts: how many machines they run on.
        key: cache key; None until the step before it has run.
        cached: the store holds its result.
        cost: expected memory, disk and time.
        bits: which integers it gives how many layers; None where it makes none.
    """

    name: str
    type: str
    params: dict[str, Any]
    host: str
    accelerator: Accelerator
    dtype: str
    processes: int
    strategy: str
    hosts: int
    key: str | None
    cached: bool
    cost: Cost
    bits: PlannedBits | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """What ``run`` will do. ``findings`` holds errors too: ``raise_errors(plan.findings)`` stops on them."""

    loaded: Loaded
    workflow: Workflow
    document: dict[str, Any]
    base_dir: Path
    machine: Machine
    model: Artifact | None
    info: ModelInfo | None
    steps: tuple[PlannedStep, ...]
    previews: Mapping[str, Preview]
    findings: tuple[Problem, ...]
    store_root: Path
    output_dir: Path
    disk_free: int

    @property
    def host(self) -> int:
        """Which of the hosts that share its steps this is; 0 carries the plan out."""
        devices = [devices_of(self.workflow, step.host) for step in self.steps if step.hosts > 1]
        return max((host_number(each) or 0 for each in devices), default=0)

    @property
    def to_run(self) -> tuple[PlannedStep, ...]:
        """Steps that the store does not hold."""
        return tuple(step for step in self.steps if not step.cached)


def plan(loaded: Loaded, *, cache_dir: Path | None = None, output_dir: Path | None = None) -> Plan:
    """Plan the workflow. Never imports torch, never downloads, never writes outside the cache folder."""
    workflow = loaded.workflow
    machine = probe()
    root = (cache_dir or loaded.base_dir / workflow.cache_dir).absolute()
    out = (output_dir or loaded.base_dir / workflow.output_dir).absolute()
    findings: list[Problem] = [*loaded.findings, *check_versions(machine.packages)]
    findings += check_devices(workflow, machine)
    findings += check_output(out, root)
    info, model = given_model(loaded, root, findings)
    if info is not None:
        findings += check_trust(workflow, info)
        findings += [Problem(note, "input_model", severity=Severity.NOTE) for note in info.notes]
    previews = _previews(loaded, info, machine, findings)
    findings += check_passes(workflow, info, machine)
    for name in {entry.evaluator for entry in workflow.passes.values()} | {workflow.evaluator}:
        if name is not None:
            findings += check_evaluator(workflow.evaluators[name], workflow)
            if info is not None and info.kind is Kind.ONNX:
                findings.append(
                    Problem(
                        "a plain ONNX graph cannot be evaluated in this version",
                        f"evaluators.{name}",
                        "Leave `evaluator` out; the graph gate compares what comes out with what went in.",
                    )
                )
    broken = any(problem.severity is Severity.ERROR for problem in findings)
    with closing(Store(root)) as store:
        steps = tuple(_steps(loaded, info, None if broken else model, machine, store, previews, findings))
        findings += store.findings
    findings += check_resources(steps, machine, root)
    findings += check_writable(root, out)
    return Plan(
        loaded=loaded,
        workflow=workflow,
        document=loaded.document,
        base_dir=loaded.base_dir,
        machine=machine,
        model=model,
        info=info,
        steps=steps,
        previews=previews,
        findings=tuple(findings),
        store_root=root,
        output_dir=out,
        disk_free=disk_free(root),
    )


def _previews(
    loaded: Loaded, info: ModelInfo | None, machine: Machine, findings: list[Problem]
) -> dict[str, Preview]:
    workflow = loaded.workflow
    used = {name for entry in workflow.passes.values() for name in data_names(entry)}
    used |= {m.data_config for e in workflow.evaluators.values() for m in e.metrics if m.data_config}
    exported = any(resolve(entry.type).produces is Kind.GENAI for entry in workflow.passes.values())
    paired = {
        name for entry in workflow.passes.values() if resolve(entry.type).pairs for name in data_names(entry)
    }
    previews: dict[str, Preview] = {}
    for config in workflow.data_configs:
        if config.name in used and info is not None:
            try:
                held_out, seed = _held_out(workflow, config.name)
                if info.kind is Kind.ONNX and not takes_tokens(info):
                    previews[config.name] = look(config, loaded.base_dir)
                    continue
                previews[config.name] = preview(
                    config,
                    loaded.base_dir,
                    info.path,
                    eval_size=held_out,
                    seed=seed,
                    runtime=exported and not previews,
                    memory=machine.memory_available,
                    pairs=config.name in paired,
                )
            except OliveError as error:
                findings.extend(error.problems)
            else:
                findings.extend(previews[config.name].problems)
                findings.extend(_check_fetchable(config, loaded.base_dir, machine))
    return previews


def _check_fetchable(config: DataConfig, base_dir: Path, machine: Machine) -> Iterator[Problem]:
    if not is_local(config, base_dir) and "datasets" not in machine.packages:
        yield Problem(
            f"loading {config.load_dataset_config.data_name!r} needs datasets, not installed",
            place_of(config),
            "pip install 'olive-next[cpu]'",
            exit_code=5,
        )


def _held_out(workflow: Workflow, name: str) -> tuple[float, int | None]:
    """What the pass that trains on this data splits off for evaluation, and its seed."""
    for entry in workflow.passes.values():
        if getattr(entry.params, "train_data_config", None) == name:
            size = getattr(entry.params, "eval_dataset_size", None) or 0
            return size, split_seed(getattr(entry.params, "training_args", {}))
    return 0, None


def _dtype(entry: PassEntry, machine: Machine, accelerator: Accelerator) -> str:
    if "training_dtype" not in resolve(entry.type).hardware:
        return ""
    return getattr(entry.params, "torch_dtype", None) or training_dtype(machine, accelerator.device)


def _estimate(
    entry: PassEntry,
    info: ModelInfo,
    machine: Machine,
    previews: Mapping[str, Preview],
    findings: list[Problem],
) -> Cost:
    try:
        return resolve(entry.type)().estimate(info, entry.params, machine, previews)
    except OliveError as error:
        findings.extend(error.problems)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - third-party code
        findings.append(defect(entry, "estimate", error))
    return Cost(memory=0, disk=0)


def _steps(
    loaded: Loaded,
    info: ModelInfo | None,
    model: Artifact | None,
    machine: Machine,
    store: Store,
    previews: Mapping[str, Preview],
    findings: list[Problem],
) -> Iterator[PlannedStep]:
    workflow = loaded.workflow
    # None: layers of a model or a document with errors cannot be told
    bits = info and model and BitsByStep(info, accelerator_of(workflow, workflow.target), findings)
    for name, entry in workflow.passes.items():
        host = entry.host or workflow.host
        accelerator = accelerator_of(workflow, host)
        step_key, found = None, None
        if model is not None:
            parts = parts_of(loaded, entry, model, machine, store.root)
            step_key = make_key(parts)
            found = store.lookup(step_key, verify=False)
        processes, strategy = 1, "ddp"
        if info is not None:
            devices = devices_of(workflow, host)
            processes, strategy = resolve(entry.type)().processes(
                info, entry.params, machine, accelerator, devices
            )
            findings += check_shares(name, entry, devices, processes)
        cost = _estimate(entry, info, machine, previews, findings) if info else Cost(memory=0, disk=0)
        planned = bits.of(entry, model) if bits else None
        if planned is not None and planned.bytes and not planned.chooses:
            cost = cost.model_copy(update={"disk": planned.bytes})
        yield PlannedStep(
            name=name,
            type=entry.type,
            params=entry.params.model_dump(mode="json"),
            host=host,
            accelerator=accelerator,
            dtype=_dtype(entry, machine, accelerator),
            processes=processes,
            strategy=strategy,
            hosts=devices_of(workflow, host).hosts if processes > 1 else 1,
            key=step_key,
            cached=found is not None,
            cost=cost,
            bits=planned,
        )
        model = None if found is None or model is None else stored_artifact(found, model)
        info = info and left(resolve(entry.type)(), info, entry)


def parts_of(
    loaded: Loaded, entry: PassEntry, model: Artifact, machine: Machine, root: Path
) -> dict[str, Any]:
    """The parts of a step's key; ``root`` is the store's folder."""
    workflow = loaded.workflow
    return step_parts(
        entry,
        model,
        workflow,
        accelerator=accelerator_of(workflow, entry.host or workflow.host),
        target=accelerator_of(workflow, workflow.target),
        machine=machine,
        base_dir=loaded.base_dir,
        memo=root / "digests.json",
    )


def stored_artifact(entry: Any, model: Artifact) -> Artifact:
    """The artifact in a store entry; an adapter refers to the model it was trained on."""
    kind = Kind(entry.meta["kind"])
    base = (model.base or model) if kind is Kind.ADAPTER else None
    return Artifact(
        kind=kind, path=entry.path, digest=entry.digest, attributes=entry.meta["attributes"], base=base
    )
