{{/* What the templates share: names, labels, and how the program is run. */}}

{{- define "beanmeter.name" -}}
{{- if contains "beanmeter" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-beanmeter" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "beanmeter.selector" -}}
app.kubernetes.io/name: beanmeter
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Not the gateways' own name: what holds for them, and lets them go nowhere but out, does not hold for who asks them. */}}
{{- define "beanmeter.pingSelector" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: ping
{{- end }}

{{- define "beanmeter.labels" -}}
{{ include "beanmeter.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "beanmeter.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "beanmeter.podSecurity" -}}
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "beanmeter.containerSecurity" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* The environment of whatever works on the database. */}}
{{- define "beanmeter.databaseSetting" -}}
{{- if eq .Values.database.kind "sqlite" -}}
- {name: BEANMETER_DATABASE_URL, value: "sqlite:////var/lib/beanmeter/beanmeter.db"}
{{- else -}}
- {name: BEANMETER_DATABASE_URL_FILE, value: /run/secrets/beanmeter/database-url}
{{- end }}
{{- end }}

{{- define "beanmeter.databaseSecret" -}}
- secret:
    name: {{ required "database.existingSecret: name the secret with the URL of PostgreSQL, or set database.kind=sqlite and replicas=1" .Values.database.existingSecret }}
    items: [{key: {{ .Values.database.key | quote }}, path: database-url}]
{{- end }}

{{/* One's own certificates, where the image has those that it trusts. */}}
{{- define "beanmeter.certificatesMount" -}}
{{- with .Values.certificates }}
{{- if .existingConfigMap -}}
- {name: certificates, mountPath: /etc/ssl/certs/ca-certificates.crt, subPath: {{ .key | quote }}, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{- define "beanmeter.certificatesVolume" -}}
{{- with .Values.certificates }}
{{- if .existingConfigMap -}}
- name: certificates
  configMap: {name: {{ .existingConfigMap }}}
{{- end }}
{{- end }}
{{- end }}

{{/* What must not be installed. */}}
{{- define "beanmeter.check" -}}
{{- if eq .Values.database.kind "sqlite" }}
{{- if or (gt (int .Values.replicas) 1) .Values.autoscaling.enabled }}
{{- fail "SQLite is for one gateway: set replicas=1 and autoscaling.enabled=false, or database.kind=postgresql" }}
{{- end }}
{{- if .Values.database.existingSecret }}
{{- fail "database.existingSecret is for PostgreSQL: set database.kind=postgresql, or leave it empty" }}
{{- end }}
{{- end }}
{{- if le (float64 .Values.settings.drain_seconds) (float64 .Values.settings.upstream_timeout_seconds) }}
{{- fail "settings.drain_seconds has to be above settings.upstream_timeout_seconds: a gateway that ends waits for the longest image" }}
{{- end }}
{{- if and .Values.settings.oidc_issuer (not .Values.settings.oidc_client_id) }}
{{- fail "settings.oidc_issuer needs settings.oidc_client_id: name the client at the identity provider" }}
{{- end }}
{{- if and .Values.autoscaling.enabled (gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas)) }}
{{- fail "autoscaling.minReplicas is above autoscaling.maxReplicas" }}
{{- end }}
{{- end }}
