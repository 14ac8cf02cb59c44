"""A plan as JSON, for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from olive.report import redact

if TYPE_CHECKING:
    from olive.engine.plan import Plan


def plan_json(plan: Plan) -> dict[str, Any]:
    """The facts of a plan, without secrets."""
    found: dict[str, Any] = redact.tree(
        {
            "document": plan.document,
            "model": None
            if plan.info is None
            else {
                "path": str(plan.info.path),
                "kind": plan.info.kind.value,
                "architecture": plan.info.architecture,
                "parameters": plan.info.parameters,
                "digest": plan.model.digest if plan.model else None,
            },
            "machine": plan.machine.model_dump(mode="json"),
            "steps": [
                {
                    "name": step.name,
                    "type": step.type,
                    "params": step.params,
                    "host": step.host,
                    "device": step.accelerator.device,
                    "execution_provider": step.accelerator.execution_provider,
                    "dtype": step.dtype,
                    "processes": step.processes,
                    "strategy": step.strategy,
                    "key": step.key,
                    "cached": step.cached,
                    "cost": step.cost.model_dump(mode="json"),
                    "bits": step.bits.model_dump(mode="json") if step.bits else None,
                }
                for step in plan.steps
            ],
            "data": {name: shown.model_dump(mode="json") for name, shown in plan.previews.items()},
            "findings": [
                {
                    "severity": problem.severity.value,
                    "message": problem.message,
                    "where": problem.where,
                    "fix": problem.fix,
                    "exit_code": problem.exit_code,
                }
                for problem in plan.findings
            ],
            "cache_dir": str(plan.store_root),
            "output_dir": str(plan.output_dir),
            "disk_free": plan.disk_free,
        }
    )
    return found
