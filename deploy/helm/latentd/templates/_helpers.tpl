{{- define "latentd.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "latentd.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* The pods that serve, which the test pod is not one of. */}}
{{- define "latentd.serverSelector" -}}
{{ include "latentd.selector" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "latentd.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "latentd.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "latentd.image" -}}
{{- $tag := .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (eq .Values.mode "gpu" | ternary "-cuda" "")) -}}
{{- .Values.image.repository }}:{{ $tag }}{{ with .Values.image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "latentd.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (.Values.serviceAccount.create | ternary (include "latentd.fullname" .) "default") -}}
{{- end -}}

{{- define "latentd.claim" -}}
{{- if .Values.bundles.existingClaim -}}
{{- .Values.bundles.existingClaim -}}
{{- else if .Values.bundles.claim.create -}}
{{- include "latentd.fullname" . }}-bundles
{{- end -}}
{{- end -}}

{{- define "latentd.keysSecret" -}}
{{- if .Values.apiKeys.existingSecret -}}
{{- .Values.apiKeys.existingSecret -}}
{{- else if .Values.apiKeys.file -}}
{{- include "latentd.fullname" . }}-keys
{{- end -}}
{{- end -}}

{{/* The folders of the models: those of the values, or the demo, which engines are written beside. */}}
{{- define "latentd.bundlePaths" -}}
{{- range .Values.models }}
- /models/{{ .path }}
{{- else }}
{{- if and (eq .Values.mode "gpu") (ne .Values.compile "never") }}
- /models/demo
{{- end }}
{{- end }}
{{- end -}}

{{/* LATENTD_BUNDLE: [NAME=]DIR, separated by commas. */}}
{{- define "latentd.bundles" -}}
{{- $bundles := list -}}
{{- range .Values.models -}}
{{- $bundles = append $bundles (printf "%s/models/%s" (.name | empty | ternary "" (printf "%s=" .name)) .path) -}}
{{- end -}}
{{- $bundles | default (include "latentd.bundlePaths" . | fromYamlArray) | join "," -}}
{{- end -}}

{{/* A setting as text: numbers without an exponent, lists separated by commas. */}}
{{- define "latentd.text" -}}
{{- if kindIs "slice" . }}{{ join "," . }}{{ else if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end -}}
{{- end -}}

{{- define "latentd.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "latentd.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* What runs a model: memory, processors, and one GPU. */}}
{{- define "latentd.resources" -}}
{{- $resources := deepCopy .Values.resources -}}
{{- if eq .Values.mode "gpu" -}}
{{- $resources = mergeOverwrite $resources (dict "limits" (dict .Values.gpu.resource 1)) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Caches of the server and of CUDA, where a read-only root leaves them no place. */}}
{{- define "latentd.cacheEnv" -}}
- name: XDG_CACHE_HOME
  value: /cache
- name: CUDA_CACHE_PATH
  value: /cache/cuda
{{- end -}}

{{- define "latentd.scratchMounts" -}}
- name: cache
  mountPath: /cache
- name: tmp
  mountPath: /tmp
{{- end -}}

{{/* Requests that are in the server: those that wait, and those it works on. */}}
{{- define "latentd.openRequests" -}}
{{- $of := printf "{namespace=%q,service=%q}" .Release.Namespace (include "latentd.fullname" .) -}}
sum(latentd_requests_waiting{{ $of }} + latentd_requests_running{{ $of }} + latentd_requests_decoding{{ $of }})
{{- end -}}

{{/* A new pod takes minutes to load, so pods are added at once, and removed one at a time after a long calm. */}}
{{- define "latentd.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - {type: Percent, value: 100, periodSeconds: 60}
    - {type: Pods, value: 2, periodSeconds: 60}
scaleDown:
  stabilizationWindowSeconds: {{ .Values.autoscaling.scaleDownSeconds }}
  policies:
    - {type: Pods, value: 1, periodSeconds: 60}
{{- end -}}
