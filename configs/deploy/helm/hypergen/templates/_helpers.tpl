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
