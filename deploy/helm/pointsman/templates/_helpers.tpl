{{- define "pointsman.labels" -}}
app.kubernetes.io/name: pointsman
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}
