{{- define "hypergen.selector" -}}
app.kubernetes.io/name: hypergen
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "hypergen.metadata" -}}
name: {{ .Release.Name }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "hypergen.selector" . | nindent 2 }}
  app.kubernetes.io/version: {{ .Values.image.tag | quote }}
  app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "hypergen.jobsAreShared" -}}
{{- if or .Values.jobs.url .Values.jobs.secret }}true{{ end }}
{{- end }}

{{- define "hypergen.portOf" -}}
{{- $url := urlParse . }}
{{- regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "443" "80" (eq $url.scheme "https")) }}
{{- end }}

{{/* What the schema cannot say, because it concerns values of different objects. */}}
{{- define "hypergen.check" -}}
{{- $scaling := .Values.autoscaling }}
{{- $replicas := .Values.replicas }}
{{- if ne $scaling.by "none" }}
{{- $replicas = $scaling.maxReplicas }}
{{- if gt (int $scaling.minReplicas) (int $scaling.maxReplicas) }}
{{- fail "autoscaling.minReplicas must be at most autoscaling.maxReplicas." }}
{{- end }}
{{- end }}
{{- if and (gt (int $replicas) 1) (not (or .Values.storage.url (include "hypergen.jobsAreShared" .))) }}
{{- fail "More than one replica needs storage.url (S3, for url results) or jobs.url or jobs.secret (Redis, for jobs); set both if clients use both." }}
{{- end }}
{{- end }}

{{/* Where the replicas share results and jobs: variables of the container. */}}
{{- define "hypergen.fleet" -}}
{{- with .Values.storage }}
{{- if .url }}
- name: HYPERGEN_STORAGE
  value: {{ .url | quote }}
{{- with .endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ . | quote }}
{{- end }}
{{- with .publicUrl }}
- name: HYPERGEN_STORAGE_PUBLIC_URL
  value: {{ . | quote }}
{{- end }}
{{- with .region }}
- name: AWS_REGION
  value: {{ . | quote }}
{{- end }}
{{- $secret := .secret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom:
    secretKeyRef: {name: {{ $secret | quote }}, key: {{ . }}}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.jobs }}
{{- if .url }}
- name: HYPERGEN_JOBS
  value: {{ .url | quote }}
{{- else if .secret }}
- name: HYPERGEN_JOBS
  valueFrom:
    secretKeyRef: {name: {{ .secret | quote }}, key: url}
{{- end }}
{{- end }}
{{- end }}
