"""The Serve application: an ingress that forwards, and replicas that have a model on a GPU each."""

# Annotations are evaluated: Serve reads that of the arguments.

from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from latentd_serve.ingress import Forwarder
from latentd_serve.replica import Images
from latentd_serve.routing import HoldersFirst
from latentd_serve.settings import Arguments
from server.api.body_limits import BodyLimits

_STATS_SECONDS = 1.0  # between reports of what replicas hold
_QUEUED = 256  # requests that wait in each ingress for a replica with room
_DRAIN_SECONDS = 600.0  # in which a replica that is taken away finishes its requests


@serve.ingress()
class Ingress:
    """See `Forwarder`."""

    def __init__(self, images: DeploymentHandle[object], arguments: Arguments) -> None:
        bodies = BodyLimits(arguments.settings().max_body_memory * 2**20)
        self._forwarder = Forwarder(images, wait_seconds=arguments.wait_seconds, bodies=bodies)

    def __serve_build_asgi_app__(self) -> Forwarder:
        return self._forwarder


IMAGES = serve.deployment(
    name="Images",
    num_replicas=1,
    ray_actor_options={"num_gpus": 1, "num_cpus": 1},
    # More than a replica takes at once and queues: it refuses further ones itself, fairly between callers.
    max_ongoing_requests=100,
    max_queued_requests=_QUEUED,
    graceful_shutdown_timeout_s=_DRAIN_SECONDS,
    health_check_period_s=5,
    request_router_config=RequestRouterConfig.model_validate(
        {"request_router_class": HoldersFirst, "request_routing_stats_period_s": _STATS_SECONDS}
    ),
)(Images)
INGRESS = serve.deployment(
    name="Ingress",
    num_replicas=1,
    ray_actor_options={"num_cpus": 0.1},
    max_ongoing_requests=1000,
    max_queued_requests=1000,
    backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
    graceful_shutdown_timeout_s=_DRAIN_SECONDS,
)(Ingress)


def app(arguments: Arguments) -> Application:
    """Build the application, from `args` of a configuration file or NAME=VALUE of `serve run`."""
    arguments.settings()  # so that a wrong setting fails here, with its name
    return INGRESS.bind(IMAGES.bind(arguments), arguments)
