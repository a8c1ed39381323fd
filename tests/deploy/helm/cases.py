"""Values that people install with, by name."""

from __future__ import annotations

from typing import Any

KEYS = '[[keys]]\nname = "alice"\nsha256 = "5ebc32f75ba0a6f6ab3d8d4a5a9e3d8b9f7cd5b9f5c4a4a8d9a4cfb2ef2a3c11"\n'
KEDA = {"autoscaling": {"kind": "keda", "prometheus": "http://prometheus-operated.monitoring:9090"}}
HPA = {"autoscaling": {"kind": "hpa", "minReplicas": 2, "maxReplicas": 8}}
INGRESS = {"ingress": {"enabled": True, "className": "nginx", "host": "images.example.com", "tlsSecret": "images-tls"}}
ROUTE = {"httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["images.example.com"]}}
EXISTING_KEYS = {"apiKeys": {"existingSecret": "latentd-keys"}}
RENDERED_KEYS = {"apiKeys": {"file": KEYS}}
MONITORS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
POLICY = {
    "networkPolicy": {
        "enabled": True,
        "from": [MONITORS],
        "egress": [{"ports": [{"port": 53, "protocol": "UDP"}]}],
    }
}
CLAIM = {"bundles": {"claim": {"create": True, "accessModes": ["ReadWriteMany"], "storageClassName": "nfs"}}}
MODELS = {"models": [{"path": "sd15"}, {"path": "more/other", "name": "anime"}], **CLAIM}
COMPILE_INIT = {"compile": "init", **MODELS}
LORAS = {"loras": {"existingClaim": "styles", "subPath": "loras"}, **MODELS}
MONITORING = {
    "monitoring": {"serviceMonitor": True, "rules": True, "labels": {"release": "prometheus"}, "keySecret": "admin"}
}
SETTINGS = {
    "settings": {
        "max_body_memory": 4096,
        "lora_memory": 1048576,
        "access_log": True,
        "header_seconds": 2.5,
        "log_format": "json",
        "load": ["sd15", "anime"],
        "trusted_proxies": ["10.0.0.0/8", "192.0.2.7"],
    }
}
POD = {
    "podLabels": {"team": "images"},
    "podAnnotations": {"example.com/note": "yes"},
    "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H200"},
    "tolerations": [{"key": "images", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "priorityClassName": "serving",
    "gpu": {"runtimeClassName": "nvidia"},
    "extraEnv": [{"name": "OTEL_SERVICE_NAME", "value": "images"}],
    "extraVolumes": [{"name": "signing", "secret": {"secretName": "c2pa"}}],
    "extraVolumeMounts": [{"name": "signing", "mountPath": "/signing", "readOnly": True}],
    "image": {"repository": "example.com/latentd", "digest": f"sha256:{'0' * 64}", "pullSecrets": [{"name": "pull"}]},
    "serviceAccount": {"annotations": {"example.com/role": "none"}},
    "service": {"type": "LoadBalancer", "sessionAffinity": "ClientIP", "annotations": {"example.com/internal": "true"}},
}

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "cpu": {"mode": "cpu"},
    "claim": CLAIM,
    "models": MODELS,
    "cpu-models": {"mode": "cpu", **MODELS},
    "compile-init": COMPILE_INIT,
    "compile-init-demo": {"compile": "init", **CLAIM},
    "compile-never": {"compile": "never"},
    "loras": LORAS,
    "settings": SETTINGS,
    "keda": KEDA,
    "hpa": HPA,
    "ingress": INGRESS,
    "route": ROUTE,
    "existing-keys": EXISTING_KEYS,
    "rendered-keys": RENDERED_KEYS,
    "policy": POLICY,
    "monitoring": MONITORING,
    "recreate": {"strategy": {"type": "Recreate"}},
    "everything": {
        **KEDA, **INGRESS, **ROUTE, **RENDERED_KEYS, **POLICY, **COMPILE_INIT, **LORAS, **MONITORING, **SETTINGS, **POD,
    },
}  # fmt: skip
