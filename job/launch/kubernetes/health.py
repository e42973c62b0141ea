"""Whether a Kubernetes cluster can be submitted to from here, and which kind of job it serves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kubernetes import client

from job.checks import Check, note, trouble, well
from job.errors import JobError
from job.launch.kubernetes.cluster import KUEUE, Cluster, Named
from job.launch.kubernetes.connection import TIMEOUT, Missing
from job.launch.kubernetes.kinds import KINDS, TRAIN_JOB, Kind
from job.launch.kubernetes.settings import Settings

JOB_VERBS = ("create", "get", "list", "watch", "patch", "delete")
OF_PODS = (("pods", "list"), ("pods/log", "get"), ("pods/proxy", "get"), ("events", "list"))


def kubernetes_checks(namespace: str | None, context: str | None) -> list[Check]:
    """Access, kinds of jobs, rights, and what the manifests name."""
    try:
        cluster = Cluster(namespace, context)
        groups = cluster.groups
    except JobError as error:
        return [trouble("access", str(error), "kubectl config get-contexts; --context NAME, --namespace NAME")]
    checks = [well("access", f"the API server answers; namespace {cluster.namespace}")]
    checks.append(kinds_check(groups))
    served = [kind for kind in KINDS if kind.group in groups]
    checks += [served_check(cluster, kind) for kind in served]
    checks.append(rights_check(cluster, served))
    checks += named_checks(cluster, served)
    queues = (
        well("Kueue", "the cluster has it: hydra.launcher.queue=NAME")
        if KUEUE in groups
        else note("Kueue", "not there")
    )
    return [*checks, queues]


def kinds_check(groups: dict[str, str]) -> Check:
    """Which of PyTorchJob and TrainJob the server knows."""
    served = [kind.name for kind in KINDS if kind.group in groups]
    if not served:
        needed = " or ".join(kind.needs for kind in KINDS)
        return trouble("kinds", "the cluster knows neither TrainJob nor PyTorchJob", f"install {needed}")
    return well("kinds", f"{' and '.join(served)}; hydra/launcher=kubernetes takes {served[0]}s")


def served_check(cluster: Cluster, kind: Kind) -> Check:
    """Whether the server has this kind in the version that is written, and shows such jobs to this user."""
    try:
        with cluster.asking(f"list of {kind.plural}"):
            found = cluster.jobs.list_namespaced_custom_object(
                **kind.where, namespace=cluster.namespace, limit=1, _request_timeout=TIMEOUT
            )
    except Missing as error:
        return trouble(kind.name, f"{error} ({kind.api_version})", f"install {kind.needs}")
    except JobError as error:
        return trouble(kind.name, str(error), "kubectl apply -k k8s/base as an administrator")
    return well(kind.name, f"{kind.api_version}, {'jobs' if found['items'] else 'no job'} in the namespace")


def rights_check(cluster: Cluster, kinds: Sequence[Kind]) -> Check:
    """Whether this user may do what the launcher does."""
    wanted = [(kind.group, kind.plural, verb) for kind in kinds for verb in JOB_VERBS]
    wanted += [("", resource, verb) for resource, verb in OF_PODS]
    try:
        refused = [f"{verb} {resource}" for group, resource, verb in wanted if not _may(cluster, group, resource, verb)]
    except JobError as error:
        return note("rights", f"the server does not say ({error})")
    if refused:
        return trouble(
            "rights", f"not allowed: {', '.join(refused)}", "k8s/base/rbac.yaml has the rights that are needed"
        )
    return well("rights", f"all {len(wanted)} that the launcher needs")


def _may(cluster: Cluster, group: str, resource: str, verb: str) -> bool:
    name, _, below = resource.partition("/")
    attributes = client.V1ResourceAttributes(
        namespace=cluster.namespace, group=group, resource=name, subresource=below or None, verb=verb
    )
    review = client.V1SelfSubjectAccessReview(spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes))
    with cluster.asking("rights"):
        asking = client.AuthorizationV1Api(cluster.core.api_client)
        answer: Any = asking.create_self_subject_access_review(review, _request_timeout=TIMEOUT)
    return bool(answer.status.allowed)


def named_checks(cluster: Cluster, kinds: Sequence[Kind]) -> list[Check]:
    """Whether the namespace has what jobs name by default: claims, the service account, the runtime of TrainJobs."""
    defaults = Settings()
    named = {
        "runs claim": Named((defaults.runs_claim,)),
        "data claim": Named(tuple(filter(None, (defaults.data_claim,)))),
        "service account": Named((), account=defaults.service_account),
    }
    if TRAIN_JOB in kinds:
        named["runtime"] = Named((), runtime=defaults.runtime)
    checks = []
    for name, one in named.items():
        words = ", ".join([*one.claims, *filter(None, (one.account, one.runtime))])
        if not words:
            continue
        try:
            cluster.refuse_missing(one)
            checks.append(well(name, words))
        except JobError as error:
            checks.append(trouble(name, str(error), f"or set hydra.launcher's key for another {name}"))
    return checks
