{{/* Labels of a part: dict "root" $ "part" NAME. */}}
{{- define "corral.labels" -}}
app.kubernetes.io/name: corral
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "corral.allLabels" -}}
{{ include "corral.labels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | quote }}
{{- end }}

{{- define "corral.name" -}}
{{ printf "%s-%s" (ternary .root.Release.Name (printf "%s-corral" .root.Release.Name) (contains "corral" .root.Release.Name) | trunc 40 | trimSuffix "-") .part }}
{{- end }}

{{- define "corral.image" -}}
{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}
{{- end }}

{{- define "corral.url" -}}
{{- if .Values.bus.url -}}
{{ .Values.bus.url }}
{{- else if .Values.nats.enabled -}}
{{ printf "nats://%s:4222" (include "corral.name" (dict "root" . "part" "nats")) }}
{{- else -}}
{{ fail "set bus.url to your bus, or nats.enabled=true for a server of this chart" }}
{{- end -}}
{{- end }}

{{/* Variables of a part, with those of its own: dict "root" $ "part" NAME "values" VALUES. */}}
{{- define "corral.env" -}}
- {name: CORRAL_NATS_URL, value: {{ include "corral.url" .root | quote }}}
{{- if .root.Values.bus.auth }}
- {name: CORRAL_NATS_CREDS, value: /etc/corral/credentials/corral.creds}
{{- end }}
- {name: CORRAL_LOG_FORMAT, value: json}
{{- range $name, $value := .values.env }}
- {name: {{ $name }}, value: {{ $value | toString | quote }}}
{{- end }}
{{- end }}

{{- define "corral.credentialsVolume" -}}
{{- if .root.Values.bus.auth }}
- name: credentials
  secret: {secretName: {{ .values.credentialsSecret | default (printf "corral-%s" .part) }}, defaultMode: 0440}
{{- end }}
{{- end }}

{{- define "corral.credentialsMount" -}}
{{- if .root.Values.bus.auth }}
- {name: credentials, mountPath: /etc/corral/credentials, readOnly: true}
{{- end }}
{{- end }}

{{/* What every pod has. */}}
{{- define "corral.pod" -}}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{ toJson . }}
{{- end }}
{{- with .values.tolerations }}
tolerations: {{ toJson . }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: {{ .user | default 10001 }}
  runAsGroup: {{ .user | default 10001 }}
  fsGroup: {{ .user | default 10001 }}
  {{- with .values.supplementalGroups }}
  supplementalGroups: {{ toJson . }}
  {{- end }}
  seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "corral.container" -}}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
resources: {{ toJson .values.resources }}
securityContext:
  privileged: false
  allowPrivilegeEscalation: false
  {{- if ne .part "runner" }}
  readOnlyRootFilesystem: true
  {{- end }}
  capabilities: {drop: [ALL]}
{{- end }}

{{- define "corral.claim" -}}
metadata:
  name: {{ .name }}
spec:
  accessModes: [ReadWriteOnce]
  {{- with .storage.className }}
  storageClassName: {{ . | quote }}
  {{- end }}
  resources: {requests: {storage: {{ .storage.size }}}}
{{- end }}

{{/* Ingress of a part that has `hosts` and `ingress`, if it is enabled. */}}
{{- define "corral.ingress" -}}
{{- $c := . }}
{{- with .values.ingress }}
{{- if .enabled }}
{{- if not $c.values.hosts }}
{{- fail (printf "an ingress needs names: set %s.hosts, such as {gpus.example}" $c.part) }}
{{- end }}
{{ "---" }}
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: {{ include "corral.name" $c }}
  labels: {{- include "corral.allLabels" $c | nindent 4 }}
  {{- with .annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with .className }}
  ingressClassName: {{ . }}
  {{- end }}
  {{- if .tlsSecret }}
  tls:
    - hosts: {{ toJson $c.values.hosts }}
      secretName: {{ .tlsSecret }}
  {{- end }}
  rules:
    {{- range $c.values.hosts }}
    - host: {{ . }}
      http:
        paths:
          - path: /
            pathType: Prefix
            backend: {service: {name: {{ include "corral.name" $c }}, port: {name: http}}}
    {{- end }}
{{- end }}
{{- end }}
{{- end }}
