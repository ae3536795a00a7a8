{{- /* Prefix of the names of all objects; 53 leaves room for suffixes. */ -}}
{{- define "broadbeam.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $release := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- default $release .Values.fullnameOverride | trunc 53 | trimSuffix "-" -}}
{{- end -}}

{{- define "broadbeam.operatorSelector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "broadbeam.labels" -}}
{{ include "broadbeam.operatorSelector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{- define "broadbeam.serviceAccountName" -}}
{{- default (ternary (include "broadbeam.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "broadbeam.operatorImage" -}}
{{- with .Values.operator.image -}}
{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ default $.Chart.AppVersion .tag }}{{ end }}
{{- end -}}
{{- end -}}

{{- /* What the operator does in a namespace that it looks after, and nothing more. */ -}}
{{- define "broadbeam.rules" -}}
- apiGroups: [serving.broadbeam.io]
  resources: [servingclusters]
  verbs: [get, list, watch]
- apiGroups: [serving.broadbeam.io]
  resources: [servingclusters/status]
  verbs: [patch]
# Children name their ServingCluster as an owner whose deletion they block; OpenShift asks for this right.
- apiGroups: [serving.broadbeam.io]
  resources: [servingclusters/finalizers]
  verbs: [update]
# get: where a child cannot be made, a look whose object has its name.
- apiGroups: [apps]
  resources: [deployments, statefulsets]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [configmaps, serviceaccounts, services]
  verbs: [get, list, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, create, patch, delete]
# For the gateway, which watches the pods of its cluster. It gets no right that the operator lacks.
- apiGroups: [rbac.authorization.k8s.io]
  resources: [rolebindings, roles]
  verbs: [get, list, create, patch, delete]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, delete]
# The readiness gate of a group's pods.
- apiGroups: [""]
  resources: [pods/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [events]
  verbs: [create]
{{- end -}}
