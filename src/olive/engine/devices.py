"""The devices and hosts that a document names: which they are, and whether they are there."""

from __future__ import annotations

import os
from collections.abc import Iterator

from olive.config.workflow import Accelerator, Devices, PassEntry, Workflow
from olive.errors import Problem, Severity
from olive.hardware.machine import Machine
from olive.passes.registry import resolve

HOST = ("OLIVE_HOST", "SLURM_NODEID", "NODE_RANK", "GROUP_RANK")


def accelerator_of(workflow: Workflow, system: str) -> Accelerator:
    """The device and providers of a system of the document."""
    accelerators = workflow.systems[system].accelerators if system in workflow.systems else ()
    return accelerators[0] if accelerators else Accelerator()


def devices_of(workflow: Workflow, system: str) -> Devices:
    """How many devices of a system train at once."""
    return workflow.systems[system].devices if system in workflow.systems else Devices()


def host_number(devices: Devices) -> int | None:
    """Which of several hosts this is, by the environment; None where it does not say."""
    if devices.hosts == 1:
        return 0
    found = next((os.environ[name] for name in HOST if os.environ.get(name, "").isdigit()), None)
    return int(found) if found is not None and int(found) < devices.hosts else None


def check_devices(workflow: Workflow, machine: Machine) -> Iterator[Problem]:
    """Devices, providers and hosts that are not here."""
    for name in sorted(
        {workflow.host, workflow.target} | {e.host for e in workflow.passes.values() if e.host}
    ):
        accelerator = accelerator_of(workflow, name)
        where = f"systems.{name}"
        if accelerator.device == "gpu" and not machine.gpus:
            yield Problem(
                "the document asks for a GPU, and this machine has none with a working driver",
                where,
                'Set its accelerators to [{"device": "cpu", "execution_providers": '
                '["CPUExecutionProvider"]}], or run on a machine with CUDA.',
                exit_code=5,
            )
        elif accelerator.device == "gpu" and _count(workflow, name) > len(machine.gpus):
            yield Problem(
                f"devices asks for {_count(workflow, name)} GPUs, and this machine has {len(machine.gpus)}",
                where,
                f"Set devices to {len(machine.gpus)} or auto.",
                exit_code=5,
            )
        elif host_number(devices_of(workflow, name)) is None:
            hosts = devices_of(workflow, name).hosts
            yield Problem(
                f"devices names {hosts} hosts, and nothing says which one this is",
                where,
                f"Start the same command on each with OLIVE_HOST set, from 0 to {hosts - 1}.",
                exit_code=5,
            )
        elif accelerator.device == "npu":
            yield Problem("no pass of this version runs on an NPU", where, "Use cpu or gpu.", exit_code=5)
        elif accelerator.execution_provider not in machine.execution_providers:
            yield Problem(
                f"{accelerator.execution_provider} is not available here; there is "
                f"{', '.join(machine.execution_providers)}",
                where,
                "Name one of these, or install the onnxruntime build that brings it.",
                exit_code=5,
            )


def _count(workflow: Workflow, system: str) -> int:
    count = devices_of(workflow, system).count
    return 1 if count == "auto" else count


def check_shares(name: str, entry: PassEntry, devices: Devices, processes: int) -> Iterator[Problem]:
    """Devices that a step leaves idle, and ways to share a model that its pass does not know."""
    if processes > 1 and devices.strategy not in ("auto", *resolve(entry.type).strategies):
        yield Problem(
            f"{entry.type} cannot share the model by {devices.strategy}",
            f"passes.{name}",
            f"Set the strategy of devices to {' or '.join(resolve(entry.type).strategies)}.",
        )
    if devices.count != "auto" and 1 < processes < devices.count:
        yield Problem(
            f"a step has {processes} rows: {processes} of {devices.count} devices train",
            f"passes.{name}",
            "Raise gradient_accumulation_steps, or name fewer devices.",
            Severity.WARNING,
        )
