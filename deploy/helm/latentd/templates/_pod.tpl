{{/* The environment of the server. */}}
{{- define "latentd.env" -}}
- name: LATENTD_HOST
  value: 0.0.0.0
- name: LATENTD_PORT
  value: "8000"
- name: LATENTD_DRAIN_SECONDS
  value: {{ .Values.stopping.drainSeconds | quote }}
{{- with include "latentd.bundles" . }}
- name: LATENTD_BUNDLE
  value: {{ . | quote }}
{{- end }}
{{- if eq .Values.mode "gpu" }}
- name: LATENTD_COMPILE
  value: {{ eq .Values.compile "start" | quote }}
{{- end }}
{{- if include "latentd.keysSecret" . }}
- name: LATENTD_API_KEYS
  value: /etc/latentd/keys.toml
{{- end }}
{{- if .Values.loras.existingClaim }}
- name: LATENTD_LORAS
  value: /loras
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: LATENTD_{{ upper $name }}
  value: {{ include "latentd.text" $value | quote }}
{{- end }}
{{ include "latentd.cacheEnv" . }}
{{- with .Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* On GPUs: the demo where there are no models, and engines before the server starts. */}}
{{- define "latentd.initContainers" -}}
{{- if and (not .Values.models) (ne .Values.compile "never") }}
{{ include "latentd.initContainer" (dict "root" . "name" "demo" "script" (.Files.Get "files/demo.sh") "paths" (list "/bundles/demo" "/models/demo")) }}
{{- end }}
{{- if eq .Values.compile "init" }}
{{ include "latentd.initContainer" (dict "root" . "name" "compile" "script" (.Files.Get "files/compile.sh") "paths" (prepend (include "latentd.bundlePaths" . | fromYamlArray) (.Values.settings.backend | default "tensorrt"))) }}
{{- end }}
{{- end -}}

{{- define "latentd.initContainer" -}}
- name: {{ .name }}
  image: {{ include "latentd.image" .root | quote }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [sh, -c]
  args:
    - |
      {{- .script | nindent 6 }}
    - {{ .name }}
    {{- range .paths }}
    - {{ . | quote }}
    {{- end }}
  env:
    {{- include "latentd.cacheEnv" .root | nindent 4 }}
  resources:
    {{- include "latentd.resources" .root | nindent 4 }}
  securityContext:
    {{- include "latentd.securityContext" .root | nindent 4 }}
  terminationMessagePolicy: FallbackToLogsOnError
  volumeMounts:
    {{- include "latentd.scratchMounts" .root | nindent 4 }}
    - name: bundles
      mountPath: /models
{{- end -}}

{{- define "latentd.volumes" -}}
- name: cache
  emptyDir: {sizeLimit: 4Gi}
- name: tmp
  emptyDir: {sizeLimit: 4Gi}
{{- if include "latentd.bundlePaths" . }}
- name: bundles
  {{- with include "latentd.claim" . }}
  persistentVolumeClaim:
    claimName: {{ . }}
  {{- else }}
  emptyDir: {}
  {{- end }}
{{- end }}
{{- with include "latentd.keysSecret" . }}
- name: keys
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- with .Values.loras.existingClaim }}
- name: loras
  persistentVolumeClaim:
    claimName: {{ . }}
    readOnly: true
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
