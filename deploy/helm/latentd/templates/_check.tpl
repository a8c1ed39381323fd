{{/* What the schema cannot refuse: values that contradict each other. */}}
{{- define "latentd.check" -}}
{{- if and (eq .Values.autoscaling.kind "keda") (not .Values.autoscaling.prometheus) -}}
{{- fail "autoscaling.kind is keda: set autoscaling.prometheus to the address of Prometheus, such as http://prometheus-operated.monitoring:9090" -}}
{{- end -}}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas is %d and autoscaling.maxReplicas %d: set the second at least as high" (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) -}}
{{- end -}}
{{- if and .Values.apiKeys.existingSecret .Values.apiKeys.file -}}
{{- fail "apiKeys.existingSecret and apiKeys.file are both set: remove one of them" -}}
{{- end -}}
{{- if and .Values.monitoring.serviceMonitor (include "latentd.keysSecret" .) (not .Values.monitoring.keySecret) -}}
{{- fail "with API keys /metrics needs one with admin: set monitoring.keySecret to a Secret that has it, or monitoring.serviceMonitor to false" -}}
{{- end -}}
{{- if and .Values.models (not (include "latentd.claim" .)) -}}
{{- fail "models are folders of the volume of bundles, and there is none: set bundles.existingClaim, or bundles.claim.create" -}}
{{- end -}}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) -}}
{{- fail "ingress.enabled: set ingress.host to the name by which callers reach the server" -}}
{{- end -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.enabled: set httpRoute.parentRefs to the Gateway, [{name: …, namespace: …}]" -}}
{{- end -}}
{{- range .Values.extraEnv -}}
{{- if hasPrefix "LATENTD_" .name -}}
{{- fail (printf "extraEnv has %s: settings of the server belong to settings, by their names in lower case without LATENTD_" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
