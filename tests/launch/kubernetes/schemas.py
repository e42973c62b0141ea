"""Validation of manifests without a cluster; a field that is not known is an error.

Core kinds are validated by kubernetes-validate, custom ones by their CRDs' own schemas.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parent.parent.parent.parent
CRDS = ROOT.parent / "shared" / "crds"
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"no CRDs of the operators in {CRDS}")
VERSION = "1.32"
# No CRD of it is at hand; the API documents one type for the specs of both.
SAME_SPEC = {"TrainingRuntime": "ClusterTrainingRuntime"}


def closed(schema: Any) -> Any:
    """A CRD's structural schema as JSON schema, closed: a field that is not listed is an error, as for the server."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    without = ("nullable", "description", "format", "default")
    result = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-") and key not in without}
    if "properties" in schema:
        result["properties"] = {name: closed(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            result[key] = closed(schema[key])
    if schema.get("nullable") and "type" in schema:
        result["type"] = [schema["type"], "null"]
    return result


@cache
def validators() -> dict[tuple[str, str], Draft202012Validator]:
    """A validator of the spec by apiVersion and kind."""
    found = {}
    for path in CRDS.glob("*.yaml"):
        crd = yaml.safe_load(path.read_text())["spec"]
        for version in crd["versions"]:
            spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
            found[f"{crd['group']}/{version['name']}", crd["names"]["kind"]] = Draft202012Validator(closed(spec))
    return found


def problems(manifest: dict[str, Any]) -> list[str]:
    """What is wrong with a manifest; a kind without a schema is wrong too."""
    name, kind, version = manifest["metadata"]["name"], manifest["kind"], manifest["apiVersion"]
    validator = validators().get((version, SAME_SPEC.get(kind, kind)))
    if validator is not None:
        unknown = manifest.keys() - {"apiVersion", "kind", "metadata", "spec"}
        return [
            *(f"{kind} {name}: {key}: unknown" for key in unknown),
            *(
                f"{kind} {name}: {error.json_path}: {error.message[:200]}"
                for error in validator.iter_errors(manifest["spec"])
            ),
        ]
    try:
        kubernetes_validate.validate(manifest, VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{kind} {name}: {'.'.join(map(str, error.path))}: {error.message[:200]}"]
    except kubernetes_validate.SchemaNotFoundError:
        return [f"{kind} {name}: no schema of {version} {kind}"]
    return []
